"""Captions of a picture, from the name of what it shows, its keywords, its style and its colours."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emoji_data.colours import COLOURS
from emoji_data.concepts import Concept
from emoji_data.styles import STYLES

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LIKE_A_CONSONANT = r"eu|uni|use|ut|uk"  # a vowel that is spoken like one: "a unicorn"
NUM_KEYWORDS = 4
MIN_MAIN = 0.2  # of the pixels: a colour that captions may mention
MIN_ONLY = 0.55  # of the pixels: the colour of the thing


def readable_name(name: str) -> str:
    """A name of CLDR as one would say it: "flag: Italy" is "flag of Italy"."""
    name = name.replace("’", "'").replace("“", "").replace("”", "")
    kind, colon, rest = name.partition(": ")
    if not (kind and colon and rest):
        return name
    if kind == "flag":
        return f"flag of {rest}"
    if kind == "keycap":
        return f"keycap {rest}"
    if kind == "family":
        return f"family of {rest}"
    if rest == "bald":
        return f"bald {kind}"
    return f"{kind} with {rest}" if re.search("hair|beard", rest) else f"{kind}, {rest}"


def with_article(name: str) -> str:
    """Name a thing as one of its kind: "a red apple"; plurals and what is counted have no article."""
    if name.startswith("flag of"):
        return f"the {name}"
    words = name.split()
    is_counted = len(words) > 1 and words[0] in ("the", "a", "an", *NUMBERS)
    is_plural = any(
        word.endswith("s") and not word.endswith("ss") and len(word) > 3 for word in (words[0], words[-1])
    )
    if is_counted or is_plural:
        return name
    is_vowel = name[0] in "aeiou" and not re.match(LIKE_A_CONSONANT, name)
    return f"an {name}" if is_vowel else f"a {name}"


def shown_name(concept: Concept) -> str:
    """The name in captions: lower case, but for countries."""
    name = readable_name(concept.name)
    return name if name.startswith("flag of") else name.lower()


def write_captions(concept: Concept, style: str, colours: Sequence[tuple[str, float]]) -> list[str]:
    """Say in several ways what a picture shows.

    Args:
        concept: what it shows.
        style: key of STYLES.
        colours: of the drawing with their shares, the largest first.

    Returns:
        At least one caption, each once.
    """
    name = shown_name(concept)
    if style == "roundflag":
        captions = [f"round {name}", f"circular {name}", f"a round badge with the {name}"]
    else:
        captions = [name, *_styled(name, style)]
    if keywords := _other_keywords(name, concept.keywords):
        captions.append(", ".join([name, *keywords]))
    if coloured := _coloured(name, style, colours):
        captions.append(coloured)
    return list(dict.fromkeys(captions))


def write_recoloured_captions(concept: Concept, style: str, colour: str) -> list[str]:
    """Captions of a copy in another colour, in which the colour is always said."""
    name = f"{colour} {readable_name(concept.name).lower()}"
    return [name, *_styled(name, style)]


def _styled(name: str, style: str) -> list[str]:
    return [f"{with_article(name)}, {STYLES[style].words}", f"an emoji of {with_article(name)}"]


def _other_keywords(name: str, keywords: Sequence[str]) -> list[str]:
    """Keywords that the name does not say already, without countries' letters and signs."""
    words = set(re.findall(r"\w+", name.lower()))
    unique = dict.fromkeys(keyword.lower() for keyword in keywords)
    said = [word for word in unique if word not in words and not re.fullmatch(r"[a-z]{2}|\W+", word)]
    return said[:NUM_KEYWORDS]


def _coloured(name: str, style: str, colours: Sequence[tuple[str, float]]) -> str | None:
    """A caption with one or two colours, where they are plain and the name has none."""
    has_colour = not COLOURS.keys().isdisjoint(re.findall("[a-z]+", name))
    main = [word for word, share in colours if share >= MIN_MAIN and word != "white"][:2]
    if not main or has_colour or name.startswith("flag"):
        return None
    first, share = colours[0]
    if first != "white" and share >= MIN_ONLY:
        return f"{with_article(f'{first} {name}')}, {STYLES[style].words}"
    return f"{name} in {main[0]} and {main[1]}" if len(main) == 2 else None
