"""A training that is run with one process and with two, which must learn the same: a script and a function."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mindalle.training import GPTTraining
from mindalle.training.base import OptimizerConfig
from stage2_transformer import ConditionConfig, GPTConfig, TransformerConfig

NUM_STEPS, BATCH_SIZE = 4, 8


class Batches(Dataset[dict[str, Tensor]]):
    """As many different batches as there are steps, of which each process sees its share."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rows = slice(rank, None, world_size)

    def __len__(self) -> int:
        return NUM_STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        codes = torch.randint(24, (BATCH_SIZE, 4, 4), generator=generator)
        cond = torch.randint(1, 64, (BATCH_SIZE, 6), generator=generator)
        return {"codes": codes[self.rows], "cond": cond[self.rows]}


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        batches = Batches(self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(batches, batch_size=None)


class Losses(pl.Callback):
    """The loss of each step, the mean over the processes."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def train(
    folder: Path,
    strategy: str = "auto",
    devices: int = 1,
    *,
    max_steps: int = NUM_STEPS,
    ckpt_path: str | None = None,
    gradient_checkpointing: bool = False,
) -> list[float]:
    """Losses of the steps; leaves a checkpoint in `folder`."""
    config = GPTConfig(
        transformer=TransformerConfig(width=32, num_layers=2, num_heads=2),
        condition=ConditionConfig(kind="text", vocab_size=64, length=6),
        vocab_size=24,
        code_shape=(4, 4),
    )
    torch.manual_seed(0)
    module = GPTTraining(
        config,
        OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, final_share=1.0),
        gradient_checkpointing=gradient_checkpointing,
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_steps=max_steps,
        gradient_clip_val=0.5,
        callbacks=[losses],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path)
    groups = trainer.optimizers[0].param_groups
    decayed = [sum(p.ndim >= 2 for p in group["params"]) for group in groups]
    assert decayed == [len(groups[0]["params"]), 0], "decay is for matrices only, sharded too"
    trainer.save_checkpoint(folder / f"{strategy}_{trainer.global_step}.ckpt")
    return losses.values


if __name__ == "__main__":
    out, strategy_name, *options = sys.argv[1:]
    torch.set_num_threads(1)
    values = train(
        Path(out), strategy_name, 2, gradient_checkpointing="recompute" in options, ckpt_path=None
    )
    Path(out, f"{strategy_name}.json").write_text(json.dumps(values))
