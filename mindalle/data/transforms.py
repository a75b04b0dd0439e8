"""From a picture of any size to a square tensor: resizing, cropping, flipping."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, ImageFilter
from torch import Tensor

from mindalle.image import fit, to_tensor

Resize = Literal["shorter", "pad"]
Crop = Literal["center", "random", "random_resized", "dalle"]
Padding = Literal["white", "blur"]


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """How pictures become training images; in evaluation every crop is the centre, and nothing is flipped."""

    image_size: int = 256  # side of the result in pixels, >= 1
    resize: Resize = "shorter"  # shorter side to resize_size, then crop; or the whole picture fits in, padded
    resize_size: int | None = None  # pixels, >= image_size; of "center" and "random"; None = image_size
    crop: Crop = "center"  # where to cut the square out; of "pad", where to put the picture: center, random
    min_scale: float = 0.75  # least share of the largest area, of "random_resized" and in padding, in (0, 1]
    padding: Padding = "white"  # of "pad": white, or the picture itself, enlarged and blurred
    flip_probability: float = 0.0  # mirror left and right, in [0, 1]

    def __post_init__(self) -> None:
        for name, known in (("resize", Resize), ("crop", Crop), ("padding", Padding)):
            if (got := getattr(self, name)) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {got!r}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size must be at least image_size, {self.image_size}, got {self.resize_size}"
            )
        if self.resize == "pad" and (self.crop not in ("center", "random") or self.resize_size is not None):
            raise ValueError(
                "a picture that is padded is not cropped, but can be put anywhere: set crop to center or "
                f"random, and leave resize_size out, got {self.crop} and {self.resize_size}"
            )
        if self.crop in ("random_resized", "dalle") and self.resize_size is not None:
            raise ValueError(f"crop {self.crop} chooses its size itself: leave resize_size out")
        if not 0 < self.min_scale <= 1 or not 0 <= self.flip_probability <= 1:
            raise ValueError(
                "min_scale must be in (0, 1] and flip_probability in [0, 1], "
                f"got {self.min_scale} and {self.flip_probability}"
            )


def transform(image: Image.Image, config: TransformConfig, rng: random.Random | None) -> Tensor:
    """Make a training image.

    Args:
        image: RGB, of any size.
        config: how.
        rng: decides where to crop and whether to flip; None = evaluation.

    Returns:
        (3, H, W) float32 in [-1, 1], H = W = image_size.
    """
    size = (config.image_size, config.image_size)
    if config.resize == "pad":
        square = _pad(image, config, rng if config.crop == "random" else None)
    elif rng is None or config.crop == "center":
        square = _crop_center(image, config)
    else:
        # resized straight from its box: enlarging the whole picture first would be slower, and much larger
        square = image.resize(size, Image.Resampling.BICUBIC, box=_random_box(image, config, rng))
    if rng is not None and rng.random() < config.flip_probability:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(square)


def _crop_center(image: Image.Image, config: TransformConfig) -> Image.Image:
    side = config.resize_size if config.crop in ("center", "random") else None
    side = side or config.image_size
    margin = (side - config.image_size) // 2
    end = margin + config.image_size
    return fit(image, (side, side)).crop((margin, margin, end, end))


def _random_box(
    image: Image.Image, config: TransformConfig, rng: random.Random
) -> tuple[float, float, float, float]:
    """The square to cut out of a picture, in its own pixels: left, top, right, bottom."""
    shorter = min(image.size)
    left, top = 0.0, 0.0
    width, height = map(float, image.size)
    if config.crop == "random":
        side = shorter * config.image_size / (config.resize_size or config.image_size)
    elif config.crop == "random_resized":
        side = shorter * math.sqrt(rng.uniform(config.min_scale, 1))
    else:  # DALL-E's (Ramesh et al. 2021): about the middle of the longer side, then a crop of at least 8/9
        left = rng.uniform(3 / 8, 5 / 8) * (width - shorter)
        top = rng.uniform(3 / 8, 5 / 8) * (height - shorter)
        width = height = shorter
        side = shorter / rng.uniform(1, 9 / 8)
    left += rng.random() * (width - side)
    top += rng.random() * (height - side)
    return left, top, min(left + side, image.width), min(top + side, image.height)


def _pad(image: Image.Image, config: TransformConfig, rng: random.Random | None) -> Image.Image:
    """The whole picture in a square: as large as fits, in the middle; with `rng` smaller, and anywhere."""
    size = (config.image_size, config.image_size)
    share = 1.0 if rng is None else math.sqrt(rng.uniform(config.min_scale, 1))
    scale = share * config.image_size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if config.padding == "white":
        square = Image.new("RGB", size, "white")
    else:
        square = fit(image, size).filter(ImageFilter.GaussianBlur(config.image_size / 16))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    room = (config.image_size - width, config.image_size - height)
    left, top = (side // 2 if rng is None else rng.randint(0, side) for side in room)
    square.paste(resized, (left, top))
    return square
