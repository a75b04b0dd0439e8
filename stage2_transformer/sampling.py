"""From logits to the next code: temperature, top-k, top-p, and a draw with a given uniform number."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How codes are drawn.

    Filters apply in this order: guidance, temperature, top-k, top-p. A tuple has one value per depth of the
    codes, or per scale of a pyramid.
    """

    temperature: float | tuple[float, ...] = 1.0  # divides logits; 0 = greedy: always the most likely code
    top_k: int | tuple[int, ...] | None = None  # keep the k most likely codes
    # keep the smallest set with this much probability, in (0, 1]; None or 1 = all
    top_p: float | tuple[float, ...] | None = None
    cfg_scale: float | tuple[float, ...] = (
        1.0  # classifier-free guidance, >= 0; 1 = off, and then half the work
    )
    window: int = 1  # codes read in a pass, >= 1; from 2 speculative: other pictures, the same distribution

    def __post_init__(self) -> None:
        for name in PER_DEPTH:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for temperature in _values(self.temperature):
            if not math.isfinite(temperature) or temperature < 0:
                raise ValueError(f"temperature must be finite and >= 0 (0 = greedy), got {self.temperature}")
        for k in _values(self.top_k):
            if k is not None and (type(k) is not int or k < 1):
                raise ValueError(
                    f"top_k must be an integer of at least 1, got {self.top_k!r}; None keeps all codes"
                )
        for p in _values(self.top_p):
            if p is not None and not 0 < p <= 1:
                raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; None keeps all codes")
        for scale in _values(self.cfg_scale):
            if not math.isfinite(scale) or scale < 0:
                raise ValueError(f"cfg_scale must be finite and >= 0 (1 = no guidance), got {self.cfg_scale}")
        if type(self.window) is not int or self.window < 1:
            raise ValueError(
                f"window must be an integer of at least 1 (1 = one code at a time), got {self.window!r}"
            )
        if self.window > 1 and isinstance(self.cfg_scale, tuple):
            raise ValueError(
                "speculation needs one cfg_scale for all codes, since a pass reads codes of several depths, "
                f"got {self.cfg_scale}: name one, or set window to 1"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely code is taken; divided by less than 1e-30, logits may overflow float32."""
        return all(temperature < 1e-30 for temperature in _values(self.temperature))

    @property
    def is_guided(self) -> bool:
        """Whether any code is drawn with guidance."""
        return any(scale != 1 for scale in _values(self.cfg_scale))

    def at(self, depth: int) -> SamplingParams:
        """The parameters of a depth, or of a scale of a pyramid: one value each."""
        values = {name: getattr(self, name) for name in PER_DEPTH}
        chosen = {name: value[depth] for name, value in values.items() if isinstance(value, tuple)}
        return replace(self, **chosen) if chosen else self

    def check_depths(self, num_depths: int) -> None:
        """Raise ValueError if a parameter has one value per depth, but for another number of depths."""
        for name in PER_DEPTH:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_depths:
                raise ValueError(f"{name} needs one value or one per depth ({num_depths}), got {value}")


PER_DEPTH = ("temperature", "top_k", "top_p", "cfg_scale")
"""Parameters that may be given for each depth."""


def _values(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def image_seeds(seed: int, num_images: int, first: int = 0) -> list[int]:
    """The seeds of the images of one call: image i depends on `seed` and i alone.

    Args:
        seed: of the call, any integer.
        num_images: how many.
        first: index of the first of them.

    Returns:
        For each image the first 8 bytes, big-endian, of SHA-256 of "seed/i", shifted right to 63 bits.
    """
    digests = [hashlib.sha256(f"{seed}/{first + i}".encode()).digest() for i in range(num_images)]
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def uniforms(seeds: Sequence[int], num_codes: int) -> Tensor:
    """One uniform number per code of each image.

    Args:
        seeds: one per image, non-negative.
        num_codes: T.

    Returns:
        (B, T) float64 in [0, 1), on the CPU; row i depends on seed i alone.
    """
    rows = [
        torch.rand(num_codes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)


def guide(logits: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022).

    Args:
        logits: (2B, ..., V), the conditional rows, then the unconditional ones.
        cfg_scale: s.

    Returns:
        (B, ..., V): unconditional + s * (conditional - unconditional).
    """
    conditional, unconditional = logits.float().chunk(2)
    # codes that are ruled out have -inf in both halves, and their difference would be no number
    return torch.where(
        conditional.isneginf(), conditional, unconditional + cfg_scale * (conditional - unconditional)
    )


def code_probabilities(logits: Tensor, params: SamplingParams, depth: int = 0) -> Tensor:
    """The distribution that the next code is drawn from.

    Args:
        logits: (B, V), guidance already applied.
        params: temperature, top_k and top_p are used.
        depth: of the code, for parameters that differ by depth.

    Returns:
        (B, V) float32, rows sum to 1. Exactly min(k, V) codes survive top-k, ties broken by whichever comes
        first in the sort. Of top-p the code that crosses p is kept, so at least one survives.
    """
    params = params.at(depth)
    if params.is_greedy:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    probabilities, candidates = _filter(logits, params)
    if candidates is None:
        return probabilities
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, candidates, probabilities)


def _filter(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K) float32 and the codes they belong to, most likely first; None = all V in order."""
    temperature, top_k, top_p = params.temperature, params.top_k, params.top_p
    assert not isinstance(temperature, tuple)
    assert not isinstance(top_k, tuple)
    assert not isinstance(top_p, tuple)
    logits, size = logits.float() / temperature, logits.shape[-1]
    top_p = top_p if top_p != 1 else None
    if top_p is None and (top_k is None or top_k >= size):
        return torch.softmax(logits, dim=-1), None
    kept, candidates = logits.topk(size if top_k is None else min(top_k, size), dim=-1)
    probabilities = torch.softmax(kept, dim=-1)
    if top_p is not None:
        # a code goes if those before it reach p; not cumsum - probabilities: where sums meet p, rounding must
        # decide as in the originals
        is_reached = probabilities.cumsum(dim=-1) >= top_p
        probabilities[:, 1:].masked_fill_(is_reached[:, :-1], 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities, candidates


def sample_next(logits: Tensor, params: SamplingParams, u: Tensor, depth: int = 0) -> Tensor:
    """Draw the next code of each row by inverting its cumulative distribution.

    Args:
        logits: (B, V), guidance already applied.
        params: temperature, top_k and top_p are used.
        u: (B,) float64 uniform numbers in [0, 1).
        depth: of the code, for parameters that differ by depth.

    Returns:
        (B,) int64: the first code whose cumulative probability exceeds u.

    Raises:
        FloatingPointError: if a row has no finite maximum or is not a number.
    """
    codes, is_finite = draw_next(logits, params, u, depth)
    require_finite(is_finite)
    return codes


def draw_next(logits: Tensor, params: SamplingParams, u: Tensor, depth: int = 0) -> tuple[Tensor, Tensor]:
    """`sample_next` that does not wait for a GPU: whether the codes mean something is left on the device.

    Args:
        logits: (B, V), guidance already applied.
        params: temperature, top_k and top_p are used.
        u: (B,) float64 uniform numbers in [0, 1).
        depth: of the code, for parameters that differ by depth.

    Returns:
        (B,) int64 codes in [0, V), and (B,) bool, to be given to `require_finite` before they are used.
    """
    params = params.at(depth)
    if params.is_greedy:
        largest, codes = logits.max(dim=-1)
        return codes, largest.isfinite()
    probabilities, candidates = _filter(logits, params)
    is_finite = probabilities[
        :, 0
    ].isfinite()  # a softmax has either no number that is not finite or no other
    if candidates is None:
        return draw_codes(probabilities, u), is_finite
    candidates, order = candidates.sort(dim=-1)  # by code: all others would add nothing to the sums
    place = draw_codes(probabilities.gather(-1, order), u)
    return candidates.gather(-1, place.unsqueeze(-1)).squeeze(-1), is_finite


def require_finite(is_finite: Tensor) -> None:
    """Raise FloatingPointError if one of these is False; the only thing here that waits for a GPU.

    Args:
        is_finite: bool, any shape: whether the logits of a code had a finite maximum.
    """
    if not bool(is_finite.all()):
        raise FloatingPointError(
            "the model's logits are not finite: with --precision fp16 or bf16 try fp32, "
            "otherwise check the checkpoint"
        )


def draw_codes(weights: Tensor, u: Tensor) -> Tensor:
    """Draw a code of each row by inverting its cumulative distribution.

    Args:
        weights: (B, V), >= 0, with a positive sum; probabilities, or in proportion to them.
        u: (B,) float64 uniform numbers in [0, 1).

    Returns:
        (B,) int64: the first code whose cumulative probability exceeds u.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    threshold = u.to(cumulative.device)[:, None] * cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return codes.clamp_max_(weights.shape[-1] - 1)  # where weights are not numbers
