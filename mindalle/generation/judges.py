"""Who says which candidates are kept: a CLIP of texts, a classifier of classes.

Keeping the pictures that a classifier is surest of is the rejection sampling of Razavi et al. 2019
(VQ-VAE-2), with which Lee et al. 2022 (RQ-Transformer) report their best results on ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import URLError

import torch
from PIL import Image
from torch import Tensor, nn

from checkpoint_io import tensors_hash
from mindalle.pipeline import Pipeline
from mindalle.rerank import ClipReranker

if TYPE_CHECKING:
    from mindalle.generation.job import SetJob

IMAGENET_CLASSES = 1000
LOGIT_SCALE = 100.0  # that all of OpenAI's CLIPs end their training with


class Judge(Protocol):
    """Says how well pictures show what was asked for."""

    @property
    def model(self) -> Any:
        """A module whose weights identify the judge."""

    def score(self, images: Sequence[Image.Image], prompt: Any, /) -> Tensor:
        """Float scores (n,) of n pictures, on the CPU; more is better.

        Args:
            images: of any size.
            prompt: the text or the label that they were drawn for.
        """


class Classifier:
    """A judge by the probability of the class.

    Args:
        model: pixels (n, 3, H, W) -> logits (n, classes).
        preprocess: PIL image -> pixels (3, H, W).
        device: where the model computes.
    """

    def __init__(
        self, model: nn.Module, preprocess: Callable[[Image.Image], Tensor], *, device: str = "cpu"
    ) -> None:
        self.model = model.to(device).eval()
        self.preprocess = preprocess
        self.device = device

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], label: int, /) -> Tensor:
        """Probabilities (n,) of the class, float32 in [0, 1], on the CPU."""
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images])  # (n, 3, H, W)
        logits: Tensor = self.model(pixels.to(self.device))
        return logits.float().softmax(dim=-1)[:, label].cpu().clone()


class ZeroShotClassifier:
    """A judge by the probability that a CLIP gives the class among the names of all (Radford et al. 2021).

    Args:
        clip: any.
        names: of all classes.
    """

    def __init__(self, clip: ClipReranker, names: Sequence[str]) -> None:
        self.clip = clip
        self.model = clip.model
        self.names = names

    @cached_property
    def texts(self) -> Tensor:
        """Features (classes, C) of the names; only the process that judges needs them."""
        return self.clip.encode_texts([f"a photo of a {name}." for name in self.names])

    def score(self, images: Sequence[Image.Image], label: int, /) -> Tensor:
        """Probabilities (n,) of the class, float32 in [0, 1], on the CPU."""
        similarity = self.clip.encode_images(images) @ self.texts.T  # (n, classes)
        return (LOGIT_SCALE * similarity).softmax(dim=-1)[:, label]


def load_efflite_classifier(job: SetJob, pipe: Pipeline) -> Classifier:
    """EfficientNet-Lite0, whose weights come in a Python package: 75% of ImageNet right."""
    from stage1_vqgan.perceptual import load_efflite

    network, _ = load_efflite()
    return Classifier(network, _imagenet_pixels(mean=0.5, std=0.5), device=job.device)


def load_resnet101(job: SetJob, pipe: Pipeline) -> Classifier:
    """ResNet-101 of torchvision, which VQGAN and RQ-Transformer reject by: 77% of ImageNet right."""
    from torchvision.models import ResNet101_Weights, resnet101

    weights = ResNet101_Weights.IMAGENET1K_V1
    try:
        network = resnet101(weights=weights, progress=False)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:  # no network; a damaged file
        reason = str(error.reason if isinstance(error, URLError) else error).partition("\n")[0]
        name = weights.url.rpartition("/")[2]
        raise FileNotFoundError(
            f"the weights of resnet101 could not be downloaded or read: {reason or type(error).__name__}. "
            f"Put a good {name} into {torch.hub.get_dir()}/checkpoints, or take --classifier efflite"
        ) from error
    return Classifier(network, weights.transforms(), device=job.device)


def load_zero_shot(job: SetJob, pipe: Pipeline) -> ZeroShotClassifier:
    """The CLIP at hand, told the names of all classes."""
    if pipe.reranker is None:
        raise ValueError("the classifier clip needs a CLIP: name it (--clip NAME)")
    num_classes = _num_classes(pipe)
    if len(job.class_names) != num_classes:
        raise ValueError(
            f"the classifier clip needs the names of all {num_classes} classes, got {len(job.class_names)}: "
            "put one per line into a file (--class-names FILE)"
        )
    return ZeroShotClassifier(pipe.reranker, job.class_names)


CLASSIFIERS: dict[str, Callable[[SetJob, Pipeline], Judge]] = {
    "efflite": load_efflite_classifier,
    "resnet101": load_resnet101,
    "clip": load_zero_shot,
}
"""Judges of classes by name."""


def load_judge(job: SetJob, pipe: Pipeline) -> Judge | None:
    """Who judges the pictures of a job; None if nobody does.

    Args:
        job: names the classifier.
        pipe: has the CLIP.

    Raises:
        ValueError: if the classifier is unknown or does not fit the model.
        ImportError: if the classifier needs a package.
        FileNotFoundError: if its weights cannot be had.
    """
    num_classes = _num_classes(pipe)
    if job.classifier is None:
        return pipe.reranker if isinstance(job.conditions[0], str) else None
    if job.classifier not in CLASSIFIERS:
        raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, got {job.classifier!r}")
    if not num_classes:
        raise ValueError("a classifier judges pictures of classes, and this model draws none")
    if job.classifier != "clip" and num_classes != IMAGENET_CLASSES:
        raise ValueError(
            f"the classifier {job.classifier} knows the {IMAGENET_CLASSES:,} classes of ImageNet, and this "
            f"model draws {num_classes:,}: take clip, with the names of the classes (--class-names)"
        )
    return CLASSIFIERS[job.classifier](job, pipe)


def judge_hash(judge: Judge) -> str:
    """SHA-256 of a judge's weights, of names and values."""
    return tensors_hash(judge.model.state_dict())


def _num_classes(pipe: Pipeline) -> int:
    """Of a model of classes; 0 of any other."""
    condition = pipe.model.config.condition if pipe.model is not None else None
    return condition.vocab_size if condition is not None and condition.kind == "class" else 0


def _imagenet_pixels(*, mean: float, std: float) -> Callable[[Image.Image], Tensor]:
    """The centre 224 of 256 pixels, as ImageNet's classifiers are tested."""
    from torchvision.transforms import InterpolationMode, v2

    return v2.Compose(  # type: ignore[no-any-return]
        [
            v2.Resize(256, interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([mean] * 3, [std] * 3),
        ]
    )
