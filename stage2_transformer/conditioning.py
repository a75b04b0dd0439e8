"""Conditions: text, a class label, or nothing, as the first entries of the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from checkpoint_io import check_bounds
from stage2_transformer.layers import normal_parameter

PAD_ID = 0
"""Text is padded with this id on the right; padding is attended to, as in the originals. A text of padding
alone is the null condition of guidance, and what an empty caption is encoded as."""


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """What a model is conditioned on."""

    kind: Literal["text", "class", "none"] = "text"
    vocab_size: int = 16384  # text: V_text; class: number of classes; none: 1; <= 2**24
    length: int = 64  # text: N, ids per prompt, <= 65536; class and none: 1
    has_null_class: bool = False  # class: one more embedding, trained as the null condition of guidance

    def __post_init__(self) -> None:
        check_bounds(self, vocab_size=1 << 24, length=1 << 16)
        if self.kind not in ("text", "class", "none"):
            raise ValueError(f"condition kind must be text, class or none, got {self.kind!r}")
        if self.vocab_size < 1 or self.length < 1:
            raise ValueError(
                f"vocab_size and length must be at least 1, got {self.vocab_size} and {self.length}"
            )
        if self.kind != "text" and self.length != 1:
            raise ValueError(f"a {self.kind} condition has length 1, got {self.length}")
        if self.kind != "class" and self.has_null_class:
            raise ValueError(f"has_null_class is for class conditions, got kind {self.kind!r}")


class Condition(nn.Module):
    """Embeds conditions as the first entries of a sequence.

    Args:
        config: kind and sizes.
        width: C.
        has_positions: whether a position embedding is added (GPT: for text only; RQ-Transformer: always).
    """

    def __init__(self, config: ConditionConfig, width: int, *, has_positions: bool) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + config.has_null_class, width)
        self.positions = normal_parameter(config.length, width) if has_positions else None

    def forward(self, cond: Tensor | None, batch_size: int = 1) -> Tensor:
        """Embed conditions.

        Args:
            cond: text ids (B, N), labels (B,), or None for an unconditional model.
            batch_size: B, used without a condition.

        Returns:
            (B, N, C), N = 1 for class and none.

        Raises:
            ValueError: if the condition is missing, unwanted, of the wrong shape or out of range.
        """
        x = self._embed(self._check(cond, batch_size))
        return x if self.positions is None else x + self.positions

    def _embed(self, ids: Tensor) -> Tensor:
        if self.config.kind != "class" or self.config.has_null_class:
            return self.embedding(ids)  # type: ignore[no-any-return]
        # no null class was trained: the mean of all classes stands for it
        table = torch.cat([self.embedding.weight, self.embedding.weight.mean(dim=0, keepdim=True)])
        has_null = bool((ids == self.config.vocab_size).any())
        return nn.functional.embedding(ids, table) if has_null else self.embedding(ids)

    def _check(self, cond: Tensor | None, batch_size: int) -> Tensor:
        """Ids (B, N) that are within the embedding."""
        kind, size = self.config.kind, self.config.vocab_size
        if kind == "none":
            if cond is not None:
                raise ValueError("this model is unconditional: pass cond=None")
            return torch.zeros(batch_size, 1, dtype=torch.int64, device=self.embedding.weight.device)
        if cond is None:
            raise ValueError(f"this model needs a {kind} condition, got None")
        ids = cond[:, None] if kind == "class" and cond.ndim == 1 else cond  # (B,) -> (B, 1)
        if ids.ndim != 2 or ids.shape[1] != self.config.length or ids.is_floating_point():
            shape = "(B,)" if kind == "class" else f"(B, {self.config.length})"
            raise ValueError(
                f"a {kind} condition must be int64 {shape}, got {cond.dtype} {tuple(cond.shape)}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > size or (high == size and kind == "text"):
            hint = "is this the tokenizer the model was trained with?" if kind == "text" else "no such class"
            raise ValueError(f"{kind} ids must be in [0, {size}), got {low if low < 0 else high}: {hint}")
        return ids

    def null(self, cond: Tensor | None) -> Tensor:
        """The condition that says nothing: text of padding, or the label `vocab_size` (the null class).

        Args:
            cond: conditions, not changed.

        Returns:
            Same shape and dtype as `cond`.

        Raises:
            ValueError: if the model is unconditional or the condition missing.
        """
        if self.config.kind == "none":
            raise ValueError("guidance needs a condition, and this model is unconditional: use cfg_scale=1")
        if cond is None:
            raise ValueError(f"this model needs a {self.config.kind} condition, got None")
        return torch.full_like(cond, PAD_ID if self.config.kind == "text" else self.config.vocab_size)
