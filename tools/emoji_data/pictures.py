"""Drawings to captioned pictures and their copies in other colours, each in its split."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from emoji_data.captions import readable_name, write_captions, write_recoloured_captions
from emoji_data.colours import COLOURS, HUES, MIN_DIFFERENCE, difference, main_colours, one_hue
from emoji_data.concepts import Concept
from emoji_data.drawings import Drawing
from emoji_data.rendering import scaled_on_white, square
from emoji_data.splits import NEVER_RECOLOURED, SPLITS, split_of

logger = logging.getLogger(__name__)

MAX_WHITE = 253.5  # of 255, mean of a picture; above, nothing is to be seen on it
RECOLOURED_GROUPS = {"objects", "travel & places", "food & drink", "animals & nature", "activities"}
RECOLOURED_STYLES = {"flat", "noto", "twemoji", "emojione"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with captions, as the shards have it."""

    key: str
    png: bytes
    concept: Concept
    style: str  # key of STYLES
    name: str
    colours: list[tuple[str, float]]  # with their shares of the drawing, the largest first
    captions: list[str]
    licence: str  # SPDX
    recoloured: str | None = None  # the colour of a copy in another colour


def make_pictures(drawings: Iterable[Drawing], size: int) -> list[Picture]:
    """Render drawings, leave out what is empty or there already, add copies in other colours.

    Args:
        drawings: of all styles.
        size: of the pictures in pixels.

    Returns:
        The pictures in the drawings' order; a drawing's copies follow it.
    """
    pictures: list[Picture] = []
    first_with: dict[bytes, Picture] = {}  # by pixels
    skipped: Counter[str] = Counter()
    for drawing in drawings:
        try:
            image = square(drawing.render())
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            logger.debug("%s: %s", drawing.key, error)
            skipped[f"{drawing.style}: not rendered"] += 1
            continue
        scaled = None if image is None else scaled_on_white(image, size)
        if image is None or scaled is None or _is_white(scaled):
            skipped[f"{drawing.style}: nothing to see on white"] += 1
        elif same := first_with.get(scaled.tobytes()):  # the same drawing by another name: keep the name
            skipped["the same picture as another"] += 1
            _add_caption(same, readable_name(drawing.concept.name).lower())
        else:
            picture = _picture(drawing, image, scaled)
            first_with[scaled.tobytes()] = picture
            pictures += [picture, *_recoloured(drawing, image, scaled)]
    logger.info("left out: %s", ", ".join(f"{count:,} {what}" for what, count in sorted(skipped.items())))
    return pictures


def split_pictures(pictures: Iterable[Picture]) -> dict[str, list[Picture]]:
    """Put pictures into the splits of SPLITS; those that are left out are in none."""
    pictures = list(pictures)
    styles: defaultdict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        styles[picture.concept.code_points].add(picture.style)
    split: dict[str, list[Picture]] = {name: [] for name in SPLITS}
    for picture in pictures:
        found = split_of(
            picture.concept,
            picture.style,
            styles=styles[picture.concept.code_points],
            recoloured=picture.recoloured,
        )
        if found is not None:
            split[found].append(picture)
    return split


def _picture(drawing: Drawing, image: Image.Image, scaled: Image.Image) -> Picture:
    """The picture of a drawing, from its square and that on white."""
    colours = main_colours(image)
    return Picture(
        key=drawing.key,
        png=_encode(scaled),
        concept=drawing.concept,
        style=drawing.style,
        name=readable_name(drawing.concept.name),
        colours=colours,
        captions=write_captions(drawing.concept, drawing.style, colours),
        licence=drawing.licence,
    )


def _recoloured(drawing: Drawing, image: Image.Image, scaled: Image.Image) -> Iterator[Picture]:
    """Copies in other colours, of things that may have any and have one."""
    concept = drawing.concept
    may_be = (
        concept.group in RECOLOURED_GROUPS
        and drawing.style in RECOLOURED_STYLES
        and concept.name not in NEVER_RECOLOURED
        and COLOURS.keys().isdisjoint(concept.name.split())
    )
    if not may_be or (hue := one_hue(image)) is None:
        return
    for colour in HUES:
        turned = hue.turned(colour)
        copy, colours = scaled_on_white(turned, scaled.width), main_colours(turned)
        has_colour = bool(colours) and colours[0][0] == colour  # not so if dark: a dark orange is brown
        if has_colour and difference(copy, scaled) >= MIN_DIFFERENCE:
            yield Picture(
                key=f"{drawing.key}_hue-{colour}",
                png=_encode(copy),
                concept=concept,
                style=drawing.style,
                name=f"{colour} {readable_name(concept.name).lower()}",
                colours=colours,
                captions=write_recoloured_captions(concept, drawing.style, colour),
                licence=drawing.licence,
                recoloured=colour,
            )


def _add_caption(picture: Picture, caption: str) -> None:
    if caption not in picture.captions:
        picture.captions.append(caption)


def _is_white(image: Image.Image) -> bool:
    """Whether a white drawing vanishes on white."""
    histogram = image.histogram()  # 256 counts for each of R, G, B
    total = sum(value % 256 * count for value, count in enumerate(histogram))
    return total / sum(histogram) > MAX_WHITE


def _encode(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
