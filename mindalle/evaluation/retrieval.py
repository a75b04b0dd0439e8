"""Retrieval: does a picture find its own text among many?"""

from __future__ import annotations

import torch
from torch import Tensor


def ranks_of_own(images: Tensor, texts: Tensor, own: Tensor) -> Tensor:
    """Where each picture's own text stands among all texts, by similarity.

    Args:
        images: (n, C), unit features.
        texts: (m, C), unit features of distinct texts.
        own: int64 (n,), which text is whose; in [0, m).

    Returns:
        int64 (n,): 0 = the most similar. A text just as similar as one's own comes before it, and so do
        similarities that are no numbers.

    Raises:
        ValueError: if the shapes do not fit or `own` is out of range.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or len(own) != len(images):
        raise ValueError(
            "expected images (n, C), texts (m, C) and own (n,), got "
            f"{tuple(images.shape)}, {tuple(texts.shape)} and {tuple(own.shape)}"
        )
    if int(own.min()) < 0 or int(own.max()) >= len(texts):
        raise ValueError(f"own must be in [0, {len(texts)}), got {int(own.min())} to {int(own.max())}")
    similarity = images @ texts.T  # (n, m)
    of_own = similarity.gather(1, own[:, None])  # (n, 1)
    return (~(similarity < of_own)).sum(dim=1) - 1


def recall(ranks: Tensor, k: int) -> float:
    """R@k: the share of ranks below k.

    Args:
        ranks: (n,), of `ranks_of_own`.
        k: >= 1.

    Returns:
        In [0, 1].
    """
    return (ranks < k).double().mean().item()


def r_precision(ranks: Tensor, num_texts: int, num_candidates: int) -> Tensor:
    """The chance that each picture's own text is more similar than others drawn at random (Xu et al. 2018).

    Computed exactly, over all draws: of `num_candidates - 1` texts out of the others none may be among the
    `rank` that are at least as similar as one's own (hypergeometric).

    Args:
        ranks: int64 (n,), of `ranks_of_own`.
        num_texts: m, distinct texts.
        num_candidates: one's own and the others, in [2, m]; 100 in the literature.

    Returns:
        (n,) float64 in [0, 1], whose mean is the R-precision.

    Raises:
        ValueError: if there are not as many texts.
    """
    if not 2 <= num_candidates <= num_texts:
        raise ValueError(f"R-precision needs 2 to {num_texts} candidates, all texts, got {num_candidates}")
    others = num_texts - 1
    worse = others - ranks[:, None].double()  # (n, 1): texts that are less similar than one's own
    drawn = torch.arange(num_candidates - 1)  # (num_candidates - 1,)
    return ((worse - drawn).clamp(min=0) / (others - drawn)).prod(dim=1)
