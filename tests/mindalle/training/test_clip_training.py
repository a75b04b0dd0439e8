"""CLIP training: the loss against open_clip's and by hand, equal captions, retrieval, several processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from clip_models import CAPTIONS, captioned, clip_config, clip_training, fit, write_tokenizer
from PIL import Image
from torch import Tensor

from checkpoint_io import config_to_mapping
from mindalle.checkpoint import save_checkpoint
from mindalle.cli.export import main as export
from mindalle.cli.train import main as train
from mindalle.clip import NativeClip
from mindalle.rerank import ClipReranker
from mindalle.run import RUN_KEY
from mindalle.training.clip import CaptionRetrieval, ClipTraining, contrastive_loss, pair_logits

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path)


@pytest.fixture
def training(tokenizer_file: Path) -> ClipTraining:
    return clip_training(tokenizer_file)


class StopAfter(pl.Callback):
    """A run that is killed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def features(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, n, 8, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def captions_of(*words: int) -> Tensor:
    """Ids (n, 2) of captions of one word."""
    return torch.tensor([[9, word] for word in words])


class TestLoss:
    def test_distinct_captions_as_open_clip(self) -> None:
        from open_clip.loss import ClipLoss

        images, texts = features(5)
        scale = torch.tensor(20.0)
        loss, _ = contrastive_loss(pair_logits(images, texts, captions_of(1, 2, 3, 4, 5), scale))
        torch.testing.assert_close(loss, ClipLoss()(images, texts, scale))

    def test_equal_captions_by_hand(self) -> None:
        """Pictures 0 and 2 are of the same caption: neither is the other's mistake, in either direction."""
        images, texts = features(3)
        texts[2] = texts[0]
        loss, _ = contrastive_loss(pair_logits(images, texts, captions_of(1, 2, 1), torch.tensor(5.0)))
        p = (5 * images @ texts.T).exp()  # (pictures, captions)
        terms = [
            p[0, 0] / (p[0, 0] + p[0, 1]),
            p[1, 1] / (p[1, 0] + p[1, 1] + p[1, 2]),
            p[2, 2] / (p[2, 1] + p[2, 2]),
            p[0, 0] / (p[0, 0] + p[1, 0]),
            p[1, 1] / (p[0, 1] + p[1, 1] + p[2, 1]),
            p[2, 2] / (p[1, 2] + p[2, 2]),
        ]
        torch.testing.assert_close(loss, -torch.stack(terms).log().mean())

    def test_accuracy_by_hand(self) -> None:
        logits = torch.tensor([[3.0, 1.0, 0.0], [5.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
        # pictures find 0, 0, 2; captions find 1, 1, 2
        assert contrastive_loss(logits)[1].item() == pytest.approx(4 / 6)

    def test_autocast_keeps_large_logits_apart(self) -> None:
        images, texts = features(6)
        ids, scale = captions_of(*range(6)), torch.tensor(100.0)
        expected = pair_logits(images, texts, ids, scale)
        with torch.autocast("cpu", torch.bfloat16):
            logits = pair_logits(images, texts, ids, scale)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected)


class TestTraining:
    def test_the_loss_falls_and_captions_are_found(self, training: ClipTraining) -> None:
        batch = captioned(CAPTIONS)
        trainer = fit(training, [batch], max_steps=40, val=[batch])
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        assert metrics["train/loss"] < 0.1 < 1.3 < math.log(len(CAPTIONS))
        for name in ("train/accuracy", "val/accuracy", "val/recall_at_1", "val/recall_at_5"):
            assert metrics[name] == 1, name
        assert metrics["train/temperature"] == pytest.approx(
            1 / training.model.logit_scale.exp().item(), rel=0.01
        )

    def test_pictures_without_caption_are_left_out(self, training: ClipTraining) -> None:
        """With them the batch is what it is without them; a blank caption is none."""
        whole = captioned([CAPTIONS[0], "", CAPTIONS[2], "  "])
        part = {"images": whole["images"][[0, 2]], "captions": [CAPTIONS[0], CAPTIONS[2]]}
        losses = []
        for batch in (whole, part):
            trainer = fit(training, [batch], max_steps=1)
            losses.append(trainer.callback_metrics["train/loss"])
            training = clip_training(Path(str(training.text_tokenizer)))
        torch.testing.assert_close(losses[0], losses[1])

    def test_no_captions_at_all(self, training: ClipTraining) -> None:
        with pytest.raises(ValueError, match=r"none of the 2 pictures of batch 0 has a caption"):
            fit(training, [captioned(["", ""])], max_steps=1)
        with pytest.raises(ValueError, match=r"no picture of the validation data has a caption"):
            fit(training, [captioned(CAPTIONS)], max_steps=1, val=[captioned([""])])

    def test_pixels_are_normalised_as_the_reranker_does(self, training: ClipTraining) -> None:
        """What is trained is what is used: a picture through both ways of preparing it."""
        from mindalle.image import to_pil

        training.setup("fit")
        images = captioned(["a"])["images"].mul(127.5).round().div(127.5)
        seen: list[Tensor] = []
        training.model.visual.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        training._encode({"images": images, "captions": ["a"]})
        pixels = training.config.preprocess()(to_pil(images)[0])
        torch.testing.assert_close(seen[0][0], pixels, atol=0.03, rtol=0)

    def test_pictures_of_another_size(self, training: ClipTraining) -> None:
        batch = {"images": torch.zeros(2, 3, 24, 24), "captions": CAPTIONS[:2]}
        with pytest.raises(
            ValueError,
            match=r"must be \(B, 3, 16, 16\) .* got \(2, 3, 24, 24\): .*transform.image_size to 16",
        ):
            fit(training, [batch], max_steps=1)

    @pytest.mark.parametrize(("start", "expected"), [(9.0, math.log(50.0)), (-1.0, 0.0)])
    def test_the_temperature_stays_in_its_range(
        self, tokenizer_file: Path, start: float, expected: float
    ) -> None:
        module = clip_training(tokenizer_file, max_logit_scale=50.0)
        module.model.logit_scale.data.fill_(start)
        fit(module, [captioned(CAPTIONS)], max_steps=1)
        assert module.model.logit_scale.item() == pytest.approx(expected)

    def test_the_checkpoint_tells_what_it_holds(self, training: ClipTraining, tmp_path: Path) -> None:
        fit(training, [captioned(CAPTIONS)], max_steps=1).save_checkpoint(tmp_path / "run.ckpt")
        content = torch.load(tmp_path / "run.ckpt", weights_only=True)
        assert content[RUN_KEY] == {
            "kind": "clip",
            "config": config_to_mapping(training.config),
            "text_tokenizer": Path(str(training.text_tokenizer)).read_text(),
        }
        assert set(content["state_dict"]) == {f"model.{name}" for name in training.model.state_dict()}

    def test_a_resumed_run_goes_on_the_same(self, tokenizer_file: Path, tmp_path: Path) -> None:
        batch = captioned(CAPTIONS)
        whole, half, rest = (clip_training(tokenizer_file) for _ in range(3))
        fit(whole, [batch], max_steps=6)
        trainer = fit(half, [batch], max_steps=6, callbacks=[StopAfter(3)])
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        assert trainer.global_step == 3
        fit(rest, [batch], max_steps=6, ckpt_path=tmp_path / "run.ckpt")
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(rest.state_dict()[name], tensor, atol=0, rtol=0)


class TestVocabulary:
    def test_of_another_tokenizer(self, tokenizer_file: Path) -> None:
        config = clip_config(tokenizer_file, vocab_size=40)
        expected = clip_config(tokenizer_file).vocab_size
        with pytest.raises(
            ValueError, match=rf"vocab_size must be {expected} \(ids of .*text_tokenizer.json \+ 2\), got 40"
        ):
            fit(ClipTraining(config, str(tokenizer_file)), [captioned(CAPTIONS)], max_steps=1)

    def test_no_tokenizer(self, tokenizer_file: Path) -> None:
        module = ClipTraining(clip_config(tokenizer_file), "nowhere.json")
        with pytest.raises(FileNotFoundError, match=r"no tokenizer at nowhere.json: .*train_tokenizer.py"):
            fit(module, [captioned(CAPTIONS)], max_steps=1)

    def test_settings_that_do_not_go_together(self, tokenizer_file: Path) -> None:
        config = clip_config(tokenizer_file)
        for options in ({"config": config}, {"text_tokenizer": "words.json"}, {}):
            with pytest.raises(ValueError, match=r"pass either pretrained, or config and text_tokenizer"):
                ClipTraining(**options)
        with pytest.raises(ValueError, match=r"got pretrained 'emoji', text_tokenizer None and a config"):
            ClipTraining(config, pretrained="emoji")
        with pytest.raises(ValueError, match=r"max_logit_scale must be at least 1, got 0.5"):
            ClipTraining(config, str(tokenizer_file), max_logit_scale=0.5)


@pytest.mark.parametrize("kind", ["native", "run"])
def test_starts_from_a_pretrained_one(training: ClipTraining, tmp_path: Path, kind: str) -> None:
    """Its config and text tokenizer come with it."""
    trainer = fit(training, [captioned(CAPTIONS)], max_steps=1)
    source = tmp_path / ("native" if kind == "native" else "run.ckpt")
    if kind == "native":
        clip = NativeClip(model=training.model, config=training.config, tokenize=training.tokenize)
        save_checkpoint(source, clip=clip)
    else:
        trainer.save_checkpoint(source)
    module = ClipTraining(pretrained=str(source))
    assert module.model.training
    assert config_to_mapping(module.config) == config_to_mapping(training.config)
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], tensor)
    fit(module, [captioned(CAPTIONS)], max_steps=1)


def test_from_a_config_to_a_reranker(tmp_path: Path, tokenizer_file: Path) -> None:
    """As a user does it: pictures in a folder, a config, two commands."""
    colours = {"red": (220, 30, 30), "green": (30, 160, 60)}
    (tmp_path / "pictures").mkdir()
    for colour, rgb in colours.items():
        Image.new("RGB", (20, 20), rgb).save(tmp_path / "pictures" / f"{colour}.png")
        (tmp_path / "pictures" / f"{colour}.txt").write_text(f"a {colour} apple\n")
    settings = {
        "config": config_to_mapping(clip_config(tokenizer_file)),
        "text_tokenizer": str(tokenizer_file),
    }
    settings["optimizer"] = {"learning_rate": 3e-3, "warmup_steps": 2}
    pictures, run = str(tmp_path / "pictures"), tmp_path / "run"
    data = {
        "train": pictures,
        "val": pictures,
        "transform": {"image_size": 16},
        "batch_size": 2,
        "num_workers": 0,
    }
    config = {
        "model": {"class_path": "mindalle.training.ClipTraining", "init_args": settings},
        "data": {"class_path": "mindalle.data.ImageData", "init_args": data},
        "trainer": {"accelerator": "cpu", "max_steps": 30, "logger": False, "enable_progress_bar": False}
        | {"check_val_every_n_epoch": 15, "default_root_dir": str(run), "enable_model_summary": False},
    }
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(config))
    assert train(["fit", "--config", str(tmp_path / "clip.yaml")]) == 0
    assert export([str(run), str(tmp_path / "my-clip")]) == 0
    reranker = ClipReranker.from_pretrained(tmp_path / "my-clip")
    images = [Image.new("RGB", (40, 30), rgb) for rgb in colours.values()]
    assert [int(reranker.score(images, f"a {colour} apple").argmax()) for colour in colours] == [0, 1]


class TestRetrieval:
    def test_ranks_by_hand(self) -> None:
        """Seven pictures of six captions, the similarities written down."""
        similarity = torch.full((7, 6), 0.1)
        caption = torch.tensor([0, 1, 2, 3, 4, 5, 0])
        places = torch.tensor([0, 0, 1, 4, 4, 5, 0])  # of the own caption, by similarity
        for row, place in enumerate(places):
            similarity[row, caption[row]] = 0.5
            others = [column for column in range(6) if column != caption[row]]
            similarity[row, others[:place]] = 0.9
        metric = CaptionRetrieval()
        texts = torch.eye(6)[caption]  # so that the product with a picture's row is its similarities
        ids = captions_of(*caption.tolist())
        metric.update(similarity[:3], texts[:3], ids[:3])
        metric.update(similarity[3:], texts[3:], ids[3:])
        recalls = metric.compute()
        assert recalls["recall_at_1"].item() == pytest.approx(3 / 7)
        assert recalls["recall_at_5"].item() == pytest.approx(6 / 7)

    @pytest.mark.parametrize("value", [1.0, math.nan])
    def test_a_model_without_an_opinion_finds_nothing(self, value: float) -> None:
        metric = CaptionRetrieval()
        metric.update(torch.full((6, 2), value), torch.ones(6, 2), captions_of(*range(6)))
        assert metric.compute()["recall_at_5"] == 0


SCRIPT = """
import sys
from pathlib import Path
import torch
from clip_models import CAPTIONS, captioned, clip_training, fit
from pytorch_lightning import Callback
from pytorch_lightning.strategies import DDPStrategy

class Split(Callback):
    '''Each process keeps every other pair.'''
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.cut(trainer, batch)
    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.cut(trainer, batch)
    def cut(self, trainer, batch):
        part = slice(trainer.global_rank, None, trainer.world_size)
        batch["images"], batch["captions"] = batch["images"][part], batch["captions"][part]

if __name__ == "__main__":
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    module = clip_training(folder / "text_tokenizer.json")
    # rank 1 has a picture without caption, rank 0 another one's caption
    batches = [captioned([*CAPTIONS, CAPTIONS[1], ""], seed) for seed in range(3)]
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    trainer = fit(module, batches, val=batches[:2], max_steps=6, devices=processes, strategy=strategy,
                  use_distributed_sampler=False, callbacks=[Split()])
    if trainer.is_global_zero:
        metrics = {k: v.clone() for k, v in trainer.callback_metrics.items()}
        torch.save({"metrics": metrics, "state": module.state_dict()}, folder / f"of{processes}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Half of each batch in each process: the same losses, gradients and so weights."""
    write_tokenizer(tmp_path)
    script = tmp_path / "train_clip.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(processes)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"of{processes}.pt") for processes in (1, 2))
    for name in ("train/loss", "train/accuracy", "train/temperature", "val/recall_at_1", "val/recall_at_5"):
        torch.testing.assert_close(two["metrics"][name], one["metrics"][name], atol=1e-4, rtol=1e-4)
    for name, tensor in one["state"].items():
        if (
            "in_proj_bias" not in name
        ):  # a key's bias changes nothing: its gradient is noise, which Adam enlarges
            torch.testing.assert_close(two["state"][name], tensor, atol=1e-4, rtol=1e-3, msg=name)
