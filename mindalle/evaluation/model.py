"""A whole model on a data set: the likelihood of its pictures, and what to draw to compare with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mindalle.data.samples import Sample, Unreadable
from mindalle.evaluation.likelihood import negative_log_likelihood
from mindalle.evaluation.pictures import Collector, PictureSet, picture_batches, square
from mindalle.generation import Condition
from mindalle.image import to_tensor
from mindalle.pipeline import Pipeline
from stage2_transformer import GPT, RQTransformer


def measure_data(
    pipe: Pipeline,
    found: PictureSet,
    samples: Iterable[Sample | Unreadable],
    collector: Collector,
    *,
    batch_size: int,
) -> tuple[Tensor, list[Condition]]:
    """Read a data set once: features of its pictures, and the likelihood of their codes under a model.

    Pictures are cut and resized to the model's size, as in training. One without the caption or class that
    the model draws from counts as unreadable.

    Args:
        pipe: the model.
        found: gets the features, captions and unreadable pictures.
        samples: of `mindalle.evaluation.pictures.read_samples`.
        collector: of the features.
        batch_size: pictures at once, >= 1.

    Returns:
        (n, D) nats per code, see `negative_log_likelihood`, and the condition of each picture.

    Raises:
        ValueError: if there is no model or no picture, or a class that the model does not know.
    """
    model = sequence_model(pipe)
    kind = model.config.condition.kind
    size, device = pipe.image_tokenizer.convnet.image_size, next(model.parameters()).device
    conditions: list[Condition] = []

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        conditioned = (_with_condition(sample, kind) for sample in samples)
        for batch in picture_batches(conditioned, found, batch_size):
            pictures = [square(sample.image, size) for sample in batch]
            collector.add(pictures)
            wanted = [_condition(sample, kind) for sample in batch]
            conditions.extend(wanted)
            images = torch.stack([to_tensor(picture) for picture in pictures])
            yield pipe.image_tokenizer.encode(images.to(device)), pipe.encode_conditions(wanted)

    nats = negative_log_likelihood(model, batches())
    collector.fill(found)
    return nats, conditions


def sequence_model(pipe: Pipeline) -> GPT | RQTransformer:
    """The model that draws; raises ValueError if the checkpoint has none."""
    if pipe.model is None:
        raise ValueError(
            "this checkpoint holds an image tokenizer only, which `evaluate.py reconstruct` measures"
        )
    return pipe.model


def _condition(sample: Sample, kind: str) -> Condition:
    return sample.captions[0] if kind == "text" else sample.label if kind == "class" else None


def _with_condition(sample: Sample | Unreadable, kind: str) -> Sample | Unreadable:
    """A picture that lacks what the model draws from cannot be used."""
    if isinstance(sample, Sample) and kind == "text" and not sample.captions:
        return Unreadable(sample.key, "it has no caption, and this model draws from text")
    if isinstance(sample, Sample) and kind == "class" and sample.label is None:
        return Unreadable(sample.key, "it has no class, and this model draws classes")
    return sample
