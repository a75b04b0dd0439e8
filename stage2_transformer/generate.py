"""The decoding loop, the only one there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stage2_transformer.interface import SequenceModel
from stage2_transformer.sampling import SamplingParams, guide, sample_next, uniforms


def generate(
    model: SequenceModel,
    cond: Tensor | None,
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    known: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw the codes of images.

    Args:
        model: a GPT or an RQTransformer, in evaluation mode.
        cond: (P, N) text ids, (P,) labels, or None. P divides B: row p serves images p * B / P to
            (p + 1) * B / P - 1 and is read once.
        params: temperature, top-k, top-p and guidance.
        seeds: one per image; image i depends on the model, its condition, `params` and seed i alone.
        known: (B or 1, n) codes in raster order, depth fastest, that every image begins with (image
            completion).
        on_step: called before the first drawn code and after each, with the number of codes done and all
            codes (B, T), zeros where not yet done.

    Returns:
        int64 (B, *code_shape) on the model's device.

    Raises:
        ValueError: if the shapes do not fit or an option does not fit the model.
        FloatingPointError: if the model's logits are not finite.
    """
    codes = torch.empty(0)
    for num_done, codes in iterate_codes(model, cond, params, seeds=seeds, known=known):
        if on_step is not None:
            on_step(num_done, codes)
    # (B, T) -> (B, *code_shape); cloned, since autograd refuses what was made in inference mode
    return codes.clone().view(len(seeds), *model.code_shape)


@torch.inference_mode()
def iterate_codes(
    model: SequenceModel,
    cond: Tensor | None,
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    known: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The decoding loop as an iterator; arguments and errors are those of `generate`.

    Yields:
        The number of codes done and the codes (B, T), zeros where not yet done; the same tensor each time.
        First comes the state with the known codes alone.
    """
    shape = tuple(model.code_shape)
    total, num_depths, batch_size = math.prod(shape), shape[2] if len(shape) == 3 else 1, len(seeds)
    is_guided = params.cfg_scale != 1
    params.check_depths(num_depths)
    if batch_size == 0:
        raise ValueError("seeds must name at least one image, got none")
    if is_guided:
        null = model.null_condition(cond)
        cond = torch.cat([cond, null]) if cond is not None else None
    cache = model.make_cache(2 * batch_size if is_guided else batch_size)
    logits = model.prefill(cond, cache)  # (B or 2B, V)
    draws = uniforms(seeds, total)
    codes = torch.zeros(batch_size, total, dtype=torch.int64, device=logits.device)
    begin = _place_known(codes, known, model.vocab_size) if known is not None and known.numel() else 0
    if 0 < begin < total:
        logits = model.decode(_twice(codes[:, :begin], is_guided), cache)[:, -1]
    yield begin, codes
    for n in range(begin, total):
        guided = guide(logits, params.cfg_scale) if is_guided else logits
        codes[:, n] = sample_next(guided, params, draws[:, n], depth=n % num_depths)
        yield n + 1, codes
        if n + 1 < total:
            logits = model.decode(_twice(codes[:, n : n + 1], is_guided), cache)[:, -1]


def _twice(codes: Tensor, is_guided: bool) -> Tensor:
    """(B, n) -> (2B, n) for the conditional and the unconditional half."""
    return torch.cat([codes, codes]) if is_guided else codes


def _place_known(codes: Tensor, known: Tensor, vocab_size: int) -> int:
    """Write known codes to the front of each row; returns how many there are."""
    if known.ndim != 2 or known.shape[0] not in (1, len(codes)) or known.shape[1] > codes.shape[1]:
        raise ValueError(
            f"known codes must be ({len(codes)} or 1, at most {codes.shape[1]}), got {tuple(known.shape)}"
        )
    if known.is_floating_point():
        raise ValueError(f"known codes must be integers, got {known.dtype}")
    if int(known.min()) < 0 or int(known.max()) >= vocab_size:
        raise ValueError(
            f"known codes must be in [0, {vocab_size}), got {int(known.min())} to {int(known.max())}: "
            "do they come from this model's image tokenizer?"
        )
    codes[:, : known.shape[1]] = known.to(codes.device)
    return known.shape[1]
