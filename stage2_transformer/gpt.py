"""GPT over a condition and image codes: minDALL-E's Transformer1d (text) and iGPT (class, none)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from checkpoint_io import check_bounds
from stage2_transformer.cache import KVCache
from stage2_transformer.conditioning import Condition, ConditionConfig
from stage2_transformer.interface import SequenceOutput, flatten_codes, raster_depths
from stage2_transformer.layers import (
    Transformer,
    TransformerConfig,
    init_weights,
    normal_parameter,
    successive_rows,
)
from stage2_transformer.linear import Linear


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a GPT over image codes."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    vocab_size: int = 16384  # V, of the image tokenizer, in [1, 2**24]
    code_shape: tuple[int, ...] = (16, 16)  # (h, w) or (h, w, D), flattened in raster order; <= 4096 each
    embedding_dropout: float = 0.0  # of embeddings while training, in [0, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code_shape", tuple(self.code_shape))
        check_bounds(self, vocab_size=1 << 24, code_shape=1 << 12)
        if self.vocab_size < 1 or len(self.code_shape) not in (2, 3) or min(self.code_shape) < 1:
            raise ValueError(
                f"vocab_size must be positive and code_shape (h, w) or (h, w, D), "
                f"got {self.vocab_size} and {self.code_shape}"
            )
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout must be in [0, 1), got {self.embedding_dropout}")

    @property
    def num_codes(self) -> int:
        """T, codes of an image."""
        return math.prod(self.code_shape)


class GPT(nn.Module):
    """A `SequenceModel`: one causal transformer over condition and codes, untied heads.

    The sequence is [condition (N) | codes (T)]; the output at the condition's last entry predicts code 0.

    Args:
        config: shape of the model.
        codebook: not read; every model of the table STAGE2 can be given the image tokenizer's.
    """

    def __init__(self, config: GPTConfig, codebook: Tensor | None = None) -> None:
        super().__init__()
        width = config.transformer.width
        self.config = config
        self.condition = Condition(config.condition, width, has_positions=config.condition.kind == "text")
        self.code_embedding: nn.Module = nn.Embedding(config.vocab_size, width)
        self.code_positions = normal_parameter(config.num_codes, width)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.transformer = Transformer(config.transformer)
        self.norm = nn.LayerNorm(width)
        self.head: nn.Module = Linear(width, config.vocab_size, bias=False)
        has_text = config.condition.kind == "text"
        self.text_head = Linear(width, config.condition.vocab_size, bias=False) if has_text else None
        self.apply(init_weights)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(h, w) or (h, w, D)."""
        return self.config.code_shape

    @property
    def code_depths(self) -> tuple[int, ...]:
        """The depth of each code."""
        return raster_depths(self.code_shape)

    def forward(self, codes: Tensor, cond: Tensor | None, past: Tensor | None = None) -> SequenceOutput:
        """Predict every code from the condition and the codes before it; the oracle of cached decoding.

        Args:
            codes: int64 (B, *code_shape); only their shape counts where `past` is given.
            cond: text ids (B, N), labels (B,), or None.
            past: like `codes`, what is read of earlier codes; None = `codes`.

        Returns:
            SequenceOutput with logits (B, *code_shape, V), and for text text_logits (B, N - 1, V_text).

        Raises:
            ValueError: if shapes or ranges do not fit the model.
        """
        codes = flatten_codes(codes if past is None else past, self.code_shape)
        prompt = self.condition(cond, batch_size=len(codes))  # (B, N, C)
        x = torch.cat([prompt, self._read(codes)], dim=1)
        x = self.norm(self.transformer(self.dropout(x)))  # (B, N + T - 1, C)
        length = prompt.shape[1]
        # (B, T, V) -> (B, *code_shape, V)
        logits = self._classify(x[:, length - 1 :], [0] * len(codes))
        text_logits = self.text_head(x[:, : length - 1]) if self.text_head is not None else None
        return SequenceOutput(logits.view(len(codes), *self.code_shape, self.vocab_size), text_logits)

    def null_condition(self, cond: Tensor | None) -> Tensor:
        """The condition that says nothing, see `Condition.null`."""
        return self.condition.null(cond)

    @property
    def cache_bytes(self) -> int:
        """What the cache of one image takes."""
        return self.transformer.cache_bytes(self._capacity)

    @property
    def _capacity(self) -> int:
        """Entries of the condition and of all codes but the last, which nothing follows."""
        return self.config.condition.length + self.config.num_codes - 1

    def make_cache(self, batch_size: int) -> KVCache:
        """An empty cache with room for whole images."""
        return self.transformer.make_cache(batch_size, self._capacity)

    def prefill(self, cond: Tensor | None, cache: KVCache, rows: Sequence[int] | None = None) -> Tensor:
        """Read the condition, see `SequenceModel.prefill`.

        Args:
            cond: (P, N), (P,) or None; P divides the number of rows.
            cache: from `make_cache`.
            rows: which rows start anew; None = all.

        Returns:
            (B, V): the logits of code 0 of each row.
        """
        prompt = self.condition(cond)  # (P, N, C)
        step = cache.begin_prompt(prompt.shape[1], len(prompt), rows)
        hidden = self.norm(self.transformer(prompt, step)[:, -1:])  # (P, 1, C)
        return self._classify(hidden, [0] * len(prompt))[:, 0].repeat_interleave(step.copies, dim=0)

    def decode(self, codes: Tensor, cache: KVCache, rows: Sequence[int] | None = None) -> Tensor:
        """Read n >= 1 codes of each row, see `SequenceModel.decode`.

        Args:
            codes: int64 (B, n).
            cache: rows may be of different lengths.
            rows: which rows; None = all.

        Returns:
            (B, n, V): the logits of the code after each.
        """
        rows = range(cache.batch_size) if rows is None else rows
        consumed = cache.num_codes
        starts = [consumed[row] for row in rows]
        step = cache.begin_step(codes.shape[1], rows)
        x = self.transformer(self._read_next(codes, cache, rows, starts), step)
        return self._classify(self.norm(x), [start + 1 for start in starts])

    def _read(self, codes: Tensor) -> Tensor:
        """The inputs (B, T - 1, C) of all codes (B, T) but the last."""
        return self.code_embedding(codes[:, :-1]) + self.code_positions[:-1]  # type: ignore[no-any-return]

    def _read_next(self, codes: Tensor, cache: KVCache, rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """The inputs (R, n, C) of the next codes (R, n) of rows that have read `starts` codes."""
        positions = successive_rows(self.code_positions, starts, codes.shape[1])
        return self.code_embedding(codes) + positions  # type: ignore[no-any-return]

    def _classify(self, hidden: Tensor, starts: Sequence[int]) -> Tensor:
        """Hidden states (R, n, C) that predict the codes from `starts` on -> logits (R, n, V)."""
        return self.head(hidden)  # type: ignore[no-any-return]
