"""How many pictures a second each stage learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mindalle.benchmark.machine import median_seconds, peak_memory, reset_peak_memory
from mindalle.benchmark.measure import draw_condition
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.losses import TokenizerLoss, TokenizerLossConfig
from stage2_transformer import GPT, GPTConfig, RQTransformer
from stage2_transformer.losses import SequenceLossConfig, sequence_losses


def measure_training(
    tokenizer: QuantizedAutoencoder,
    model: GPT | RQTransformer,
    batch_size: int,
    *,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Time steps on random data: forward, backward, AdamW.

    The tokenizer's loss is without its perceptual network, whose weights may have to be downloaded; the
    adversary is there where pictures are large enough for it.

    Args:
        tokenizer: changed by the steps.
        model: changed by the steps.
        batch_size: pictures of a step.
        repeats: medians are over so many steps, after one that is not counted.
        dtype: of autocast; float32 = without.
        device: of both.

    Returns:
        batch size, and of each stage images per second and peak memory in bytes.
    """
    result: dict[str, Any] = {"batch_size": batch_size, "dtype": str(dtype).removeprefix("torch.")}
    for name, (loss, modules) in {
        "stage1": _tokenizer_step(tokenizer, batch_size, device),
        "stage2": _model_step(model, batch_size, device),
    }.items():
        reset_peak_memory(device)
        step = _whole_step(loss, modules, dtype, device)
        result[f"{name}_images_per_second"] = batch_size / median_seconds(step, device, repeats)
        result[f"{name}_peak_memory_bytes"] = peak_memory(device)
    return result


def _whole_step(
    loss: Callable[[], Tensor], modules: list[nn.Module], dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            value = loss()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _tokenizer_step(
    tokenizer: QuantizedAutoencoder, batch_size: int, device: torch.device
) -> tuple[Callable[[], Tensor], list[nn.Module]]:
    tokenizer.train()
    side = tokenizer.convnet.image_size
    images = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1
    criterion = TokenizerLoss(TokenizerLossConfig(perceptual="none", adversarial_warmup=0))
    if criterion.discriminator is not None and side < criterion.discriminator.min_size:
        criterion = TokenizerLoss(TokenizerLossConfig(perceptual="none", adversarial_weight=0.0))
    criterion.to(device)

    def loss() -> Tensor:
        reconstructions, quantized = tokenizer(images)
        last_layer = tokenizer.decoder.last_layer
        return criterion(images, reconstructions, quantized, step=0, last_layer=last_layer).total  # type: ignore[no-any-return]

    return loss, [tokenizer, criterion]


def _model_step(
    model: GPT | RQTransformer, batch_size: int, device: torch.device
) -> tuple[Callable[[], Tensor], list[nn.Module]]:
    model.train()
    config = model.config
    smallest = config.vocab_size if isinstance(config, GPTConfig) else min(config.codebook_sizes)
    codes = torch.randint(smallest, (batch_size, *model.code_shape), device=device)
    cond = draw_condition(config)
    cond = cond.repeat_interleave(batch_size, dim=0).to(device) if cond is not None else None

    def loss() -> Tensor:
        return sequence_losses(model(codes, cond), codes, cond, SequenceLossConfig(), None).total

    return loss, [model]
