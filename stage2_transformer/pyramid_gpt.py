"""GPT over a pyramid of codes: grids of rising size one after the other, each with a codebook of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint_io import check_bounds
from stage2_transformer.cache import KVCache
from stage2_transformer.conditioning import ConditionConfig
from stage2_transformer.gpt import GPT
from stage2_transformer.layers import TransformerConfig, init_weights, normal_parameter
from stage2_transformer.rq_transformer import DepthClassifier

MAX_CODES = 1 << 14
"""T, at most: the canvas is a matrix (T, T)."""


@dataclass(frozen=True, kw_only=True)
class PyramidGPTConfig:
    """Shape of a GPT over a pyramid of codes."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    scales: tuple[int, ...] = (1, 2, 4, 8, 8)  # codes along a side, coarse to fine, each >= 1
    codebook_sizes: tuple[int, ...] = (2048, 2048, 2048, 2048, 2048)  # V of each scale, >= 1
    codebook_width: int = 64  # C of the image tokenizer's codebooks, >= 1
    reads_canvas: bool = (
        True  # whether each entry also reads what coarser scales drew at the next code's place
    )
    embedding_dropout: float = 0.0  # of embeddings while training, in [0, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        check_bounds(self, scales=1 << 12, codebook_sizes=1 << 24, codebook_width=1 << 16)
        if not self.scales or len(self.scales) != len(self.codebook_sizes) or min(self.scales) < 1:
            raise ValueError(
                "scales must be at least 1, with one codebook size per scale, "
                f"got {self.scales} and {self.codebook_sizes}"
            )
        if min(self.codebook_sizes) < 1 or self.codebook_width < 1:
            raise ValueError(
                "codebook_sizes and codebook_width must be at least 1, "
                f"got {self.codebook_sizes} and {self.codebook_width}"
            )
        if self.num_codes > MAX_CODES:
            raise ValueError(f"scales must have at most {MAX_CODES} codes in all, got {self.num_codes}")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout must be in [0, 1), got {self.embedding_dropout}")

    @property
    def vocab_size(self) -> int:
        """V, of the largest codebook."""
        return max(self.codebook_sizes)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(T,)."""
        return (self.num_codes,)

    @property
    def num_codes(self) -> int:
        """T, codes of an image."""
        return sum(side * side for side in self.scales)

    @property
    def code_depths(self) -> tuple[int, ...]:
        """The scale of each code, coarse to fine."""
        return tuple(scale for scale, side in enumerate(self.scales) for _ in range(side * side))


class PyramidGPT(GPT):
    """A `SequenceModel` for pyramids of codes (B, T).

    Codes enter as their codebook vectors. Every entry knows the scale of the code that it predicts, and reads
    the canvas: the sum of all coarser scales, up-sampled bilinearly and pooled to that code's place.

    Args:
        config: shape of the model.
        codebook: (S, V, C'), the image tokenizer's; never trained.
    """

    config: PyramidGPTConfig  # type: ignore[assignment]

    def __init__(self, config: PyramidGPTConfig, codebook: Tensor | None = None) -> None:
        super().__init__(config)  # type: ignore[arg-type]  # of the same fields
        width = config.transformer.width
        self.register_buffer("codebook", _check_codebook(codebook, config), persistent=False)
        self.codebook: Tensor
        canvas = canvas_matrix(config.scales) if config.reads_canvas else None
        self.register_buffer("canvas", canvas, persistent=False)  # (T, T)
        self.canvas: Tensor | None
        self.register_buffer("depths", torch.tensor(config.code_depths, device="cpu"), persistent=False)
        self.depths: Tensor  # (T,)
        self.code_embedding = nn.Linear(config.codebook_width, width)
        self.canvas_embedding = (
            nn.Linear(config.codebook_width, width, bias=False) if config.reads_canvas else None
        )
        self.scale_embedding = normal_parameter(len(config.scales), width)
        self.head = DepthClassifier(len(config.scales), width, config.vocab_size)
        for module in (self.code_embedding, self.canvas_embedding):
            if module is not None:
                init_weights(module)

    @property
    def code_depths(self) -> tuple[int, ...]:
        """The scale of each code."""
        return self.config.code_depths

    def make_cache(self, batch_size: int) -> KVCache:
        """An empty cache with room for whole images and the vectors of their codes."""
        cache = super().make_cache(batch_size)
        shape = (batch_size, self.config.num_codes, self.config.codebook_width)
        cache.vectors = self.codebook.new_zeros(shape)
        return cache

    def _read(self, codes: Tensor) -> Tensor:
        """The inputs (B, T - 1, C) of all codes (B, T) but the last."""
        vectors = self._vectors(codes, self.depths)
        # (T - 1, T) @ (B, T, C') -> (B, T - 1, C')
        canvas = None if self.canvas is None else self.canvas[1:] @ vectors
        return self._inputs(
            vectors[:, :-1], canvas, torch.arange(self.config.num_codes - 1, device=codes.device)
        )

    def _read_next(self, codes: Tensor, cache: KVCache, rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """The inputs (R, n, C) of the next codes (R, n) of rows that have read `starts` codes."""
        assert cache.vectors is not None
        places = _places(starts, codes.shape[1], codes.device)  # (R, n)
        vectors = self._vectors(codes, self.depths[places])  # (R, n, C')
        row_index = torch.tensor(list(rows), device=codes.device)[:, None]  # (R, 1)
        cache.vectors[row_index, places] = vectors
        canvas = None
        if self.canvas is not None:
            end = max(starts) + codes.shape[1]
            reach = self.canvas[places + 1, :end]  # (R, n, end); zero but for codes of coarser scales
            canvas = reach @ cache.vectors[row_index[:, 0], :end]
        return self._inputs(vectors, canvas, places)

    def _inputs(self, vectors: Tensor, canvas: Tensor | None, places: Tensor) -> Tensor:
        """Vectors (B, n, C') of the codes at places, and the next codes' canvas, or None -> (B, n, C)."""
        x: Tensor = self.code_embedding(vectors) + self.code_positions[places]
        if canvas is not None and self.canvas_embedding is not None:
            x = x + self.canvas_embedding(canvas)
        return x + self.scale_embedding[self.depths[places + 1]]

    def _vectors(self, codes: Tensor, depths: Tensor) -> Tensor:
        """The codebook vectors (B, n, C') of codes (B, n) of the scales (n,) or (B, n)."""
        return F.embedding(codes + depths * self.vocab_size, self.codebook.flatten(0, 1))

    def _classify(self, hidden: Tensor, starts: Sequence[int]) -> Tensor:
        """Hidden states (R, n, C) that predict the codes from `starts` on -> (R, n, V).

        Logits beyond the codebook of a scale are -inf.
        """
        num_new = hidden.shape[1]
        if len(set(starts)) == 1:
            return torch.cat(
                [
                    self._classify_scale(hidden[:, begin:end], scale)
                    for scale, begin, end in _runs(self.code_depths[starts[0] : starts[0] + num_new])
                ],
                dim=1,
            )
        depths = self.depths[_places(starts, num_new, hidden.device)]  # (R, n)
        logits = hidden.new_empty(*hidden.shape[:2], self.vocab_size)
        for scale in torch.unique(depths).tolist():
            logits[depths == scale] = self._classify_scale(hidden[depths == scale], scale)
        return logits

    def _classify_scale(self, hidden: Tensor, scale: int) -> Tensor:
        """(..., C), all of one scale -> (..., V)."""
        logits: Tensor = self.head(hidden, scale)
        size = self.config.codebook_sizes[scale]
        if size < self.vocab_size:
            logits[..., size:] = -math.inf
        return logits


def canvas_matrix(scales: Sequence[int]) -> Tensor:
    """How far each code reaches onto the canvas that another one is drawn on.

    Args:
        scales: codes along a side, coarse to fine.

    Returns:
        (T, T) float32: entry (m, n) is the share of code n's vector in the canvas at code m, which is zero
        unless n is of a coarser scale. The canvas has the side of the finest scale; it is the bilinearly
        up-sampled sum of the coarser scales, and code m sees its mean over m's cell.
    """
    total = sum(side * side for side in scales)
    matrix, begin = torch.zeros(total, total, device="cpu"), 0
    for scale, side in enumerate(scales):
        grid = torch.eye(side * side, device="cpu").view(-1, 1, side, side)  # one picture per code
        spread = F.interpolate(grid, size=scales[-1], mode="bilinear", align_corners=False)
        later = begin + side * side
        for finer in scales[scale + 1 :]:
            share = F.adaptive_avg_pool2d(spread, finer).flatten(1)  # (side^2, finer^2)
            matrix[later : later + finer * finer, begin : begin + side * side] = share.T
            later += finer * finer
        begin += side * side
    return matrix


def _runs(depths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Ascending scales -> (scale, first, end) of each run of equal ones."""
    return [(d, depths.index(d), depths.index(d) + depths.count(d)) for d in sorted(set(depths))]


def _places(starts: Sequence[int], num_new: int, device: torch.device) -> Tensor:
    """(R, n): the n places from each start on."""
    return torch.tensor(list(starts), device=device)[:, None] + torch.arange(num_new, device=device)


def _check_codebook(codebook: Tensor | None, config: PyramidGPTConfig) -> Tensor:
    if codebook is None:
        raise ValueError("a pyramid's GPT reads codes as codebook vectors: pass tokenizer.codebook()")
    expected = (len(config.scales), config.vocab_size, config.codebook_width)
    if tuple(codebook.shape) != expected:
        raise ValueError(
            f"the codebook must be (S, V, C) = {expected}, got {tuple(codebook.shape)}: "
            "is this the image tokenizer the model was trained with?"
        )
    return codebook.detach()
