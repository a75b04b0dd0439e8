"""Small checkpoints that sets are drawn from: 16x16 pixels, codes (4, 4)."""

from __future__ import annotations

from pathlib import Path

import torch
from clip_models import clip_config, write_tokenizer

from mindalle.checkpoint import save_checkpoint
from mindalle.clip import NativeClip, make_clip_tokenizer
from mindalle.text import TextTokenizer
from stage1_vqgan import VQGAN
from stage2_transformer import GPT, ConditionConfig, GPTConfig, TransformerConfig

PROMPTS = (
    "a red apple",
    "a green apple",
    "a red car",
    "a green car on a road",
    "two red cars",
    "a car",
    "apple",
)


def save_text_model(directory: Path, tokenizer: VQGAN, model: GPT, *, has_clip: bool = False) -> str:
    """A model of texts, with a CLIP of random weights or without."""
    clip = None
    words = write_tokenizer(directory.parent)
    if has_clip:
        config = clip_config(words)
        tokenize = make_clip_tokenizer(words.read_bytes(), config, source=str(words), where="a test")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            clip = NativeClip(model=config.build().eval(), config=config, tokenize=tokenize)
    text_tokenizer = TextTokenizer.from_file(words, length=6)
    save_checkpoint(
        directory, image_tokenizer=tokenizer, model=model, text_tokenizer=text_tokenizer, clip=clip
    )
    return str(directory)


def save_class_model(directory: Path, tokenizer: VQGAN, num_classes: int = 12) -> str:
    """A model of classes; of no class with 0."""
    config = GPTConfig(
        transformer=TransformerConfig(width=16, num_layers=1, num_heads=2),
        condition=ConditionConfig(
            kind="class" if num_classes else "none", vocab_size=num_classes or 1, length=1
        ),
        vocab_size=24,
        code_shape=(4, 4),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
    save_checkpoint(directory, image_tokenizer=tokenizer, model=model)
    return str(directory)
