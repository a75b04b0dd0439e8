"""The data set as files: WebDataset shards, the attribution that licences ask for, a README with counts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds

from emoji_data.packages import pinned_versions
from emoji_data.pictures import Picture
from emoji_data.splits import LEFT_OUT, SPLITS
from emoji_data.styles import FLAG_FONT_LICENCE, STYLES

SHARD_SIZE = 4096  # pictures


def write_data(directory: Path, splits: Mapping[str, Sequence[Picture]]) -> None:
    """Write everything; the same pictures give the same bytes.

    Args:
        directory: an empty one.
        splits: pictures by split.
    """
    for split, pictures in splits.items():
        ordered = sorted(pictures, key=_shuffled) if split == "train" else pictures
        for start in range(0, len(ordered), SHARD_SIZE):
            path = directory / f"{split}-{start // SHARD_SIZE:04d}.tar"
            write_shard(path, split, ordered[start : start + SHARD_SIZE])
    everything = [picture for pictures in splits.values() for picture in pictures]
    (directory / "ATTRIBUTION.md").write_text(attribution(everything), encoding="utf-8")
    (directory / "README.md").write_text(readme(splits), encoding="utf-8")


def write_shard(path: Path, split: str, pictures: Sequence[Picture]) -> None:
    """Write a tar of KEY.json and KEY.png without times and owners."""
    with path.open("wb") as file, wds.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for picture in pictures:
            metadata = json.dumps(describe(picture, split), ensure_ascii=False)
            tar.write({"__key__": picture.key, "png": picture.png, "json": metadata.encode()})


def describe(picture: Picture, split: str) -> dict[str, Any]:
    """What KEY.json has."""
    concept = picture.concept
    return {
        "concept": concept.code_points,
        "emoji": concept.emoji,
        "name": picture.name,
        "style": picture.style,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "keywords": concept.keywords,
        "colors": picture.colours,
        **({"recolored": picture.recoloured} if picture.recoloured else {}),
        "captions": picture.captions,
        "license": picture.licence,
        "split": split,
    }


def attribution(pictures: Sequence[Picture]) -> str:
    """Whom the licences want named: ATTRIBUTION.md, and that of a model trained on the pictures."""
    lines = [
        f"- `{style}`: {STYLES[style].credit} Licence: {STYLES[style].licence}. "
        "Cropped, resized, put on white."
        for style in sorted({picture.style for picture in pictures})
    ]
    notes = ["Pictures with `_hue-` in their key had their hue changed."]
    if any(picture.licence == FLAG_FONT_LICENCE for picture in pictures):
        notes.insert(
            0,
            "Pictures with `_font` in their key (Noto's flags) are glyphs of the Noto Color Emoji font, "
            "(c) Google Inc. Licence: SIL OFL 1.1.",
        )
    notes.append("Names and keywords: Unicode CLDR (Unicode-3.0) and emojibase-data (MIT).")
    head = "# Attribution\n\nThe licence of each picture is in its JSON file (`license`).\n"
    return "\n".join([head, *lines, "", "\n\n".join(notes), ""])


def readme(splits: Mapping[str, Sequence[Picture]]) -> str:
    """What is in the data set, and what it was made from."""
    everything = [picture for pictures in splits.values() for picture in pictures]
    concepts = {picture.concept.code_points for picture in everything}
    counts = Counter(picture.style for picture in everything)
    num_recoloured = sum(picture.recoloured is not None for picture in everything)
    rows = [
        f"| `{split}-*.tar` | {len(pictures):,} | {SPLITS[split]} |" for split, pictures in splits.items()
    ]
    return "\n".join(
        [
            "# Emoji",
            "",
            f"{len(everything):,} captioned pictures on white: {len(concepts):,} concepts in {len(counts)} "
            f"styles, {num_recoloured:,} of them copies in another colour. Made by `tools/build_emoji.py`; "
            "licences and authors are in [ATTRIBUTION.md](ATTRIBUTION.md).",
            "",
            "| shards | pictures | what |",
            "|---|---|---|",
            *rows,
            "",
            f"In no shard: every drawing of {', '.join(sorted(LEFT_OUT))}; and half of what is held out, "
            "concept by concept, which is kept back for a test.",
            "",
            "| style | pictures |",
            "|---|---|",
            *(f"| {style} | {counts[style]:,} |" for style in STYLES if style in counts),
            "",
            "Made from these npm packages:",
            "",
            *(f"- {name} {version}" for name, version in pinned_versions().items()),
            "",
        ]
    )


def _shuffled(picture: Picture) -> str:
    """A key to sort by, so that neighbours in a shard have nothing in common."""
    return hashlib.sha256(picture.key.encode()).hexdigest()
