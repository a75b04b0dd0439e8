"""CLIP reranking: how well does each picture fit the prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from checkpoint_io import tensors_hash
from mindalle.clip import ClipModel, Preprocess, Tokenize, unit
from mindalle.clip_weights import load_clip
from mindalle.device import choose_device


class ClipReranker:
    """Scores pictures against a prompt.

    A model of OpenAI's own package goes in as it is, be it in half precision on CUDA:
    `ClipReranker(*clip.load("ViT-B/32"), clip.tokenize)`.

    Args:
        model: in eval mode; device and dtype come from its parameters (if it has none: CPU, float32).
        preprocess: PIL image -> pixels (3, H, W).
        tokenize: list of B prompts -> integer ids (B, N).
        batch_size: pictures, or texts, encoded at once, > 0.

    Raises:
        ValueError: if `batch_size` is not positive.
    """

    def __init__(
        self, model: ClipModel, preprocess: Preprocess, tokenize: Tokenize, *, batch_size: int = 32
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.model = model
        self.preprocess = preprocess
        self.tokenize = tokenize
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, device: str | torch.device = "auto"
    ) -> ClipReranker:
        """Load a CLIP in float32, executing nothing from its files.

        Args:
            name_or_path: one of `OPENAI_MODELS` (downloaded once), a file of OpenAI's format (TorchScript
                archive or state dict, of any size), or a native checkpoint directory.
            device: where the model runs, see `mindalle.device.choose_device`.

        Raises:
            FileNotFoundError: if the name is unknown, the download fails or a file is missing.
            ValueError: if a file is damaged, asks to run code, or does not fit its config, or the device is
                not there.
            ImportError: if the model is OpenAI's, and open_clip, which has the tokenizer, is not installed.
        """
        model, preprocess, tokenize = load_clip(name_or_path)
        return cls(model.to(choose_device(device)), preprocess, tokenize)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the model's weights, of names and values; by it a record names who judged."""
        return tensors_hash(self.model.state_dict())  # type: ignore[attr-defined]

    def score(self, images: Sequence[Image.Image], prompt: str) -> Tensor:
        """Compare n pictures, of any size and mode, with a prompt, which is encoded once.

        Returns:
            Cosine similarities (n,), float32 in [-1, 1], on the CPU.

        Raises:
            ValueError: if there are no images.
        """
        (text,) = self.encode_texts([prompt])  # (C,)
        scores: Tensor = self.encode_images(images) @ text
        return scores.clamp(-1, 1)  # rounding can leave [-1, 1]

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of n pictures, of any size and mode.

        Returns:
            Unit vectors (n, C), float32, on the CPU.

        Raises:
            ValueError: if there are no images.
            FloatingPointError: if the model's features are no numbers.
        """
        if not images:
            raise ValueError("images must hold at least one picture, got none")
        device, dtype = _placement(self.model)
        features = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = images[start : start + self.batch_size]
                pixels = torch.stack([self.preprocess(image) for image in batch])  # (batch, 3, H, W)
                features.append(unit(self.model.encode_image(pixels.to(device, dtype))))
        return _finite(torch.cat(features).cpu())  # out of inference mode: a tensor like any other

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of n texts.

        Returns:
            Unit vectors (n, C), float32, on the CPU.

        Raises:
            ValueError: if there are no texts.
            FloatingPointError: if the model's features are no numbers.
        """
        if not texts:
            raise ValueError("texts must hold at least one text, got none")
        device, _ = _placement(self.model)
        features = []
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                ids = self.tokenize(list(texts[start : start + self.batch_size]))  # (batch, N)
                features.append(unit(self.model.encode_text(ids.to(device))))
        return _finite(torch.cat(features).cpu())


def _finite(features: Tensor) -> Tensor:
    """Refuse features that would rank nothing."""
    if not features.isfinite().all():
        raise FloatingPointError(
            "the CLIP gives features that are NaN or infinite: its weights are damaged, or its training "
            "diverged; rank with another one, or not at all"
        )
    return features


def _placement(model: ClipModel) -> tuple[torch.device, torch.dtype]:
    """Where pixels go: a half-precision CLIP keeps some parameters in float32, but no convolution."""
    parameters = list(getattr(model, "parameters", list)())
    for parameter in [p for p in parameters if p.ndim == 4] + parameters:
        return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32
