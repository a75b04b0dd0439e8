"""Training an image tokenizer with Lightning: L1 reconstruction, the quantizer's loss, dead-code restart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from checkpoint_io import config_from_mapping, config_to_mapping
from stage1_vqgan.quantize import QuantizerOutput
from stage1_vqgan.vqgan import VQGAN, VQGANConfig


class VQGANTraining(pl.LightningModule):
    """Fits a VQGAN to images.

    Batches are mappings with `images` (B, 3, H, W) in [-1, 1].

    Args:
        config: of the model; from a checkpoint it comes as a mapping.
        learning_rate: of Adam at its peak, per step, > 0.
        warmup_steps: steps of linear warm-up before the cosine to zero, >= 0.
        restart_every: every so many steps, entries of the codebook that no latent chose since the last time
            move to random latents of the batch (the first step gives all of them their start), >= 1.
        restart_until: share of the training after which no entry moves any more, in [0, 1].

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        config: VQGANConfig,
        learning_rate: float = 4e-4,
        warmup_steps: int = 100,
        restart_every: int = 50,
        restart_until: float = 0.9,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or warmup_steps < 0 or restart_every < 1 or not 0 <= restart_until <= 1:
            raise ValueError(
                "learning_rate must be positive, warmup_steps at least 0, restart_every at least 1 and "
                f"restart_until in [0, 1], got {learning_rate}, {warmup_steps}, {restart_every} and "
                f"{restart_until}"
            )
        if isinstance(config, Mapping):
            config = config_from_mapping(VQGANConfig, config, where="hyper_parameters.config")
        self.save_hyperparameters(ignore="config")
        # plain values: torch refuses to resume from a file with objects in it
        self.save_hyperparameters({"config": config_to_mapping(config)})
        self.model = VQGAN(config)
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.restart_every = restart_every
        self.restart_until = restart_until
        self.last_restart = -1  # step of it: with accumulated gradients a step has several batches
        # (V,) how often each entry was chosen since the last restart
        self.register_buffer("usage", torch.zeros(config.quantizer.codebook_size, dtype=torch.int64))
        self.usage: Tensor

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch: reconstruct, count codes, move dead entries; returns the loss."""
        images = batch["images"]
        is_due = self.global_step % self.restart_every == 0 and self.global_step != self.last_restart
        if is_due and self._progress() <= self.restart_until:
            self._restart_dead_codes(images)
        reconstructions, quantized = self.model(images)
        self.usage += torch.bincount(quantized.codes.flatten(), minlength=self.usage.numel())
        return self._losses(images, reconstructions, quantized, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the same losses on held-out images."""
        images = batch["images"]
        reconstructions, quantized = self.model(images)
        self._losses(images, reconstructions, quantized, "val")

    def _losses(
        self, images: Tensor, reconstructions: Tensor, quantized: QuantizerOutput, stage: str
    ) -> Tensor:
        l1 = F.l1_loss(reconstructions, images)
        loss: Tensor = l1 + quantized.loss
        error = F.mse_loss(reconstructions.clamp(-1, 1), images)
        self.log_dict(
            {
                f"{stage}/loss": loss,
                f"{stage}/l1": l1,
                f"{stage}/quantizer": quantized.loss,
                f"{stage}/psnr": 10 * torch.log10(4 / error),  # the range of [-1, 1] is 2, its square 4
                f"{stage}/codes_used": float((quantized.codes.flatten().bincount() > 0).sum()),
            },
            batch_size=len(images),
            prog_bar=True,
        )
        return loss

    @torch.no_grad()
    def _restart_dead_codes(self, images: Tensor) -> None:
        dead = (self.usage == 0).nonzero().flatten()
        latents = rearrange(self.model.encode_latents(images), "b c h w -> (b h w) c").float()
        picks = torch.randint(len(latents), (len(dead),), device=latents.device)
        self.model.quantizer.codebook[dead] = latents[picks]
        self.usage.zero_()
        self.last_restart = self.global_step
        self.log("train/restarted", float(len(dead)))

    def _progress(self) -> float:
        """Share of the training that is done."""
        return self.global_step / self._total_steps()

    def _total_steps(self) -> int:
        """Steps of the training; image shards do not tell how many batches an epoch has."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                "the learning rate falls to zero at the last step: say which with trainer.max_steps"
            )
        return int(steps)

    def configure_optimizers(self) -> Any:
        """Adam, linear warm-up and cosine to zero.

        Raises:
            ValueError: if the training has no end.
        """
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate, betas=(0.5, 0.9))
        total = self._total_steps()

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            return 0.5 * (
                1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, total - self.warmup_steps))
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
