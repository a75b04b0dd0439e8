"""Sampling filters, and greedy decoding that runs the whole model again for every code."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits (n, V) -> the probabilities (n, V) that minDALL-E and rq-vae-transformer sample from.

    Ties with the k-th logit all stay, and the code that crosses p stays. None skips a filter; top_p = 1.0 is
    not quite none, since a float32 sum reaches 1 before the end.
    """
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.sort(dim=-1, descending=True).values[:, top_k - 1, None]  # (n, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        kept = torch.zeros_like(probs)
        for row, row_probs in enumerate(probs):
            descending = row_probs.sort(descending=True)
            for prob, code, mass in zip(*descending, descending.values.cumsum(0), strict=True):
                kept[row, code] = prob
                if mass >= top_p:
                    break
        probs = kept / kept.sum(dim=-1, keepdim=True)
    return probs


def greedy(forward: Callable[[Tensor], Tensor], batch: int, code_shape: tuple[int, ...]) -> Tensor:
    """The most likely code at each place in turn, (batch, *code_shape); raster order, depth fastest.

    Args:
        forward: codes (B, rows, ...) -> logits (B, rows, ..., V), for any number of leading rows of the code
            shape, where logits at n do not depend on codes >= n.
    """
    codes = torch.zeros(batch, math.prod(code_shape), dtype=torch.long)
    for n in range(codes.shape[1]):
        rows = n // math.prod(code_shape[1:]) + 1
        logits = forward(codes.view(batch, *code_shape)[:, :rows])
        codes[:, n] = logits.flatten(1, -2)[:, n].argmax(
            dim=-1
        )  # (B, rows, ..., V) -> (B, codes of the rows, V)
    return codes.view(batch, *code_shape)
