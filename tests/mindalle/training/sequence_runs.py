"""Short trainings of tiny sequence models on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from mindalle.training import GPTTraining, RQTransformerTraining
from mindalle.training.base import OptimizerConfig
from mindalle.training.callbacks import SeededSteps
from mindalle.training.sequence import SequenceTraining
from stage2_transformer import GPT, ConditionConfig, RQTransformer

Batch = dict[str, Tensor]
CONDITIONS = {
    "text": ConditionConfig(kind="text", vocab_size=64, length=6),
    "class": ConditionConfig(kind="class", vocab_size=5, length=1),
    "class_null": ConditionConfig(kind="class", vocab_size=5, length=1, has_null_class=True),
    "none": ConditionConfig(kind="none", vocab_size=1, length=1),
}
both = pytest.mark.parametrize("model", ["gpt", "rq"], indirect=True)
FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, final_share=1.0)


class Recorder(pl.Callback):
    """What was logged, after each batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class OneBatch(pl.LightningDataModule):
    """The same batch in each epoch, with the codebook of an image tokenizer."""

    def __init__(self, batch: Batch, table: Tensor, **attributes: Any) -> None:
        super().__init__()
        self.batch = batch
        self.table = table
        for name, value in attributes.items():
            setattr(self, name, value)

    def codebook(self) -> Tensor:
        return self.table

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]


def fit(
    module: pl.LightningModule,
    data: Any,
    *callbacks: pl.Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[pl.Trainer, list[dict[str, float]]]:
    """Train; the checkpoints that `callbacks` write are the only ones."""
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SeededSteps(), recorder, *callbacks],
        **{"max_epochs": -1, **options},
    )
    with torch.random.fork_rng(devices=[]):
        if isinstance(data, pl.LightningDataModule):
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        else:
            trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    return trainer, recorder.metrics


def batch_for(code_shape: tuple[int, ...], condition: ConditionConfig) -> Batch:
    """Each of four conditions has its own codes."""
    generator = torch.Generator().manual_seed(0)
    batch = {"codes": torch.randint(24, (4, *code_shape), generator=generator)}
    if condition.kind == "text":
        batch["cond"] = torch.randint(1, 64, (4, 6), generator=generator)
    elif condition.kind == "class":
        batch["cond"] = torch.arange(4)
    return batch


def training(model: GPT | RQTransformer, condition: str = "text", **options: Any) -> SequenceTraining:
    """A module with new weights and the model's shape."""
    cls = GPTTraining if isinstance(model, GPT) else RQTransformerTraining
    config = replace(model.config, condition=CONDITIONS[condition])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config, **{"optimizer": FAST, **options})


def assert_equal(found: Any, expected: Any) -> None:
    """The same tensors and numbers in the same places."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal(ours, theirs)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
