"""Differentiable augmentation (Zhao et al. 2020): an adversary of few pictures cannot learn them by heart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DiffAugmentConfig:
    """How far pictures are changed; the defaults are the paper's, 0 leaves them as they are."""

    color: float = 1.0  # share of the paper's ranges of brightness, saturation and contrast, in [0, 1]
    translation: float = 0.125  # largest shift as a share of a side, in [0, 0.5]
    cutout: float = 0.5  # side of the hole as a share of the picture's, in [0, 1)

    def __post_init__(self) -> None:
        for name, top in (("color", 1.0), ("translation", 0.5)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} must be in [0, {top:g}], got {getattr(self, name)}")
        if not 0 <= self.cutout < 1:
            raise ValueError(f"cutout must be in [0, 1), got {self.cutout}")


def diff_augment(images: Tensor, config: DiffAugmentConfig) -> Tensor:
    """Change colours, shift, and cut a hole: for real and reconstructed pictures by the same rules.

    Each picture has draws of its own, from torch's generator of its device.

    Args:
        images: (B, 3, H, W) in [-1, 1], of any float dtype.
        config: how far.

    Returns:
        Same shape and dtype, not clamped; what is shifted in or cut out is 0, and the gradient passes to the
        rest.

    Source: Zhao et al. 2020, section 3.2, in the order of their code: colour, translation, cutout.
    """
    if config.color > 0:
        images = _recolor(images, config.color)
    if config.translation > 0:
        images = _translate(images, config.translation)
    return _cut_out(images, config.cutout) if config.cutout > 0 else images


def _recolor(images: Tensor, strength: float) -> Tensor:
    """Brightness + [-0.5, 0.5], saturation x [0, 2], contrast x [0.5, 1.5], at full strength."""
    # (3, B, 1, 1, 1) in [-strength, strength]
    brightness, saturation, contrast = images.new_empty(3, len(images), 1, 1, 1).uniform_(-strength, strength)
    images = images + 0.5 * brightness
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (1 + saturation) * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    augmented: Tensor = mean + (1 + 0.5 * contrast) * (images - mean)
    return augmented


def _translate(images: Tensor, share: float) -> Tensor:
    """Shift by whole pixels, rows and columns apart; zeros come in from outside."""
    largest = [_pixels(side, share) for side in images.shape[2:]]
    rows, columns = (
        # (B, side) places in the padded picture
        torch.randint(2 * shift + 1, (len(images), 1), device=images.device)
        + torch.arange(side, device=images.device)
        for side, shift in zip(images.shape[2:], largest, strict=True)
    )
    padded = F.pad(images, (largest[1], largest[1], largest[0], largest[0]))
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return rearrange(shifted, "b h w c -> b c h w")


def _cut_out(images: Tensor, share: float) -> Tensor:
    """Set a rectangle to 0; its middle is anywhere in the picture, so that it may reach beyond the edge."""
    inside = []
    for side in images.shape[2:]:
        size = _pixels(side, share)
        middle = torch.randint(side + 1 - size % 2, (len(images), 1), device=images.device)
        place = torch.arange(side, device=images.device) - middle + size // 2  # (B, side), in the hole's own
        inside.append((place >= 0) & (place < size))
    hole = inside[0][:, :, None] & inside[1][:, None, :]  # (B, H, W)
    return images.masked_fill(hole.unsqueeze(1), 0.0)


def _pixels(side: int, share: float) -> int:
    return int(side * share + 0.5)
