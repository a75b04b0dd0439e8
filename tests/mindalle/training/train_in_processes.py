"""A training to be run by one process, or by several as a script; both must learn the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mindalle.training.base import OptimizerConfig
from mindalle.training.sequence import GPTTraining, RQTransformerTraining
from stage2_transformer import ConditionConfig, GPTConfig, RQTransformerConfig, TransformerConfig

NUM_STEPS, BATCH_SIZE = 8, 8
STACK = TransformerConfig(width=32, num_layers=2, num_heads=2)
TEXT = ConditionConfig(kind="text", vocab_size=64, length=6)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, final_share=1.0)
GPT_CONFIG = GPTConfig(transformer=STACK, condition=TEXT, vocab_size=24, code_shape=(4, 4))
RQ_CONFIG = RQTransformerConfig(
    body=STACK,
    head=STACK,
    condition=TEXT,
    codebook_sizes=(24, 20),
    code_shape=(4, 4, 2),
    codebook_width=8,
    has_shared_classifier=False,
)


class Batches(Dataset[dict[str, Tensor]]):
    """Two batches in turns, of which each process sees its share."""

    def __init__(self, code_shape: tuple[int, ...], rank: int, world_size: int) -> None:
        self.code_shape = code_shape
        self.rows = slice(rank, None, world_size)

    def __len__(self) -> int:
        return NUM_STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index % 2)
        codes = torch.randint(20, (BATCH_SIZE, *self.code_shape), generator=generator)
        cond = torch.randint(1, 64, (BATCH_SIZE, 6), generator=generator)
        return {"codes": codes[self.rows], "cond": cond[self.rows]}


class Data(pl.LightningDataModule):
    def __init__(self, code_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.code_shape = code_shape

    def codebook(self) -> Tensor:
        depth = self.code_shape[2] if len(self.code_shape) == 3 else 1
        return torch.randn(depth, 24, 8, generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        batches = Batches(self.code_shape, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(batches, batch_size=None)


class Losses(pl.Callback):
    """The loss of each step, the mean over the processes."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def train(
    folder: Path,
    kind: str,
    strategy: str = "auto",
    devices: int = 1,
    *,
    max_steps: int = NUM_STEPS,
    ckpt_path: Path | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> list[float]:
    """Train a tiny model and save it as `folder`/KIND_STRATEGY_STEPS.ckpt; returns the loss of each step."""
    torch.manual_seed(0)
    module = (
        GPTTraining(GPT_CONFIG, OPTIMIZER, **options)
        if kind == "gpt"
        else RQTransformerTraining(RQ_CONFIG, OPTIMIZER, **options)
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_steps=max_steps,
        gradient_clip_val=0.5,
        callbacks=[losses, *callbacks],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Data(module.model.code_shape), ckpt_path=ckpt_path, weights_only=True)
    decayed, others = (group["params"] for group in trainer.optimizers[0].param_groups)
    assert all(parameter.ndim >= 2 for parameter in decayed)  # sharded too
    assert all(parameter.ndim == 1 for parameter in others)
    trainer.save_checkpoint(folder / f"{kind}_{strategy}_{trainer.global_step}.ckpt")
    return losses.values


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    values = train(out, devices=2, **arguments)
    (out / "losses.json").write_text(json.dumps(values))
