"""Drawings to pixels: SVG by resvg, WebP and glyphs of a colour font by Pillow; cropped and put on white."""

from __future__ import annotations

import hashlib
import logging
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from mindalle.image import on_white

try:
    import resvg_py
except ImportError as error:
    raise ImportError('the drawings are SVG, which needs resvg-py: pip install -e ".[emoji]"') from error

logger = logging.getLogger(__name__)

RENDER_SIZE = 256  # pixels; that of the 3D drawings too
MARGIN = 0.04  # of the side, on every side of a picture
VISIBLE_ALPHA = 8  # of 255; less is a shadow's end
FLAG_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FLAG_FONT_PACKAGE = "fonts-noto-color-emoji"
FLAG_FONT_SHA256 = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"  # 2.042 of Debian 12
GLYPH_SIZE = 109  # pixels; the font has its bitmaps in this size alone
MAX_FLAG_WIDTH = 150  # pixels; two letters instead of a flag are wider


def render_svg(svg: str) -> Image.Image:
    """Render an SVG document.

    Args:
        svg: the document; text in it is left out, so that the machine's fonts do not matter.

    Returns:
        RGBA, RENDER_SIZE pixels along each side.

    Raises:
        ValueError: if resvg cannot, or if it refers to other pictures, which may be any file.
    """
    if "<image" in svg:
        raise ValueError("it has a picture inside")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True)
    return Image.open(BytesIO(bytes(png))).convert("RGBA")


def read_webp(path: Path) -> Image.Image:
    """Read a drawing that is pixels already, as RGBA."""
    with Image.open(path, formats=["WEBP"]) as image:
        return image.convert("RGBA")


class FlagFont:
    """The font with Noto's waved flags, which exist as its bitmaps alone.

    Args:
        path: of NotoColorEmoji.ttf.

    Raises:
        FileNotFoundError: if there is no such font.
        ValueError: if it is not that font.
        ImportError: if Pillow cannot join two letters to a flag.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"no font at {path}: apt-get install {FLAG_FONT_PACKAGE}, name it with --noto-font, "
                "or leave Noto's flags out with --without-noto-flags"
            )
        if not features.check("raqm"):
            raise ImportError(
                "Pillow has no Raqm, which joins letters to flags: apt-get install libfribidi0, or leave "
                "Noto's flags out with --without-noto-flags"
            )
        try:
            self._font = ImageFont.truetype(path, GLYPH_SIZE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise ValueError(
                f"{path} has no bitmaps of {GLYPH_SIZE} pixels ({error}): expected NotoColorEmoji.ttf of "
                f"Debian's {FLAG_FONT_PACKAGE}, or --without-noto-flags"
            ) from error
        if hashlib.sha256(path.read_bytes()).hexdigest() != FLAG_FONT_SHA256:
            logger.warning("%s is not version 2.042 of Debian 12: Noto's flags may differ", path)

    def render(self, emoji: str) -> Image.Image:
        """Draw one emoji.

        Args:
            emoji: its characters.

        Returns:
            RGBA with the glyph somewhere on it.

        Raises:
            ValueError: if the font does not have it.
        """
        image = Image.new("RGBA", (300, 160), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((10, 10), emoji, font=self._font, embedded_color=True)
        box = image.getbbox()
        if box is None or box[2] - box[0] > MAX_FLAG_WIDTH:
            raise ValueError("the font has no glyph of it")
        return image


def square(drawing: Image.Image) -> Image.Image | None:
    """Put the visible part of an RGBA drawing in the middle of a square; None if nothing is visible."""
    visible = drawing.getchannel("A").point(lambda alpha: 255 if alpha > VISIBLE_ALPHA else 0).getbbox()
    if visible is None:
        return None
    cropped = drawing.crop(visible)
    side = round(max(cropped.size) / (1 - 2 * MARGIN))
    padded = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    padded.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return padded


def scaled_on_white(drawing: Image.Image, size: int) -> Image.Image:
    """A square RGBA drawing as an RGB picture, `size` pixels along each side."""
    return on_white(drawing).resize((size, size), Image.Resampling.LANCZOS)
