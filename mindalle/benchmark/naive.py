"""Decoding as the originals do it: the baseline of benchmarks, and the oracle of the fast path.

float32, the prompt read once per image, keys and values concatenated anew at every step, query, key and
value computed one after the other, attention written out; the RQ-Transformer's whole prefix embedded again
for every code. Each is a `SequenceModel`, so that `generate` is the loop here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_transformer import GPT, RQTransformer, SequenceOutput
from stage2_transformer.layers import Transformer


class NaiveCache:
    """Past keys and values, a piece per step, and the codes so far.

    Args:
        batch_size: B.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.body: list[Tensor] = []  # each (L, 2, B, nh, n, hd)
        self.head: list[Tensor] = []  # the same of the RQ-Transformer's head, at the running position
        self.codes = torch.empty(batch_size, 0, dtype=torch.int64)

    @property
    def num_codes(self) -> list[int]:
        """Codes consumed by each row."""
        return [self.codes.shape[1]] * self.batch_size

    def rewind(self, row: int, num_codes: int) -> None:
        """Not possible: all rows share their pieces.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the naive cache cannot forget: decode plainly, without speculation")


class NaiveModel:
    """What both naive decoders share.

    Args:
        model: in evaluation mode and float32; its weights are used, not copied.
    """

    def __init__(self, model: GPT | RQTransformer) -> None:
        self.model: Any = model
        self.config: Any = model.config

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.model.vocab_size)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(h, w) or (h, w, D)."""
        return tuple(self.model.code_shape)

    @property
    def code_depths(self) -> tuple[int, ...]:
        """The depth of each code."""
        return tuple(self.model.code_depths)

    def __call__(self, codes: Tensor, cond: Tensor | None) -> SequenceOutput:
        """The model's own full forward pass, see `SequenceModel`."""
        output: SequenceOutput = self.model(codes, cond)
        return output

    def null_condition(self, cond: Tensor | None) -> Tensor:
        """The model's own, see `SequenceModel`."""
        null: Tensor = self.model.null_condition(cond)
        return null

    def make_cache(self, batch_size: int) -> NaiveCache:
        """An empty cache."""
        return NaiveCache(batch_size)

    def prefill(self, cond: Tensor | None, cache: NaiveCache, rows: Sequence[int] | None = None) -> Tensor:
        """Read the condition, once for each row; all rows start anew.

        Args:
            cond: (P, N), (P,) or None; P divides B.
            cache: from `make_cache`.
            rows: None or all of them in order: there is no other choice.

        Returns:
            (B, V): the logits of code 0 of each row.
        """
        _check_rows(cache, rows)
        cond = cond.repeat_interleave(cache.batch_size // len(cond), dim=0) if cond is not None else None
        prompt = self.model.condition(cond, batch_size=cache.batch_size)  # (B, N, C)
        cache.body, cache.head = [], []
        cache.codes = torch.empty(cache.batch_size, 0, dtype=torch.int64, device=prompt.device)
        return self._after_prompt(prompt, cache)

    def decode(self, codes: Tensor, cache: NaiveCache, rows: Sequence[int] | None = None) -> Tensor:
        """Read n >= 1 codes of each row, one after the other.

        Args:
            codes: int64 (B, n).
            cache: from `make_cache`.
            rows: None or all of them in order: there is no other choice.

        Returns:
            (B, n, V): the logits of the code after each.
        """
        _check_rows(cache, rows)
        logits = []
        for i in range(codes.shape[1]):
            cache.codes = torch.cat([cache.codes, codes[:, i : i + 1]], dim=1)
            logits.append(self._after_code(cache))
        return torch.stack(logits, dim=1)

    def _after_prompt(self, prompt: Tensor, cache: NaiveCache) -> Tensor:
        """Embedded conditions (B, N, C) -> logits of the first code (B, V)."""
        raise NotImplementedError

    def _after_code(self, cache: NaiveCache) -> Tensor:
        """Logits (B, V) of the code after the last of the cache."""
        raise NotImplementedError


class NaiveGPT(NaiveModel):
    """GPT, decoded as minDALL-E's own code does."""

    def _after_prompt(self, prompt: Tensor, cache: NaiveCache) -> Tensor:
        return self._classify(run_stack(self.model.transformer, prompt, cache.body))

    def _after_code(self, cache: NaiveCache) -> Tensor:
        place = cache.codes.shape[1] - 1
        x = self.model.code_embedding(cache.codes[:, place:]) + self.model.code_positions[place]
        return self._classify(run_stack(self.model.transformer, x, cache.body))

    def _classify(self, hidden: Tensor) -> Tensor:
        return _linear(self.model.head, self.model.norm(hidden[:, -1]))


class NaiveRQTransformer(NaiveModel):
    """RQ-Transformer, decoded as rq-vae-transformer's own code does."""

    def _after_prompt(self, prompt: Tensor, cache: NaiveCache) -> Tensor:
        context = run_stack(self.model.body, prompt, cache.body)[:, -1:]
        return self._predict(context, cache, depth=0)

    def _after_code(self, cache: NaiveCache) -> Tensor:
        num_codes, depth = cache.codes.shape[1], self.config.depth
        num_positions = -(-num_codes // depth)
        missing = num_positions * depth - num_codes
        # (B, n) -> (B, P, D), the running position filled up with zeros that nothing reads
        codes = F.pad(cache.codes, (0, missing)).view(-1, num_positions, depth)
        # the whole prefix, of which one entry is used: so do the originals at every code
        positions = self._read_positions(codes) + self.model.position_embedding[:num_positions]
        depths = self._read_depths(codes)
        if missing:
            return self._predict(depths[:, -1, -1 - missing, None], cache, depth=depth - missing)
        cache.head = []
        return self._predict(run_stack(self.model.body, positions[:, -1:], cache.body), cache, depth=0)

    def _predict(self, x: Tensor, cache: NaiveCache, depth: int) -> Tensor:
        """The head's next input (B, 1, C) -> logits (B, V) of a depth."""
        hidden = run_stack(self.model.head, x + self.model.depth_embedding[depth], cache.head)
        normed = self.model.classifier_norm(hidden)
        if isinstance(self.model.classifier, nn.Linear):
            return _linear(self.model.classifier, normed)[:, 0]
        logits: Tensor = self.model.classifier(normed[:, 0], depth)
        logits[:, self.config.codebook_sizes[depth] :] = -math.inf
        return logits

    def _vectors(self, codes: Tensor, *, from_codebook: bool) -> Tensor:
        """(B, P, D) -> (B, P, D, C)."""
        first, vectors = 0, []  # row of the table at which a depth begins
        for depth, size in enumerate(self.config.codebook_sizes):
            table = self.model.codebook[depth] if from_codebook else self.model.table.weight
            vectors.append(F.embedding(codes[..., depth] + first, table))
            first += 0 if from_codebook or self.config.has_shared_embedding else size
        return torch.stack(vectors, dim=-2)

    def _read_positions(self, codes: Tensor) -> Tensor:
        vectors = self._vectors(codes, from_codebook=self.config.has_codebook_body)
        return self.model.body_input(vectors).sum(dim=-2)  # type: ignore[no-any-return]

    def _read_depths(self, codes: Tensor) -> Tensor:
        vectors = self._vectors(codes, from_codebook=self.config.has_codebook_head)
        if self.config.has_codebook_head and self.config.has_cumulative_head:
            vectors = vectors.cumsum(dim=-2)
        return self.model.head_input(vectors)  # type: ignore[no-any-return]


def naive(model: GPT | RQTransformer) -> NaiveModel:
    """The naive decoder of a model.

    Args:
        model: in evaluation mode and float32; its weights are used, not copied.

    Returns:
        A `SequenceModel` that gives the same logits up to float noise.
    """
    return NaiveGPT(model) if isinstance(model, GPT) else NaiveRQTransformer(model)


def _check_rows(cache: NaiveCache, rows: Sequence[int] | None) -> None:
    if rows is not None and list(rows) != list(range(cache.batch_size)):
        raise ValueError(
            f"the naive cache advances all {cache.batch_size} rows at once, got rows {list(rows)}"
        )


def run_stack(stack: Transformer, x: Tensor, past: list[Tensor]) -> Tensor:
    """Run a stack over new entries, with all pieces of the past put together anew.

    Args:
        stack: its weights are used.
        x: (B, n, C); n = 1 unless the past is empty.
        past: pieces (L, 2, B, nh, m, hd); this step's is appended.

    Returns:
        (B, n, C).
    """
    before = torch.cat(past, dim=-2) if past else None
    present = []
    blocks: Any = stack.blocks
    for layer, block in enumerate(blocks):
        normed = block.norm1(x)
        attended, new = _attend(block.attention, normed, before[layer] if before is not None else None)
        x = x + attended
        widen, activation, narrow = block.mlp
        x = x + _linear(narrow, activation(_linear(widen, block.norm2(x))))
        present.append(new)
    past.append(torch.stack(present))
    return x


def _attend(attention: Any, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, n, C), past (2, B, nh, m, hd) -> attended (B, n, C), new keys and values (2, B, nh, n, hd)."""
    weights = attention.qkv.weight.chunk(3)
    biases = attention.qkv.bias.chunk(3) if attention.qkv.bias is not None else (None, None, None)
    query, keys, values = (
        rearrange(F.linear(x, weight, bias), "b n (nh hd) -> b nh n hd", nh=attention.num_heads)
        for weight, bias in zip(weights, biases, strict=True)
    )
    new = torch.stack([keys, values])
    if past is not None:
        keys, values = torch.cat([past[0], keys], dim=-2), torch.cat([past[1], values], dim=-2)
    scores = query @ keys.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B, nh, n, m + n)
    length, total = scores.shape[-2:]
    is_hidden = torch.ones(length, total, dtype=torch.bool, device=x.device).triu(total - length + 1)
    weights_of_past = scores.masked_fill(is_hidden, -math.inf).softmax(dim=-1)
    attended = rearrange(weights_of_past @ values, "b nh n hd -> b n (nh hd)")
    return _linear(attention.proj, attended), new


def _linear(layer: Any, x: Tensor) -> Tensor:
    """`nn.Linear` as PyTorch computes it, (..., C) -> (..., C')."""
    return F.linear(x, layer.weight, layer.bias)
