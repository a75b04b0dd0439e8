"""Training: the losses fall, codes stay alive, a run resumes, and what is exported draws."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from shard_files import draw_picture, write_shard
from torch import Tensor
from torch.utils.data import DataLoader

from checkpoint_io import config_to_mapping
from mindalle.cli.export import main as export
from mindalle.cli.train import TrainingCLI
from mindalle.cli.train import main as train
from mindalle.data.codes import CachedCodes
from mindalle.data.shards import ImageShards
from mindalle.image import to_tensor
from mindalle.pipeline import Pipeline
from stage1_vqgan import VQGAN
from stage1_vqgan.training import VQGANTraining
from stage2_transformer import GPT, ConditionConfig, SamplingParams
from stage2_transformer.training import GPTTraining

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


class Recorder(pl.Callback):
    """What was logged and the learning rate, after each batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.metrics.append(values | {"learning_rate": self.learning_rate})


def fit(
    module: pl.LightningModule, batches: Any, *, ckpt_path: Path | None = None, **options: Any
) -> tuple[pl.Trainer, list[dict[str, float]]]:
    """Train on a list of ready batches."""
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
        **{"max_epochs": -1, **options},
    )
    loader = DataLoader(batches, batch_size=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, recorder.metrics


@pytest.fixture
def pictures() -> dict[str, Tensor]:
    return {"images": torch.stack([to_tensor(draw_picture(i)[0]) for i in range(8)])}


@pytest.fixture
def codes() -> dict[str, Tensor]:
    """Each of four captions has its own codes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(24, (4, 4, 4), generator=generator),
        "cond": torch.randint(1, 64, (4, 6), generator=generator),
    }


@pytest.fixture
def vqgan(tiny_vqgan: VQGAN) -> VQGANTraining:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQGANTraining(tiny_vqgan.config, learning_rate=2e-3, warmup_steps=3, restart_every=5)


def gpt_training(tiny_gpt: GPT, condition: ConditionConfig | None = None, **options: Any) -> GPTTraining:
    config = replace(tiny_gpt.config, condition=condition or tiny_gpt.config.condition)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPTTraining(config, learning_rate=1e-2, **options)


class TestVQGANTraining:
    def test_the_loss_falls_and_codes_live(self, vqgan: VQGANTraining, pictures: dict[str, Tensor]) -> None:
        _, metrics = fit(vqgan, [pictures], max_steps=36)
        assert metrics[-1]["train/loss"] < 0.5 * metrics[3]["train/loss"]
        assert metrics[-1]["train/l1"] < 0.5 * metrics[3]["train/l1"]
        assert metrics[-1]["train/psnr"] > metrics[3]["train/psnr"] + 2
        # of 24; an entry that has just moved may share its place with another, so that one of the two is idle
        assert metrics[-1]["train/codes_used"] >= 20
        with torch.no_grad():
            assert vqgan.model.eval().encode(pictures["images"]).unique().numel() >= 20

    def test_without_restarts_codes_die(self, tiny_vqgan: VQGAN, pictures: dict[str, Tensor]) -> None:
        """Which is why there are restarts: the test above is not true anyway."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = VQGANTraining(tiny_vqgan.config, learning_rate=2e-3, warmup_steps=3, restart_until=0.0)
        _, metrics = fit(module, [pictures], max_steps=15)
        assert metrics[-1]["train/codes_used"] < 20

    def test_what_a_restart_moves(self, vqgan: VQGANTraining, pictures: dict[str, Tensor]) -> None:
        """Entries that were not chosen, and no others, to latents of the batch."""
        vqgan.log = lambda *args, **options: None  # type: ignore[method-assign]
        vqgan.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=10)
        vqgan.usage[:20] = torch.arange(1, 21)
        before = vqgan.model.quantizer.codebook.detach().clone()
        vqgan._restart_dead_codes(pictures["images"])
        after = vqgan.model.quantizer.codebook.detach()
        assert torch.equal(after[:20], before[:20])
        latents = vqgan.model.encode_latents(pictures["images"]).detach()
        latents = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, h, w) -> (B * h * w, C)
        for entry in after[20:]:
            assert (entry - latents).abs().amax(dim=1).min() < 1e-6
        assert not vqgan.usage.any()

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_restarts_once_in_a_step(
        self,
        vqgan: VQGANTraining,
        pictures: dict[str, Tensor],
        monkeypatch: pytest.MonkeyPatch,
        accumulate: int,
    ) -> None:
        """With accumulated gradients each batch of a step restarted, by the codes of one batch alone."""
        steps: list[int] = []
        restart = vqgan._restart_dead_codes

        def record(images: Tensor) -> None:
            steps.append(vqgan.global_step)
            restart(images)

        monkeypatch.setattr(vqgan, "_restart_dead_codes", record)
        vqgan.restart_every, vqgan.restart_until = 3, 0.5
        fit(vqgan, [pictures] * 8, max_steps=7, accumulate_grad_batches=accumulate)
        assert steps == [0, 3]

    def test_validation_changes_nothing(self, vqgan: VQGANTraining, pictures: dict[str, Tensor]) -> None:
        logged: dict[str, Any] = {}
        vqgan.log_dict = lambda values, **options: logged.update(values)  # type: ignore[method-assign]
        before = {name: tensor.clone() for name, tensor in vqgan.state_dict().items()}
        with torch.no_grad():
            vqgan.eval().validation_step(pictures, 0)
        assert set(logged) == {f"val/{name}" for name in ("loss", "l1", "quantizer", "psnr", "codes_used")}
        for name, tensor in vqgan.state_dict().items():
            assert torch.equal(tensor, before[name])
        with torch.no_grad():
            reconstructions, quantized = vqgan.model(pictures["images"])
        l1 = F.l1_loss(reconstructions, pictures["images"])
        torch.testing.assert_close(logged["val/l1"], l1)
        torch.testing.assert_close(logged["val/loss"], l1 + quantized.loss)

    @pytest.mark.parametrize(
        "numbers",
        [{"learning_rate": 0.0}, {"warmup_steps": -1}, {"restart_every": 0}, {"restart_until": 1.5}],
    )
    def test_ranges(self, tiny_vqgan: VQGAN, numbers: dict[str, Any]) -> None:
        message = "learning_rate must be positive, .* restart_every at least 1 and restart_until in"
        with pytest.raises(ValueError, match=message):
            VQGANTraining(tiny_vqgan.config, **numbers)


class TestGPTTraining:
    def test_the_loss_falls(self, tiny_gpt: GPT, codes: dict[str, Tensor]) -> None:
        """The null condition has no picture of its own: what is dropped is what stays of the loss."""
        module = gpt_training(tiny_gpt, null_probability=0.1)
        _, metrics = fit(module, [codes], max_steps=60)
        assert metrics[0]["train/code_loss"] == pytest.approx(math.log(24), abs=0.2)
        assert metrics[-1]["train/loss"] < 0.5 * metrics[0]["train/loss"]
        with torch.no_grad():
            logits = module.model.eval()(codes["codes"], codes["cond"]).logits
            null = module.model.null_condition(codes["cond"])
            without = module.model(codes["codes"], null).logits
        first = codes["codes"][:, 0, 0]
        assert torch.equal(logits[:, 0, 0].argmax(-1), first)  # the first code follows from the text alone
        assert without[:, 0, 0].unique(dim=0).shape[0] == 1

    @pytest.mark.parametrize(
        "condition",
        [
            ConditionConfig(kind="class", vocab_size=5, length=1),
            ConditionConfig(kind="class", vocab_size=5, length=1, has_null_class=True),
            ConditionConfig(kind="none", vocab_size=1, length=1),
            ConditionConfig(kind="text", vocab_size=64, length=1),
        ],
    )
    def test_other_conditions(
        self, tiny_gpt: GPT, codes: dict[str, Tensor], condition: ConditionConfig
    ) -> None:
        """A text of a single id has no second one to predict, and its loss was not a number."""
        cond = {"class": torch.arange(4), "none": None, "text": codes["cond"][:, :1]}[condition.kind]
        batch = {"codes": codes["codes"]} | ({"cond": cond} if cond is not None else {})
        _, metrics = fit(gpt_training(tiny_gpt, condition, null_probability=0.5), [batch], max_steps=20)
        assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
        assert "train/text_loss" not in metrics[-1]

    @pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
    def test_condition_dropout(self, tiny_gpt: GPT, probability: float) -> None:
        module = gpt_training(tiny_gpt, null_probability=probability)
        seen: list[Tensor] = []
        module._loss = lambda codes, cond, stage: seen.append(cond)  # type: ignore[method-assign]
        cond = torch.randint(1, 64, (400, 6))
        batch = {"codes": torch.zeros(400, 4, 4, dtype=torch.int64), "cond": cond.clone()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module.training_step(batch, 0)
        module.validation_step(batch, 0)
        assert torch.equal(batch["cond"], cond)  # not changed in place
        assert torch.equal(seen[1], cond)  # never dropped in validation
        is_null = (seen[0] == 0).all(dim=1)
        assert torch.equal(seen[0][~is_null], cond[~is_null])
        assert is_null.float().mean().item() == pytest.approx(probability, abs=0.06)

    def test_losses_by_hand(self, tiny_gpt: GPT, codes: dict[str, Tensor]) -> None:
        module = gpt_training(tiny_gpt, text_weight=0.3)
        logged: dict[str, Any] = {}
        module.log_dict = lambda values, **options: logged.update(values)  # type: ignore[method-assign]
        module.log = lambda name, value, **options: logged.update({name: value})  # type: ignore[method-assign]
        with torch.no_grad():
            module.eval().validation_step(codes, 0)
            output = module.model(codes["codes"], codes["cond"])
        picked = output.logits.log_softmax(-1).gather(-1, codes["codes"].unsqueeze(-1))
        words = output.text_logits.log_softmax(-1).gather(-1, codes["cond"][:, 1:].unsqueeze(-1))
        torch.testing.assert_close(logged["val/code_loss"], -picked.mean())
        torch.testing.assert_close(logged["val/text_loss"], -words.mean())
        torch.testing.assert_close(logged["val/loss"], -picked.mean() - 0.3 * words.mean())

    def test_decay_is_for_matrices(self, tiny_gpt: GPT, codes: dict[str, Tensor]) -> None:
        module = gpt_training(tiny_gpt, weight_decay=0.2)
        trainer, _ = fit(module, [codes], max_steps=1)
        decayed, others = trainer.optimizers[0].param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0)
        assert {parameter.ndim for parameter in decayed["params"]} == {2}
        assert {parameter.ndim for parameter in others["params"]} == {1}
        assert len(decayed["params"]) + len(others["params"]) == len(list(module.parameters()))

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ({"weight_decay": -1}, "weight_decay and text_weight at least 0"),
            ({"warmup_share": 1.0}, r"warmup_share in \(0, 1\)"),
            ({"text_weight": -0.1}, "text_weight at least 0"),
            ({"null_probability": 1.1}, r"null_probability must be in \[0, 1\], got 1.1"),
        ],
    )
    def test_ranges(self, tiny_gpt: GPT, numbers: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            gpt_training(tiny_gpt, **numbers)


class TestSchedules:
    """Linear to the peak, then half a cosine to zero."""

    @pytest.mark.parametrize(("steps", "share"), [(20, 0.25), (10, 0.1), (7, 0.01), (1, 0.5)])
    def test_gpt(self, tiny_gpt: GPT, codes: dict[str, Tensor], steps: int, share: float) -> None:
        """Ten steps with a tenth for warm-up divided by zero in torch's OneCycleLR."""
        _, metrics = fit(gpt_training(tiny_gpt, warmup_share=share), [codes] * 3, max_steps=steps)
        warmup = max(1, round(steps * share))
        rise = [(step + 1) / warmup for step in range(min(steps, warmup))]
        fall = [
            0.5 + 0.5 * math.cos(math.pi * step / (steps - warmup)) for step in range(max(0, steps - warmup))
        ]
        assert [values["learning_rate"] for values in metrics] == pytest.approx(
            [1e-2 * factor for factor in rise + fall]
        )

    def test_vqgan(self, vqgan: VQGANTraining, pictures: dict[str, Tensor]) -> None:
        _, metrics = fit(vqgan, [pictures], max_steps=9)
        factors = [1 / 3, 2 / 3, 1] + [0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(6)]
        assert [values["learning_rate"] for values in metrics] == pytest.approx(
            [2e-3 * factor for factor in factors]
        )

    @pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 2}])
    def test_a_training_without_an_end(
        self, vqgan: VQGANTraining, tiny_gpt: GPT, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        """The length of an epoch of shards is not known: the rate jumped between zero and its peak."""
        shard = str(write_shard(tmp_path / "0.tar", range(4)))
        data = ImageShards([shard], [shard], image_size=16, batch_size=2, num_workers=0)
        for module in (vqgan, gpt_training(tiny_gpt)):
            trainer = pl.Trainer(
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                **options,
            )
            with pytest.raises(
                ValueError, match=r"falls to zero at the last step: say which with trainer.max"
            ):
                trainer.fit(module, data)


class TestCheckpoints:
    """Of Lightning: they resume, load by themselves, and hold no objects, whoever started the training."""

    @pytest.mark.parametrize("kind", ["vqgan", "gpt"])
    def test_round_trip(
        self,
        kind: str,
        vqgan: VQGANTraining,
        tiny_gpt: GPT,
        pictures: dict[str, Tensor],
        codes: dict[str, Tensor],
        tmp_path: Path,
    ) -> None:
        """A config object in the file kept torch from reading it, and the export found an empty stand-in."""
        module: Any = vqgan if kind == "vqgan" else gpt_training(tiny_gpt)
        batch = pictures if kind == "vqgan" else codes
        trainer, _ = fit(module, [batch], max_steps=4)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        content = torch.load(tmp_path / "run.ckpt", weights_only=True)
        assert content["hyper_parameters"]["config"] == config_to_mapping(module.model.config)

        loaded = type(module).load_from_checkpoint(tmp_path / "run.ckpt")
        assert loaded.model.config == module.model.config
        assert loaded.learning_rate == module.learning_rate
        for name, tensor in module.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)

        resumed, metrics = fit(loaded, [batch], max_steps=9, ckpt_path=tmp_path / "run.ckpt")
        assert (resumed.global_step, len(metrics)) == (9, 5)

    def test_export_finds_the_model(
        self, vqgan: VQGANTraining, pictures: dict[str, Tensor], tmp_path: Path
    ) -> None:
        trainer, _ = fit(vqgan, [pictures], max_steps=2)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        assert export(["--image-tokenizer", str(tmp_path / "run.ckpt"), str(tmp_path / "native")]) == 0
        exported = Pipeline.from_pretrained(tmp_path / "native").image_tokenizer
        for name, tensor in vqgan.model.state_dict().items():
            assert torch.equal(exported.state_dict()[name], tensor)


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def vqgan_config(folder: Path, *, max_steps: int) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "stage1_vqgan.training.VQGANTraining",
            "init_args": {
                "config": {
                    "convnet": {
                        "image_size": 16,
                        "channels": 32,
                        "channel_multipliers": [1, 1, 2],
                        "num_res_blocks": 1,
                        "attention_resolutions": [4],
                        "latent_channels": 8,
                    },
                    "quantizer": {"codebook_size": 32, "width": 8},
                },
                "learning_rate": 1e-3,
                "warmup_steps": 5,
                "restart_every": 10,
            },
        },
        "data": {
            "class_path": "mindalle.data.shards.ImageShards",
            "init_args": {
                "train_shards": [str(folder / "train-*.tar")],
                "val_shards": [str(folder / "val.tar")],
                "image_size": 16,
                "batch_size": 8,
                "num_workers": 0,
            },
        },
        "trainer": trainer_config(folder / "vqgan", max_steps),
    }


def gpt_config(folder: Path, *, max_steps: int) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "stage2_transformer.training.GPTTraining",
            "init_args": {
                "config": {
                    "vocab_size": 32,
                    "code_shape": [4, 4],
                    "transformer": {"width": 32, "num_layers": 2, "num_heads": 2},
                    "condition": {"kind": "text", "vocab_size": 60, "length": 4},
                },
                "learning_rate": 3e-3,
            },
        },
        "data": {
            "class_path": "mindalle.data.codes.CachedCodes",
            "init_args": {
                "image_tokenizer": str(folder / "tokenizer"),
                "train_shards": [str(folder / "train-*.tar")],
                "val_shards": [str(folder / "val.tar")],
                "cache_dir": str(folder / "codes"),
                "text_tokenizer": str(folder / "text_tokenizer.json"),
                "text_vocab_size": 60,
                "text_length": 4,
                "batch_size": 8,
            },
        },
        "trainer": trainer_config(folder / "gpt", max_steps),
    }


def trainer_config(folder: Path, max_steps: int) -> dict[str, Any]:
    checkpoints = {"dirpath": str(folder), "save_last": True, "every_n_train_steps": 10}
    return {
        "accelerator": "cpu",
        "max_steps": max_steps,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "callbacks": [
            {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": checkpoints}
        ],
    }


def write_shards(folder: Path) -> None:
    write_shard(folder / "train-0.tar", range(8))
    write_shard(folder / "train-1.tar", range(8, 16))
    write_shard(folder / "val.tar", range(4))


class TestCommandLine:
    def test_from_pictures_to_pictures(self, tmp_path: Path) -> None:
        """Fit a tokenizer, export it, fit a GPT on its codes, export both, draw."""
        write_shards(tmp_path)
        config = write_yaml(tmp_path / "vqgan.yaml", vqgan_config(tmp_path, max_steps=20))
        assert train(["fit", "--config", str(config)]) == 0
        run = str(tmp_path / "vqgan" / "last.ckpt")
        assert export(["--image-tokenizer", run, str(tmp_path / "tokenizer")]) == 0

        config = write_yaml(tmp_path / "gpt.yaml", gpt_config(tmp_path, max_steps=10))
        assert train(["fit", "--config", str(config)]) == 0
        # longer, from where it stopped
        run = str(tmp_path / "gpt" / "last.ckpt")
        assert train(["fit", "--config", str(config), "--ckpt_path", run, "--trainer.max_steps", "20"]) == 0
        assert torch.load(run, weights_only=True)["global_step"] == 20
        parts = ["--image-tokenizer", str(tmp_path / "tokenizer"), "--model", run]
        text = ["--text-tokenizer", str(tmp_path / "text_tokenizer.json")]
        assert export([*parts, *text, "--top-k", "8", "--dtype", "fp16", str(tmp_path / "model")]) == 0

        pipe = Pipeline.from_pretrained(tmp_path / "model")
        assert pipe.sampling.params == SamplingParams(top_k=8)
        result = pipe("a red square", num_images=2)
        assert [image.size for image in result.images] == [(16, 16)] * 2
        assert result.codes.shape == (2, 4, 4)

    @pytest.mark.slow
    def test_as_a_user_types_it(self, tmp_path: Path) -> None:
        """With the scripts, a logger and a progress bar; long enough for a prompt's colour to come out."""
        write_shards(tmp_path)

        def run(script: str, *arguments: object) -> None:
            command = [sys.executable, str(ROOT / "tools" / script), *map(str, arguments)]
            result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr

        for name, config in (
            ("vqgan", vqgan_config(tmp_path, max_steps=300)),
            ("gpt", gpt_config(tmp_path, max_steps=200)),
        ):
            for option in ("logger", "enable_progress_bar", "enable_model_summary"):
                del config["trainer"][option]
            run("train.py", "fit", "--config", write_yaml(tmp_path / f"{name}.yaml", config))
            if name == "vqgan":
                run(
                    "export.py", "--image-tokenizer", tmp_path / "vqgan" / "last.ckpt", tmp_path / "tokenizer"
                )
        parts = ["--image-tokenizer", tmp_path / "tokenizer", "--model", tmp_path / "gpt" / "last.ckpt"]
        run("export.py", *parts, "--text-tokenizer", tmp_path / "text_tokenizer.json", tmp_path / "model")

        pipe = Pipeline.from_pretrained(tmp_path / "model")
        for index in range(4):
            picture, caption = draw_picture(index)
            (image,) = pipe(caption, params=SamplingParams(temperature=0)).images
            expected, centre = (np.asarray(image)[6:10, 6:10].mean(axis=(0, 1)) for image in (picture, image))
            assert np.abs(centre - expected).max() < 60, caption

    @pytest.mark.parametrize(
        ("place", "key"),
        [
            ("trainer", "max_stepz"),
            ("data.init_args", "batchsize"),
            ("model.init_args", "lr"),
            ("model.init_args.config", "code_book"),
            ("model.init_args.config.quantizer", "codebooksize"),
        ],
    )
    def test_unknown_key(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, key: str
    ) -> None:
        config = vqgan_config(tmp_path, max_steps=1)
        section = config
        for name in place.split("."):
            section = section[name]
        section[key] = 3
        with pytest.raises(SystemExit) as caught:
            train(["fit", "--config", str(write_yaml(tmp_path / "wrong.yaml", config))])
        assert caught.value.code == 2
        assert key in capsys.readouterr().err

    def test_unknown_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            train(["fit", "--trainer.max_step", "3"])  # abbreviated
        assert caught.value.code == 2
        assert "max_step" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--data.train_shards=[none-*.tar]", "no shards match none-*.tar: point data.train_shards and"),
            ("--model.restart_every=0", "restart_every at least 1"),
            ("--model.config.quantizer.codebook_size=0", "codebook_size and width must be at least 1, got 0"),
            ("--trainer.max_steps=-1", "falls to zero at the last step: say which with trainer.max_steps"),
        ],
    )
    def test_errors_in_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
    ) -> None:
        write_shards(tmp_path)
        config = write_yaml(tmp_path / "vqgan.yaml", vqgan_config(tmp_path, max_steps=1))
        code, lines = run_in_process(["fit", "--config", str(config), option], capsys)
        assert code in (1, 2)
        assert message in lines[-1]
        assert not any("Traceback" in line for line in lines)
        if code == 1:
            assert lines[-1].startswith("train.py: error: ")
            code, lines = run_in_process(["fit", "--config", str(config), option, "--debug"], capsys)
            assert code == 1
            assert any("Traceback" in line for line in lines)

    def test_a_bug_keeps_its_stack_trace(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: object, stage: str) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(ImageShards, "setup", fail)
        config = write_yaml(tmp_path / "vqgan.yaml", vqgan_config(tmp_path, max_steps=1))
        with pytest.raises(RuntimeError, match="a bug"):
            train(["fit", "--config", str(config)])


def run_in_process(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and lines of stderr."""
    capsys.readouterr()
    try:
        code = train(arguments)
    except SystemExit as error:
        code = int(str(error.code))
    return code, capsys.readouterr().err.strip().splitlines()


class TestExport:
    """What is not in the tests of the other commands."""

    @pytest.fixture
    def runs(
        self,
        vqgan: VQGANTraining,
        tiny_gpt: GPT,
        pictures: dict[str, Tensor],
        codes: dict[str, Tensor],
        tmp_path: Path,
    ) -> Path:
        for name, module, batch in (
            ("vqgan", vqgan, pictures),
            ("gpt", gpt_training(tiny_gpt), codes),
        ):
            trainer, _ = fit(module, [batch], max_steps=1)
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return tmp_path

    def test_a_text_model_needs_its_tokenizer(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It would have been a checkpoint that cannot draw."""
        parts = ["--image-tokenizer", str(runs / "vqgan.ckpt"), "--model", str(runs / "gpt.ckpt")]
        assert export([*parts, str(runs / "out")]) == 2
        assert "--text-tokenizer goes with a model that reads text" in capsys.readouterr().err
        assert not (runs / "out").exists()

    def test_stages_of_different_vocabularies(
        self, runs: Path, tiny_gpt: GPT, codes: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = GPTTraining(replace(tiny_gpt.config, vocab_size=25))
        trainer, _ = fit(module, [codes], max_steps=1)
        trainer.save_checkpoint(runs / "gpt.ckpt")
        parts = ["--image-tokenizer", str(runs / "vqgan.ckpt"), "--model", str(runs / "gpt.ckpt")]
        assert export([*parts, str(runs / "out")]) == 1
        assert "vocabulary of 25 codes, its image tokenizer 24" in capsys.readouterr().err
        assert not (runs / "out").exists()

    def test_no_training_run(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for content in ({"hyper_parameters": {"config": {}}}, {"state_dict": {}}, {"hyper_parameters": 3}):
            torch.save(content, runs / "other.ckpt")
            assert export(["--image-tokenizer", str(runs / "other.ckpt"), str(runs / "out")]) == 1
            assert "other.ckpt is no checkpoint of a training run: it needs a" in capsys.readouterr().err

    def test_missing_card(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--image-tokenizer", str(runs / "vqgan.ckpt"), "--card", str(runs / "none.md")]
        assert export([*arguments, str(runs / "out")]) == 1
        assert "no model card at" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_repository(path: Path) -> None:
    """They parse, their numbers fit, and the parts agree with each other."""
    cli = TrainingCLI(args=["--config", str(path)], run=False, parser_kwargs={"parser_mode": "omegaconf"})
    assert cli.trainer.max_steps > 0
    if isinstance(cli.datamodule, ImageShards):
        assert cli.datamodule.image_size == cli.model.model.convnet.image_size
    if isinstance(cli.datamodule, CachedCodes):
        condition = cli.model.model.config.condition
        assert (cli.datamodule.text_length, cli.datamodule.text_vocab_size) == (
            condition.length,
            condition.vocab_size,
        )


def test_there_are_configs() -> None:
    assert {"first_light_vqgan", "first_light_gpt"} <= {path.stem for path in CONFIGS}
