"""The linear layer, against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stage2_transformer.linear import Linear, has_onednn


@pytest.fixture(params=[True, False], ids=["bias", "plain"])
def layer(request: pytest.FixtureRequest) -> Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Linear(96, 160, bias=request.param)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def expected(layer: Linear, x: Tensor) -> Tensor:
    """In double precision."""
    exact = copy.deepcopy(layer).double()
    return nn.functional.linear(x.double(), exact.weight, exact.bias)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (7, 96), (2, 3, 96), (0, 96)])
def test_without_gradients(layer: Linear, shape: tuple[int, ...]) -> None:
    x = inputs(*shape)
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == (*shape[:-1], 160)
    torch.testing.assert_close(found.double(), expected(layer, x), atol=1e-5, rtol=0)


def test_rows_that_are_not_contiguous(layer: Linear) -> None:
    x = inputs(4, 5, 96)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, -1]).double(), expected(layer, x[:, -1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            layer(x.transpose(0, 1)).double(), expected(layer, x.transpose(0, 1)), atol=1e-5, rtol=0
        )


def test_numbers_that_are_not_finite_stay_in_their_row(layer: Linear) -> None:
    x = inputs(3, 96)
    x[1, 4] = torch.nan
    with torch.no_grad():
        assert layer(x).isfinite().all(dim=-1).tolist() == [True, False, True]


def test_gradients(layer: Linear) -> None:
    plain = nn.Linear(96, 160, bias=layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    for module in (layer, plain):
        module(inputs(5, 96)).square().mean().backward()
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_other_dtypes(layer: Linear) -> None:
    x = inputs(2, 96)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        half = copy.deepcopy(layer).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.skipif(not has_onednn(), reason="needs an x86 CPU with AVX, and PyTorch with oneDNN")
def test_a_row_has_the_same_bits_whatever_the_others_are(layer: Linear) -> None:
    x = inputs(33, 96)
    with torch.inference_mode():
        whole = layer(x)
        for num_rows in (2, 3, 4, 7, 8, 16, 31, 32):
            assert torch.equal(layer(x[:num_rows]), whole[:num_rows])
