"""Timing a model: prompt, codes and pictures, against what the machine could do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindalle.benchmark.machine import median_seconds, peak_memory, reset_peak_memory, synchronize
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage2_transformer import (
    GPTConfig,
    RQTransformerConfig,
    SamplingParams,
    SequenceModel,
    TransformerConfig,
    image_seeds,
    iterate_codes,
)

WINDOW = 8
"""Latencies by position are means over a part of all codes: the first, middle and last eighth."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
CACHE_BYTES = WEIGHT_BYTES | {"int8": 4}
"""Bytes of a key's or value's number: int8 models keep both in float32."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One timed call of the decoding loop."""

    prefill: float  # seconds
    steps: list[float]  # seconds of each code, those drawn in one pass shared equally
    total: float  # seconds


@dataclass(frozen=True, kw_only=True)
class Work:
    """What decoding one code of a whole batch takes, on average over an image."""

    bytes_read: float  # weights, keys and values, each once
    multiply_adds: float


def draw_condition(config: GPTConfig | RQTransformerConfig) -> Tensor | None:
    """A random condition of one image: text ids (1, N), a label (1,), or None."""
    condition = config.condition
    if condition.kind == "none":
        return None
    shape = (1, condition.length) if condition.kind == "text" else (1,)
    return torch.randint(condition.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def time_drawing(
    model: SequenceModel, cond: Tensor | None, params: SamplingParams, batch_size: int, device: torch.device
) -> Drawing:
    """Draw the codes of a batch for one prompt, and note the time of each.

    Args:
        model: in evaluation mode.
        cond: (1, N), (1,) or None.
        params: how to sample.
        batch_size: images.
        device: of the model.

    Returns:
        The times.
    """
    begin = time.perf_counter()
    drawing = iterate_codes(model, cond, params, seeds=image_seeds(0, batch_size))
    next(drawing)  # no code yet
    synchronize(device)
    prefilled = last = time.perf_counter()
    steps: list[float] = []
    for num_done, _ in drawing:
        synchronize(device)
        num_new, now = num_done - len(steps), time.perf_counter()
        if num_new:  # else the pass counts with those that the next one makes final
            steps += [(now - last) / num_new] * num_new
            last = now
    return Drawing(prefill=prefilled - begin, steps=steps, total=last - begin)


def measure_decoding(
    models: Mapping[str, SequenceModel],
    cond: Tensor | None,
    params: Mapping[str, SamplingParams],
    batch_size: int,
    *,
    repeats: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Time models against each other, taking turns, so that all have the same luck with a busy machine.

    Args:
        models: name -> model.
        cond: (1, N), (1,) or None.
        params: name -> how to sample.
        batch_size: images drawn together.
        repeats: medians are over so many.
        device: of the models.

    Returns:
        Name -> batch size and medians: seconds in all, of the prompt, per code (at the first, middle and last
        codes, too, and curve, by eighths), images per second, and peak memory in bytes.
    """
    drawings: dict[str, list[Drawing]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    for _ in range(repeats):
        for name, model in models.items():
            reset_peak_memory(device)
            drawings[name].append(time_drawing(model, cond, params[name], batch_size, device))
            peaks[name] = max(peaks[name], peak_memory(device))
    return {
        name: {
            "batch_size": batch_size,
            **_summary(drawings[name], batch_size, model.code_shape),
            "peak_memory_bytes": peaks[name],
        }
        for name, model in models.items()
    }


def _summary(drawings: Sequence[Drawing], batch_size: int, code_shape: Sequence[int]) -> dict[str, Any]:
    depth = code_shape[2] if len(code_shape) == 3 else 1
    curves = [by_position(drawing.steps, depth) for drawing in drawings]
    curve = [statistics.median(values) for values in zip(*curves, strict=True)]
    total = statistics.median(drawing.total for drawing in drawings)
    # without the first step: it only samples, the pass before it is the prefill
    steps = [statistics.mean(drawing.steps[1:] or drawing.steps) for drawing in drawings]
    return {
        "seconds": total,
        "seconds_of_all_repeats": [drawing.total for drawing in drawings],
        "prefill_seconds": statistics.median(drawing.prefill for drawing in drawings),
        "code_seconds": statistics.median(steps),
        "first_code_seconds": curve[0],
        "middle_code_seconds": curve[len(curve) // 2],
        "last_code_seconds": curve[-1],
        "growth": curve[-1] / curve[0] - 1,
        "curve_seconds": curve,
        "images_per_second": batch_size / total,
    }


def by_position(steps: Sequence[float], depth: int) -> list[float]:
    """Mean times of consecutive codes, from the first to the last.

    Args:
        steps: seconds of each code; the first one is left out, since it comes with the prompt.
        depth: D; parts are whole positions, since not all depths take the same time.

    Returns:
        At most WINDOW + 1 means over equal parts; the middle and the last among them.
    """
    steps = steps[1:] or steps
    length = min(len(steps), max(depth, len(steps) // WINDOW // depth * depth))
    starts = [round(i * (len(steps) - length) / WINDOW) for i in range(WINDOW + 1)]
    return [statistics.mean(steps[start : start + length]) for start in sorted(set(starts))]


def decoding_work(
    config: GPTConfig | RQTransformerConfig, batch_size: int, precision: str, *, is_guided: bool = False
) -> Work:
    """What decoding one code takes, from the model's shape.

    Args:
        config: of the model.
        batch_size: images drawn together.
        precision: of the model.
        is_guided: whether every image has a second row, for guidance.

    Returns:
        The work of all rows of one code, averaged over an image.
    """
    rows = batch_size * (1 + is_guided)
    if isinstance(config, GPTConfig):
        stacks = [(config.transformer, 1.0, config.condition.length + config.num_codes / 2)]
        width, vocab_size = config.transformer.width, config.vocab_size
    else:
        depth = config.depth
        body = (config.body, 1 / depth, config.condition.length + config.num_positions / 2)
        stacks = [body, (config.head, 1.0, (depth + 1) / 2)]
        width, vocab_size = config.body.width, max(config.codebook_sizes)
    weights: float = width * vocab_size
    cached = 0.0  # numbers of keys and values that a row reads
    for stack, share, length in stacks:
        weights += share * _num_weights(stack)
        cached += share * 2 * stack.num_layers * stack.width * length
    return Work(
        bytes_read=weights * WEIGHT_BYTES[precision] + rows * cached * CACHE_BYTES[precision],
        multiply_adds=rows * (weights + cached),
    )


def against_limits(work: Work, code_seconds: float, limits: Mapping[str, float]) -> dict[str, float]:
    """How close decoding comes to what the machine can do.

    Args:
        work: of a code.
        code_seconds: measured.
        limits: bytes_per_second and multiply_adds_per_second of the machine.

    Returns:
        Bytes and multiply-adds of a code, and the shares of both limits; weights that stay in a cache are
        read faster than memory, and int8 and bf16 multiplied faster than float32: shares may exceed 1.
    """
    return {
        "bytes_per_code": work.bytes_read,
        "bandwidth_share": work.bytes_read / code_seconds / limits["bytes_per_second"],
        "multiply_adds_per_code": work.multiply_adds,
        "multiply_add_share": work.multiply_adds / code_seconds / limits["multiply_adds_per_second"],
    }


def _num_weights(stack: TransformerConfig) -> int:
    """Of the matrices: query, key, value, projection, and both layers of the MLP."""
    return stack.num_layers * 12 * stack.width**2


def measure_image_tokenizer(
    tokenizer: QuantizedAutoencoder, batch_size: int, *, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Time both directions of an image tokenizer on random pictures.

    Args:
        tokenizer: in evaluation mode.
        batch_size: pictures at once.
        repeats: medians are over so many, after one that is not counted.
        device: of the tokenizer.

    Returns:
        batch size, pixels of a side, seconds per picture of encode and decode, peak memory in bytes.
    """
    side = tokenizer.convnet.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, side, side, generator=generator).to(device) * 2 - 1
    reset_peak_memory(device)
    with torch.inference_mode():
        codes = tokenizer.encode(images)
        encode = median_seconds(lambda: tokenizer.encode(images), device, repeats)
        decode = median_seconds(lambda: tokenizer.decode(codes), device, repeats)
    return {
        "batch_size": batch_size,
        "image_size": side,
        "encode_seconds_per_image": encode / batch_size,
        "decode_seconds_per_image": decode / batch_size,
        "peak_memory_bytes": peak_memory(device),
    }
