"""What every training shares: optimiser, warm-up and cosine, and a checkpoint that tells what it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from checkpoint_io import config_to_mapping, flatten_config
from mindalle.run import RUN_KEY
from mindalle.training.muon import MuonAdamW


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) or Muon with linear warm-up and a cosine to the last step."""

    learning_rate: float = 5e-4  # at its peak, > 0
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment, in [0, 1)
    weight_decay: float = 0.0  # decoupled, on matrices only (not biases, norms, single vectors), >= 0
    muon: bool = False  # for the matrices of a sequence model's blocks, see `MuonAdamW`; AdamW for the rest
    warmup_steps: int = 100  # optimiser steps of linear warm-up, >= 0
    final_share: float = 0.0  # learning rate at the last step / at its peak, in [0, 1]; 1 = constant

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError(
                "learning_rate must be positive, weight_decay and warmup_steps at least 0, "
                f"got {self.learning_rate}, {self.weight_decay} and {self.warmup_steps}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"final_share must be in [0, 1], got {self.final_share}")

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate of a step as share of the peak.

        Args:
            step: counted from 0.
            total_steps: of the training, >= 1; not used by a constant rate.

        Returns:
            In (0, 1] during warm-up, then falling from 1 to `final_share`.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.final_share == 1:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


class Training(pl.LightningModule):
    """A Lightning module around `self.model`, which is what is trained and exported.

    Subclasses set `kind` and `self.model`, and write `training_step` and `validation_step`.

    Args:
        optimizer: settings; None = the defaults.
    """

    kind: str
    """Key of the model's class in `STAGE1`, `STAGE2`, or "clip"."""
    model: Any
    """The network."""

    def __init__(self, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__()
        self.optimizer_config = optimizer or OptimizerConfig()

    def model_config(self) -> Any:
        """The dataclass that `self.model` was built from."""
        return self.model.config

    def trained_modules(self) -> list[nn.Module]:
        """What the optimiser trains: the model; an adversary is added here."""
        return [self.model]

    def block_matrices(self) -> list[nn.Parameter]:
        """What Muon may train: matrices (m, n) between layers, no embeddings or classifiers; none here."""
        return []

    def configure_optimizers(self) -> Any:
        """The optimiser, with decay on matrices only, and the schedule, per step.

        Raises:
            ValueError: if the learning rate falls to the last step and there is none, or Muon is wanted and
                has nothing to train, or only parts of matrices.
        """
        config = self.optimizer_config
        parameters = [p for module in self.trained_modules() for p in module.parameters() if p.requires_grad]
        matrices = self.block_matrices() if config.muon else []
        if config.muon and not matrices:
            raise ValueError(
                f"optimizer.muon is for the blocks of sequence models, and {type(self).__name__} has none: "
                "set it to false"
            )
        orthogonalised = {id(matrix) for matrix in matrices}
        others = [p for p in parameters if id(p) not in orthogonalised]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = (
            MuonAdamW(
                matrices,
                groups,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                betas=config.betas,
            )
            if config.muon
            else torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        )
        total = self.total_steps() if config.final_share < 1 else 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model; only its dropout may have changed.

        Raises:
            ValueError: if the checkpoint's kind or config is another.
        """
        about = checkpoint.get(RUN_KEY)
        if about is None:
            return
        ours = {"kind": self.kind, **flatten_config(config_to_mapping(self.model_config()))}
        theirs = {"kind": about["kind"], **flatten_config(about["config"])}
        differing = [
            f"{name} {theirs[name]} there, {ours[name]} here"
            for name in ours
            if name in theirs and ours[name] != theirs[name] and not name.endswith("_dropout")
        ]
        if differing:
            raise ValueError(
                f"the checkpoint holds another model than model.config describes ({'; '.join(differing)}): "
                "go on with the config that the run was started with, or train anew"
            )

    def on_train_start(self) -> None:
        """Go on with the config's settings: a checkpoint brings back those that it was made with."""
        config, scheduler = self.optimizer_config, self.lr_schedulers()
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):  # another strategy's or a subclass's
            return
        rate = config.learning_rate
        scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        groups = scheduler.optimizer.param_groups
        for group in groups:
            group.update(lr=rate * factor, initial_lr=rate, weight_decay=config.weight_decay)
            if "betas" in group:  # AdamW's
                group["betas"] = config.betas
        groups[-1]["weight_decay"] = 0.0  # of all that is no matrix

    def total_steps(self) -> int:
        """Optimiser steps of the whole training.

        Raises:
            ValueError: if it has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                "the training needs an end: set trainer.max_steps or trainer.max_epochs "
                "(or optimizer.final_share to 1 for a constant learning rate)"
            )
        return int(steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the weights are of, in plain values: loading a checkpoint executes nothing."""
        checkpoint[RUN_KEY] = {"kind": self.kind, "config": config_to_mapping(self.model_config())}
