"""What is drawn: Unicode's emoji with their names and keywords, and how a drawing's name finds its emoji."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from emoji_data.packages import Packages, normalize_code_points

COMPONENTS = 2  # emojibase's number of a group: skin tones and hair, which are no pictures of their own
SETS_WITH_OLD_NAMES = ("noto", "twemoji", "fluent-emoji-flat")  # names that an emoji had in earlier years
SHORTCODES = ("github", "iamcal", "joypixels", "cldr")
ACCENTS = str.maketrans("ñãéíôçå", "naeioca")  # of the countries' names; drawings are named without them


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A thing that several styles draw."""

    code_points: str  # in hex, joined by "-"; "X-..." where Unicode has no such emoji
    emoji: str  # the characters; "" where there are none
    name: str  # as in Unicode's CLDR: "flag: Italy"
    keywords: tuple[str, ...]
    group: str
    subgroup: str


def read_concepts(packages: Packages) -> dict[str, Concept]:
    """All emoji without skin tones, by their code points."""
    messages = packages.json("emojibase-data", "en/messages.json")
    groups, subgroups = (
        {entry["order"]: entry["message"] for entry in messages[kind]} for kind in ("groups", "subgroups")
    )
    annotations = packages.json("cldr-annotations-full", "annotations/en/annotations.json")
    keywords = {
        _plain(emoji): entry.get("default", [])
        for emoji, entry in annotations["annotations"]["annotations"].items()
    }
    concepts = {}
    for entry in packages.json("emojibase-data", "en/data.json"):
        if entry.get("group", COMPONENTS) == COMPONENTS:
            continue
        code_points = normalize_code_points(entry["hexcode"])
        words = [*entry.get("tags", ()), *keywords.get(_plain(entry["emoji"]), ())]
        concepts[code_points] = Concept(
            code_points=code_points,
            emoji=entry["emoji"],
            name=entry["label"],
            keywords=tuple(dict.fromkeys(words)),
            group=groups[entry["group"]],
            subgroup=subgroups.get(entry.get("subgroup"), ""),
        )
    return concepts


def concept_without_emoji(name: str) -> Concept:
    """A thing that Unicode has no emoji of."""
    digest = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    return Concept(
        code_points=f"X-{digest[:8]}", emoji="", name=name, keywords=(), group="other", subgroup=""
    )


def comparable(name: str) -> str:
    """A name without case, spaces, punctuation and accents: what two sets call a thing differs in these."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("&", "and").translate(ACCENTS))


def index_names(packages: Packages, concepts: dict[str, Concept]) -> dict[str, str]:
    """The emoji that a name means.

    Args:
        packages: that know names.
        concepts: by code points.

    Returns:
        Comparable name -> code points. Where a name means several, the best known source decides.
    """
    index: dict[str, str] = {}
    for name, code_points in _names(packages, concepts):
        if code_points in concepts and (name := comparable(name)):
            index.setdefault(name, code_points)
    return index


def _names(packages: Packages, concepts: dict[str, Concept]) -> Iterator[tuple[str, str]]:
    """Names and code points, the best known source first."""
    for code_points, concept in concepts.items():
        yield concept.name, code_points
    for code_points, concept in concepts.items():
        kind, _, country = concept.name.partition(": ")
        if kind == "flag":
            for name in (f"flag for {country}", f"flag {country}", f"{country} flag", country):
                yield name, code_points
    for name in SETS_WITH_OLD_NAMES:
        yield from _old_names(packages, f"@iconify-json/{name}")
    for code_points in concepts:
        if "-" not in code_points:  # of single characters Unicode keeps the first name for ever
            yield unicodedata.name(chr(int(code_points, 16)), ""), code_points
    for source in SHORTCODES:
        for code_points, codes in packages.json("emojibase-data", f"en/shortcodes/{source}.json").items():
            for code in [codes] if isinstance(codes, str) else codes:
                if len(comparable(code)) > 2:  # shorter ones are a country's letters, or anything
                    yield code, normalize_code_points(code_points)


def _old_names(packages: Packages, package: str) -> Iterator[tuple[str, str]]:
    """Names of a set's drawings and their aliases."""
    icons = packages.icons(package)
    first = {name: code_points[0] for name, code_points in icons.code_points.items()}
    yield from first.items()
    for alias, entry in icons.aliases.items():
        code_points = first.get(alias) or first.get(entry["parent"])
        if code_points and not {"rotate", "hFlip", "vFlip"} & set(entry):  # turned, it is another thing
            yield alias, code_points


def _plain(emoji: str) -> str:
    """Without the selector that asks for the coloured form."""
    return emoji.replace("\ufe0f", "")
