"""How much of a codebook pictures take, and how evenly."""

from __future__ import annotations

import torch
from torch import Tensor


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each entry is used: codes int (n, T, D) in [0, V) -> int64 (D, V)."""
    by_depth = codes.long().flatten(0, 1).T  # (n, T, D) -> (D, n * T)
    return torch.stack([torch.bincount(row, minlength=codebook_size) for row in by_depth])


def perplexity(counts: Tensor) -> Tensor:
    """How many entries, used equally, would be as varied: exp of the entropy.

    Args:
        counts: (D, V), not all zero in any row.

    Returns:
        (D,) float64 in [1, V].
    """
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(dim=1)
    return entropy.exp()
