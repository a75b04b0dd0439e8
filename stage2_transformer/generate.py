"""The decoding loop, the only one there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stage2_transformer.interface import SequenceModel
from stage2_transformer.sampling import SamplingParams, draw_next, guide, require_finite, uniforms
from stage2_transformer.speculative import SpeculativeDecoder

CHECK_EVERY = 16
"""Codes after which a drawing asks whether all logits so far were finite: a GPU has to be waited for."""


class Decoder(Protocol):
    """What the loop does with logits: it makes codes final, and says what to read next."""

    @property
    def num_done(self) -> int:
        """Final codes of the row that has fewest."""
        ...

    def accept(self, logits: Tensor) -> None:
        """Take the logits (R, n, V) of the codes after those read last, guidance applied."""
        ...

    def next_pass(self) -> tuple[Tensor, list[int], list[int]]:
        """Codes (R, n) to read, the rows they belong to, and how many codes of each row come before them."""
        ...


class PlainDecoder:
    """The `Decoder` that draws one code of every row after each pass.

    Args:
        codes: (B, T), written to.
        begin: how many of each row are known.
        params: temperature, top_k and top_p are used.
        seeds: one per row.
        code_depths: the depth of each of the T codes.
    """

    def __init__(
        self,
        codes: Tensor,
        begin: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        code_depths: Sequence[int],
    ) -> None:
        self.codes = codes
        self.num_done = begin
        by_depth = [params.at(depth) for depth in range(max(code_depths) + 1)]
        self.params = [by_depth[depth] for depth in code_depths]  # of each code
        self.draws = uniforms(seeds, codes.shape[1]).to(codes.device)
        self.is_finite = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
        self.rows = list(range(len(codes)))

    def accept(self, logits: Tensor) -> None:
        """Draw the next code of each row, see `Decoder.accept`.

        Raises:
            FloatingPointError: if logits are not finite; up to CHECK_EVERY codes later, and not after the
                last.
        """
        n = self.num_done
        codes, is_finite = draw_next(logits[:, -1], self.params[n], self.draws[:, n])
        self.codes[:, n] = codes
        self.is_finite &= is_finite
        self.num_done += 1
        if self.num_done % CHECK_EVERY == 0 or self.num_done == self.codes.shape[1]:
            require_finite(self.is_finite)

    def next_pass(self) -> tuple[Tensor, list[int], list[int]]:
        """The codes just drawn, see `Decoder.next_pass`."""
        n = self.num_done - 1
        return self.codes[:, n : n + 1], self.rows, [n] * len(self.rows)


def generate(
    model: SequenceModel,
    cond: Tensor | None,
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    known: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw the codes of images.

    Args:
        model: a GPT or an RQTransformer, in evaluation mode.
        cond: (P, N) text ids, (P,) labels, or None. P divides B: row p serves images p * B / P to
            (p + 1) * B / P - 1 and is read once.
        params: temperature, top-k, top-p and guidance.
        seeds: one per image; image i depends on the model, its condition, `params` and seed i alone.
        known: (B or 1, n) codes in raster order, depth fastest, that every image begins with (image
            completion).
        on_step: called before the first drawn code and after each, with the number of codes done and all
            codes (B, T), zeros where not yet done. With `params.window` above 1 it is called after each
            pass, with the number of the image that has fewest; others may be further.

    Returns:
        int64 (B, *code_shape) on the model's device.

    Raises:
        ValueError: if the shapes do not fit or an option does not fit the model.
        FloatingPointError: if the model's logits are not finite.
    """
    codes = torch.empty(0)
    for num_done, codes in iterate_codes(model, cond, params, seeds=seeds, known=known):
        if on_step is not None:
            on_step(num_done, codes)
    # (B, T) -> (B, *code_shape); cloned, since autograd refuses what was made in inference mode
    return codes.clone().view(len(seeds), *model.code_shape)


@torch.inference_mode()
def iterate_codes(
    model: SequenceModel,
    cond: Tensor | None,
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    known: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The decoding loop as an iterator; arguments and errors are those of `generate`.

    Yields:
        The number of codes done and the codes (B, T), zeros where not yet done; the same tensor each time.
        First comes the state with the known codes alone.
    """
    shape = tuple(model.code_shape)
    total, batch_size, depths = math.prod(shape), len(seeds), model.code_depths
    is_guided = params.is_guided
    params.check_depths(max(depths) + 1)
    # of each code; with speculation one scale serves all
    scales: list[Any] = [params.at(depth).cfg_scale for depth in depths]
    if batch_size == 0:
        raise ValueError("seeds must name at least one image, got none")
    if is_guided:
        null = model.null_condition(cond)
        cond = torch.cat([cond, null]) if cond is not None else None
    cache = model.make_cache(2 * batch_size if is_guided else batch_size)
    logits = model.prefill(cond, cache)[:, None]  # (B or 2B, 1, V)
    codes = torch.zeros(batch_size, total, dtype=torch.int64, device=logits.device)
    begin = _place_known(codes, known, model.vocab_size) if known is not None and known.numel() else 0
    if 0 < begin < total:
        logits = model.decode(_twice(codes[:, :begin], is_guided), cache)[:, -1:]
    decoder = _make_decoder(model, codes, begin, params, seeds)
    yield begin, codes
    while decoder.num_done < total:
        decoder.accept(guide(logits, scales[decoder.num_done]) if is_guided else logits)
        yield decoder.num_done, codes
        if decoder.num_done < total:
            chunk, rows, lengths = decoder.next_pass()
            if is_guided:
                rows, lengths = rows + [row + batch_size for row in rows], lengths + lengths
            held = cache.num_codes
            for row, length in zip(rows, lengths, strict=True):
                if held[row] != length:
                    cache.rewind(row, length)
            logits = model.decode(_twice(chunk, is_guided), cache, rows)


def _make_decoder(
    model: SequenceModel, codes: Tensor, begin: int, params: SamplingParams, seeds: Sequence[int]
) -> Decoder:
    if params.window > 1:
        return SpeculativeDecoder(
            codes,
            begin,
            params,
            seeds=seeds,
            code_shape=tuple(model.code_shape),
            code_depths=model.code_depths,
            vocab_size=model.vocab_size,
        )
    return PlainDecoder(codes, begin, params, seeds=seeds, code_depths=model.code_depths)


def _twice(codes: Tensor, is_guided: bool) -> Tensor:
    """(B, n) -> (2B, n) for the conditional and the unconditional half."""
    return torch.cat([codes, codes]) if is_guided else codes


def _place_known(codes: Tensor, known: Tensor, vocab_size: int) -> int:
    """Write known codes to the front of each row; returns how many there are."""
    if known.ndim != 2 or known.shape[0] not in (1, len(codes)) or known.shape[1] > codes.shape[1]:
        raise ValueError(
            f"known codes must be ({len(codes)} or 1, at most {codes.shape[1]}), got {tuple(known.shape)}"
        )
    if known.is_floating_point():
        raise ValueError(f"known codes must be integers, got {known.dtype}")
    if int(known.min()) < 0 or int(known.max()) >= vocab_size:
        raise ValueError(
            f"known codes must be in [0, {vocab_size}), got {int(known.min())} to {int(known.max())}: "
            "do they come from this model's image tokenizer?"
        )
    codes[:, : known.shape[1]] = known.to(codes.device)
    return known.shape[1]
