"""Muon on the matrices of transformer blocks and AdamW on all else, as one optimiser for Lightning's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class MuonAdamW(torch.optim.Optimizer):
    """Two of PyTorch's optimisers over groups of parameters and a state that belong to both.

    Muon (Jordan et al. 2024) replaces a matrix's averaged gradient by the nearest orthogonal matrix, scaled
    to the step that AdamW would take (Liu et al. 2025, arXiv 2502.16982), so that learning rate and decay of
    one do for the other.

    Args:
        matrices: (m, n) each, for Muon.
        others: AdamW's groups, with their own `weight_decay`.
        learning_rate: of both.
        weight_decay: decoupled, of the matrices.
        betas: decay of AdamW's first and second moment.

    Raises:
        ValueError: if a matrix is sharded over processes.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        if any(isinstance(matrix, DTensor) for matrix in matrices):
            raise ValueError("Muon needs whole matrices: with fsdp_blocks set optimizer.muon to false")
        self._parts: tuple[torch.optim.Optimizer, torch.optim.Optimizer] = (
            torch.optim.Muon(
                matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=learning_rate, betas=betas),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step of each; `closure` computes the loss and its gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, groups in zip(self._parts, (self.param_groups[:1], self.param_groups[1:]), strict=True):
            part.param_groups, part.state = groups, self.state  # loading a checkpoint makes them anew
            part.step()
        return loss
