"""What a sequence model minimises: the cross-entropy of codes, hard or soft, and of the text before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage2_transformer.conditioning import PAD_ID
from stage2_transformer.interface import SequenceOutput, raster_depths


@dataclass(frozen=True, kw_only=True)
class SequenceLossConfig:
    """How the losses are added up; the originals weigh text 0.1 and codes 0.9."""

    code_weight: float = 1.0  # of the codes' cross-entropy, >= 0
    text_weight: float = 0.1  # of the text's, >= 0; not used by models that read no text
    ignores_padding: bool = False  # leave padding out of the text's; the originals learn to predict it
    # of the codes of each depth, or scale of a pyramid, >= 0 and relative; () = all codes alike
    depth_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(weight < 0 for weight in self.depth_weights) or (
            self.depth_weights and not sum(self.depth_weights)
        ):
            raise ValueError(
                f"depth_weights must be at least 0 and one of them above, got {self.depth_weights}"
            )
        if self.code_weight < 0 or self.text_weight < 0:
            raise ValueError(
                "code_weight and text_weight must be at least 0, "
                f"got {self.code_weight} and {self.text_weight}"
            )


class SequenceLosses(NamedTuple):
    """Losses of a batch, scalars in nats, float32."""

    total: Tensor  # weighted sum, what is minimised
    code: Tensor  # mean over all codes
    text: Tensor | None  # mean over the text ids but the first; None where no text is predicted
    by_depth: Tensor | None  # (D,), of `code`, by depth or scale; None where there is one


def sequence_losses(
    output: SequenceOutput,
    codes: Tensor,
    cond: Tensor | None,
    config: SequenceLossConfig,
    targets: Tensor | None = None,
    code_depths: Sequence[int] | None = None,
) -> SequenceLosses:
    """All losses of a batch.

    Args:
        output: of the model for `codes` and `cond`.
        codes: int64 (B, *code_shape).
        cond: what the model read; its text ids (B, N) are what the text is compared with.
        config: weights.
        targets: (B, *code_shape, V), probabilities that replace the codes as what is to be predicted.
        code_depths: the depth or scale of each of the T codes; None = of codes in raster order.

    Returns:
        The losses.

    Raises:
        ValueError: if `targets` are not of the logits' shape, or there is not a depth to each of the depth
            weights.
    """
    if targets is None:
        per_code = code_cross_entropy(output.logits, codes)
    else:
        per_code = soft_cross_entropy(output.logits, targets)
    code = per_code.mean()
    depths = torch.tensor(code_depths or raster_depths(tuple(codes.shape[1:])), device=codes.device)  # (T,)
    counts = torch.bincount(depths)  # (D,)
    by_depth = None
    if len(counts) > 1:
        means = per_code.flatten(1).mean(dim=0)  # (B, T) -> (T,)
        by_depth = torch.zeros_like(counts, dtype=means.dtype).index_add(0, depths, means) / counts
    weights = config.depth_weights
    total = config.code_weight * (_weighted(by_depth, counts, weights) if weights else code)
    text = None
    # a text of a single id has no second one to predict
    if output.text_logits is not None and cond is not None and cond.shape[1] > 1:
        text = text_cross_entropy(output.text_logits, cond, ignores_padding=config.ignores_padding)
        total = total + config.text_weight * text
    return SequenceLosses(total, code, text, by_depth)


def _weighted(by_depth: Tensor | None, counts: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Weighted mean over all codes, from the losses and the numbers of codes (D,) of the depths."""
    if by_depth is None or len(by_depth) != len(weights):
        found = "no depth" if by_depth is None else f"{len(by_depth)} depths"
        raise ValueError(
            f"depth_weights has {len(weights)} weights, the codes have {found}: name one for each, or none"
        )
    shares = counts * by_depth.new_tensor(weights)
    return torch.sum(by_depth * shares) / shares.sum()


def code_cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Negative log-likelihood of each code.

    Args:
        logits: (B, *code_shape, V), any float type; computed with in float32, in autocast too.
        codes: int64 (B, *code_shape).

    Returns:
        (B, *code_shape) float32.
    """
    flat = F.cross_entropy(
        rearrange(logits.float(), "b ... v -> (b ...) v"),
        rearrange(codes, "b ... -> (b ...)"),
        reduction="none",
    )
    return flat.view(codes.shape)  # (B T,) -> (B, *code_shape)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with distributions over codes, -sum p log softmax(logits) (Lee et al. 2022, 3.2.3).

    Args:
        logits: (B, *code_shape, V), any float type; -inf beyond the codebook of a depth.
        targets: (B, *code_shape, V) probabilities; zero where a logit is -inf.

    Returns:
        (B, *code_shape) float32.

    Raises:
        ValueError: if the shapes differ.
    """
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets must be of the logits' shape {tuple(logits.shape)}, got {tuple(targets.shape)}: "
            "are they of the image tokenizer the model is trained for?"
        )
    # where nothing is expected nothing is lost, also at a logit of -inf, whose product with 0 is no number
    logs = F.log_softmax(logits.float(), dim=-1).masked_fill(targets == 0, 0.0)
    return -(targets.float() * logs).sum(dim=-1)


def text_cross_entropy(text_logits: Tensor, text: Tensor, *, ignores_padding: bool = False) -> Tensor:
    """Mean negative log-likelihood of each text id but the first, given those before it.

    Args:
        text_logits: (B, N - 1, V_text); at n they predict id n + 1.
        text: int64 (B, N), N > 1.
        ignores_padding: take the mean over the ids that are not padding; zero if there is none.

    Returns:
        Scalar, float32.
    """
    flat = rearrange(text_logits.float(), "b n v -> (b n) v")
    wanted = rearrange(text[:, 1:], "b n -> (b n)")
    if not ignores_padding:
        return F.cross_entropy(flat, wanted)
    total = F.cross_entropy(flat, wanted, ignore_index=PAD_ID, reduction="sum")
    return total / (wanted != PAD_ID).sum().clamp(min=1)
