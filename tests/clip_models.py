"""A small CLIP in training: 16x16 pixels, captions of 8 ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mindalle.clip import ClipConfig
from mindalle.text import TextTokenizer
from mindalle.training.base import OptimizerConfig
from mindalle.training.clip import ClipTraining

CAPTIONS = ["a red apple", "a green apple", "a red car", "a green car on a road"]


def write_tokenizer(folder: Path) -> Path:
    """The one of the fixture `tiny_text_tokenizer`."""
    captions = [*CAPTIONS, "two red cars"]
    path = folder / "text_tokenizer.json"
    TextTokenizer.train(captions, vocab_size=64, length=6).save(path)
    return path


def clip_config(text_tokenizer: Path, **changes: Any) -> ClipConfig:
    vocab_size = TextTokenizer.from_file(text_tokenizer, length=6).vocab_size + 2
    settings = {
        "embed_dim": 16,
        "image_size": 16,
        "vision_layers": 1,
        "vision_width": 32,
        "vision_patch_size": 8,
        "vision_head_width": 16,
        "text_layers": 1,
        "text_width": 32,
        "text_heads": 2,
        "context_length": 8,
        "vocab_size": vocab_size,
    }
    return ClipConfig(**{**settings, **changes})


def clip_training(text_tokenizer: Path, **options: Any) -> ClipTraining:
    """Always the same weights."""
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ClipTraining(
            clip_config(text_tokenizer), str(text_tokenizer), **{"optimizer": optimizer, **options}
        )


def captioned(captions: list[str], seed: int = 0) -> dict[str, Any]:
    """A batch of random pictures."""
    generator = torch.Generator().manual_seed(seed)
    images: Tensor = torch.rand(len(captions), 3, 16, 16, generator=generator) * 2 - 1
    return {"images": images, "captions": captions}


def fit(
    module: ClipTraining,
    batches: list[dict[str, Any]],
    *,
    val: list[dict[str, Any]] | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train on ready batches, over and over."""
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": -1, "enable_checkpointing": False, **options},
    )
    loaders = [DataLoader(some, batch_size=None) for some in ([batches, val] if val else [batches])]  # type: ignore[arg-type]
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer
