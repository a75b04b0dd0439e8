"""Lossless speculative Jacobi decoding: many codes are guessed, read in one pass, and tested.

Source: Teng et al. 2024 (arXiv 2410.01699). As in So et al. 2025 (arXiv 2510.24211), every draft of a window
is tested, not only those up to the first rejection, and those kept stay: fewer change, and fewer passes do.

Why an image is distributed as one drawn code by code:

1. Let all random numbers of the codes before i be given. Then so are p^1, p^2, ..., the distributions of i in
   the passes that test it, and the first of these passes to read the final codes before i: number f.
2. If a draft is distributed as q, what the test makes of it, with numbers of its own, is distributed as p: y
   comes with min(p, q)(y) from drafts kept and with max(0, p - q)(y) from those redrawn. The first guess has
   q = one-hot; so after pass j the draft is distributed as p^j.
3. After pass f it is final, and p^f is the model's distribution given the final codes before i: induction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_transformer.sampling import (
    SamplingParams,
    code_probabilities,
    draw_codes,
    require_finite,
    uniforms,
)


def correct_drafts(
    drafts: Tensor, old: Tensor, new: Tensor, u_keep: Tensor, u_redraw: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn drafts of one distribution into codes of another, changing as few as possible.

    Args:
        drafts: int64 (B, n), distributed as `old`.
        old: q, (B, n, V), rows sum to 1.
        new: p, (B, n, V), rows sum to 1.
        u_keep: (B, n) uniform numbers in [0, 1): a draft x stays if this times q(x) is less than p(x).
        u_redraw: (B, n) uniform numbers in [0, 1): invert the distribution max(0, p - q) of the others.

    Returns:
        The codes (B, n), distributed as `new`, and which of them are the drafts, bool (B, n).
    """
    index = drafts.unsqueeze(-1)  # (B, n, 1)
    ratio_test = u_keep * old.gather(-1, index).squeeze(-1) < new.gather(-1, index).squeeze(-1)
    is_rejected = ~ratio_test
    wanted = new[is_rejected]  # (R, V)
    residual = (wanted - old[is_rejected]).clamp_min(0)
    # rounding can leave nothing where p and q are all but equal
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, wanted)
    codes = drafts.clone()
    codes[is_rejected] = draw_codes(residual, u_redraw[is_rejected])
    return codes, ratio_test


class SpeculativeDecoder:
    """The `Decoder` that tests up to `params.window` codes of each row in a pass.

    The numbers of a row are indexed by code and by how often it was tested, so that a row depends on its seed
    and not on the others, which may be further or finished.

    Args:
        codes: (B, T), written to where codes become final.
        begin: how many of each row are known.
        params: temperature, top_k, top_p and window are used.
        seeds: one per row.
        code_shape: (h, w), (h, w, D), or (T,) of a pyramid, where a guess is the code before it.
        code_depths: the depth or scale of each code.
        vocab_size: V.
    """

    def __init__(
        self,
        codes: Tensor,
        begin: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        code_shape: Sequence[int],
        code_depths: Sequence[int],
        vocab_size: int,
    ) -> None:
        batch_size, total = codes.shape
        self.codes = codes
        self.params = params
        self.total = total
        self.depth = code_shape[2] if len(code_shape) == 3 else 1
        self.code_depths = torch.tensor(code_depths, device=codes.device)  # (T,)
        self.row_length = math.prod(code_shape[1:])
        self.width = max(1, min(params.window, total - 1))  # of a pass; the last code is never read
        self.drafts = codes.clone()
        # (B, width, V): at i % width what draft i was drawn from
        self.old = torch.zeros(batch_size, self.width, vocab_size, device=codes.device)
        self.draws = uniforms(seeds, 2 * total * self.width).view(batch_size, total, self.width, 2)
        self.draws = self.draws.to(codes.device)
        self.num_tests = torch.zeros_like(codes)  # of each code
        self.done = [begin] * batch_size  # final codes of each row
        self.drafted = [begin] * batch_size  # final codes and drafts of each row
        self.rows = list(range(batch_size))  # those of the pass at hand, not finished
        self.starts = [begin] * batch_size  # for each of `rows` the first code that the pass at hand predicts
        if begin < total:
            self._guess(1)

    @property
    def num_done(self) -> int:
        """Final codes of the row that has fewest."""
        return min(self.done)

    def accept(self, logits: Tensor) -> None:
        """Test the drafts that a pass has predicted, and write those that become final.

        Args:
            logits: (R, n, V) of codes `starts` to `starts + n - 1` of `rows`, guidance applied.

        Raises:
            FloatingPointError: if logits are not finite.
        """
        num_new, device = logits.shape[1], logits.device
        is_finite = logits.amax(dim=-1).isfinite()  # (R, n)
        rows = self._column(range(len(self.done)))
        places = torch.tensor(self.starts, device=device)[:, None] + torch.arange(num_new, device=device)
        slots = places % self.width  # (R, n)
        new = self._probabilities(logits, places)
        drafts = self.drafts[rows, places]
        # at the end of an image a pass reads final codes again, to be as wide as the others
        is_final = places < self._column(self.done)
        tests = self.num_tests[rows, places].clamp_max(self.width - 1)
        u_keep, u_redraw = self.draws[rows, places, tests].unbind(dim=-1)
        codes, is_kept = correct_drafts(drafts, self.old[rows, slots], new, u_keep, u_redraw)
        codes = torch.where(is_final, drafts, codes)
        is_kept = is_kept | is_final
        self.drafts[rows, places] = codes
        self.old[rows, slots] = new
        self.num_tests[rows, places] += 1
        require_finite(is_finite)  # here, where the numbers below have to be waited for anyway
        num_kept = is_kept.long().cumprod(dim=1).sum(dim=1).tolist()  # before the first that changed
        for row, start, kept in zip(self.rows, self.starts, num_kept, strict=True):
            self.done[row] = start + min(kept + 1, num_new)  # that one had the final codes before it, too
        is_final = places < self._column(self.done)
        self.codes[rows, places] = torch.where(is_final, codes, 0)

    def next_pass(self) -> tuple[Tensor, list[int], list[int]]:
        """What to read next.

        Returns:
            codes (R, n), the rows they belong to, and how many codes of each row come before them.
        """
        self.rows = [row for row, done in enumerate(self.done) if done < self.total]
        self.starts = [min(self.done[row], self.total - self.width) for row in self.rows]
        self._guess(self.width)
        parts = [
            self.drafts[row, start - 1 : start - 1 + self.width]
            for row, start in zip(self.rows, self.starts, strict=True)
        ]
        return torch.stack(parts), self.rows, [start - 1 for start in self.starts]

    def _guess(self, num_new: int) -> None:
        """Draft what the next pass is first to predict: the code above, in the first row the one before."""
        ends = {row: start + num_new for row, start in zip(self.rows, self.starts, strict=True)}
        for place in range(min(self.drafted[row] for row in ends), max(ends.values())):
            rows = [row for row, end in ends.items() if self.drafted[row] <= place < end]
            back = self.row_length if place >= self.row_length else self.depth
            guesses = self.drafts[rows, place - back] if place >= back else self.drafts.new_zeros(len(rows))
            self.drafts[rows, place] = guesses
            self.old[rows, place % self.width] = F.one_hot(guesses, self.old.shape[-1]).to(self.old)
        for row, end in ends.items():
            self.drafted[row] = max(self.drafted[row], end)

    def _column(self, values: Sequence[int]) -> Tensor:
        """A number for each row of the image batch -> those of `rows`, (R, 1)."""
        return torch.tensor([values[row] for row in self.rows], device=self.codes.device)[:, None]

    def _probabilities(self, logits: Tensor, places: Tensor) -> Tensor:
        """(R, n, V) -> the same, what the codes are drawn from."""
        if self.params.at(0) is self.params:  # one value for all depths
            return code_probabilities(logits.flatten(0, 1), self.params).view_as(logits)
        probabilities = torch.empty_like(logits, dtype=torch.float32)
        depths = self.code_depths[places]  # (R, n)
        for depth in torch.unique(depths).tolist():
            is_here = depths == depth
            probabilities[is_here] = code_probabilities(logits[is_here], self.params, depth)
        return probabilities
