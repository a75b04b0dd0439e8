"""The data module of stage 2: it makes what is missing, draws captions, and notices another tokenizer."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.make import make_taming
from shard_files import draw_picture, write_shard

from mindalle.checkpoint import save_checkpoint
from mindalle.data.codes import CachedCodes, collate_captioned
from mindalle.image import to_tensor
from mindalle.text import TextTokenizer
from stage1_vqgan import VQGAN

CAPTIONS = {0: ["red", "a red square", "the red one"], 1: []}


@pytest.fixture
def arguments(tmp_path: Path, tiny_vqgan: VQGAN) -> dict[str, Any]:
    save_checkpoint(tmp_path / "tokenizer", image_tokenizer=tiny_vqgan)
    write_shard(tmp_path / "train.tar", range(10), CAPTIONS)
    write_shard(tmp_path / "val.tar", [0, 1, 12], CAPTIONS)
    return {
        "image_tokenizer": str(tmp_path / "tokenizer"),
        "train_shards": [str(tmp_path / "train.tar")],
        "val_shards": [str(tmp_path / "val.tar")],
        "cache_dir": str(tmp_path / "codes"),
        "text_tokenizer": str(tmp_path / "text_tokenizer.json"),
        "text_vocab_size": 60,
        "text_length": 4,
        "batch_size": 4,
    }


def prepared(arguments: dict[str, Any]) -> CachedCodes:
    data = CachedCodes(**arguments)
    data.prepare_data()
    return data


class TestPrepareData:
    def test_makes_caches_and_text_tokenizer(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        prepared(arguments)
        counts = {
            split: json.loads((tmp_path / "codes" / split / "header.json").read_text())["count"]
            for split in ("train", "val")
        }
        assert counts == {"train": 10, "val": 3}
        tokenizer = TextTokenizer.from_file(tmp_path / "text_tokenizer.json", length=4)
        assert tokenizer.vocab_size <= 60
        assert 1 not in tokenizer.encode(["the red circle"]).tolist()[0]

    def test_once(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        prepared(arguments)
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".tar"]
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
        prepared(arguments)
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before

    def test_a_given_text_tokenizer_is_used(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        given = TextTokenizer.train(["something else"], vocab_size=30, length=4)
        given.save(tmp_path / "text_tokenizer.json")
        (batch,) = prepared(arguments | {"batch_size": 99}).val_dataloader()
        assert torch.equal(batch["cond"][0], given.encode(["red"])[0])

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_missing_shards(self, arguments: dict[str, Any], tmp_path: Path, split: str) -> None:
        with pytest.raises(FileNotFoundError, match=r"no shards match none-\*"):
            prepared(arguments | {f"{split}_shards": ["none-*"]})
        assert not (tmp_path / "codes" / split).exists()

    def test_no_image_tokenizer(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none"):
            prepared(arguments | {"image_tokenizer": str(tmp_path / "none")})


class TestBatches:
    def test_validation_is_in_order_with_first_captions(
        self, arguments: dict[str, Any], tmp_path: Path, tiny_vqgan: VQGAN
    ) -> None:
        (batch,) = prepared(arguments).val_dataloader()
        images = torch.stack([to_tensor(draw_picture(i)[0]) for i in (0, 1, 12)])
        with torch.no_grad():
            assert torch.equal(batch["codes"], tiny_vqgan.encode(images))
        tokenizer = TextTokenizer.from_file(tmp_path / "text_tokenizer.json", length=4)
        expected = tokenizer.encode(["red", "", draw_picture(12)[1]])
        assert torch.equal(batch["cond"], expected)
        assert not batch["cond"][1].any()  # no caption: the null condition

    def test_training_is_shuffled_and_whole(self, arguments: dict[str, Any]) -> None:
        data = prepared(arguments)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            epochs = [list(data.train_dataloader()) for _ in range(2)]
        for epoch in epochs:
            assert [len(batch["codes"]) for batch in epoch] == [4, 4, 2]
            assert epoch[0]["codes"].shape == (4, 4, 4)
            assert epoch[0]["cond"].shape == (4, 4)
        first, second = (torch.cat([batch["codes"] for batch in epoch]).flatten(1) for epoch in epochs)
        assert not torch.equal(first, second)
        assert sorted(first.tolist()) == sorted(second.tolist())

    def test_fewer_pictures_than_a_batch(self, arguments: dict[str, Any]) -> None:
        (batch,) = prepared(arguments | {"batch_size": 64}).train_dataloader()
        assert len(batch["codes"]) == 10

    def test_captions_are_drawn_in_training(self) -> None:
        """Each of an image's captions with the same chance; in validation always the first."""
        texts = ["red", "green", "blue"]
        tokenizer = TextTokenizer.train(texts, vocab_size=60, length=2)
        samples = [{"codes": torch.zeros(2, 2), "captions": texts}] * 300
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn = collate_captioned(samples, text_tokenizer=tokenizer, is_train=True)["cond"]
        counts = [int((drawn == tokenizer.encode([text])).all(dim=1).sum()) for text in texts]
        assert sum(counts) == 300
        assert min(counts) > 70
        first = collate_captioned(samples, text_tokenizer=tokenizer, is_train=False)["cond"]
        assert torch.equal(first, tokenizer.encode(["red"]).expand(300, -1))

    def test_long_captions_are_cut_silently(
        self, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            batches = list(prepared(arguments | {"text_length": 1}).train_dataloader())
        assert batches[0]["cond"].shape == (4, 1)
        assert not caplog.records

    def test_no_captions(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        write_shard(tmp_path / "train.tar", range(3), {0: [], 1: [], 2: []})
        with pytest.raises(ValueError, match="codes/train have no captions: nothing to learn text from"):
            prepared(arguments).train_dataloader()

    def test_codes_of_another_tokenizer(
        self, arguments: dict[str, Any], tmp_path: Path, tiny_vqgan: VQGAN
    ) -> None:
        """The tokenizer is trained again and exported to the same place: its old codes mean nothing now."""
        data = prepared(arguments)
        shutil.rmtree(tmp_path / "tokenizer")
        torch.nn.init.normal_(tiny_vqgan.quantizer.codebook)
        save_checkpoint(tmp_path / "tokenizer", image_tokenizer=tiny_vqgan)
        with pytest.raises(ValueError, match=r"encoded by another image tokenizer .* remove it to encode"):
            data.train_dataloader()

    def test_image_tokenizer_in_another_layout(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        make_taming(tmp_path / "taming")
        with pytest.raises(FileNotFoundError, match=r"export or convert the image tokenizer to a native"):
            prepared(arguments | {"image_tokenizer": str(tmp_path / "taming")})
