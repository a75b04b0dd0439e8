"""A small model with a CLIP, captioned pictures, and a judge: what reports are tested on."""

from __future__ import annotations

from pathlib import Path

import torch
from clip_models import clip_config, write_tokenizer
from evaluation_sets import write_clip, write_set

from mindalle.checkpoint import save_checkpoint
from mindalle.clip import NativeClip, make_clip_tokenizer
from mindalle.report.lab import ReportJob
from mindalle.text import TextTokenizer
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage2_transformer import GPT, RQTransformer


def save_model(
    directory: Path, tokenizer: QuantizedAutoencoder, model: GPT | RQTransformer | None, *, has_clip: bool
) -> str:
    """A checkpoint of a model of texts, or of a tokenizer alone."""
    words, clip = write_tokenizer(directory.parent), None
    if has_clip:
        config = clip_config(words)
        tokenize = make_clip_tokenizer(words.read_bytes(), config, source=str(words), where="a test")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            clip = NativeClip(model=config.build().eval(), config=config, tokenize=tokenize)
    text_tokenizer = TextTokenizer.from_file(words, length=6) if model is not None else None
    save_checkpoint(
        directory, image_tokenizer=tokenizer, model=model, text_tokenizer=text_tokenizer, clip=clip
    )
    return str(directory)


def small_job(folder: Path, model: str, **changes: object) -> ReportJob:
    """A report of a dozen pictures, in `folder / "out"`; data and judge are made beside it."""
    if not (folder / "data").exists():
        write_set(folder / "data", 12)
        write_clip(folder / "judge", seed=1)
    settings = {
        "data": str(folder / "data"),
        "model": model,
        "out": folder / "out",
        "judge": str(folder / "judge"),
        "features": "clip",
        "feature_dims": 2,
        "num_captions": 6,
        "num_candidates": 4,
        "lengths": (2, 4),
        "batch_sizes": (1, 2),
        "repeats": 1,
        "command": "a test",
    }
    return ReportJob(**(settings | changes))  # type: ignore[arg-type]
