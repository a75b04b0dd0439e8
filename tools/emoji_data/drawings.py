"""The drawings of all styles, each with what it shows; nothing is rendered before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image

from emoji_data.concepts import Concept, comparable, concept_without_emoji, index_names
from emoji_data.packages import IconSet, Packages, normalize_code_points
from emoji_data.rendering import FlagFont, read_webp, render_svg
from emoji_data.styles import FLAG_FONT_LICENCE, STYLES

FLAGS = "flags"  # the group's name
OTHER_FORMATS = ("3d", "roundflag")  # styles whose drawings have no names to be found by
REGIONAL_INDICATOR_A = 0x1F1E6  # two such letters are the flag of a country
SKIN_TONES = ("skin tone", "light skin", "dark skin")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One style's drawing of a concept."""

    style: str  # key of STYLES
    concept: Concept
    variant: str = ""  # tells apart several drawings of the concept in this style
    licence: str
    render: Callable[[], Image.Image]  # RGBA of any size; ValueError if it cannot be rendered

    @property
    def key(self) -> str:
        """The name of its files."""
        variant = f"_{self.variant}" if self.variant else ""
        return f"{self.style}_{self.concept.code_points.lower()}{variant}"


def read_drawings(packages: Packages, concepts: dict[str, Concept], font: FlagFont | None) -> list[Drawing]:
    """All drawings, in the order of the styles.

    Args:
        packages: they are in.
        concepts: by code points.
        font: of the Noto flags, which are in no package; None = without them.

    Returns:
        Drawings of `concepts` and of a few things that have no emoji.
    """
    names = index_names(packages, concepts)
    drawings: list[Drawing] = []
    for style in STYLES:
        if style not in OTHER_FORMATS:
            drawings += _from_icons(style, packages.icons(STYLES[style].package), concepts, names)
    drawings += _from_3d(packages, concepts)
    drawings += _round_flags(packages, concepts)
    if font is not None:
        is_drawn = {drawing.concept.code_points for drawing in drawings if drawing.style == "noto"}
        drawings += [
            _drawing("noto", concept, partial(font.render, concept.emoji), variant="font")
            for concept in concepts.values()
            if concept.group == FLAGS and concept.code_points not in is_drawn
        ]
    return drawings


def _drawing(style: str, concept: Concept, render: Callable[[], Image.Image], variant: str = "") -> Drawing:
    licence = FLAG_FONT_LICENCE if variant == "font" else STYLES[style].licence
    return Drawing(style=style, concept=concept, variant=variant, licence=licence, render=render)


def _from_icons(
    style: str, icons: IconSet, concepts: dict[str, Concept], names: dict[str, str]
) -> Iterator[Drawing]:
    """The drawings of an Iconify set, one for each concept and variant."""
    is_drawn = set()
    for name in icons.names:
        if name.endswith("-low"):  # the same with fewer details
            continue
        concept, variant = _concept_of(style, name, icons, concepts, names)
        if concept is not None and (concept.code_points, variant) not in is_drawn:
            is_drawn.add((concept.code_points, variant))
            yield _drawing(style, concept, partial(render_svg, icons.svg(name)), variant)


def _concept_of(
    style: str, name: str, icons: IconSet, concepts: dict[str, Concept], names: dict[str, str]
) -> tuple[Concept | None, str]:
    """What a drawing shows, and the number of the variant; by its characters, or else by its name."""
    known = [points for points in icons.code_points.get(name, ()) if points in concepts]
    if known or comparable(name) in names:
        return concepts[known[0] if known else names[comparable(name)]], ""
    if style != "streamline":
        return None, ""
    # its names may end in a number, and some have no emoji
    base, variant = match.groups() if (match := re.fullmatch(r"(.*?)-(\d+)", name)) else (name, "")
    if comparable(base) in names:
        return concepts[names[comparable(base)]], variant
    words = base.replace("-", " ")
    has_skin_tone = any(tone in words for tone in SKIN_TONES)
    is_name = re.fullmatch(r"[a-z ]{3,40}", words) is not None and not has_skin_tone
    return concept_without_emoji(words) if is_name else None, variant


def _from_3d(packages: Packages, concepts: dict[str, Concept]) -> Iterator[Drawing]:
    """The 3D drawings that Microsoft published; flags, couples and families there are of unclear origin."""
    published = packages.icons(STYLES["flat"].package).characters  # both sets have the same emoji
    known = concepts.keys() & set(map(normalize_code_points, published))
    for path in sorted(packages.path(STYLES["3d"].package, "assets").glob("*.webp")):
        code_points = normalize_code_points(path.stem)
        if code_points in known and concepts[code_points].group != FLAGS:
            known.discard(code_points)  # some are there twice, with and without selectors
            yield _drawing("3d", concepts[code_points], partial(read_webp, path))


def _round_flags(packages: Packages, concepts: dict[str, Concept]) -> Iterator[Drawing]:
    """The flags of countries, named by their two letters."""
    icons = packages.icons(STYLES["roundflag"].package)
    for name in icons.content["icons"]:  # those that the set no longer shows are flags all the same
        if re.fullmatch("[a-z]{2}", name):
            points = "-".join(f"{REGIONAL_INDICATOR_A + ord(letter) - ord('a'):X}" for letter in name)
            if points in concepts:
                yield _drawing("roundflag", concepts[points], partial(render_svg, icons.svg(name)))
