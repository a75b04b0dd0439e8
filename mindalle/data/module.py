"""What the data modules share: a stream for each process, and its place in the checkpoint of a run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from mindalle.data.stream import StreamLoader


class StreamData(pl.LightningDataModule):
    """A data module whose training batches go on where a killed run was.

    The place is kept here since Lightning restores its loaders neither after a whole epoch nor where the
    schedule has asked for the number of steps before.

    Args:
        batch_size: B, samples per step and device, >= 1.
        num_workers: processes that read ahead, >= 0.
        seed: of all that is random in the data.
    """

    def __init__(self, *, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                "batch_size must be at least 1 and num_workers at least 0, "
                f"got {batch_size} and {num_workers}"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._train_loader: StreamLoader | None = None
        self._place: dict[str, int] | None = None

    def stream_settings(self, *, is_train: bool) -> dict[str, Any]:
        """The arguments of a stream for this process, save for its items.

        Args:
            is_train: for training; Lightning's `overfit_batches` makes that evaluation on the same samples.
        """
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "rank": self.trainer.global_rank if self.trainer else 0,
            "world_size": self.trainer.world_size if self.trainer else 1,
            "is_train": is_train,
        }

    @property
    def is_overfitting(self) -> bool:
        """Whether Lightning's `overfit_batches` asks for the same training batches in each epoch."""
        return bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]

    def resumed(self, loader: StreamLoader) -> StreamLoader:
        """The training loader, sent to where the run was; its place is saved with the run from now on."""
        if self._place is not None:
            loader.load_state_dict(self._place)
        self._train_loader, self._place = loader, None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The place of the next training batch: `epoch` and `batch`."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place, be the training loader made already or not."""
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)
        else:
            self._place = state_dict
