"""CodeData: it encodes what is missing, draws by seed, epoch and picture, and refuses what does not fit."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from shard_files import draw_picture, encode_picture, write_pictures, write_shard, write_tar

from checkpoint_io import CheckpointError
from mindalle.checkpoint import save_checkpoint
from mindalle.data import CodeData, TransformConfig
from mindalle.data.code_cache import CodeCache, identified_tokenizer
from mindalle.data.samples import seed_of
from mindalle.image import to_tensor
from mindalle.text import TextTokenizer
from mindalle.training.sequence import RQTransformerTraining
from stage1_vqgan import RQVAE, VQGAN
from stage2_transformer import RQTransformer

CAPTIONS: dict[int, list[str]] = {0: ["red", "a red square", "the red one"], 1: []}
RANDOM = TransformConfig(image_size=16, crop="random_resized", min_scale=0.3, flip_probability=0.5)


@pytest.fixture
def arguments(tmp_path: Path, tiny_vqgan: VQGAN) -> dict[str, Any]:
    save_checkpoint(tmp_path / "vqgan", image_tokenizer=tiny_vqgan)
    TextTokenizer.train(
        ["a red square circle", "a green the one", "blue yellow"], vocab_size=64, length=6
    ).save(tmp_path / "words.json")
    return {
        "train": str(write_shard(tmp_path / "train.tar", range(10), CAPTIONS)),
        "val": str(write_shard(tmp_path / "val.tar", [0, 1, 12], CAPTIONS)),
        "image_tokenizer": str(tmp_path / "vqgan"),
        "cache_dir": str(tmp_path / "codes"),
        "text_tokenizer": str(tmp_path / "words.json"),
        "text_length": 6,
        "batch_size": 4,
        "num_workers": 0,
    }


@pytest.fixture
def soft(arguments: dict[str, Any], tmp_path: Path, tiny_rqvae: RQVAE) -> dict[str, Any]:
    """With soft targets."""
    save_checkpoint(tmp_path / "rqvae", image_tokenizer=tiny_rqvae)
    return arguments | {"image_tokenizer": str(tmp_path / "rqvae"), "soft_targets_temperature": 0.5}


def ready(arguments: dict[str, Any], **changes: Any) -> CodeData:
    data = CodeData(**(arguments | changes))
    data.prepare_data()
    data.setup("fit")
    return data


def epochs(data: CodeData, count: int) -> list[list[dict[str, Any]]]:
    """Batches of the epochs of a training, as the model gets them."""
    loader = data.train_dataloader()
    return [[data.on_after_batch_transfer(batch, 0) for batch in loader] for _ in range(count)]


def validation(data: CodeData) -> list[dict[str, Any]]:
    return [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            same = torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name]
            assert same, name


class TestPreparing:
    def test_once(self, arguments: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """How to be quicker is said while there is something to encode."""
        caplog.set_level(logging.INFO, "mindalle")
        ready(arguments)
        assert "train.tar on the CPU, in one process: tools/encode.py is quicker" in caplog.text
        assert "val.tar on the CPU" in caplog.text
        caplog.clear()
        files = [path for path in (tmp_path / "codes").rglob("*") if path.suffix]
        assert {path.parent.name for path in files} == {"train", "val"}
        before = {path: path.stat().st_mtime_ns for path in files}
        ready(arguments)
        assert {path: path.stat().st_mtime_ns for path in files} == before
        assert "on the CPU" not in caplog.text

    def test_crops_of_training_only(self, arguments: dict[str, Any]) -> None:
        data = ready(arguments, num_crops=3, transform=RANDOM)
        assert [cache.plan.num_crops for cache in data.caches.values()] == [3, 1]

    def test_ready_caches(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        made = epochs(ready(arguments), 1)[0]
        caches = {split: str(tmp_path / "codes" / split) for split in ("train", "val")}
        for name in ("train.tar", "val.tar"):
            (tmp_path / name).unlink()
        assert_same(epochs(ready(arguments, **caches, cache_dir=None), 1)[0], made)

    def test_no_validation(self, arguments: dict[str, Any]) -> None:
        assert ready(arguments, val=None).val_dataloader() == []

    def test_text_tokenizer_is_looked_for_first(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        """Not after hours of encoding."""
        with pytest.raises(
            FileNotFoundError,
            match=r"no text tokenizer at .*none.json: train one on the captions with python "
            r"tools/train_tokenizer.py .*train.tar --length 6 --out .*none.json; to fine-tune a model, name",
        ):
            ready(arguments, text_tokenizer=str(tmp_path / "none.json"))
        with pytest.raises(
            FileNotFoundError, match=r"no text tokenizer at None: .* --out text_tokenizer.json"
        ):
            ready(arguments, text_tokenizer=None)
        assert not (tmp_path / "codes").exists()


class TestValidation:
    def test_in_order_with_centre_and_first_caption(
        self, arguments: dict[str, Any], tiny_vqgan: VQGAN, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = ready(arguments, batch_size=2, num_crops=2, transform=RANDOM, bpe_dropout=0.9)
        found = validation(data)
        images = torch.stack([to_tensor(draw_picture(i)[0]) for i in (0, 1, 12)])
        with torch.no_grad():
            assert torch.equal(torch.cat([batch["codes"] for batch in found]), tiny_vqgan.encode(images))
        assert data.text_tokenizer is not None
        expected = data.text_tokenizer.encode(["red", "", draw_picture(12)[1]])
        assert torch.equal(torch.cat([batch["cond"] for batch in found]), expected)
        assert [len(batch["codes"]) for batch in found] == [2, 1]
        assert found[1]["keys"] == ["val.tar/0012"]
        assert "1 of 3 pictures in" in caplog.text
        assert "have no caption: they train the null condition" in caplog.text

    def test_words_that_the_tokenizer_does_not_know(
        self, arguments: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Captions of another script trained on [UNK], and nobody was told."""
        shard = write_shard(tmp_path / "korean.tar", range(3), {0: ["빨간 사과"], 1: ["red " * 99]})
        ready({**arguments, "train": str(shard), "cache_dir": str(tmp_path / "korean")})
        assert "train: 1 of 3 captions have unknown words, 1 are cut at" in caplog.text


class TestTraining:
    def test_every_picture_once_an_epoch(self, arguments: dict[str, Any]) -> None:
        data = ready(arguments, batch_size=5)
        first, second = epochs(data, 2)
        keys = [[key for batch in epoch for key in batch["keys"]] for epoch in (first, second)]
        assert keys[0] != keys[1]
        assert set(keys[0]) == set(keys[1]) == {f"train.tar/{i:04d}" for i in range(10)}
        batch = first[0]
        assert (batch["codes"].shape, batch["codes"].dtype) == ((5, 4, 4), torch.int64)
        assert (batch["cond"].shape, batch["cond"].dtype) == ((5, 6), torch.int64)

    def test_crop_and_caption_by_seed_epoch_and_picture(self, arguments: dict[str, Any]) -> None:
        data = ready(arguments, batch_size=10, num_crops=3, transform=RANDOM, seed=3)
        cache, tokenizer = data.caches["train"], data.text_tokenizer
        assert tokenizer is not None
        crops, captions = Counter[int](), Counter[str]()
        for epoch, (batch,) in enumerate(epochs(data, 4)):
            for row, key in enumerate(batch["keys"]):
                rng, index = random.Random(seed_of(3, epoch, key)), int(key[-4:])
                crop, caption = rng.randrange(3), rng.choice(cache.picture(index).captions or ("",))
                assert torch.equal(batch["codes"][row], cache.codes(index, crop))
                assert torch.equal(batch["cond"][row], tokenizer.encode([caption])[0])
                crops[crop] += 1
                captions[caption] += index == 0
        assert min(crops.values()) > 2
        assert sum(count > 0 for count in captions.values()) > 1

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_the_same_again_whoever_reads(self, arguments: dict[str, Any], num_workers: int) -> None:
        settings = {"num_crops": 3, "transform": RANDOM, "bpe_dropout": 0.5}
        first, second = epochs(ready(arguments, **settings), 2)
        again = epochs(ready(arguments, **settings, num_workers=num_workers), 2)
        assert_same(again[0] + again[1], first + second)
        resumed = ready(arguments, **settings, num_workers=num_workers)
        resumed.load_state_dict({"epoch": 1, "batch": 1})
        assert_same(epochs(resumed, 1)[0][:1], second[1:2])

    def test_bpe_dropout(self, arguments: dict[str, Any]) -> None:
        plain, dropped = (epochs(ready(arguments, bpe_dropout=dropout), 1)[0] for dropout in (0.0, 1.0))
        for one, other in zip(plain, dropped, strict=True):
            assert one["keys"] == other["keys"]
            assert torch.equal(one["codes"], other["codes"])
            lengths = [(batch["cond"] != 0).sum(dim=1) for batch in (one, other)]
            assert bool((lengths[0] <= lengths[1]).all())
            assert bool((lengths[1] == 6).any())

    def test_long_captions_are_cut_silently(
        self, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        data = ready(arguments, text_length=1)
        with caplog.at_level(logging.INFO):
            assert epochs(data, 1)[0][0]["cond"].shape == (4, 1)
        assert "lost" not in caplog.text


class TestConditions:
    def test_classes(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        write_pictures(tmp_path / "train", [f"{name}/{i}.png" for i in range(3) for name in ("ant", "bee")])
        write_pictures(tmp_path / "val", ["ant/9.png", "bee/9.png"])
        folders = {split: str(tmp_path / split) for split in ("train", "val")}
        data = ready(arguments, **folders, condition="class", text_tokenizer=None)
        assert data.num_classes == 2
        for batch in epochs(data, 1)[0]:
            assert batch["cond"].tolist() == [int(key.startswith("bee")) for key in batch["keys"]]
            assert batch["cond"].dtype == torch.int64

    def test_none(self, arguments: dict[str, Any]) -> None:
        data = ready(arguments, condition="none", text_tokenizer=None)
        assert set(epochs(data, 1)[0][0]) == {"codes", "keys", "num_skipped"}
        assert data.num_classes is None

    def test_prompts(self, arguments: dict[str, Any]) -> None:
        """Read as captions and labels are."""
        data = ready(arguments)
        assert data.text_tokenizer is not None
        assert torch.equal(data.encode_prompts(["red", ""]), data.text_tokenizer.encode(["red", ""]))
        with pytest.raises(ValueError, match=r"with the condition text reads texts, got \[1\]"):
            data.encode_prompts([1])
        labels = CodeData(**(arguments | {"condition": "class", "text_tokenizer": None}))
        labels.text_tokenizer = None
        assert labels.encode_prompts([3, 1]).tolist() == [3, 1]
        free = CodeData(**(arguments | {"condition": "none"}))
        with pytest.raises(ValueError, match=r"with the condition none reads no prompts, got \['red'\]"):
            free.encode_prompts(["red"])


class TestSoftTargets:
    def test_distributions_around_the_codes(self, soft: dict[str, Any], tiny_rqvae: RQVAE) -> None:
        data = ready(soft)
        for batch in epochs(data, 1)[0] + validation(data):
            targets, codes = batch["targets"], batch["codes"]
            assert targets.shape == (*codes.shape, 24)
            assert targets.dtype == torch.float32
            torch.testing.assert_close(targets.sum(dim=-1), torch.ones(codes.shape))
            assert torch.equal(targets.argmax(dim=-1), codes)
            assert not {"latents", "seed"} & set(batch)
        hard = validation(ready(soft, soft_targets_temperature=None, cache_dir=soft["cache_dir"] + "2"))[0]
        batch = validation(data)[0]
        assert hard["keys"] == batch["keys"]
        assert (
            float((hard["codes"] == batch["codes"]).float().mean()) > 0.98
        )  # latents are kept in half precision
        assert torch.equal(data.codebook(), tiny_rqvae.codebook())
        assert data.code_shape == (4, 4, 3)

    def test_drawn_codes(self, soft: dict[str, Any]) -> None:
        """The same again in a run that is resumed; others in another epoch; never in validation."""
        data = ready(soft, is_stochastic=True, batch_size=10)
        (first,), (second,) = epochs(data, 2)
        assert_same(epochs(ready(soft, is_stochastic=True, batch_size=10), 1)[0], [first])
        order = [second["keys"].index(key) for key in first["keys"]]
        assert not torch.equal(first["codes"], second["codes"][order])
        is_likeliest = first["codes"] == first["targets"].argmax(dim=-1)
        expected = first["targets"].max(dim=-1).values.mean()
        assert float(is_likeliest.float().mean()) == pytest.approx(float(expected), abs=0.1)
        for batch in validation(data):
            assert torch.equal(batch["codes"], batch["targets"].argmax(dim=-1))

    def test_draws_differ_from_step_to_step(self, soft: dict[str, Any], tmp_path: Path) -> None:
        """Of one and the same picture, in one and the same place."""
        alone = str(write_shard(tmp_path / "alone.tar", [0]))
        data = ready(soft, train=alone, val=None, is_stochastic=True, batch_size=1)
        drawn = {tuple(batch["codes"].flatten().tolist()) for (batch,) in epochs(data, 4)}
        assert len(drawn) == 4

    def test_in_a_training(
        self, soft: dict[str, Any], tmp_path: Path, tiny_rq: RQTransformer, tiny_rqvae: RQVAE
    ) -> None:
        """Lightning calls all that is needed; the model reads the tokenizer's codebook."""
        training = RQTransformerTraining(tiny_rq.config)
        trainer = pl.Trainer(
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=tmp_path,
        )
        trainer.fit(training, datamodule=CodeData(**soft, is_stochastic=True))
        assert torch.equal(training.model.codebook, tiny_rqvae.codebook())
        assert trainer.global_step == 2
        assert float(trainer.callback_metrics["val/loss"]) > 0


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"soft_targets_temperature": 0.0}, "soft_targets_temperature must be positive, got 0"),
            ({"is_stochastic": True}, "is_stochastic draws from soft targets: set soft_targets_temperature"),
            ({"bpe_dropout": 1.5}, r"bpe_dropout must be in \[0, 1\], got 1.5"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ],
    )
    def test_settings(self, arguments: dict[str, Any], changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CodeData(**(arguments | changes))

    def test_nowhere_to_put_the_codes(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match="is not encoded yet: set cache_dir, where its codes go, or encode"
        ):
            ready(arguments, cache_dir=None)

    def test_not_prepared(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(FileNotFoundError, match=r"no code cache at .*codes/train: it has no header.json"):
            CodeData(**arguments).setup("fit")

    def test_no_captions(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        bare = str(write_shard(tmp_path / "bare.tar", range(3), {0: [], 1: [], 2: []}))
        with pytest.raises(
            ValueError, match=r"3 of 3 pictures in .*codes/train have no caption: set condition"
        ):
            ready(arguments, train=bare)

    def test_no_classes(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match=r"not all pictures in .*codes/train have a class: expected class"
        ):
            ready(arguments, condition="class")

    def test_other_classes(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        write_pictures(tmp_path / "train", ["ant/0.png", "cat/0.png"])
        write_pictures(tmp_path / "val", ["ant/0.png", "bee/0.png"])
        folders = {split: str(tmp_path / split) for split in ("train", "val")}
        with pytest.raises(
            ValueError, match="train and val must have the same, got bee, cat in one of them only"
        ):
            ready(arguments, **folders, condition="class")

    def test_classes_of_validation_alone(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        """A model of two classes took label 2 for its null class, and validated on it without a word."""
        write_pictures(tmp_path / "train", ["ant/0.png", "bee/0.png"])
        write_pictures(tmp_path / "val", ["ant/0.png", "bee/0.png", "cat/0.png"])
        folders = {split: str(tmp_path / split) for split in ("train", "val")}
        message = r"train has 2 classes, so val may have 2 at most, got 3 \(cat in val only\): leave their"
        with pytest.raises(ValueError, match=message):
            ready(arguments, **folders, condition="class")
        assert ready(arguments, **folders, condition="none").num_classes is None
        swapped = {"train": folders["val"], "val": folders["train"], "cache_dir": str(tmp_path / "swapped")}
        assert ready(arguments, **swapped, condition="class").num_classes == 3

    def test_labels_of_validation_alone(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        """Shards on the network have labels without names."""
        picture = encode_picture(draw_picture(0)[0])
        specs = {}
        for split, labels in {"train": "01", "val": "04"}.items():
            files = {
                f"{i}.{kind}": content
                for i in labels
                for kind, content in (("png", picture), ("cls", i.encode()))
            }
            specs[split] = f"pipe:cat {write_tar(tmp_path / f'{split}.tar', files)}"
        with pytest.raises(ValueError, match="train has 2 classes, so val may have 2 at most, got 5: leave"):
            ready(arguments, **specs, condition="class", allow_pipe=True)

    def test_soft_targets_of_one_code_per_position(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"soft targets are for residual codes \(RQ-VAE\)"):
            ready(arguments, soft_targets_temperature=0.5)

    def test_no_latents(self, soft: dict[str, Any]) -> None:
        ready(soft, soft_targets_temperature=None)
        caches = {split: f"{soft['cache_dir']}/{split}" for split in ("train", "val")}
        with pytest.raises(
            ValueError, match=r"need latents, and .*train has none: encode again with --latents"
        ):
            ready(soft, **caches)

    def test_other_shapes(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        ready(arguments, transform=TransformConfig(image_size=24))
        changes = {"train": f"{arguments['cache_dir']}/train", "cache_dir": str(tmp_path / "other")}
        with pytest.raises(
            ValueError, match=r"train has codes of shape \(6, 6\), val of \(4, 4\): encode one"
        ):
            ready(arguments, **changes)

    def test_codes_of_another_tokenizer(
        self, arguments: dict[str, Any], tmp_path: Path, tiny_vqgan: VQGAN
    ) -> None:
        """The tokenizer is trained again and exported to the same place: its old codes mean nothing now."""
        ready(arguments)
        torch.nn.init.normal_(tiny_vqgan.quantizer.codebook)
        save_checkpoint(tmp_path / "again", image_tokenizer=tiny_vqgan)
        again = arguments | {"image_tokenizer": str(tmp_path / "again")}
        with pytest.raises(FileExistsError, match=r"holds codes of another plan \(tokenizer: "):
            ready(again)
        with pytest.raises(
            CheckpointError, match=r"encoded by another image tokenizer .* remove it to encode"
        ):
            CodeData(**again).setup("fit")


def test_a_config_file(arguments: dict[str, Any]) -> None:
    """As LightningCLI reads it."""
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_class_arguments(CodeData, "data")
    config = arguments | {
        "transform": {"image_size": 32, "crop": "dalle"},
        "num_crops": 2,
        "bpe_dropout": 0.1,
    }
    data = parser.instantiate_classes(parser.parse_object({"data": config})).data
    assert data.transform == TransformConfig(image_size=32, crop="dalle")
    assert (data.specs["val"], data.bpe_dropout) == (arguments["val"], 0.1)


def test_cache_of_the_command_is_the_data_modules(arguments: dict[str, Any]) -> None:
    data = ready(arguments)
    tokenizer_hash = identified_tokenizer(arguments["image_tokenizer"])[1]
    assert len(CodeCache(f"{arguments['cache_dir']}/train", tokenizer_hash=tokenizer_hash)) == 10
    assert data.caches["val"].header.count == 3
