"""Averaged weights: their arithmetic, and what a run has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tokenizer_runs import VAL, Pictures, draw_batch, training
from torch.utils.data import DataLoader

from mindalle.training import AveragedWeights
from mindalle.training.checkpoints import RunCheckpoint


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


def test_averages_follow_the_weights_to_their_device() -> None:
    """On a GPU they stayed in main memory, to which each step copied all weights. Here meta is the GPU."""
    averages, module = AveragedWeights(), training("vqgan")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    averages.setup(trainer, module, "fit")
    module.to("meta")
    averages.on_fit_start(trainer, module)
    assert {tensor.device.type for tensor in averages._average_model.state_dict().values()} == {"meta"}


def test_a_late_stop_keeps_the_weights(tmp_path: Path) -> None:
    """At the end of the training the averages are copied over the weights, and were saved as such."""

    class EarlyStop(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    weights = Weights()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            *(AveragedWeights(0.3), EarlyStop(), weights),
            RunCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2),
        ],
        max_epochs=5,
    )
    trainer.fit(training("vqgan"), Pictures([draw_batch(0, 1)], VAL))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (trainer.global_step, content["global_step"]) == (3, 3)
    name = "model.decoder.conv_out.weight"
    assert torch.equal(content["current_model_state"][name], weights.seen[-1])
    assert not torch.equal(content["state_dict"][name], weights.seen[-1])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\)"):
        AveragedWeights(decay)
