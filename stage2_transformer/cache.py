"""The state of decoding: keys and values of a stack, preallocated, and of the RQ-Transformer's two stacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values (L, B, nh, S, hd) of L layers for B rows with room for S entries.

    Rows may be of different lengths. While all are equal, reads and writes are slices; otherwise they are
    gathered.

    Args:
        num_layers: L.
        batch_size: B.
        num_heads: nh.
        capacity: S, entries per row.
        head_width: hd.
        like: a tensor with the dtype and device to use.
        is_static: steps attend to all S entries, most of them masked, and so all have one shape: for compiled
            code, which would be compiled again for every other shape.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_width: int,
        like: Tensor,
        is_static: bool = False,
    ) -> None:
        shape = (num_layers, batch_size, num_heads, capacity, head_width)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.batch_size = batch_size
        self.capacity = capacity
        self.is_static = is_static
        if is_static:  # CUDA graphs may write to it
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.prompt_length = 0  # entries before the first code
        self.lengths = [0] * batch_size  # entries of each row
        self.vectors: Tensor | None = None  # (B, T, C') of the codes read, for models that look back at them

    @property
    def num_codes(self) -> list[int]:
        """Codes consumed by each row."""
        return [length - self.prompt_length for length in self.lengths]

    def rewind(self, row: int, num_codes: int) -> None:
        """Forget all but the first `num_codes` codes of a row.

        Args:
            row: in [0, B).
            num_codes: at most as many as the row has.

        Raises:
            ValueError: if the row has fewer codes.
        """
        if not 0 <= num_codes <= self.num_codes[row]:
            raise ValueError(f"row {row} has {self.num_codes[row]} codes, cannot rewind it to {num_codes}")
        self.lengths[row] = self.prompt_length + num_codes

    def begin_prompt(self, length: int, num_prompts: int, rows: Sequence[int] | None) -> PromptStep:
        """Reset rows and start a pass over their prompts.

        Args:
            length: N, entries of a prompt.
            num_prompts: P; prompt p serves rows p * R / P to (p + 1) * R / P - 1.
            rows: R rows of the cache; None = all.

        Returns:
            The step to give to the layers.

        Raises:
            ValueError: if P does not divide R.
        """
        rows = range(self.batch_size) if rows is None else rows
        if len(rows) % num_prompts:
            raise ValueError(
                "the number of conditions must divide the number of images, "
                f"got {num_prompts} and {len(rows)}"
            )
        self.prompt_length = length
        for row in rows:
            self.lengths[row] = length
        return PromptStep(self, list(rows), length, len(rows) // num_prompts)

    def begin_step(
        self, num_new: int, rows: Sequence[int] | None, first_visible: Sequence[Sequence[int]] | None = None
    ) -> DecodeStep:
        """Start a pass over `num_new` further entries of each row, and count them.

        Args:
            num_new: n >= 1.
            rows: R rows of the cache; None = all.
            first_visible: (R, n), the first entry of its row that each new entry sees; None = entry 0.

        Returns:
            The step to give to the layers.

        Raises:
            ValueError: if a row has no condition yet, or no room.
        """
        rows = list(range(self.batch_size)) if rows is None else list(rows)
        starts = [self.lengths[row] for row in rows]
        if min(starts) == 0:
            raise ValueError(f"row {rows[starts.index(0)]} has no condition yet: call prefill first")
        if max(starts) + num_new > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} entries a row, got {max(starts)} and {num_new} "
                "more: an image has no more codes than that"
            )
        for row in rows:
            self.lengths[row] += num_new
        return DecodeStep(self, rows, starts, num_new, first_visible or [[0] * num_new] * len(rows))


class PromptStep:
    """A pass over prompts: each is read once and its keys and values are copied to the rows it serves."""

    def __init__(self, cache: KVCache, rows: list[int], length: int, copies: int) -> None:
        self.cache = cache
        self.rows = rows
        self.length = length
        self.copies = copies
        self.mask: Tensor | None = None
        self.is_causal = length > 1

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values (P, nh, N, hd) and return those to attend to: the same."""
        self.cache.keys[layer, self.rows, :, : self.length] = keys.repeat_interleave(self.copies, dim=0)
        self.cache.values[layer, self.rows, :, : self.length] = values.repeat_interleave(self.copies, dim=0)
        return keys, values


class DecodeStep:
    """A pass over n new entries of each row: where they are stored and what each of them sees."""

    is_causal = False  # the mask says it

    def __init__(
        self,
        cache: KVCache,
        rows: list[int],
        starts: list[int],
        num_new: int,
        first_visible: Sequence[Sequence[int]],
    ) -> None:
        self.cache = cache
        self.has_all_rows = rows == list(range(cache.batch_size))
        self.is_uniform = self.has_all_rows and len(set(starts)) == 1 and not cache.is_static
        self.start = starts[0]
        self.begin, self.end = min(min(row) for row in first_visible), max(starts) + num_new
        if cache.is_static:
            self.begin, self.end = 0, cache.capacity
        self.mask: Tensor | None = None
        if self.is_uniform and num_new == 1:
            return  # the one new entry of each row sees the whole slice
        device = cache.keys.device
        self.rows = torch.tensor(rows, device=device)
        # (R, n)
        self.positions = torch.tensor([[s + i for i in range(num_new)] for s in starts], device=device)
        first = torch.tensor(first_visible, device=device)  # (R, n)
        seen = torch.arange(self.begin, self.end, device=device)
        visible = (seen >= first[..., None]) & (seen <= self.positions[..., None])  # (R, n, end - begin)
        self.mask = visible.unsqueeze(1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (R, nh, n, hd); return those to attend to (R, nh, S', hd)."""
        all_keys, all_values = self.cache.keys[layer], self.cache.values[layer]  # (B, nh, S, hd)
        if self.is_uniform:
            all_keys[:, :, self.start : self.end] = keys
            all_values[:, :, self.start : self.end] = values
            return all_keys[:, :, self.begin : self.end], all_values[:, :, self.begin : self.end]
        rows = self.rows[:, None]  # (R, 1), with positions (R, n) -> (R, n, nh, hd)
        all_keys[rows, :, self.positions] = keys.transpose(1, 2)
        all_values[rows, :, self.positions] = values.transpose(1, 2)
        if not self.has_all_rows:
            all_keys, all_values = all_keys[self.rows], all_values[self.rows]
        return all_keys[:, :, self.begin : self.end], all_values[:, :, self.begin : self.end]


class RQCache:
    """The state of decoding: the body's cache over positions, the head's over codes, and the codes.

    The head keeps an entry per code, each seeing those of its own position only, so that a row rewinds by its
    lengths alone.

    Args:
        body: entries [condition | positions that are complete].
        head: entry n is the input that predicts code n; its prompt is entry 0.
        codes: int64 (B, T) consumed so far, anything beyond.
        depth: D.
    """

    def __init__(self, body: KVCache, head: KVCache, codes: Tensor, depth: int) -> None:
        self.body = body
        self.head = head
        self.codes = codes
        self.depth = depth
        self.batch_size = len(codes)

    @property
    def num_codes(self) -> list[int]:
        """Codes consumed by each row."""
        return self.head.num_codes

    def rewind(self, row: int, num_codes: int) -> None:
        """Forget all but the first `num_codes` codes of a row, see `KVCache.rewind`."""
        self.head.rewind(row, num_codes)
        self.body.rewind(row, num_codes // self.depth)

    def store(self, codes: Tensor, rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Keep the next codes of rows that are at one depth.

        Args:
            codes: int64 (R, n).
            rows: R rows of the cache.
            starts: codes that each row had before; equal modulo D.

        Returns:
            (R, P, D), the positions that these codes fall into, whole; codes to come are anything.
        """
        num_new, phase = codes.shape[1], starts[0] % self.depth
        size = -(-(phase + num_new) // self.depth) * self.depth
        if list(rows) == list(range(self.batch_size)) and len(set(starts)) == 1:
            self.codes[:, starts[0] : starts[0] + num_new] = codes
            first = starts[0] - phase
            return self.codes[:, first : first + size].view(
                len(rows), -1, self.depth
            )  # (R, P D) -> (R, P, D)
        device = codes.device
        row_index = torch.tensor(rows, device=device)[:, None]  # (R, 1)
        begin = torch.tensor(starts, device=device)[:, None]  # (R, 1)
        self.codes[row_index, begin + torch.arange(num_new, device=device)] = codes
        block = begin - phase + torch.arange(size, device=device)  # (R, P D)
        return self.codes[row_index, block].view(len(rows), -1, self.depth)  # (R, P D) -> (R, P, D)
