"""Pixels: the one file that knows that PIL means [0, 255] and a tokenizer means [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, transparency on white.

    Args:
        path: the file.

    Returns:
        An RGB image, wholly read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            return on_white(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


def on_white(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB; what is transparent becomes white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return rearrange(pixels, "h w c -> c h w").float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1], clamped here -> PIL images; truncated to bytes as the originals do."""
    unit = (images.detach().float().cpu() * 0.5 + 0.5).clamp(0, 1)
    pixels = rearrange((unit * 255).to(torch.uint8), "b c h w -> b h w c").numpy()
    return [Image.fromarray(picture) for picture in pixels]


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize so that the image covers `size` (height, width), then cut its centre out."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        reconstructions: same shape; clamped to [-1, 1].

    Returns:
        (B,) in dB; infinite for equal images.
    """
    error = (reconstructions.clamp(-1, 1) - images).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)  # the range of [-1, 1] is 2, its square 4


def contact_sheet(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    cell: int | None = None,
) -> Image.Image:
    """Lay images out in a grid on white.

    Args:
        images: at least one; each is scaled to fill a cell.
        columns: of the grid; None = about square.
        captions: one line under each image; long ones are cut.
        cell: side of a cell in pixels; None = the largest image's, at least 64.

    Returns:
        One RGB image.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cell = cell or max(64, *(max(image.size) for image in images))
    line = 14 if captions else 0
    gap = 4
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = gap + (i % columns) * (cell + gap), gap + (i // columns) * (cell + line + gap)
        scale = cell / max(image.size)
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        resized = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample
        )
        sheet.paste(resized, (left, top))
        if captions:
            text = captions[i]
            while text and draw.textlength(text) > cell:
                text = text[:-1]
            draw.text((left, top + cell), text, fill="black")
    return sheet
