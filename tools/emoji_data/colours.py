"""The colours that a drawing has, in basic words, and copies of it in other colours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float64]

COLOURS = {  # sRGB examples of each word: what is nearest to one of them is called so
    "red": ((220, 40, 40), (180, 20, 30), (240, 80, 70)),
    "orange": ((245, 140, 30), (250, 165, 60)),
    "yellow": ((255, 215, 60), (250, 235, 110)),
    "green": ((60, 160, 60), (120, 190, 70), (30, 110, 60)),
    "blue": ((50, 120, 220), (90, 170, 240), (30, 60, 150)),
    "purple": ((150, 80, 190), (110, 60, 160)),
    "pink": ((245, 140, 180), (230, 90, 150), (250, 190, 205)),
    "brown": ((130, 80, 45), (165, 110, 70), (95, 60, 40)),
    "black": ((20, 20, 22), (45, 45, 50)),
    "gray": ((130, 135, 140), (170, 175, 180), (95, 100, 105)),
    "white": ((255, 255, 255), (236, 239, 241)),
}
HUES = {
    "red": 0,
    "orange": 26,
    "yellow": 50,
    "green": 120,
    "blue": 213,
    "purple": 275,
    "pink": 330,
}  # degrees

SAMPLE_SIDE = 32  # pixels; colours are counted on a small copy
OPAQUE_ALPHA = 200  # of 255; pixels with less are mixed with the background
MIN_PIXELS = 8
MIN_SHARE = 0.12  # of the pixels; a colour with less is not named
MAX_NAMED = 3

MIN_SATURATION, MIN_VALUE = 60, 40  # of 255; below, a pixel has no hue to speak of
HUE_WIDTH = 28  # degrees from the mean that still are the same hue
MIN_ONE_HUE = 0.85  # of the pixels that have a hue
MIN_COLOURED = 0.45  # of the visible pixels
MIN_DIFFERENCE = 4.0  # of 255, mean over pixels and channels; with less it had the colour before

XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE_POINT = np.array([0.9505, 1, 1.089])  # D65


def main_colours(drawing: Image.Image) -> list[tuple[str, float]]:
    """Name the colours that cover most of a drawing.

    Args:
        drawing: RGBA.

    Returns:
        Up to three of COLOURS with their share of the opaque pixels, the largest first.
    """
    sample = np.asarray(drawing.resize((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.BOX), np.float64)
    pixels = sample.reshape(-1, 4)  # (H*W, 4)
    pixels = pixels[pixels[:, 3] > OPAQUE_ALPHA]
    if len(pixels) < MIN_PIXELS:
        return []
    difference = to_lab(pixels[:, None, :3]) - EXAMPLES  # (pixels, examples, 3)
    nearest = (difference**2).sum(axis=-1).argmin(axis=1)
    counts = Counter(WORDS[index] for index in nearest)
    shares = [(word, count / len(pixels)) for word, count in counts.most_common(MAX_NAMED)]
    return [(word, round(share, 3)) for word, share in shares if share >= MIN_SHARE]


def to_lab(rgb: Array) -> Array:
    """Colours in sRGB, [0, 255], to CIELAB, where distances are as large as they look; both (..., 3)."""
    unit = rgb / 255
    linear = np.where(unit > 0.04045, ((unit + 0.055) / 1.055) ** 2.4, unit / 12.92)
    xyz = linear @ XYZ.T / WHITE_POINT
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


WORDS = [word for word, examples in COLOURS.items() for _ in examples]
EXAMPLES = to_lab(np.array([example for examples in COLOURS.values() for example in examples]))


@dataclass(frozen=True, kw_only=True)
class OneHue:
    """A drawing that is of one hue, so that it can have another one."""

    drawing: Image.Image  # RGBA
    hsv: npt.NDArray[np.int32]  # (H, W, 3) in [0, 255]
    hue: Array  # (H, W) in degrees
    mean: float  # degrees
    has_hue: npt.NDArray[np.bool_]  # (H, W): the pixels of that hue

    def turned(self, colour: str) -> Image.Image:
        """The drawing with its hue turned to that of a word of HUES; shades stay."""
        hsv = self.hsv.copy()
        turned = ((self.hue - self.mean + HUES[colour]) % 360) * 255 / 360
        hsv[..., 0] = np.where(self.has_hue, turned, hsv[..., 0])
        bands = [Image.fromarray(band) for band in np.moveaxis(hsv.astype(np.uint8), -1, 0)]
        image = Image.merge("HSV", bands).convert("RGB")
        image.putalpha(self.drawing.getchannel("A"))
        return image


def one_hue(drawing: Image.Image) -> OneHue | None:
    """Find the hue of a drawing.

    Args:
        drawing: RGBA.

    Returns:
        The hue; None if the drawing has several, or is mostly grey, black and white.
    """
    alpha = np.asarray(drawing.getchannel("A"))
    hsv = np.asarray(drawing.convert("RGB").convert("HSV")).astype(np.int32)
    hue = hsv[..., 0] * 360 / 255
    has_any = (hsv[..., 1] > MIN_SATURATION) & (hsv[..., 2] > MIN_VALUE) & (alpha > 0)
    if not has_any.any():
        return None
    angles = np.deg2rad(hue[has_any])
    mean = float(np.rad2deg(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())) % 360)
    has_hue = has_any & (np.abs((hue - mean + 180) % 360 - 180) < HUE_WIDTH)
    is_one = has_hue.sum() / has_any.sum() >= MIN_ONE_HUE
    is_coloured = has_hue.sum() / max(1, (alpha > 128).sum()) >= MIN_COLOURED
    if not (is_one and is_coloured):
        return None
    return OneHue(drawing=drawing, hsv=hsv, hue=hue, mean=mean, has_hue=has_hue)


def difference(image: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two RGB images of one size, in [0, 255]."""
    return float(np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16)).mean())
