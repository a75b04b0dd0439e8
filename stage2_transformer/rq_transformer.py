"""RQ-Transformer (Lee et al. 2022): a body over positions of the code grid, a head over each one's depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint_io import check_bounds
from stage2_transformer.cache import RQCache
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
class RQTransformerConfig:
    """Shape of an RQ-Transformer; the defaults are the released ImageNet 1.4B."""

    body: TransformerConfig = field(default_factory=TransformerConfig)  # over positions
    head: TransformerConfig = field(default_factory=lambda: TransformerConfig(num_layers=6))  # over depth
    condition: ConditionConfig = field(
        default_factory=lambda: ConditionConfig(kind="class", vocab_size=1000, length=1)
    )
    codebook_sizes: tuple[int, ...] = (
        16384,
        16384,
        16384,
        16384,
    )  # V of each of D depths, in [1, 2**24]
    code_shape: tuple[int, ...] = (8, 8, 4)  # (h, w, D), <= 4096 each
    codebook_width: int = 256  # C of the image tokenizer's codebook, used where codes enter as its vectors
    has_codebook_body: bool = True  # the body reads codes as codebook vectors and a linear layer, not a table
    has_codebook_head: bool = True  # so does the head
    has_cumulative_head: bool = True  # the head reads the sum of a position's vectors so far, not the last
    has_shared_embedding: bool = True  # one table for all depths, where a table is used
    has_shared_classifier: bool = True  # one output layer for all depths
    embedding_dropout: float = 0.0  # of embeddings while training, in [0, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        object.__setattr__(self, "code_shape", tuple(self.code_shape))
        check_bounds(self, codebook_sizes=1 << 24, code_shape=1 << 12, codebook_width=1 << 16)
        is_shape = len(self.code_shape) == 3 and min(self.code_shape) >= 1
        if not is_shape or len(self.codebook_sizes) != self.code_shape[2]:
            raise ValueError(
                f"code_shape must be (h, w, D) with one codebook size per depth, got {self.code_shape} "
                f"and {len(self.codebook_sizes)} sizes"
            )
        if min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes must be at least 1, got {self.codebook_sizes}")
        if self.body.width != self.head.width:
            raise ValueError(
                f"body and head must have one width, got {self.body.width} and {self.head.width}"
            )
        if len(set(self.codebook_sizes)) > 1 and self.has_shared_classifier:
            raise ValueError(f"a shared classifier needs codebooks of one size, got {self.codebook_sizes}")
        if len(set(self.codebook_sizes)) > 1 and self.has_shared_embedding and self.has_table:
            raise ValueError(f"a shared embedding needs codebooks of one size, got {self.codebook_sizes}")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout must be in [0, 1), got {self.embedding_dropout}")

    @property
    def vocab_size(self) -> int:
        """V, of the largest codebook."""
        return max(self.codebook_sizes)

    @property
    def depth(self) -> int:
        """D, codes per position."""
        return self.code_shape[2]

    @property
    def num_positions(self) -> int:
        """Places of the code grid, h * w."""
        return self.code_shape[0] * self.code_shape[1]

    @property
    def has_codebook(self) -> bool:
        """Whether body or head read codes as codebook vectors."""
        return self.has_codebook_body or self.has_codebook_head

    @property
    def has_table(self) -> bool:
        """Whether body or head read codes through an embedding table."""
        return not (self.has_codebook_body and self.has_codebook_head)


class CodeInput(nn.Module):
    """How one half of the model reads codes: as codebook vectors through a linear layer, or from a table.

    Args:
        width: C of the model.
        codebook_width: of the codebook's vectors; None = read from a table.
    """

    def __init__(self, width: int, codebook_width: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(codebook_width, width) if codebook_width is not None else None

    def forward(self, vectors: Tensor, num_summed: int = 1) -> Tensor:
        """(..., C') -> (..., C); `num_summed` > 1: the vectors are sums of as many that each get the bias."""
        if self.linear is None:
            return vectors
        return F.linear(vectors, self.linear.weight, self.linear.bias * num_summed)


class DepthClassifier(nn.Module):
    """One output layer per depth.

    Args:
        depth: D.
        width: C.
        vocab_size: V.
    """

    def __init__(self, depth: int, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = normal_parameter(depth, width, vocab_size)
        self.bias = nn.Parameter(torch.zeros(depth, vocab_size))

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """(..., C), all of one depth -> (..., V)."""
        return x @ self.weight[depth] + self.bias[depth]


class RQTransformer(nn.Module):
    """A `SequenceModel` for residual codes (B, h, w, D).

    The body reads [condition | positions] and gives a context for each position; the head reads [context |
    codes of the position so far] and predicts the position's codes one depth after the other.

    Args:
        config: shape of the model.
        codebook: (D, V, C'), the image tokenizer's; read where codes enter as its vectors, never trained.
    """

    def __init__(self, config: RQTransformerConfig, codebook: Tensor | None = None) -> None:
        super().__init__()
        width, sizes = config.body.width, config.codebook_sizes
        self.config = config
        self.register_buffer("codebook", _check_codebook(codebook, config), persistent=False)
        self.codebook: Tensor | None
        self.condition = Condition(config.condition, width, has_positions=True)
        self.position_embedding = normal_parameter(config.num_positions, width)
        self.depth_embedding = normal_parameter(config.depth, width)
        table_size = sizes[0] if config.has_shared_embedding else sum(sizes)
        self.table = nn.Embedding(table_size, width) if config.has_table else None
        self.body_input = CodeInput(width, config.codebook_width if config.has_codebook_body else None)
        self.head_input = CodeInput(width, config.codebook_width if config.has_codebook_head else None)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.body = Transformer(config.body)
        self.head = Transformer(config.head)
        self.classifier_norm = nn.LayerNorm(width)
        self.classifier: Linear | DepthClassifier = (
            Linear(width, sizes[0])
            if config.has_shared_classifier
            else DepthClassifier(config.depth, width, max(sizes))
        )
        has_text = config.condition.kind == "text"
        self.text_norm = nn.LayerNorm(width) if has_text else None
        self.text_head = Linear(width, config.condition.vocab_size) if has_text else None
        self.apply(init_weights)

    @property
    def vocab_size(self) -> int:
        """V, of the largest codebook."""
        return self.config.vocab_size

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(h, w, D)."""
        return self.config.code_shape

    @property
    def code_depths(self) -> tuple[int, ...]:
        """The depth of each code."""
        return raster_depths(self.code_shape)

    def forward(self, codes: Tensor, cond: Tensor | None, past: Tensor | None = None) -> SequenceOutput:
        """Predict every code from the condition and the codes before it; the oracle of cached decoding.

        Args:
            codes: int64 (B, h, w, D).
            cond: text ids (B, N), labels (B,), or None.
            past: like `codes`, what is read of earlier positions; None = `codes`. The earlier depths of a
                position itself are read from `codes` all the same.

        Returns:
            SequenceOutput with logits (B, h, w, D, V), -inf beyond a depth's own codebook, and for text
            text_logits (B, N - 1, V_text).

        Raises:
            ValueError: if shapes or ranges do not fit the model.
        """
        depth = self.config.depth
        by_position = flatten_codes(codes, self.code_shape).view(len(codes), -1, depth)  # (B, T) -> (B, P, D)
        read = by_position if past is None else flatten_codes(past, self.code_shape).view_as(by_position)
        prompt = self.condition(cond, batch_size=len(codes))  # (B, N, C)
        positions = self._read_positions(read[:, :-1]) + self.position_embedding[:-1]
        x = self.body(self.dropout(torch.cat([prompt, positions], dim=1)))  # (B, N + P - 1, C)
        length = prompt.shape[1]
        contexts = x[:, length - 1 :].unsqueeze(2)  # (B, P, 1, C)
        earlier = self._read_depths(by_position).view(*by_position.shape, -1)[:, :, :-1]  # (B, P, D - 1, C)
        inputs = torch.cat([contexts, earlier], dim=2) + self.depth_embedding  # (B, P, D, C)
        hidden = self.head(self.dropout(inputs).flatten(0, 1))  # (B, P, D, C) -> (B P, D, C)
        logits = self._classify(hidden, range(depth))  # (B P, D, V)
        text_logits = None
        if self.text_norm is not None and self.text_head is not None:
            text_logits = self.text_head(self.text_norm(x[:, : length - 1]))
        # (B P, D, V) -> (B, h, w, D, V)
        return SequenceOutput(logits.view(*codes.shape, logits.shape[-1]), text_logits)

    def null_condition(self, cond: Tensor | None) -> Tensor:
        """The condition that says nothing, see `Condition.null`."""
        return self.condition.null(cond)

    @property
    def cache_bytes(self) -> int:
        """What the cache of one image takes."""
        return self.body.cache_bytes(self._body_capacity) + self.head.cache_bytes(math.prod(self.code_shape))

    @property
    def _body_capacity(self) -> int:
        """Entries of the condition and of all positions but the last, which nothing follows."""
        return self.config.condition.length + self.config.num_positions - 1

    def make_cache(self, batch_size: int) -> RQCache:
        """An empty cache with room for the condition and all codes."""
        total = math.prod(self.code_shape)
        return RQCache(
            self.body.make_cache(batch_size, self._body_capacity),
            self.head.make_cache(batch_size, total),
            torch.zeros(batch_size, total, dtype=torch.int64, device=self.position_embedding.device),
            self.config.depth,
        )

    def prefill(self, cond: Tensor | None, cache: RQCache, rows: Sequence[int] | None = None) -> Tensor:
        """Read the condition, see `SequenceModel.prefill`.

        Args:
            cond: (P, N), (P,) or None; P divides the number of rows.
            cache: from `make_cache`.
            rows: which rows start anew; None = all.

        Returns:
            (B, V): the logits of code 0 of each row.
        """
        prompt = self.condition(cond)  # (P, N, C)
        context = self.body(prompt, cache.body.begin_prompt(prompt.shape[1], len(prompt), rows))[:, -1:]
        step = cache.head.begin_prompt(1, len(prompt), rows)
        logits = self._classify(self.head(context + self.depth_embedding[:1], step), [0])  # (P, 1, V)
        return logits[:, 0].repeat_interleave(step.copies, dim=0)

    def decode(self, codes: Tensor, cache: RQCache, rows: Sequence[int] | None = None) -> Tensor:
        """Read n >= 1 codes of each row, see `SequenceModel.decode`.

        Args:
            codes: int64 (B, n).
            cache: rows may be of different lengths.
            rows: which rows; None = all.

        Returns:
            (B, n, V): the logits of the code after each.
        """
        chosen = list(range(cache.batch_size)) if rows is None else list(rows)
        consumed = cache.num_codes
        by_phase: dict[int, list[int]] = {}  # depth of the next code -> which of the chosen rows
        for i, row in enumerate(chosen):
            by_phase.setdefault(consumed[row] % self.config.depth, []).append(i)
        if len(by_phase) == 1:
            return self._decode_phase(codes, cache, chosen)
        logits = torch.empty(0)
        for picks in by_phase.values():
            part = self._decode_phase(codes[picks], cache, [chosen[i] for i in picks])
            logits = part.new_empty(len(chosen), *part.shape[1:]) if not len(logits) else logits
            logits[picks] = part
        return logits

    def _decode_phase(self, codes: Tensor, cache: RQCache, rows: list[int]) -> Tensor:
        """`decode` for rows that are at the same depth: (R, n) -> (R, n, V)."""
        depth, num_new, num_codes = self.config.depth, codes.shape[1], cache.num_codes
        consumed = [num_codes[row] for row in rows]
        phase = consumed[0] % depth
        num_complete = (phase + num_new) // depth  # positions that these codes complete
        head_step = cache.head.begin_step(
            num_new, rows, [[(c + i + 1) // depth * depth for i in range(num_new)] for c in consumed]
        )
        touched = cache.store(codes, rows, consumed)  # (R, touched, D)
        inputs = self._read_depths(touched, phase, num_new)  # (R, n, C)
        next_depths = [(phase + i + 1) % depth for i in range(num_new)]
        if num_complete:
            body_step = cache.body.begin_step(num_complete, rows)
            starts = [c // depth for c in consumed]
            embedded = self._read_positions(touched[:, :num_complete])
            context = self.body(
                embedded + successive_rows(self.position_embedding, starts, num_complete), body_step
            )
            first_context = depth - 1 - phase  # which of the n codes completes the first position
            inputs = context if num_new == 1 else inputs.slice_scatter(context, 1, first_context, step=depth)
        # a single one as a slice, since a list of indices would be sent to the device
        chosen = slice(next_depths[0], next_depths[0] + 1) if num_new == 1 else next_depths
        hidden = self.head(inputs + self.depth_embedding[chosen], head_step)
        return self._classify(hidden, next_depths)

    def _vectors(self, codes: Tensor, *, from_codebook: bool) -> Tensor:
        """Codes (..., D) -> what stands for each of them (..., D, C' or C)."""
        if from_codebook:
            assert self.codebook is not None
            by_depth = zip(codes.unbind(dim=-1), self.codebook, strict=True)
            return torch.stack([F.embedding(part, table) for part, table in by_depth], dim=-2)
        assert self.table is not None
        if self.config.has_shared_embedding:
            return self.table(codes)  # type: ignore[no-any-return]
        sizes = torch.tensor((0, *self.config.codebook_sizes[:-1]), device=codes.device)
        return self.table(codes + sizes.cumsum(dim=0))  # type: ignore[no-any-return]

    def _read_positions(self, codes: Tensor) -> Tensor:
        """Codes (B, P, D) -> the body's inputs (B, P, C), without position embedding."""
        summed = self._vectors(codes, from_codebook=self.config.has_codebook_body).sum(dim=-2)
        # in the originals each of the D vectors goes through the layer alone, so its bias counts D times
        return self.body_input(summed, num_summed=self.config.depth)  # type: ignore[no-any-return]

    def _read_depths(self, codes: Tensor, first: int = 0, num_read: int | None = None) -> Tensor:
        """Codes (B, P, D) -> the head's inputs after `num_read` (or all) of the P D codes from `first` on.

        (B, n, C), without depth embedding.
        """
        vectors = self._vectors(codes, from_codebook=self.config.has_codebook_head)
        if self.config.has_codebook_head and self.config.has_cumulative_head:
            vectors = vectors.cumsum(dim=-2)
        last = None if num_read is None else first + num_read
        return self.head_input(vectors.flatten(1, 2)[:, first:last])  # type: ignore[no-any-return]

    def _classify(self, hidden: Tensor, depths: Sequence[int]) -> Tensor:
        """(B, n, C), head outputs of the given depths -> (B, n, V), -inf beyond a depth's own codebook."""
        normed: Tensor = self.classifier_norm(hidden)
        if self.config.has_shared_classifier:
            return self.classifier(normed)  # type: ignore[no-any-return]
        if len(depths) == 1:
            return self._classify_depth(normed, depths[0])
        if list(depths) == list(range(self.config.depth)):  # in training: nothing is scattered
            return torch.stack([self._classify_depth(normed[:, depth], depth) for depth in depths], dim=1)
        logits = normed.new_empty(*normed.shape[:2], self.vocab_size)
        for depth in set(depths):  # not one gathered weight (C, V) per entry: a known half image has hundreds
            entries = [i for i, entry_depth in enumerate(depths) if entry_depth == depth]
            logits[:, entries] = self._classify_depth(normed[:, entries], depth)
        return logits

    def _classify_depth(self, normed: Tensor, depth: int) -> Tensor:
        """(B, n, C), all of one depth -> (B, n, V), -inf beyond its codebook."""
        logits: Tensor = self.classifier(normed, depth)
        size = self.config.codebook_sizes[depth]
        if size < self.vocab_size:  # writing to nothing, too, would cost the backward pass a copy
            logits[..., size:] = -math.inf
        return logits


def _check_codebook(codebook: Tensor | None, config: RQTransformerConfig) -> Tensor | None:
    """The codebook, out of reach of gradients; None where nothing reads it."""
    if not config.has_codebook:
        return None
    if codebook is None:
        raise ValueError("this RQ-Transformer reads codes as codebook vectors: pass tokenizer.codebook()")
    expected = (config.depth, max(config.codebook_sizes), config.codebook_width)
    if tuple(codebook.shape) != expected:
        raise ValueError(
            f"the codebook must be (D, V, C) = {expected}, got {tuple(codebook.shape)}: "
            "is this the image tokenizer the model was trained with?"
        )
    return codebook.detach()
