"""Training data: sources of captioned pictures, the stream of batches, and the Lightning data modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindalle.data.samples import Sample, Source, Unreadable, open_source
from mindalle.data.transforms import TransformConfig, transform

if TYPE_CHECKING:
    from mindalle.data.codes import CodeData
    from mindalle.data.images import ImageData

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


def __getattr__(name: str) -> Any:
    """Import Lightning with the data modules, when one is asked for: reading pictures does without."""
    if name == "CodeData":
        from mindalle.data.codes import CodeData

        return CodeData
    if name == "ImageData":
        from mindalle.data.images import ImageData

        return ImageData
    raise AttributeError(f"module 'mindalle.data' has no attribute {name!r}")
