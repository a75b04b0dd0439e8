"""Sets of pictures: each is read once, and what every metric needs of it is kept."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mindalle.data.samples import Sample, Source, Unreadable, clean_captions
from mindalle.data.shards import Shards
from mindalle.evaluation.features import FeatureNetwork
from mindalle.image import fit
from mindalle.rerank import ClipReranker

logger = logging.getLogger(__name__)
RESULTS = "results.jsonl"  # of a folder that was drawn: {"file", "prompt", "score", ...} for each picture
PLACE = ("number", "prompt", "class_label", "seed")  # in a line of it: what was drawn together
NUM_NAMED = 10  # unreadable pictures that a record names


@dataclass(kw_only=True)
class PictureSet:
    """What is kept of n pictures."""

    name: str
    fingerprint: str
    prepared: str = "as they are"  # how pictures were resized and cut before any network saw them
    vectors: Tensor | None = None  # (n, C), of the feature network
    logits: Tensor | None = None  # (n, classes)
    clip: Tensor | None = None  # (n, C'), unit vectors of the CLIP that judges
    captions: list[tuple[str, ...]] = field(default_factory=list)  # of each picture
    unreadable: list[Unreadable] = field(default_factory=list)  # pictures that are not among the n
    judges: frozenset[str] = frozenset()  # SHA-256 of the weights of who chose the pictures among candidates
    chosen: str | None = None  # how, such as "best 1 of 16"; None = they were not, or nothing says so

    def __len__(self) -> int:
        return len(self.captions)

    def about(self, kind: str) -> dict[str, Any]:
        """For a record.

        Args:
            kind: what the set is: "images", "data", ...
        """
        return {
            "kind": kind,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "prepared": self.prepared,
            "chosen": self.chosen,
            "num_images": len(self),
            "num_unreadable": len(self.unreadable),
            "unreadable": [f"{one.key}: {one.reason}" for one in self.unreadable[:NUM_NAMED]],
        }


def read_samples(source: Source, limit: int | None = None) -> Iterator[Sample | Unreadable]:
    """All pictures of a source in order.

    Of a folder that was drawn, with a results.jsonl, only those it lists, captioned with their prompts.

    Args:
        source: of `mindalle.data.samples.open_source`.
        limit: of pictures, unreadable ones among them; None = all.

    Yields:
        The pictures.

    Raises:
        ValueError: if a results.jsonl cannot be understood.
    """
    samples: Iterator[Sample | Unreadable] = (
        sample for part in range(source.num_parts) for sample in source.read(part)
    )
    # shards hold pictures and prompts alone, and one of several may be named
    rows = None if isinstance(source, Shards) else _drawn_rows(source)
    yield from islice(samples if rows is None else _listed(samples, rows), limit)


def count_listed(source: Source, limit: int | None) -> int | None:
    """Pictures that will be read, unreadable ones among them; None where nobody has counted."""
    try:
        count = len(source)
    except ValueError:  # shards on the network
        return None
    return count if limit is None else min(count, limit)


def choice_of(source: Source) -> tuple[frozenset[str], str | None]:
    """Who chose the pictures of a drawn set, and among how many.

    Args:
        source: of any pictures.

    Returns:
        SHA-256 of the weights of the CLIP or classifier, if one judged, and "best 1 of 16", if it chose.
    """
    judges: set[str] = set()
    kept: Counter[tuple[str, int]] = Counter()  # of each prompt and number of candidates
    for row in (_drawn_rows(source) or {}).values():
        settings = row.get("settings")
        judge = settings.get("judge_sha256") if isinstance(settings, dict) else None
        if isinstance(settings, dict) and isinstance(judge, str):
            judges.add(judge)
            if isinstance(count := settings.get("num_candidates"), int):
                kept[repr([row.get(name) for name in PLACE]), count] += 1
    choices = sorted({(num, of) for (_, of), num in kept.items() if num < of})
    return frozenset(judges), ", ".join(f"best {num} of {of}" for num, of in choices) or None


def measure_pictures(
    source: Source,
    samples: Iterable[Sample | Unreadable],
    *,
    network: FeatureNetwork | None,
    judge: ClipReranker | None,
    prepare: Callable[[Image.Image], Image.Image] | None = None,
    batch_size: int = 32,
) -> PictureSet:
    """Run the networks over a set, each once over each picture.

    Args:
        source: for its name and fingerprint.
        samples: the pictures.
        network: of the features; None = none are needed.
        judge: of captions; None = none is needed.
        prepare: makes every picture the size that is compared; None = they are taken as they are.
        batch_size: pictures at once, >= 1.

    Returns:
        What the metrics need.

    Raises:
        ValueError: if none of the pictures can be read.
    """
    judges, chosen = choice_of(source)
    found = PictureSet(name=source.name, fingerprint=source.fingerprint, judges=judges, chosen=chosen)
    collector = Collector(network, judge)
    for batch in picture_batches(samples, found, batch_size):
        collector.add([one.image if prepare is None else prepare(one.image) for one in batch])
    collector.fill(found)
    return found


def square(picture: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` pixels and cut the centre out, as in training."""
    return fit(picture, (size, size))


def squared(size: int) -> str:
    """What `square` does, for a record."""
    return f"{size}x{size}: shorter side, PIL bicubic, antialiased; centre crop"


def picture_batches(
    samples: Iterable[Sample | Unreadable], found: PictureSet, batch_size: int
) -> Iterator[list[Sample]]:
    """The pictures that can be read; their captions, and those that cannot be read, are noted in a set.

    Args:
        samples: of `read_samples`.
        found: gets captions and unreadable ones.
        batch_size: pictures at once, >= 1.

    Yields:
        At most `batch_size` pictures.

    Raises:
        ValueError: if none can be read.
    """
    readable = _readable(samples, found.unreadable)
    for batch in iter(lambda: list(islice(readable, batch_size)), []):
        found.captions += [one.captions for one in batch]
        yield batch
    if not len(found):
        reason = f": {found.unreadable[0].key}: {found.unreadable[0].reason}" if found.unreadable else ""
        raise ValueError(f"no readable picture in {found.name}{reason}")


class Collector:
    """The features of pictures that come in batches.

    Args:
        network: of the features; None = none are needed.
        judge: the CLIP whose features are kept, too; if it is the network's own, it runs once.
    """

    def __init__(self, network: FeatureNetwork | None, judge: ClipReranker | None) -> None:
        self.network, self.judge = network, judge
        self._batches: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []

    def add(self, pictures: list[Image.Image]) -> None:
        """Run the networks over a batch."""
        vectors, logits = self.network.extract(pictures) if self.network is not None else (None, None)
        is_shared = self.network is not None and self.judge is self.network.clip
        seen = None
        if self.judge is not None:
            seen = vectors if is_shared else self.judge.encode_images(pictures)
        self._batches.append((vectors, logits, seen))

    def fill(self, found: PictureSet) -> None:
        """Put what was collected into a set."""
        found.vectors, found.logits, found.clip = (
            torch.cat([one for one in column if one is not None]) if column[0] is not None else None
            for column in zip(*self._batches, strict=True)
        )


def _readable(samples: Iterable[Sample | Unreadable], unreadable: list[Unreadable]) -> Iterator[Sample]:
    """The pictures that can be read; the others are named and noted."""
    for sample in samples:
        if isinstance(sample, Sample):
            yield sample
        else:
            if len(unreadable) < NUM_NAMED:
                logger.warning("skipped %s: %s", sample.key, sample.reason)
            unreadable.append(sample)


def _listed(
    samples: Iterable[Sample | Unreadable], rows: Mapping[str, Mapping[str, Any]]
) -> Iterator[Sample | Unreadable]:
    """The pictures that results.jsonl lists, with their prompts: beside them lie sheets and previews."""
    missing = dict(rows)
    for sample in samples:
        row = missing.pop(sample.key, None)
        if row is not None and isinstance(sample, Sample):
            yield Sample(sample.key, sample.image, clean_captions(row.get("prompt")), sample.label)
        elif row is not None:
            yield sample
    for key in missing:
        yield Unreadable(key, f"{RESULTS} lists it, but there is no such file")


def _drawn_rows(source: Source) -> dict[str, Mapping[str, Any]] | None:
    """File -> its line of results.jsonl; None where there is none.

    Raises:
        ValueError: if a line cannot be understood.
    """
    root = Path(source.urls[0]).parent if isinstance(source, Shards) else Path(source.name)
    path = root / RESULTS  # of shards on the network there is none
    if not path.is_file():
        return None
    rows: dict[str, Mapping[str, Any]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("file"), str):
                    raise ValueError(f"expected an object with a file, got {line[:80]!r}")
                clean_captions(row.get("prompt"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            rows[row["file"]] = row
    return rows
