"""Training a GPT over image codes with Lightning: cross-entropy on codes and text, condition dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint_io import config_from_mapping, config_to_mapping
from stage2_transformer.gpt import GPT, GPTConfig


class GPTTraining(pl.LightningModule):
    """Fits a GPT to cached codes.

    Batches have `codes` int64 (B, *code_shape) and `cond`: text ids (B, N), labels (B,), or absent.

    Args:
        config: of the model; from a checkpoint it comes as a mapping.
        learning_rate: of AdamW at its peak, per step, > 0.
        weight_decay: decoupled, on matrices only, >= 0.
        warmup_share: share of the training for linear warm-up before the cosine to zero, in (0, 1).
        text_weight: of the text's cross-entropy against the codes', >= 0.
        null_probability: chance that a sample's condition is replaced by the null condition, for guidance, in
            [0, 1].

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        config: GPTConfig,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        warmup_share: float = 0.03,
        text_weight: float = 0.1,
        null_probability: float = 0.1,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or weight_decay < 0 or not 0 < warmup_share < 1 or text_weight < 0:
            raise ValueError(
                "learning_rate must be positive, weight_decay and text_weight at least 0 and warmup_share in "
                f"(0, 1), got {learning_rate}, {weight_decay}, {text_weight} and {warmup_share}"
            )
        if not 0 <= null_probability <= 1:
            raise ValueError(f"null_probability must be in [0, 1], got {null_probability}")
        if isinstance(config, Mapping):
            config = config_from_mapping(GPTConfig, config, where="hyper_parameters.config")
        self.save_hyperparameters(ignore="config")
        # plain values: torch refuses to resume from a file with objects in it
        self.save_hyperparameters({"config": config_to_mapping(config)})
        self.model = GPT(config)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_share = warmup_share
        self.text_weight = text_weight
        self.null_probability = null_probability

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch, some conditions dropped; returns the loss."""
        cond = batch.get("cond")
        if cond is not None and self.null_probability > 0:
            is_dropped = torch.rand(len(cond), device=cond.device) < self.null_probability  # (B,)
            dropped = is_dropped.view(-1, *[1] * (cond.ndim - 1))
            cond = torch.where(dropped, self.model.null_condition(cond), cond)
        return self._loss(batch["codes"], cond, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss on held-out images."""
        self._loss(batch["codes"], batch.get("cond"), "val")

    def _loss(self, codes: Tensor, cond: Tensor | None, stage: str) -> Tensor:
        output = self.model(codes, cond)
        code_loss = F.cross_entropy(output.logits.flatten(0, -2), codes.flatten())
        loss: Tensor = code_loss
        if output.text_logits is not None and cond is not None and cond.shape[1] > 1:
            text_loss = F.cross_entropy(output.text_logits.flatten(0, 1), cond[:, 1:].flatten())
            loss = loss + self.text_weight * text_loss
            self.log(f"{stage}/text_loss", text_loss, batch_size=len(codes))
        losses = {f"{stage}/loss": loss, f"{stage}/code_loss": code_loss}
        self.log_dict(losses, batch_size=len(codes), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only, linear warm-up and cosine to zero.

        Raises:
            ValueError: if the training has no end.
        """
        parameters = list(self.model.parameters())
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=(0.9, 0.95),
        )
        total = self._total_steps()
        warmup = max(1, round(self.warmup_share * total))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> int:
        """Steps of the training."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                "the learning rate falls to zero at the last step: say which with trainer.max_steps"
            )
        return int(steps)
