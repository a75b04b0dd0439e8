"""Which pictures are trained on, and which are held out: decided by hashes, so that it stays so for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from emoji_data.concepts import Concept
from emoji_data.styles import family_of

SPLITS = {
    "train": "what models are trained on",
    "val_pair": "held-out pairs of a concept and a style family: the concept is in train, this drawing of it "
    "is not, nor is one after the same master",
    "val_color": "held-out pairs of a colour and an object: both words are in train, never together for this "
    "object in any style",
}
LEFT_OUT = {  # in no split, as nothing of them is in train: can a colour and a shape be put together?
    "green circle",
    "purple circle",
    "orange square",
    "blue square",
    "purple heart",
    "yellow heart",
    "blue book",
    "green apple",
    "small orange diamond",
    "black cat",
}
NEVER_RECOLOURED = {"closed book"}  # in blue it would be the "blue book" that is left out

VALIDATION_CONCEPTS = frozenset(
    Path(__file__).with_name("validation_concepts.txt").read_text(encoding="utf-8").split()
)
"""Code points of half of the concepts with something held out. The other half is kept back for a test."""

MIN_STYLES = 4  # of a concept, for one to be held out
PERCENT_PAIRS = 40  # of such concepts have a family held out
PERCENT_COLOURS = 8  # of the pairs of a colour and an object are held out


def split_of(concept: Concept, style: str, *, styles: Collection[str], recoloured: str | None) -> str | None:
    """Find the split of a picture.

    Args:
        concept: what it shows.
        style: it is drawn in.
        styles: that the concept is drawn in.
        recoloured: the colour of a copy in another colour, None for a drawing as it was made.

    Returns:
        Key of SPLITS; None if the picture is kept back.
    """
    if concept.name in LEFT_OUT:
        return None
    if _is_held_out(concept, style, styles):
        split = "val_pair"
    elif recoloured and _hash(concept.code_points + recoloured) % 100 < PERCENT_COLOURS:
        split = "val_color"
    else:
        return "train"
    return split if concept.code_points in VALIDATION_CONCEPTS else None


def _is_held_out(concept: Concept, style: str, styles: Collection[str]) -> bool:
    """Whether a style is of the family whose drawings of the concept are not in train."""
    if len(styles) < MIN_STYLES:
        return False
    number = _hash(concept.code_points)
    families = sorted(set(map(family_of, styles)))
    held_out = families[number // 100 % len(families)]
    return number % 100 < PERCENT_PAIRS and family_of(style) == held_out


def _hash(text: str) -> int:
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), 16)
