"""Looks after a tokenizer's training, and says in words what goes wrong and which option to change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stage1_vqgan.losses import MAX_ADAPTIVE_WEIGHT, TokenizerLossConfig
from stage1_vqgan.quantize import CodebookTrainingConfig
from stage1_vqgan.quantize.interface import Assignment

logger = logging.getLogger(__name__)
WINDOW = 200
"""Batches that a judgement is about."""
FEW_CODES = 0.25
"""Share of the entries that an even choice would have taken, below which codes are dying."""
WON, LOST = 0.05, 0.99
"""Hinge losses: of a discriminator that is hardly ever wrong, and of one that knows nothing (1)."""
SATURATED = 0.5
"""Share of the batches with the adaptive weight at its bound."""


class TokenizerWatch:
    """Warns once of each kind of trouble, after a window of batches that all showed it.

    It keeps its sums on the device and reads them once per window, so that no step waits for it.

    Args:
        loss: settings of the loss.
        codebook: how the codebooks learn; None = by gradient.
        is_codebook_trained: whether codebooks learn at all: frozen ones are not watched.
        window: batches that a judgement is about, >= 1.
    """

    def __init__(
        self,
        loss: TokenizerLossConfig,
        codebook: CodebookTrainingConfig | None,
        *,
        is_codebook_trained: bool,
        window: int = WINDOW,
    ) -> None:
        self.loss = loss
        self.codebook = codebook
        self.is_codebook_trained = is_codebook_trained
        self.window = window
        self._is_first = True  # window, in which codebooks find their place
        self._told: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._batches = 0
        self._heard = 0
        self._hinge: Tensor | float = 0.0  # sum over the batches with an adversary that is heard
        self._at_bound: Tensor | int = 0  # of them: adaptive weight at its bound
        self._used: list[Tensor] = []  # of each codebook: (V,) whether an entry was chosen
        self._choices: list[int] = []

    @torch.no_grad()
    def observe(self, parts: Mapping[str, Tensor], assignments: Sequence[Assignment]) -> None:
        """Take in a batch, and at a window's end warn of what it showed.

        Args:
            parts: of the loss, as `LossTerms` has them.
            assignments: what the batch chose of each codebook.
        """
        self._batches += 1
        if "generator" in parts:
            self._heard += 1
            self._hinge = self._hinge + parts["discriminator"].float()
            # bfloat16 has no 10000
            self._at_bound = self._at_bound + (parts["adaptive_weight"] >= 0.99 * MAX_ADAPTIVE_WEIGHT).int()
        if not self._used:
            self._used = [
                torch.zeros(len(a.table), dtype=torch.bool, device=a.codes.device) for a in assignments
            ]
            self._choices = [0] * len(assignments)
        for i, assignment in enumerate(assignments):
            self._used[i][assignment.codes] = True
            self._choices[i] += len(assignment.codes)
        if self._batches == self.window:
            if self.is_codebook_trained and not self._is_first:
                self._judge_codes()
            if self._heard == self.window:
                self._judge_adversary()
            self._is_first = False
            self._begin()

    def _judge_codes(self) -> None:
        """Compare each codebook's use with that of an even choice: small batches cannot take all entries."""
        for number, (used, choices) in enumerate(zip(self._used, self._choices, strict=True)):
            size, taken = len(used), int(used.sum())
            even = size * (1 - (1 - 1 / size) ** choices)
            if taken < FEW_CODES * even:
                which = f"codebook {number}" if len(self._used) > 1 else "the codebook"
                self._tell(
                    "codes",
                    f"codes die: {taken} of {size} entries of {which} were chosen, where an even choice "
                    f"would have taken {even:.0f}. {self._cure_of_codes()}, or take a smaller codebook",
                )

    def _cure_of_codes(self) -> str:
        if self.codebook is None:
            return "Set codebook to {}: moving averages with a k-means start and restarts"
        if self.codebook.restart_after == 0:
            return "Set codebook.restart_after to 100, so that unchosen entries move"
        return f"Lower codebook.restart_after ({self.codebook.restart_after}) or optimizer.learning_rate"

    def _judge_adversary(self) -> None:
        hinge, at_bound = float(self._hinge) / self._heard, float(self._at_bound) / self._heard
        if hinge <= WON:
            augment = "" if self.loss.augmentation else "set loss.augmentation to {} if pictures are few, "
            self._tell(
                "won",
                f"the adversary wins outright: its loss is {hinge:.3f} (0: never wrong). To give the "
                f"tokenizer a chance, {augment}lower loss.discriminator.width or num_layers, or start later "
                "(loss.adversarial_start)",
            )
        if hinge >= LOST:
            augment = "weaken loss.augmentation, " if self.loss.augmentation else ""
            self._tell(
                "lost",
                f"the adversary loses outright: its loss is {hinge:.3f} (1: it knows nothing), its gradient "
                f"is noise. To make it stronger, {augment}raise loss.discriminator.width or "
                f"loss.adversarial_warmup ({self.loss.adversarial_warmup}); or do without: "
                "loss.adversarial_weight 0",
            )
        if self.loss.is_adaptive and at_bound >= SATURATED:
            self._tell(
                "saturated",
                f"the adaptive weight is at its bound of {MAX_ADAPTIVE_WEIGHT:g} in {at_bound:.0%} of the "
                "batches: the adversary's gradient is next to nothing and is blown up. Raise "
                f"loss.adversarial_warmup ({self.loss.adversarial_warmup}), or set loss.is_adaptive to false "
                f"and lower loss.adversarial_weight ({self.loss.adversarial_weight:g})",
            )

    def _tell(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("in the last %d batches %s", self.window, message)
