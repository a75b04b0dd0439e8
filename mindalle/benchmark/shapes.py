"""The shapes of known models, to be measured with random weights where there are no others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mindalle.checkpoint import load_checkpoint
from mindalle.hub import resolve_model
from stage1_vqgan import (
    RQVAE,
    VQGAN,
    ConvNetConfig,
    ResidualQuantizerConfig,
    RQVAEConfig,
    VectorQuantizerConfig,
    VQGANConfig,
)
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.precision import decode_in_, pixel_dtype
from stage2_transformer import (
    GPT,
    ConditionConfig,
    GPTConfig,
    RQTransformer,
    RQTransformerConfig,
    TransformerConfig,
    choose_precision,
)
from stage2_transformer.int8 import quantize_
from stage2_transformer.precision import DTYPES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Both stages of a model."""

    image_tokenizer: VQGANConfig | RQVAEConfig
    model: GPTConfig | RQTransformerConfig


VQGAN_F16 = VQGANConfig(
    convnet=ConvNetConfig(),  # 256x256 pixels to 16x16 codes
    quantizer=VectorQuantizerConfig(codebook_size=16384, width=256),
)
RQVAE_8X8X4 = RQVAEConfig(
    convnet=ConvNetConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(8,)),
    quantizer=ResidualQuantizerConfig(codebook_sizes=(16384,) * 4, width=256),
    latent_width=256,
)
SHAPES: dict[str, Shape] = {
    "mindalle-1.3b": Shape(image_tokenizer=VQGAN_F16, model=GPTConfig()),
    "rq-1.4b": Shape(image_tokenizer=RQVAE_8X8X4, model=RQTransformerConfig()),
    "rq-480m": Shape(
        image_tokenizer=RQVAE_8X8X4,
        model=RQTransformerConfig(
            body=TransformerConfig(num_layers=12), head=TransformerConfig(num_layers=4)
        ),
    ),
    "gpt-small": Shape(
        image_tokenizer=VQGAN_F16,
        model=GPTConfig(transformer=TransformerConfig(width=512, num_layers=8, num_heads=8)),
    ),
    "emoji": Shape(
        image_tokenizer=RQVAEConfig(
            convnet=ConvNetConfig(
                image_size=64,
                channels=32,
                channel_multipliers=(1, 2, 2, 4),
                num_res_blocks=1,
                attention_resolutions=(8,),
                latent_channels=128,
            ),
            quantizer=ResidualQuantizerConfig(codebook_sizes=(2048,) * 3, width=64, is_shared=False),
            latent_width=64,
        ),
        model=RQTransformerConfig(
            body=TransformerConfig(width=256, num_layers=8, num_heads=8),
            head=TransformerConfig(width=256, num_layers=2, num_heads=8),
            condition=ConditionConfig(kind="text", vocab_size=2048, length=24),
            codebook_sizes=(2048,) * 3,
            code_shape=(8, 8, 3),
            codebook_width=64,
            has_shared_classifier=False,
        ),
    ),
}
"""Name -> shape; weights are random, so what is drawn means nothing."""


def with_layers(config: GPTConfig | RQTransformerConfig, num_layers: int) -> GPTConfig | RQTransformerConfig:
    """The same model with fewer layers.

    Args:
        config: of the whole model.
        num_layers: of the GPT or of the RQ-Transformer's body, >= 1; its head keeps at most as many.

    Returns:
        A config.

    Raises:
        ValueError: if the model has fewer layers than that.
    """
    stack = config.transformer if isinstance(config, GPTConfig) else config.body
    if not 1 <= num_layers <= stack.num_layers:
        raise ValueError(f"num_layers must be in [1, {stack.num_layers}] for this shape, got {num_layers}")
    shorter = replace(stack, num_layers=num_layers)
    if isinstance(config, GPTConfig):
        return replace(config, transformer=shorter)
    head = replace(config.head, num_layers=min(num_layers, config.head.num_layers))
    return replace(config, body=shorter, head=head)


def build_random(
    shape: Shape, precision: str, device: torch.device, *, num_layers: int | None = None
) -> tuple[QuantizedAutoencoder, GPT | RQTransformer]:
    """Both stages with random weights, the same ones every time.

    Args:
        shape: what to build.
        precision: of the sequence model, one of `stage2_transformer.PRECISIONS`; pictures are decoded in what
            fits it.
        device: where both compute.
        num_layers: of the sequence model; None = all.

    Returns:
        Image tokenizer and sequence model, in evaluation mode.

    Raises:
        ValueError: if the shape has fewer layers than that.
    """
    config = with_layers(shape.model, num_layers) if num_layers is not None else shape.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage1 = shape.image_tokenizer
        tokenizer = VQGAN(stage1) if isinstance(stage1, VQGANConfig) else RQVAE(stage1)
        model = (
            GPT(config)
            if isinstance(config, GPTConfig)
            else RQTransformer(config, tokenizer.codebook().detach())
        )
    chosen = choose_precision(precision, device, sum(p.numel() for p in model.parameters()))
    decode_in_(tokenizer, pixel_dtype(chosen, device))
    if chosen == "int8":
        quantize_(model)
    return tokenizer.eval().to(device), model.eval().to(device, DTYPES.get(chosen))


def load_stages(
    name: str | Path, precision: str, device: torch.device
) -> tuple[QuantizedAutoencoder, GPT | RQTransformer]:
    """Both stages of a checkpoint.

    Args:
        name: as of `Pipeline.from_pretrained`.
        precision: of the sequence model, one of `stage2_transformer.PRECISIONS`; pictures are decoded in what
            fits it.
        device: where both compute.

    Returns:
        Image tokenizer and sequence model, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the checkpoint is damaged or has no sequence model.
    """
    loaded = load_checkpoint(resolve_model(name), precision=precision, device=device)
    if loaded.model is None:
        raise ValueError(f"{name} has an image tokenizer alone: pass a model that draws")
    return loaded.image_tokenizer.to(device), loaded.model.to(device)
