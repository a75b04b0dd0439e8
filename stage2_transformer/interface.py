"""What a sequence model is, whatever its architecture: three methods, and a cache passed as an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class SequenceOutput(NamedTuple):
    """Result of a full forward pass."""

    logits: Tensor  # (B, *code_shape, V): the logits at n predict the code at n
    text_logits: Tensor | None  # (B, N - 1, V_text): at n they predict text token n + 1; None without text


class Cache(Protocol):
    """The state of decoding: what was computed for each row so far."""

    batch_size: int

    @property
    def num_codes(self) -> list[int]:
        """Codes consumed by each row."""
        ...

    def rewind(self, row: int, num_codes: int) -> None:
        """Forget all but the first `num_codes` codes of a row."""
        ...


@runtime_checkable
class SequenceModel(Protocol):
    """Condition -> codes, one code at a time, in raster order with depth fastest; pyramids coarse to fine."""

    @property
    def vocab_size(self) -> int:
        """V, of the largest codebook."""
        ...

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(h, w), (h, w, D), or (T,) of a pyramid."""
        ...

    @property
    def code_depths(self) -> tuple[int, ...]:
        """The depth of each of the T codes, or its scale in a pyramid: which of `SamplingParams` is meant."""
        ...

    def __call__(self, codes: Tensor, cond: Tensor | None) -> SequenceOutput:
        """Predict every code from the condition and the codes before it, in training and evaluation alike.

        Args:
            codes: int64 (B, *code_shape).
            cond: (B, N) text ids, (B,) labels, or None.
        """
        ...

    def null_condition(self, cond: Tensor | None) -> Tensor:
        """The condition that says nothing, for classifier-free guidance; same shape as `cond`."""
        ...

    def make_cache(self, batch_size: int) -> Cache:
        """An empty cache with room for whole images, on the model's device."""
        ...

    def prefill(self, cond: Tensor | None, cache: Any, rows: Sequence[int] | None = None) -> Tensor:
        """Read the condition.

        Args:
            cond: P conditions; P divides the number of rows, and each serves as many consecutive rows.
            cache: from `make_cache`; the rows start anew.
            rows: which rows of the cache; None = all.

        Returns:
            (B, V): the logits of code 0 of each row.
        """
        ...

    def decode(self, codes: Tensor, cache: Any, rows: Sequence[int] | None = None) -> Tensor:
        """Read n >= 1 codes of each row.

        Args:
            codes: int64 (B, n), in raster order with depth fastest, following those the cache has seen.
            cache: rows may be of different lengths.
            rows: which rows of the cache; None = all.

        Returns:
            (B, n, V): entry i is the logits of the code that follows code i.
        """
        ...


def raster_depths(code_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The depth of each code in raster order: of (h, w, D) 0 to D - 1 over and over, otherwise 0."""
    depth = code_shape[2] if len(code_shape) == 3 else 1
    return tuple(n % depth for n in range(math.prod(code_shape)))


def flatten_codes(codes: Tensor, code_shape: tuple[int, ...]) -> Tensor:
    """Flatten codes in raster order, depth fastest.

    Args:
        codes: should be int64 (B, *code_shape).
        code_shape: of the model.

    Returns:
        (B, T).

    Raises:
        ValueError: if the shape or dtype is another.
    """
    if tuple(codes.shape[1:]) != tuple(code_shape) or codes.is_floating_point():
        expected = ", ".join(map(str, code_shape))
        raise ValueError(f"codes must be int64 (B, {expected}), got {codes.dtype} {tuple(codes.shape)}")
    return codes.flatten(1)
