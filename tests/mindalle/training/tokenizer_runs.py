"""Short trainings of tiny tokenizers on drawn pictures; as a script, one in two processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path += [str(Path(__file__).parents[3]), str(Path(__file__).parents[2])]  # for the script

from shard_files import draw_picture

from mindalle.image import to_tensor
from mindalle.training import OptimizerConfig, RQVAETraining, VQGANTraining
from mindalle.training.tokenizer import TokenizerTraining
from stage1_vqgan import (
    ConvNetConfig,
    ResidualQuantizerConfig,
    RQVAEConfig,
    VectorQuantizerConfig,
    VQGANConfig,
)
from stage1_vqgan.discriminator import DiscriminatorConfig
from stage1_vqgan.losses import TokenizerLossConfig
from stage1_vqgan.quantize import CodebookTrainingConfig

FAST = OptimizerConfig(learning_rate=3e-3, betas=(0.5, 0.9), warmup_steps=3, final_share=1.0)
ADVERSARY = DiscriminatorConfig(width=8, num_layers=1)
CODEBOOK = CodebookTrainingConfig(restart_after=5, decay=0.9)
CONVNET = ConvNetConfig(
    image_size=16,
    channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_channels=8,
)
VQGAN_CONFIG = VQGANConfig(convnet=CONVNET, quantizer=VectorQuantizerConfig(codebook_size=24, width=8))
RQVAE_CONFIG = RQVAEConfig(
    convnet=CONVNET,
    quantizer=ResidualQuantizerConfig(codebook_sizes=(24, 24, 24), width=8),
    latent_width=8,
)


def draw_batch(*indices: int) -> dict[str, Any]:
    """Pictures with these indices (0-7 differ), as `ImageData` gives them."""
    images = torch.stack([to_tensor(draw_picture(index)[0]) for index in indices])
    return {"images": images, "keys": [f"picture {index}" for index in indices], "num_skipped": 0}


class Pictures(pl.LightningDataModule):
    """Ready batches, of which each process sees its share of the pictures."""

    def __init__(self, train: Sequence[dict[str, Any]], val: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> Any:
        return DataLoader(self._share(self.train), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self._share(self.val), batch_size=None)  # type: ignore[arg-type]

    def _share(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        assert self.trainer is not None
        rank, size = self.trainer.global_rank, self.trainer.world_size
        return [
            {name: values[rank::size] for name, values in batch.items() if name != "num_skipped"}
            for batch in batches
        ]


def losses(**settings: Any) -> TokenizerLossConfig:
    """Pixels alone, unless told otherwise; an adversary is heard from its first step."""
    alone = {"perceptual": "none", "adversarial_weight": 0.0, "adversarial_warmup": 0}
    return TokenizerLossConfig(**{**alone, "discriminator": ADVERSARY, **settings})


def training(kind: str, **options: Any) -> TokenizerTraining:
    """A new "vqgan" (by gradient, or with `codebook` by averages) or "rqvae"."""
    cls, config = {"vqgan": (VQGANTraining, VQGAN_CONFIG), "rqvae": (RQVAETraining, RQVAE_CONFIG)}[kind]
    if kind == "rqvae":
        options = {"codebook": CODEBOOK, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**{"config": config, "optimizer": FAST, "loss": losses(), **options})


TRAIN = [draw_batch(0, 1, 2, 3), draw_batch(4, 5, 6, 7)]
VAL = [draw_batch(0, 6, 1, 2), draw_batch(3, 7, 4, 5)]


def train(folder: Path, **options: Any) -> dict[str, Any]:
    """Four steps, the adversary from the second on, and a validation: weights and what was logged."""
    module = training("rqvae", loss=losses(adversarial_weight=0.75, adversarial_start=2))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, datamodule=Pictures(TRAIN, VAL))
    logged: dict[str, Tensor] = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
    return {"state": module.state_dict(), "logged": logged, "rank": trainer.global_rank}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    result = train(out, strategy="ddp", devices=2)
    torch.save(result, out / f"{result['rank']}.pt")
