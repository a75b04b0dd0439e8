"""What every training shares: the schedule, which weights decay, and that a training ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mindalle.training import OptimizerConfig
from mindalle.training.base import Training


class Norm(nn.Module):
    """A matrix, a bias, and a norm, one of whose two vectors is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.norm.bias.requires_grad_(False)


class Line(Training):
    """Notes the optimiser's settings in each step."""

    def __init__(self, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__(optimizer)
        self.model = Norm()
        self.rates: list[float] = []
        self.groups: list[dict[str, Any]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.groups = [dict(group) for group in self.trainer.optimizers[0].param_groups]
        self.rates.append(self.groups[0]["lr"])
        assert self.groups[1]["lr"] == self.rates[-1]
        loss: Tensor = self.model.norm(self.model.linear(batch)).square().mean()
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """It is none of the toolkit's models."""


def fit(module: Line, *, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": -1, **options},
    )
    trainer.fit(module, DataLoader(torch.randn(4, 5, 3), batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def cosine(step: int, steps: int) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"warmup_steps": 3}, [1 / 3, 2 / 3, 1, *(cosine(step, 6) for step in range(6))]),
        ({"warmup_steps": 0}, [cosine(step, 9) for step in range(9)]),
        (
            {"warmup_steps": 4, "final_share": 0.1},
            [1 / 4, 2 / 4, 3 / 4, 1, *(0.1 + 0.9 * cosine(step, 5) for step in range(5))],
        ),
        ({"warmup_steps": 2, "final_share": 1.0}, [1 / 2, *[1] * 8]),
        ({"warmup_steps": 20}, [(step + 1) / 20 for step in range(9)]),  # it ends before
    ],
)
def test_the_schedule_by_hand(settings: dict[str, Any], factors: list[float]) -> None:
    module = Line(OptimizerConfig(learning_rate=3e-3, **settings))
    fit(module, max_steps=9)
    assert module.rates == pytest.approx([3e-3 * factor for factor in factors])


def test_accumulated_batches_are_one_step() -> None:
    module = Line(OptimizerConfig(learning_rate=1.0, warmup_steps=2))
    fit(module, max_steps=4, accumulate_grad_batches=2)
    assert module.rates[::2] == module.rates[1::2] == pytest.approx([0.5, 1, cosine(0, 2), cosine(1, 2)])


def test_epochs_are_an_end_too() -> None:
    module = Line(OptimizerConfig(learning_rate=1.0, warmup_steps=0))
    fit(module, max_epochs=2)  # of four batches
    assert module.rates == pytest.approx([cosine(step, 8) for step in range(8)])


def test_after_the_end_the_rate_stays() -> None:
    """A cosine would rise again."""
    config = OptimizerConfig(warmup_steps=2, final_share=0.2)
    assert [config.factor(step, 10) for step in (10, 11, 15, 18)] == pytest.approx([0.2] * 4)
    assert config.factor(2, 2) == 1  # warm-up and nothing more: no division by zero


def test_decay_is_for_matrices() -> None:
    module = Line(OptimizerConfig(weight_decay=0.3, betas=(0.8, 0.99)))
    fit(module, max_steps=1)
    decayed, others = module.groups
    assert [p is module.model.linear.weight for p in decayed["params"]] == [True]
    assert {id(p) for p in others["params"]} == {id(module.model.linear.bias), id(module.model.norm.weight)}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == others["betas"] == (0.8, 0.99)


def test_a_training_without_an_end() -> None:
    message = r"needs an end: set trainer.max_steps or trainer.max_epochs \(or optimizer.final_share to 1"
    with pytest.raises(ValueError, match=message):
        fit(Line(), max_steps=-1)
    constant = Line(OptimizerConfig(final_share=1.0, warmup_steps=0))
    trainer = fit(constant, max_steps=-1, max_time={"seconds": 1}, limit_train_batches=1)
    assert trainer.global_step > 0
    assert set(constant.rates) == {5e-4}


def test_muon_has_nothing_to_train() -> None:
    message = "optimizer.muon is for the blocks of sequence models, and Line has none: set it to false"
    with pytest.raises(ValueError, match=message):
        fit(Line(OptimizerConfig(muon=True)), max_steps=1)


class TestResuming:
    def resumed(self, tmp_path: Path, config: OptimizerConfig) -> Line:
        """After four steps with `before`, from its checkpoint."""
        before = OptimizerConfig(learning_rate=0.5, warmup_steps=2, weight_decay=0.1)
        fit(Line(before), max_steps=4).save_checkpoint(tmp_path / "last.ckpt")
        module = Line(config)
        fit(module, max_steps=8, ckpt_path=tmp_path / "last.ckpt")
        return module

    def test_with_other_settings(self, tmp_path: Path) -> None:
        """After a loss that is not a number users are told to lower the rate, and the checkpoint won."""
        config = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.2, betas=(0.5, 0.6))
        module = self.resumed(tmp_path, config)
        assert module.rates == pytest.approx([1e-3 * cosine(step, 6) for step in range(2, 6)])
        assert [group["weight_decay"] for group in module.groups] == [0.2, 0.0]
        assert [group["betas"] for group in module.groups] == [(0.5, 0.6)] * 2

    def test_with_the_same(self, tmp_path: Path) -> None:
        config = OptimizerConfig(learning_rate=0.5, warmup_steps=2, weight_decay=0.1)
        module = self.resumed(tmp_path, config)
        whole = Line(config)
        fit(whole, max_steps=8)
        assert module.rates == whole.rates[4:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, .* got 0.0, 0.0 and 100"),
        ({"weight_decay": -0.1}, "weight_decay and warmup_steps at least 0, got 0.0005, -0.1 and 100"),
        ({"warmup_steps": -1}, "at least 0, got 0.0005, 0.0 and -1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers"),
        ({"final_share": 1.1}, r"final_share must be in \[0, 1\], got 1.1"),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)
