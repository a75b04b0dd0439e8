"""The stream of batches from shards, which cannot be read at any place: shuffled as well as that allows."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from itertools import chain, count
from typing import Any, Protocol

from mindalle.data.members import RawSample
from mindalle.data.samples import Sample, Unreadable, seed_of
from mindalle.data.shards import Shards, shuffled
from mindalle.data.stream import MAX_MISSES, Items, Reader, Stream


class ShardItems(Items, Protocol):
    """Samples of shards."""

    source: Shards

    def draw(self, sample: Sample | Unreadable, epoch: int) -> Any | Unreadable:
        """What `load` does with a sample once it is read."""


class ShardStream(Stream):
    """A stream whose samples are read from front to end; resuming passes over samples without decoding them.

    Training: the shards are permuted and dealt to the workers of all ranks; each shuffles its own in a buffer
    and begins again, with the shards dealt anew, where it runs out of them before the epoch ends. So batches
    depend on the number of workers, too. Where there are fewer shards than workers, every worker reads all of
    them and decodes what its batches need.

    Args:
        items: the samples.
        kwargs: as of `Stream`.
    """

    items: ShardItems

    def __init__(self, items: ShardItems, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)

    def positions(self, batch: int, num_workers: int) -> range:
        """Where the samples of a batch are: in the worker's own share, if the shards are dealt."""
        if not self._is_dealt(num_workers):
            return super().positions(batch, num_workers)
        start = batch // num_workers * self.batch_size
        return range(start, start + self.batch_size)

    def open_epoch(self, epoch: int, batch: int, num_workers: int) -> Reader:
        """Begin to read an epoch, at its first sample; see `Stream.open_epoch`."""
        share, num_shares = 0, 1
        if self._is_dealt(num_workers):
            share, num_shares = self.rank * num_workers + batch % num_workers, self.world_size * num_workers
        # replacing unreadable samples leads so far ahead of what is still to be read
        recent = MAX_MISSES + self.batch_size * self.world_size
        window = _Window(self._walk(epoch, share, num_shares), recent)

        def read(position: int) -> Any:
            return self.items.draw(self.items.source.decode(window[position]), epoch)

        return read

    def _is_dealt(self, num_workers: int) -> bool:
        return self.is_train and self.items.source.num_parts >= self.world_size * num_workers

    def _walk(self, epoch: int, share: int, num_shares: int) -> Iterator[RawSample | Unreadable]:
        """The samples of a share, over and over."""
        source = self.items.source
        for turn in count():
            parts = list(range(source.num_parts))
            if self.is_train:
                random.Random(seed_of(self.seed, epoch, turn)).shuffle(parts)
            samples: Iterator[RawSample | Unreadable] = chain.from_iterable(
                map(source.raw, parts[share::num_shares])
            )
            if self.is_train:
                samples = shuffled(samples, random.Random(seed_of(self.seed, epoch, turn, share)))
            first = next(samples, None)
            if first is None:
                raise ValueError(f"{source.name} has shards that are empty: remove them")
            yield first
            yield from samples


class _Window:
    """The last samples of an iterator, by their position in it."""

    def __init__(self, samples: Iterator[RawSample | Unreadable], size: int) -> None:
        self._samples = samples
        self._recent: deque[RawSample | Unreadable] = deque(maxlen=size)
        self._end = 0

    def __getitem__(self, position: int) -> RawSample | Unreadable:
        while self._end <= position:
            self._recent.append(next(self._samples))
            self._end += 1
        return self._recent[position - self._end]  # counted from the end, negative
