"""Averaged weights: what is validated, drawn with and exported is steadier than any single step's."""

from __future__ import annotations

from functools import partial

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class AveragedWeights(WeightAveraging):
    """Lightning's averaging with a decay that starts low, so that early averages forget the random start.

    A checkpoint has the averages under `state_dict` and the weights of the last step, from which the run
    goes on, under `current_model_state`.

    Args:
        decay: of the average per optimiser step, in (0, 1); step n uses at most (1 + n) / (10 + n).

    Raises:
        ValueError: if the decay is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        super().__init__(use_buffers=False, avg_fn=partial(_average, decay=decay))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the averages to the weights' device: Lightning makes them before it moves the weights."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)


def _average(averaged: Tensor, current: Tensor, num_averaged: Tensor | int, *, decay: float) -> Tensor:
    steps = float(num_averaged)
    return averaged.lerp(current, 1 - min(decay, (1 + steps) / (10 + steps)))
