"""The stream: which samples are in which batch, on which rank, in which order, whatever has happened."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import draw_picture, encode_picture, write_shard, write_tar

from mindalle.data.samples import Sample, Unreadable, open_source
from mindalle.data.shard_stream import ShardStream
from mindalle.data.stream import Stream, StreamLoader


class Numbers:
    """Samples 0, 1, 2, ..., of which some are unreadable; a batch tells what it is of."""

    def __init__(self, count: int, unreadable: Sequence[int] = ()) -> None:
        self.count = count
        self.unreadable = frozenset(unreadable)

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, epoch: int) -> int | Unreadable:
        return Unreadable(f"{index}.png", "broken") if index in self.unreadable else index

    def collate(self, loaded: Sequence[int], epoch: int, batch: int) -> dict[str, Any]:
        return {"numbers": torch.tensor(loaded), "place": [epoch, batch]}


class ShardNumbers(Numbers):
    """The same from shards, whose keys are numbers."""

    def __init__(self, spec: str, count: int | None = None) -> None:
        self.source: Any = open_source(spec)
        super().__init__(len(self.source) if count is None else count)

    def draw(self, sample: Sample | Unreadable, epoch: int) -> int | Unreadable:
        return sample if isinstance(sample, Unreadable) else int(sample.key[-4:])


def loader(items: Any, *, num_workers: int = 0, start: int = 0, **settings: Any) -> StreamLoader:
    kind = ShardStream if isinstance(items, ShardNumbers) else Stream
    made = StreamLoader(kind(items, **{"batch_size": 4, **settings}), num_workers=num_workers)
    if start:
        made.load_state_dict(dict(zip(("epoch", "batch"), divmod(start, len(made)), strict=True)))
    return made


def endless(made: StreamLoader) -> Iterator[list[int]]:
    """The batches of all epochs."""
    while True:
        for batch in made:
            yield batch["numbers"].tolist()


def batches(made: StreamLoader, count: int) -> list[list[int]]:
    return list(islice(endless(made), count))


def samples(made: StreamLoader) -> list[int]:
    """Those of one epoch."""
    return list(chain(*batches(made, len(made))))


class TestTraining:
    def test_every_sample_once_in_an_epoch(self) -> None:
        made = loader(Numbers(22))
        assert len(made) == 5
        epochs = [samples(made) for _ in range(3)]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) == 20
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != sorted(epochs[0])
        assert set(chain(*epochs)) == set(range(22))

    def test_seeds(self) -> None:
        assert samples(loader(Numbers(20))) == samples(loader(Numbers(20), seed=0))
        assert samples(loader(Numbers(20))) != samples(loader(Numbers(20), seed=1))

    def test_fewer_samples_than_a_batch(self) -> None:
        """They were dropped, and training went on for ever over no batches at all."""
        made = loader(Numbers(3), batch_size=8)
        assert len(made) == 1
        assert sorted(Counter(samples(made)).values()) == [2, 3, 3]

    def test_places(self) -> None:
        made = loader(Numbers(9))
        assert [batch["place"] for _ in range(2) for batch in made] == [[0, 0], [0, 1], [1, 0], [1, 1]]

    def test_workers_change_nothing(self) -> None:
        numbers = Numbers(30, unreadable=[3, 4, 20])
        assert batches(loader(numbers, num_workers=2), 15) == batches(loader(numbers), 15)


class TestEvaluation:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_in_order_and_always_from_the_first(self, num_workers: int) -> None:
        made = loader(Numbers(9), is_train=False, num_workers=num_workers)
        next(iter(made))  # as Lightning's sanity check does
        for _ in range(2):
            assert batches(made, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]

    @pytest.mark.parametrize(("count", "repeated"), [(24, 0), (19, 0), (18, 0), (17, 1), (1, 1)])
    def test_ranks(self, count: int, repeated: int) -> None:
        """All have equally many batches, or one would wait for the other for ever."""
        ranks = [loader(Numbers(count), is_train=False, rank=rank, world_size=2) for rank in range(2)]
        assert len(ranks[0]) == len(ranks[1]) == len([*ranks[0]]) == len([*ranks[1]])
        found = Counter(chain(*map(samples, ranks)))
        assert sorted(found) == list(range(count))
        assert sum(found.values()) == count + repeated


class TestRanks:
    @pytest.mark.parametrize("unreadable", [(), (1, 2, 11)])
    def test_joined_batches_are_those_of_one_process(self, unreadable: tuple[int, ...]) -> None:
        numbers = Numbers(27, unreadable)
        ranks = [batches(loader(numbers, batch_size=3, rank=rank, world_size=2), 8) for rank in range(2)]
        joined = [[*chain(*zip(*pair, strict=True))] for pair in zip(*ranks, strict=True)]
        assert joined == batches(loader(numbers, batch_size=6), 8)

    @pytest.mark.parametrize(("batch_size", "rank", "world_size"), [(0, 0, 1), (1, 2, 2), (1, -1, 1)])
    def test_numbers(self, batch_size: int, rank: int, world_size: int) -> None:
        with pytest.raises(ValueError, match=r"batch_size must be at least 1 and rank in \[0, world_size\)"):
            Stream(Numbers(3), batch_size=batch_size, rank=rank, world_size=world_size)


class TestResuming:
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("had", [1, 4, 5, 7])
    def test_goes_on_with_the_next_batch(self, num_workers: int, had: int) -> None:
        """The state counts batches handed out, not what workers have read ahead."""
        numbers = Numbers(20, unreadable=[7])
        expected = batches(loader(numbers), 14)
        run = loader(numbers, num_workers=num_workers)
        assert batches(run, had) == expected[:had]
        state = run.state_dict()
        assert state == {"epoch": had // 5, "batch": had % 5}
        resumed = loader(numbers, num_workers=num_workers)
        resumed.load_state_dict(state)
        assert batches(resumed, 14 - had) == expected[had:]

    def test_an_epoch_that_the_trainer_ends_early(self) -> None:
        """`limit_train_batches` makes short epochs, which together see all samples."""
        numbers = Numbers(20)
        made = loader(numbers)
        found = [[batch["numbers"].tolist() for batch in islice(made, 2)] for _ in range(3)]
        assert list(chain(*found)) == batches(loader(numbers), 6)

    def test_iterators_that_are_not_used(self) -> None:
        """Lightning makes some."""
        made = loader(Numbers(20))
        iter(made), iter(made)
        assert batches(made, 3) == batches(loader(Numbers(20)), 3)

    def test_other_batches(self) -> None:
        """After a change of the batch size, an epoch may have fewer batches than have been."""
        made = loader(Numbers(20), batch_size=10)
        made.load_state_dict({"epoch": 1, "batch": 4})
        assert made.state_dict() == {"epoch": 2, "batch": 0}


class TestUnreadable:
    def test_replaced_and_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        made = loader(Numbers(20, unreadable=[3, 11]))
        whole = samples(loader(Numbers(20)))
        found = samples(made)
        for position in range(20):
            replacing = next(n for n in (whole + whole)[position:] if n not in (3, 11))
            assert found[position] == replacing
        assert sum(batch["num_skipped"] for batch in made) == 2
        messages = [record.getMessage() for record in caplog.records]
        assert sorted(message[:-11] for message in messages) == [
            "skipped 11.png: broken",
            "skipped 3.png: broken",
        ]
        assert [message[-11:] for message in messages] == [" (1 so far)", " (2 so far)"]

    def test_counted_once_by_all_ranks(self) -> None:
        numbers = Numbers(20, unreadable=[3, 4, 5, 11])
        ranks = [loader(numbers, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
        assert sum(batch["num_skipped"] for rank in ranks for batch in rank) == 4

    @pytest.mark.parametrize("count", [3, 5000])
    def test_nothing_readable(self, count: int) -> None:
        made = loader(Numbers(count, unreadable=range(count)))
        with pytest.raises(
            ValueError, match=rf"none of {min(count, 1000):,} pictures in a row can be read, at last"
        ):
            batches(made, 1)


class TestShards:
    @pytest.fixture
    def spec(self, tmp_path: Path) -> str:
        for i in range(4):
            write_shard(tmp_path / f"{i}.tar", range(10 * i, 10 * i + 10), size=4)
        return str(tmp_path / "*.tar")

    def test_every_sample_once_in_an_epoch(self, spec: str) -> None:
        made = loader(ShardNumbers(spec))
        epochs = [samples(made) for _ in range(3)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(40))
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0][:10] != sorted(epochs[0][:10])
        assert samples(loader(ShardNumbers(spec), seed=1)) != epochs[0]

    @pytest.mark.parametrize(("num_workers", "world_size"), [(2, 1), (0, 2), (2, 2)])
    def test_dealt_to_workers_and_ranks(self, spec: str, num_workers: int, world_size: int) -> None:
        """Shards of equal size: each sample is seen once by one of them."""
        settings = {"batch_size": 5, "num_workers": num_workers, "world_size": world_size}
        ranks = [samples(loader(ShardNumbers(spec), rank=rank, **settings)) for rank in range(world_size)]
        assert sorted(chain(*ranks)) == list(range(40))

    @pytest.mark.parametrize(("num_workers", "world_size"), [(2, 3), (0, 5)])
    def test_fewer_shards_than_workers(self, spec: str, num_workers: int, world_size: int) -> None:
        """Then batches do not depend on the number of workers."""
        settings = {"batch_size": 2, "world_size": world_size}
        ranks = [
            batches(loader(ShardNumbers(spec), rank=rank, num_workers=num_workers, **settings), 4)
            for rank in range(world_size)
        ]
        joined = [[*chain(*zip(*rows, strict=True))] for rows in zip(*ranks, strict=True)]
        alone = batches(loader(ShardNumbers(spec), batch_size=2 * world_size), 4)
        assert joined == alone

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("had", [3, 10, 14])
    def test_resuming(self, spec: str, num_workers: int, had: int) -> None:
        expected = batches(loader(ShardNumbers(spec), num_workers=num_workers), 18)
        resumed = loader(ShardNumbers(spec), num_workers=num_workers, start=had)
        assert batches(resumed, 18 - had) == expected[had:]

    def test_longer_epochs_than_there_are_samples(self, spec: str) -> None:
        found = samples(loader(ShardNumbers(spec, count=100)))
        assert sorted(Counter(found).values()) == [2] * 20 + [3] * 20

    def test_evaluation(self, spec: str) -> None:
        for num_workers in (0, 2):
            made = loader(ShardNumbers(spec), is_train=False, batch_size=7, num_workers=num_workers)
            assert samples(made) == list(range(40))

    def test_unreadable(self, tmp_path: Path) -> None:
        """Replacing them reads ahead, and what was read ahead is still to come."""
        files = {f"{i:04d}.png": encode_picture(draw_picture(i, 4)[0]) for i in range(20)}
        files |= {f"{i:04d}.png": b"broken" for i in range(6, 14)}
        made = loader(ShardNumbers(str(write_tar(tmp_path / "0.tar", files))), is_train=False, batch_size=4)
        found = [(batch["numbers"].tolist(), batch["num_skipped"]) for batch in made]
        assert found == [
            ([0, 1, 2, 3], 0),
            ([4, 5, 14, 14], 2),
            ([14, 14, 14, 14], 4),
            ([14, 14, 14, 15], 2),
            ([16, 17, 18, 19], 0),
        ]

    def test_shards_that_became_empty(self, spec: str) -> None:
        items = ShardNumbers(spec)
        for url in items.source.urls:
            write_tar(Path(url), {})
        with pytest.raises(ValueError, match=r"\*.tar has shards that are empty: remove them"):
            batches(loader(items), 1)

    def test_workers_of_any_kind(self, spec: str) -> None:
        """Where workers are spawned, not forked, a stream must pickle."""
        stream = loader(ShardNumbers(spec)).stream
        copied = pickle.loads(pickle.dumps(stream))
        assert [b["numbers"].tolist() for b, _ in copied] == [b["numbers"].tolist() for b, _ in stream]


@pytest.fixture(autouse=True)
def _log_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
