"""The stream of batches: a function of seed and position, so that a run that was killed goes on where it was.

Which samples a batch holds, and everything that is drawn for them, follows from (seed, epoch, batch, rank,
world size): nothing of a random generator needs to be saved, only how many batches the trainer has had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mindalle.data.samples import Unreadable, seed_of

logger = logging.getLogger(__name__)

MAX_MISSES = 1000
"""So many unreadable samples in a row are no accident: an error instead of an endless search."""

Batch = dict[str, Any]


class Items(Protocol):
    """What batches are made of: samples that can be read by their index."""

    def __len__(self) -> int:
        """Samples of an epoch."""

    def load(self, index: int, epoch: int) -> Any | Unreadable:
        """Read a sample and draw what is random in it, by (seed, epoch, its key) alone.

        Args:
            index: in [0, len).
            epoch: counted from 0.
        """

    def collate(self, loaded: Sequence[Any], epoch: int, batch: int) -> Batch:
        """Make a batch.

        Args:
            loaded: B samples, none unreadable.
            epoch: counted from 0.
            batch: number in the epoch, counted from 0.
        """


Reader = Callable[[int], Any]
"""Position in an epoch -> loaded sample or Unreadable; no position is too high. Positions nearly ascend."""


class Stream(IterableDataset[tuple[Batch, list[Unreadable]]]):
    """Whole batches, with what was unreadable and had to be replaced; dealt to the workers of a DataLoader.

    Training: each epoch is a permutation of the samples, without the last partial batch, or the samples over
    and over where there are fewer than a batch needs. Evaluation: the samples in order, with a last partial
    batch. The ranks share out each *global* batch, rank r taking every world_size-th sample of it: so the
    same samples meet in a step, whether one process has them all or several have a part each. Only where
    fewer samples are left than ranks, the remaining ranks evaluate one a second time.

    An unreadable sample is replaced by the next one of the permutation.

    Args:
        items: the samples.
        batch_size: B, samples per batch and rank, >= 1.
        seed: of the permutations.
        rank: of this process, in [0, world_size).
        world_size: processes that train together.
        is_train: shuffled and endless, rather than in order and once.
    """

    def __init__(
        self,
        items: Items,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        is_train: bool = True,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "batch_size must be at least 1 and rank in [0, world_size), "
                f"got {batch_size}, rank {rank} of {world_size}"
            )
        self.items = items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.is_train = is_train
        self.position = 0
        """Batches of all epochs before the next one."""

    def __len__(self) -> int:
        """Batches of an epoch, the same on all ranks."""
        global_batch = self.batch_size * self.world_size
        num_samples = len(self.items)
        return max(1, num_samples // global_batch) if self.is_train else -(-num_samples // global_batch)

    def __iter__(self) -> Iterator[tuple[Batch, list[Unreadable]]]:
        """As many batches as an epoch has, from the position on; worker w of W makes every W-th of them."""
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        start = self.position + (worker.id if worker else 0)
        open_epoch = -1
        for number in range(start, self.position + len(self), num_workers):
            epoch, batch = divmod(number, len(self))
            if epoch != open_epoch:
                read, open_epoch = self.open_epoch(epoch, batch, num_workers), epoch
            loaded, unreadable = _load(read, self.positions(batch, num_workers), len(self.items))
            yield self.items.collate(loaded, epoch, batch), unreadable

    def positions(self, batch: int, num_workers: int) -> range:
        """Where in the epoch the samples of a batch are.

        Args:
            batch: number in the epoch.
            num_workers: that share the work; of no account here.
        """
        start = batch * self.batch_size * self.world_size
        end = start + self.batch_size * self.world_size
        first = start + self.rank
        if not self.is_train:
            end = max(first + 1, min(end, len(self.items)))
        return range(first, end, self.world_size)

    def open_epoch(self, epoch: int, batch: int, num_workers: int) -> Reader:
        """Begin to read an epoch.

        Args:
            epoch: counted from 0.
            batch: number of the first batch that is wanted.
            num_workers: that share the work; worker `batch % num_workers` asks.

        Returns:
            Reads the sample at a position.
        """
        order = _permutation(len(self.items), seed_of(self.seed, epoch)) if self.is_train else None

        def read(position: int) -> Any:
            index = position % len(self.items)
            return self.items.load(index if order is None else int(order[index]), epoch)

        return read


def _permutation(size: int, seed: int) -> Tensor:
    """(size,) int64."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _load(read: Reader, positions: range, num_samples: int) -> tuple[list[Any], list[Unreadable]]:
    """The samples at these positions, each or the next that is readable, and those that were not."""
    loaded: list[Any] = []
    unreadable: list[Unreadable] = []
    for position in positions:
        item = read(position)
        if isinstance(item, Unreadable):
            unreadable.append(item)
        misses = 0
        while isinstance(item, Unreadable):
            misses += 1
            if misses >= min(num_samples, MAX_MISSES):
                raise ValueError(
                    f"none of {misses:,} pictures in a row can be read, at last {item.key}: {item.reason}"
                )
            item = read(position + misses)
        loaded.append(item)
    return loaded, unreadable


class StreamLoader:
    """Reads a stream in worker processes, and knows how far the trainer is.

    Lightning saves and restores its state. Iterating gives as many batches as an epoch has: in training from
    where it was left, also into the next epoch; in evaluation always from the first. Batches get
    `num_skipped`, the unreadable samples that were replaced.

    It has a DataLoader rather than being one, so that Lightning does not rebuild it with other samplers.

    Args:
        stream: the batches.
        num_workers: processes that read ahead; 0 = none.
    """

    def __init__(self, stream: Stream, *, num_workers: int = 0) -> None:
        self.stream = stream
        self._loader = DataLoader(
            stream, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available()
        )
        self._skipped: set[str] = set()  # keys

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        if not self.stream.is_train:
            self.stream.position = 0
        for batch, unreadable in self._loader:
            self._warn(unreadable)
            # before it is handed out: what the trainer saves after this batch goes on with the next
            self.stream.position += 1
            yield {**batch, "num_skipped": len(unreadable)}

    def state_dict(self) -> dict[str, int]:
        """The place of the next batch: `epoch` and `batch`, its number in the epoch."""
        epoch, batch = divmod(self.stream.position, len(self))
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there.

        Args:
            state_dict: as `state_dict` gives it; a batch that the epoch has not, now that it is made of
                other batches, means the next epoch.
        """
        self.stream.position = state_dict["epoch"] * len(self) + min(state_dict["batch"], len(self))

    def _warn(self, unreadable: Sequence[Unreadable]) -> None:
        """Once for each sample."""
        for sample in unreadable:
            if sample.key not in self._skipped:
                self._skipped.add(sample.key)
                logger.warning(
                    "skipped %s: %s (%s so far)", sample.key, sample.reason, f"{len(self._skipped):,}"
                )
