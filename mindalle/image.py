"""Pixels: the one file that knows that PIL means [0, 255] and a tokenizer means [-1, 1]."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError, features
from torch import Tensor

ROUNDING = 1e-4
"""Of a byte, added before truncating: what was a byte and then a float32 in [-1, 1] is off by up to 2e-5."""

_FORMATS = {
    "PNG": ("png",),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "JPEG2000": ("jp2", "j2k", "jpx", "jpf", "jpc", "j2c") if features.check("jpg_2000") else (),
    # from Pillow 11.3 on
    "AVIF": ("avif", "avifs") if "avif" in features.modules and features.check("avif") else (),
    "QOI": ("qoi",),
}

PICTURE_FORMATS = tuple(name for name, suffixes in _FORMATS.items() if suffixes)
"""What Pillow may take a file for: it knows formats that are programs, too, such as EPS, and runs them."""

PICTURE_SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
"""Of files that are taken for pictures, in any case of letters."""

MAX_ASPECT = 100
"""Longer side / shorter side: resized by its shorter side, a line of pixels would fill the memory."""


class UnclearPixelsError(ValueError):
    """A picture whose numbers do not tell what is white."""


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright as its camera noted, transparency on white.

    Args:
        path: the file.

    Returns:
        An RGB image, wholly read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable picture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        return decode_image(path)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def decode_image(file: Path | BytesIO) -> Image.Image:
    """Decode a picture file, whatever it really holds: the one place that does so.

    Args:
        file: path or contents.

    Returns:
        An RGB image, as of `open_image`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: says in one line what the file is instead of a readable picture.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's, about odd tags, and about large pictures: it refuses those of twice as many pixels
            warnings.simplefilter("ignore")
            with Image.open(file, formats=PICTURE_FORMATS) as image:
                width, height = image.size
                if max(width, height) <= MAX_ASPECT * min(width, height):
                    return on_white(image)
    except (FileNotFoundError, UnclearPixelsError):
        raise
    except UnidentifiedImageError as error:
        expected = ", ".join(PICTURE_FORMATS)
        raise ValueError(f"not a picture of a known format: expected {expected}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"refused: {str(error).rstrip('.')}; scale it down first") from error
    except Exception as error:  # a damaged file fails in any of a dozen ways
        reason = " ".join(str(error).split())
        raise ValueError(f"not a readable picture: {reason}. Was the download cut short?") from error
    raise ValueError(f"no picture but a line: {width} x {height} pixels")


def on_white(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, upright as its camera noted; what is transparent becomes white.

    Raises:
        UnclearPixelsError: if floating-point values leave [0, 1], or whole ones 16 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        image = _from_unit(image)
    if image.mode.startswith("I"):  # 16 bits ("I" in Pillow before 11), which Pillow would clip, not scale
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey -> "L", or "LA" where one value stands for transparency."""
    values = np.asarray(image)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise UnclearPixelsError(
            f"no clear picture: its values lie in [{values.min()}, {values.max()}], expected 8 or 16 bits: "
            "which of them is white? Save it as PNG"
        )
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        is_opaque = values != image.info["transparency"]
        grey.putalpha(Image.fromarray(np.uint8(255) * is_opaque))
    return grey


def _from_unit(image: Image.Image) -> Image.Image:
    """Floating-point grey in [0, 1] -> "L"; Pillow would clip it to [0, 255], which is black."""
    values = np.asarray(image)  # (H, W) float32
    if not (values.min() >= 0 and values.max() <= 1):  # neither is NaN
        raise UnclearPixelsError(
            f"no clear picture: its floating-point values lie in [{values.min():g}, {values.max():g}], "
            "expected [0, 1]: which of them is white? Scale it, or save it as PNG"
        )
    return Image.fromarray((values * 255).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return rearrange(pixels, "h w c -> c h w").float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1], clamped here -> PIL images; truncated to bytes as the originals do.

    The inverse of `to_tensor`, byte for byte.
    """
    unit = (images.detach().float().cpu() * 0.5 + 0.5).clamp(0, 1)
    pixels = rearrange((unit * 255 + ROUNDING).to(torch.uint8), "b c h w -> b h w c").numpy()
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
        cell: longer side of a cell in pixels; None = the largest image's, at least 64.

    Returns:
        One RGB image.

    Raises:
        ValueError: if there are no images, or captions for another number of them.
    """
    if not images or (captions is not None and len(captions) != len(images)):
        raise ValueError(
            f"a sheet needs images and a caption for each or none, got {len(images)} images and "
            f"{'no' if captions is None else len(captions)} captions"
        )
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    zoom = (cell or max(64, width, height)) / max(width, height)
    width, height = max(1, round(width * zoom)), max(1, round(height * zoom))  # of a cell
    line = 14 if captions else 0
    gap = 4
    size = (columns * (width + gap) + gap, rows * (height + line + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + line + gap)
        scale = min(width / image.width, height / image.height)
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        resized = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample
        )
        sheet.paste(resized, (left, top))
        if captions:
            text = " ".join(captions[i].split())  # one line
            while text and draw.textlength(text) > width:
                text = text[:-1]
            draw.text((left, top + height), text, fill="black")
    return sheet
