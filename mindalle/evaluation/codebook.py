"""Codebooks: how much of them pictures take, and how evenly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mindalle.evaluation.intervals import resampled_interval
from mindalle.evaluation.results import Measure
from stage1_vqgan.quantize.usage import code_counts, perplexity


def codebook_measures(
    by_depth: Sequence[Tensor], codebook_sizes: Sequence[int], *, seed: int
) -> list[Measure]:
    """Usage and perplexity of the codebook of each depth.

    Args:
        by_depth: codes (n, T) of each depth.
        codebook_sizes: V of each depth.
        seed: of the intervals.

    Returns:
        The measures; of few pictures both are too small, which their intervals do not show.
    """
    measures = []
    for depth, size in enumerate(codebook_sizes):
        suffix = f", depth {depth + 1}" if len(codebook_sizes) > 1 else ""
        for name, rule in CODEBOOK_RULES.items():
            measures.append(_codebook_measure(f"{name}{suffix}", rule, by_depth[depth], size, seed))
    return measures


def _usage(counts: Tensor) -> Tensor:
    """(D, V) -> (D,): the share of entries that are used at all."""
    return (counts > 0).double().mean(dim=1)


CODEBOOK_RULES = {"codebook usage": _usage, "codebook perplexity": perplexity}


def _codebook_measure(
    metric: str, rule: Callable[[Tensor], Tensor], codes: Tensor, size: int, seed: int
) -> Measure:
    def measure(indices: Tensor) -> float:
        return float(rule(code_counts([codes[indices]], size)))

    value = measure(torch.arange(len(codes)))
    return Measure(
        metric=metric,
        value=value,
        interval=resampled_interval(measure, len(codes), value, seed=seed) if len(codes) > 1 else None,
        num_images=len(codes),
        details={"codebook_size": size, "num_codes": codes.numel()},
    )
