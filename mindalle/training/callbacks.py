"""What every run does besides learning: reproducible steps, a stop at nonsense, a count of bad pictures."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
KEYS_SHOWN = 8


class SeededSteps(pl.Callback):
    """Makes the randomness of a step (dropout, dropped conditions) follow from seed, epoch, batch and rank.

    A resumed run needs no state of a generator: it draws what the uninterrupted run would have drawn.
    The seed is `seed_everything`'s.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch's generators."""
        seed = os.environ.get("PL_GLOBAL_SEED", "0")
        place = f"{seed}/{trainer.current_epoch}/{batch_idx}/{trainer.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big", signed=True))


class StopOnNonFinite(pl.Callback):
    """Stops before a loss that is not a number reaches the weights.

    The checkpoints written so far stay as they are, so that the run can go on from the last of them.

    Raises:
        FloatingPointError: names the step, the batch and what to try.
    """

    def __init__(self) -> None:
        self._keys: list[str] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which samples the batch is made of."""
        self._keys = list(batch.get("keys", [])) if isinstance(batch, Mapping) else []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at the loss; on several devices all stop together."""
        is_finite = bool(torch.isfinite(loss).all())
        if trainer.strategy.reduce_boolean_decision(is_finite, all=True):
            return
        shown = ", ".join(self._keys[:KEYS_SHOWN]) or "unnamed samples"
        more = f" and {len(self._keys) - KEYS_SHOWN} more" if len(self._keys) > KEYS_SHOWN else ""
        what = (
            "the loss of another process is not finite"
            if is_finite
            else f"the loss is {float(loss.detach())}"
        )
        where = f" on rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        raise FloatingPointError(
            f"{what} at step {trainer.global_step}; the batch{where}: {shown}{more}. "
            "The weights are as before it, the last checkpoint is good. Look at these pictures, then go on "
            "with --ckpt_path last and a lower learning_rate, trainer.gradient_clip_val 1.0, "
            "or trainer.precision 32-true"
        )


class SkippedReport(pl.Callback):
    """Counts pictures that could not be read, logs the count, and tells it after each epoch."""

    def __init__(self) -> None:
        self.num_skipped = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count anew."""
        self.num_skipped = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what the batch skipped."""
        skipped = int(batch.get("num_skipped", 0)) if isinstance(batch, Mapping) else 0
        if skipped:
            self.num_skipped += skipped
            pl_module.log("train/skipped", float(self.num_skipped))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of this epoch's."""
        if self.num_skipped:
            logger.warning(
                "%d pictures could not be read in epoch %d and were skipped: the warnings above say which",
                self.num_skipped,
                trainer.current_epoch,
            )
