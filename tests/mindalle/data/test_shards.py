"""Shards: what an entry becomes, that broken ones are skipped aloud, and the order of all others."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from shard_files import draw_picture, encode_picture, write_shard, write_tar

from mindalle.data.shards import ImageShards, decode_sample, find_shards, shard_dataset
from mindalle.image import to_tensor


def read(shards: list[Path], *, shuffle: int = 0, image_size: int = 16) -> list[dict[str, Any]]:
    return list(shard_dataset([str(shard) for shard in shards], image_size, shuffle=shuffle))


def keys(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


def entry(**files: bytes) -> dict[str, Any]:
    return {"__key__": "0007", "__url__": "train.tar", **files}


PICTURE = encode_picture(draw_picture(0)[0])


class TestFindShards:
    def test_patterns_in_order(self, tmp_path: Path) -> None:
        for name in ("b-1.tar", "b-0.tar", "a.tar", "other.zip"):
            (tmp_path / name).touch()
        found = find_shards([str(tmp_path / "b-*.tar"), str(tmp_path / "a.tar")])
        assert [Path(shard).name for shard in found] == ["b-0.tar", "b-1.tar", "a.tar"]

    @pytest.mark.parametrize("pattern", ["*.tar", "none.tar"])
    def test_empty_pattern(self, tmp_path: Path, pattern: str) -> None:
        (tmp_path / "a.zip").touch()
        with pytest.raises(FileNotFoundError, match=r"no shards match .*\.tar: point data.train_shards and"):
            find_shards([str(tmp_path / "a.zip"), str(tmp_path / pattern)])


class TestDecodeSample:
    def test_picture_and_captions(self) -> None:
        sample = decode_sample(entry(png=PICTURE, json=b'{"captions": ["a", "\\u6771"], "url": "x"}'), 16)
        assert torch.equal(sample["images"], to_tensor(draw_picture(0)[0]))
        assert sample["captions"] == ["a", "東"]

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
    def test_formats_and_size(self, suffix: str) -> None:
        picture = encode_picture(draw_picture(0, size=50)[0], suffix)
        sample = decode_sample(entry(**{suffix: picture}), 24)
        assert sample["images"].shape == (3, 24, 24)
        assert sample["captions"] == []
        torch.testing.assert_close(
            sample["images"][:, 12, 12], torch.tensor([1.0, -1.0, -1.0]), atol=0.1, rtol=0
        )

    def test_transparency_is_white(self) -> None:
        picture = encode_picture(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
        assert decode_sample(entry(png=picture), 4)["images"].eq(1).all()

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"txt": b"a"}, r"sample 0007 of train.tar has no image \(png, jpg, jpeg, webp\)"),
            ({"png": b""}, "sample 0007 of train.tar is damaged: cannot identify"),
            ({"png": PICTURE[:60]}, "sample 0007 of train.tar is damaged: "),
            (
                {"png": PICTURE, "json": b'{"captions": ['},
                "sample 0007 of train.tar is damaged: Expecting value",
            ),
            ({"png": PICTURE, "json": b"[]"}, "sample 0007 of train.tar is damaged: 'list' object"),
            ({"png": PICTURE, "json": b'{"captions": null}'}, "is damaged: can only join an iterable"),
            ({"png": PICTURE, "json": b'{"captions": [1]}'}, "expected str instance, int found"),
            ({"png": PICTURE, "json": b'{"captions": "red"}'}, "must be a list of strings, got 'red'"),
            ({"png": PICTURE, "json": b'{"captions": ["\\ud83d"]}'}, "surrogates not allowed"),
        ],
    )
    def test_errors(self, files: dict[str, bytes], message: str) -> None:
        """A single string was read as a list of letters, half a surrogate pair failed hours later."""
        with pytest.raises(ValueError, match=message):
            decode_sample(entry(**files), 16)

    def test_metadata_without_captions(self) -> None:
        assert decode_sample(entry(png=PICTURE, json=b'{"width": 16}'), 16)["captions"] == []


class TestShardDataset:
    def test_everything_in_order(self, tmp_path: Path) -> None:
        shards = [write_shard(tmp_path / "1.tar", [3, 1]), write_shard(tmp_path / "0.tar", [7, 5, 6])]
        samples = read(shards)
        assert keys(samples) == ["0003", "0001", "0007", "0005", "0006"]
        for sample in samples:
            image, caption = draw_picture(int(sample["__key__"]))
            assert torch.equal(sample["images"], to_tensor(image))
            assert sample["captions"] == [caption]

    def test_broken_entries_are_skipped(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = {
            "0000.png": PICTURE,
            "0001.png": PICTURE[:50],
            "0002.txt": b"no picture",
            "0003.png": PICTURE,
            "0003.json": b"{",
            "0004.png": PICTURE,
            "0004.json": json.dumps({"captions": ["whole"]}).encode(),
        }
        samples = read([write_tar(tmp_path / "train.tar", files)])
        assert keys(samples) == ["0000", "0004"]
        assert samples[1]["captions"] == ["whole"]
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 3
        for warning, key in zip(warnings, ("0001", "0002", "0003"), strict=True):
            assert warning.startswith(f"skipped what cannot be read: sample {key} of {tmp_path}/train.tar")

    @pytest.mark.parametrize("damage", ["truncated", "no tar", "empty", "missing"])
    def test_broken_shards_are_skipped(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
    ) -> None:
        first = write_shard(tmp_path / "0.tar", range(4), size=64)
        if damage == "truncated":
            first.write_bytes(first.read_bytes()[:2600])  # inside the third picture
        elif damage == "missing":
            first.unlink()
        else:
            first.write_bytes(b"" if damage == "empty" else b"text" * 999)
        second = write_shard(tmp_path / "1.tar", [8, 9])
        found = keys(read([first, second]))
        assert found[-2:] == ["0008", "0009"]
        assert found[:-2] == ["0000", "0001"][: len(found) - 2]
        assert any("0.tar" in record.getMessage() for record in caplog.records)
        assert all(len(record.getMessage()) < 300 for record in caplog.records)

    def test_shuffled(self, tmp_path: Path) -> None:
        """Another order in each epoch, and all follow from torch's seed, as `seed_everything` promises."""
        shards = [write_shard(tmp_path / f"{i}.tar", range(10 * i, 10 * i + 10)) for i in range(4)]
        dataset = shard_dataset([str(shard) for shard in shards], 16, shuffle=30)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            epochs = [keys(list(dataset)) for _ in range(3)]
            torch.manual_seed(0)
            again = [keys(list(dataset)) for _ in range(3)]
        assert epochs == again
        assert epochs[0] != epochs[1] != epochs[2]
        first_shards = {epoch[0][:3] for epoch in epochs} | {epoch[1][:3] for epoch in epochs}
        assert len(first_shards) > 1
        for epoch in epochs:
            assert sorted(epoch) == [f"{i:04d}" for i in range(40)]

    def test_worker_processes_of_any_kind(self, tmp_path: Path) -> None:
        """Where workers are spawned, not forked, a data set must pickle."""
        dataset = shard_dataset([str(write_shard(tmp_path / "0.tar", range(3)))], 16, shuffle=5)
        assert sorted(keys(list(pickle.loads(pickle.dumps(dataset))))) == ["0000", "0001", "0002"]


class TestImageShards:
    @pytest.fixture
    def patterns(self, tmp_path: Path) -> tuple[list[str], list[str]]:
        write_shard(tmp_path / "train-0.tar", range(7))
        write_shard(tmp_path / "train-1.tar", range(7, 10))
        write_shard(tmp_path / "val.tar", range(10, 13))
        return [str(tmp_path / "train-*.tar")], [str(tmp_path / "val.tar")]

    @pytest.mark.parametrize("num_workers", [0, 2, 5])
    def test_batches(self, patterns: tuple[list[str], list[str]], num_workers: int) -> None:
        """Nothing is dropped, and there are no workers without a shard."""
        data = ImageShards(*patterns, image_size=16, batch_size=4, num_workers=num_workers)
        data.setup("fit")
        train, val = data.train_dataloader(), data.val_dataloader()
        assert (train.num_workers, val.num_workers) == (min(num_workers, 2), min(num_workers, 1))
        images = torch.cat([batch["images"] for batch in train])
        expected = torch.stack([to_tensor(draw_picture(i)[0]) for i in range(10)])
        assert images.shape == (10, 3, 16, 16)
        assert sorted(images.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())
        (val_batch,) = val
        assert torch.equal(
            val_batch["images"], torch.stack([to_tensor(draw_picture(i)[0]) for i in (10, 11, 12)])
        )

    def test_fewer_pictures_than_a_batch(self, patterns: tuple[list[str], list[str]]) -> None:
        """They were dropped, and training went on for ever over no batches at all."""
        (batch,) = ImageShards(*patterns, image_size=16, batch_size=64, num_workers=0).train_dataloader()
        assert len(batch["images"]) == 10

    @pytest.mark.parametrize("split", [0, 1])
    def test_nothing_to_read(
        self,
        patterns: tuple[list[str], list[str]],
        tmp_path: Path,
        split: int,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        empty = write_tar(tmp_path / "empty.tar", {"0.txt": b"no picture"})
        both = [*patterns]
        both[split] = [str(empty)]
        with pytest.raises(
            ValueError, match=r"no readable image in .*empty.tar: expected WebDataset .tar files"
        ):
            ImageShards(*both).setup("fit")
        assert "0 of" in caplog.text

    def test_missing_shards(self, patterns: tuple[list[str], list[str]]) -> None:
        with pytest.raises(FileNotFoundError, match=r"no shards match none-\*.tar"):
            ImageShards(patterns[0], ["none-*.tar"]).setup("fit")

    def test_several_devices(self, patterns: tuple[list[str], list[str]]) -> None:
        data = ImageShards(*patterns)
        data.trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
        with pytest.raises(
            ValueError, match=r"not shared out among devices yet, got 2: set trainer.devices to 1"
        ):
            data.setup("fit")

    @pytest.mark.parametrize("numbers", [{"image_size": 0}, {"batch_size": 0}, {"num_workers": -1}])
    def test_numbers(self, patterns: tuple[list[str], list[str]], numbers: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"must be at least 1 and num_workers at least 0, got .*(0|-1)"):
            ImageShards(*patterns, **numbers)


@pytest.fixture(autouse=True)
def _log_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
