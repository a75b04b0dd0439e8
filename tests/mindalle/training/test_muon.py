"""Muon in bfloat16 is PyTorch's; without bfloat16 in the processor it computes in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mindalle.training import muon as module
from mindalle.training.muon import Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.775, 2.0315)
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
SHAPES = [(6, 6), (4, 12), (12, 4)]


def train(optimizer_class: type[torch.optim.Optimizer], num_steps: int = 4) -> tuple[list[Tensor], object]:
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = optimizer_class(matrices, **SETTINGS)  # type: ignore[call-arg]
    for _ in range(num_steps):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices], optimizer.state_dict()


def test_in_bfloat16_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bfloat16", lambda device: True)
    (ours, our_state), (theirs, their_state) = train(Muon), train(torch.optim.Muon)
    torch.testing.assert_close(ours, theirs)
    assert str(our_state) == str(their_state)  # so that a run goes on with either


@pytest.mark.parametrize("shape", SHAPES)
def test_without_bfloat16_it_iterates_in_float32(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's Muon always iterates in bfloat16, which an AVX2 machine imitates many times slower."""
    monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = orthogonalize(matrix, COEFFICIENTS, 5, 1e-7)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = sum(factor * values**power for factor, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), left @ values.diag() @ right, atol=1e-5, rtol=1e-5)
