"""Averaged weights: their arithmetic, and what a run has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tokenizer_runs import draw_batch, training
from torch.utils.data import DataLoader

from mindalle.training import AveragedWeights


class Weights(pl.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.model.decoder.last_layer.detach().clone())


def fit(steps: int, decay: float) -> tuple[pl.Trainer, list[torch.Tensor]]:
    weights = Weights()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AveragedWeights(decay), weights],
        max_steps=steps,
    )
    trainer.fit(training("vqgan"), DataLoader([draw_batch(0, 1)] * steps, batch_size=None))
    return trainer, weights.seen


def test_the_average_by_hand(tmp_path: Path) -> None:
    """The decay of step n is min(decay, (1 + n) / (10 + n)); the first step's weights begin it."""
    trainer, seen = fit(6, decay=0.3)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    average = seen[0]
    for n, weights in enumerate(seen[1:], start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weights
    name = "model.decoder.conv_out.weight"
    torch.testing.assert_close(content["state_dict"][name], average)
    assert not torch.equal(average, seen[-1])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\)"):
        AveragedWeights(decay)
