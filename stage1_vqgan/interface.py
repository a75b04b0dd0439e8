"""What an image tokenizer is, whoever made it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ImageTokenizer(Protocol):
    """Pixels <-> codes."""

    @property
    def codebook_size(self) -> int:
        """V: codes are in [0, V)."""
        ...

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(h, w), (h, w, D) of residual codes, or (T,) of a pyramid, at the training resolution."""
        ...

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side: image sides are multiples of it."""
        ...

    def by_depth(self, codes: Tensor) -> list[Tensor]:
        """Codes (B, *code_shape) -> those of each depth, or scale of a pyramid, (B, T of that depth)."""
        ...

    def coarse_to_fine(self, codes: Tensor) -> list[Tensor]:
        """The codes of 1, 2, ... depths, or scales of a pyramid, which decode to ever finer pictures."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Compress images to codes.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            int64 (B, *code_shape), in [0, V).
        """
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Draw the images that codes stand for.

        Args:
            codes: int64 (B, *code_shape), in [0, V).

        Returns:
            (B, 3, H, W), about [-1, 1] and not clamped.
        """
        ...


def check_images(images: Tensor, downsampling: int) -> None:
    """Refuse images that a tokenizer cannot encode.

    Args:
        images: should be (B, 3, H, W), floating point.
        downsampling: H and W must be multiples of it.

    Raises:
        ValueError: says what was got and expected.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not images.numel():
        raise ValueError(
            f"images must be floating point (B, 3, H, W) and not empty, got {images.dtype} "
            f"{tuple(images.shape)}: convert with mindalle.image.to_tensor"
        )
    height, width = images.shape[2:]
    if height % downsampling or width % downsampling:
        raise ValueError(
            f"image sides must be multiples of {downsampling}, got {height}x{width}: "
            "resize or crop the images"
        )


def check_codes(codes: Tensor, codebook_size: int, ndim: int) -> None:
    """Refuse codes that a tokenizer cannot decode.

    Args:
        codes: should be int64 with `ndim` dimensions, in [0, codebook_size).
        codebook_size: V.
        ndim: 2 for (B, T), 3 for (B, h, w), 4 for (B, h, w, D).

    Raises:
        ValueError: says what was got and expected.
    """
    if codes.ndim != ndim or codes.is_floating_point() or not codes.numel():
        raise ValueError(
            f"codes must be int64 with {ndim} dimensions and not empty, "
            f"got {codes.dtype} {tuple(codes.shape)}"
        )
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"codes must be in [0, {codebook_size}), got {low if low < 0 else high}: "
            "do they come from a tokenizer with another codebook?"
        )
