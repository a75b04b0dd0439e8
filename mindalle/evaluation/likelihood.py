"""Likelihood: how well a sequence model predicts the codes of held-out pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from mindalle.evaluation.results import Measure, mean_measure
from stage2_transformer import SequenceModel
from stage2_transformer.losses import code_cross_entropy


@torch.inference_mode()
def negative_log_likelihood(model: SequenceModel, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The negative log-likelihood of pictures' codes given their condition.

    Args:
        model: in evaluation mode.
        batches: codes int64 (B, *code_shape) on the model's device, and conditions: text ids (B, N), labels
            (B,), or None.

    Returns:
        (n, D) nats per code, float64: the mean over each picture's codes of a depth; D = 1 for codes without.

    Raises:
        ValueError: if there are no pictures.
    """
    rows = []
    for codes, cond in batches:
        nats = code_cross_entropy(model(codes, cond).logits, codes).double()
        by_depth = nats if nats.ndim == 4 else nats[..., None]  # (B, h, w, D)
        rows.append(rearrange(by_depth, "b h w d -> b (h w) d").mean(dim=1).cpu())
    if not rows:
        raise ValueError("there are no pictures to measure a likelihood on")
    return torch.cat(rows).clone()


def likelihood_measures(nats: Tensor, *, num_positions: int, num_pixels: int, seed: int) -> list[Measure]:
    """The same as nats and bits per code, over all depths and for each, and per value of a pixel.

    Args:
        nats: (n, D), of `negative_log_likelihood`.
        num_positions: h * w, positions of the code grid.
        num_pixels: H * W, each with three values.
        seed: of the intervals.

    Returns:
        The measures. Bits per dimension are those of the codes, spread over the pixels: what the codes do not
        hold of a picture is not paid for, so they do not compare with models of pixels.
    """
    per_picture, depth = nats.mean(dim=1), nats.shape[1]
    bits_per_dim = per_picture * (num_positions * depth / (math.log(2) * 3 * num_pixels))
    named = [("NLL per code", per_picture, "nats"), ("bits per code", per_picture / math.log(2), "bits")]
    if depth > 1:
        named += [(f"NLL per code, depth {d}", nats[:, d - 1], "nats") for d in range(1, depth + 1)]
    named.append(("bits per dimension, of the codes", bits_per_dim, "bits"))
    details = {"codes_per_image": num_positions * depth, "pixel_values": 3 * num_pixels}
    return [mean_measure(name, values, unit=unit, seed=seed, details=details) for name, values, unit in named]
