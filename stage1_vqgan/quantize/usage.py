"""How much of a codebook pictures take, and how evenly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def code_counts(by_depth: Sequence[Tensor], codebook_size: int) -> Tensor:
    """How often each entry is used: int codes of each depth, of any shape, in [0, V) -> int64 (D, V)."""
    return torch.stack(
        [torch.bincount(codes.long().flatten(), minlength=codebook_size) for codes in by_depth]
    )


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
