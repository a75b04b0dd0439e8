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

from stage1_vqgan.quantize import QuantizerOutput
from stage1_vqgan.vqgan import VQGAN, VQGANConfig


class VQGANTraining(pl.LightningModule):
    """Fits a VQGAN to images.

    Batches are mappings with `images` (B, 3, H, W) in [-1, 1].

    Args:
        config: of the model.
        learning_rate: of Adam at its peak, per step, > 0.
        warmup_steps: steps of linear warm-up before the cosine to zero.
        restart_every: every so many steps, entries of the codebook that no latent chose since the last time
            move to random latents of the batch (the first step gives all of them their start).
        restart_until: share of the training after which no entry moves any more, in [0, 1].
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
        self.save_hyperparameters()
        self.model = VQGAN(config)
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.restart_every = restart_every
        self.restart_until = restart_until
        # (V,) how often each entry was chosen since the last restart
        self.register_buffer("usage", torch.zeros(config.quantizer.codebook_size, dtype=torch.int64))
        self.usage: Tensor

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch: reconstruct, count codes, move dead entries; returns the loss."""
        images = batch["images"]
        if self.global_step % self.restart_every == 0 and self._progress() <= self.restart_until:
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
        self.log("train/restarted", float(len(dead)))

    def _progress(self) -> float:
        """Share of the training that is done."""
        return self.global_step / max(1, int(self.trainer.estimated_stepping_batches))

    def configure_optimizers(self) -> Any:
        """Adam, linear warm-up and cosine to zero."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate, betas=(0.5, 0.9))
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            return 0.5 * (
                1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, total - self.warmup_steps))
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
