"""Training data: sources of captioned pictures, the stream of batches, and the Lightning data modules."""

from mindalle.data.codes import CodeData
from mindalle.data.images import ImageData
from mindalle.data.samples import Sample, Source, Unreadable, open_source
from mindalle.data.transforms import TransformConfig, transform

__all__ = [
    "CodeData",
    "ImageData",
    "Sample",
    "Source",
    "TransformConfig",
    "Unreadable",
    "open_source",
    "transform",
]
