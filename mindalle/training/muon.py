"""Muon on the matrices of transformer blocks and AdamW on all else, as one optimiser for Lightning's loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stage1_vqgan.precision import has_bfloat16


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which iterates in float32 where the processor would only imitate bfloat16.

    Settings and state are PyTorch's, so that either goes on from a checkpoint of the other.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Move each matrix (m, n) by its orthogonalised, averaged gradient."""
        assert closure is None  # MuonAdamW has called it
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, group)
        return None

    def _move(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
        direction = matrix.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
        direction = orthogonalize(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        # Liu et al. 2025: the root mean square of AdamW's step, whatever the shape
        matrix.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    """Bring a matrix's singular values near 1 by Newton-Schulz, in bfloat16 where the processor has it.

    Args:
        matrix: (m, n).
        coefficients: a, b, c of a step x -> a x + b (x xᵀ) x + c (x xᵀ)² x.
        num_steps: of the iteration.
        eps: least norm that is divided by.

    Returns:
        (m, n), in bfloat16 or float32.
    """
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if has_bfloat16(matrix.device) else torch.float32)
    x = x.T if x.shape[0] > x.shape[1] else x  # the smaller product
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


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
            Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
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
