"""Fully sharded training of sequence models: `--trainer.strategy fsdp_blocks`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mindalle.training.sheets import PromptSheet
from stage2_transformer.layers import Block


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters of a model over processes (FSDP, Zhao et al. 2023): each keeps a part of each.

    Args:
        model: has transformer `Block`s. Each is gathered only while it computes; embeddings, heads and
            norms are gathered for the whole step.
        mesh: of one dimension, the processes.
    """
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


class BlockFSDPStrategy(ModelParallelStrategy):
    """Shards `module.model` over all processes, block by block; on GPUs, and for tests on the CPU.

    Parameters keep their names and shapes, so that decay on matrices only, clipping by norm and
    `precision: bf16-mixed` work as without. Checkpoints are whole files, which any number of processes
    resumes from and which can be exported. Each process builds the whole model first, in its main memory.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Start the processes' group, all of them in the one dimension of data."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # not known when Lightning asks for it
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around `configure_model`: shards what it leaves.

        Raises:
            ValueError: if weights are averaged, which Lightning does not do for sharded ones, or prompts are
                drawn: one process would wait for the weights of the others, which do not draw.
        """
        module: Any = self.lightning_module
        for refused, what in ((WeightAveraging, "averaged weights (EMA)"), (PromptSheet, "a PromptSheet")):
            if any(isinstance(callback, refused) for callback in module.trainer.callbacks):
                raise ValueError(f"{what} cannot be had with fsdp_blocks: remove the callback, or use ddp")
        yield
        shard_blocks(module.model, self.device_mesh["data_parallel"])


StrategyRegistry.register(
    "fsdp_blocks",
    BlockFSDPStrategy,
    description="Fully sharded data parallel, one transformer block at a time",
)
