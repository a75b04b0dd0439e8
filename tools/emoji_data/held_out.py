"""What the shards hold out: pictures, captions that name a style, and pairs of a colour and a thing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import webdataset as wds
from PIL import Image

from emoji_data.colours import HUES
from mindalle.data.samples import Unreadable, decode

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A picture of a shard and what its JSON says."""

    image: Image.Image
    about: dict[str, Any]


def held_out_captions(data: Path, number: int, seed: int) -> dict[str, str]:
    """Captions of concept and style whose drawing was held out, and the concept's name."""
    captions = {
        caption: about["name"]
        for about in read_abouts(data, "val_pair")
        if "recolored" not in about
        for caption in about["captions"]
        if caption.endswith(f"{about['style']} style")
    }
    if not captions:
        raise ValueError(f"val_pair of {data} has no caption that names a style: nothing can be drawn")
    return {caption: captions[caption] for caption in sample(sorted(captions), number, seed)}


def unseen_colours(data: Path, number: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of colour and thing that were never seen together."""
    found = set()
    for about in read_abouts(data, "val_color"):
        colour, _, thing = about["name"].partition(" ")
        if colour in HUES and thing:
            found.add((colour, thing))
    if not found:
        raise ValueError(f"val_color of {data} has no name of a colour and a thing: nothing can be drawn")
    return sample(sorted(found), number, seed)


def sample(population: Sequence[T], number: int, seed: int) -> list[T]:
    """`number` of them, or all if there are fewer, in random order."""
    return random.Random(seed).sample(population, min(number, len(population)))


def concept_names(data: Path) -> list[str]:
    """The names of all concepts."""
    return sorted(
        {
            about["name"]
            for split in ("train", "val_pair")
            for about in read_abouts(data, split)
            if "recolored" not in about
        }
    )


def read_records(data: Path, split: str) -> Iterator[Record]:
    """The pictures of a split with their JSON, in order."""
    for sample in _samples(data, split):
        decoded = decode(sample["__key__"], BytesIO(sample["png"]), (), None)
        if isinstance(decoded, Unreadable):
            raise ValueError(f"{split}: {decoded.key} is damaged: {decoded.reason}; make the shards again")
        yield Record(decoded.image, json.loads(sample["json"]))


def read_abouts(data: Path, split: str) -> Iterator[dict[str, Any]]:
    """The JSON of a split's pictures, which are not decoded, in order."""
    return (json.loads(sample["json"]) for sample in _samples(data, split))


def _samples(data: Path, split: str) -> Iterable[dict[str, Any]]:
    """The files of each picture of a split."""
    shards = sorted(str(path) for path in data.glob(f"{split}-*.tar"))
    if not shards:
        raise FileNotFoundError(f"no {split}-*.tar in {data}: make them with tools/build_emoji.py")
    samples: Iterable[dict[str, Any]] = wds.WebDataset(shards, shardshuffle=False)
    return samples
