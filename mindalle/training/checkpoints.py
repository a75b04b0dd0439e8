"""When and how a run's checkpoints are written: at its end too, and whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from checkpoint_io import atomic_path


class RunCheckpoint(ModelCheckpoint):
    """Lightning's, whose last.ckpt lacks the steps after the last multiple of `every_n_train_steps`."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time, and after the last step: here, since averages replace the weights later."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if _is_last_step(trainer):
            self._save_last_step(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where it is time, and before a stop that was decided later, such as early stopping's."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.should_stop:
            self._save_last_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: it is too late, averages have replaced the weights; Lightning saves even in a dry run."""

    def _save_last_step(self, trainer: pl.Trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _is_last_step(trainer: pl.Trainer) -> bool:
    is_last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    is_last_batch = trainer.is_last_batch and is_last_epoch
    return trainer.should_stop or trainer.global_step == trainer.max_steps or is_last_batch


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it: whoever is killed leaves the last one whole.

    Lightning writes to the system's temporary directory. Where that is another disk, what it calls a move is
    a copy, which can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: of the Trainer.
            path: the file; to an address such as s3://... Lightning writes.
            storage_options: of no account.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        for partial in path.parent.glob(".*.ckpt"):  # of a run that was killed: one process writes here
            partial.unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
