"""Likelihood: of a model that knows nothing, of one that knows all, and of a real one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mindalle.evaluation import likelihood_measures, negative_log_likelihood
from stage2_transformer import GPT, RQTransformer
from stage2_transformer.interface import SequenceOutput


class Guess:
    """Gives each code this much more than any other."""

    def __init__(self, vocab_size: int, certainty: float) -> None:
        self.vocab_size, self.certainty = vocab_size, certainty

    def __call__(self, codes: Tensor, cond: Tensor | None) -> SequenceOutput:
        one_hot = torch.nn.functional.one_hot(codes, self.vocab_size)
        return SequenceOutput(self.certainty * one_hot.float(), None)


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4)])
def test_uniform_logits(shape: tuple[int, ...]) -> None:
    codes = torch.randint(50, (5, *shape), generator=torch.Generator().manual_seed(0))
    model: Any = Guess(50, 0.0)
    nats = negative_log_likelihood(model, [(codes[:2], None), (codes[2:], None)])
    assert nats.shape == (5, shape[2] if len(shape) == 3 else 1)
    assert torch.allclose(nats, torch.tensor(math.log(50)).double())
    sure: Any = Guess(50, 1e4)
    assert negative_log_likelihood(sure, [(codes, None)]).abs().max() == 0


def test_measures_of_a_uniform_model() -> None:
    """8 x 8 x 4 codes of 10 bits are 2560 bits, of 3 * 64 * 64 values of pixels."""
    nats = torch.full((3, 4), math.log(1024), dtype=torch.float64)
    measures = {
        measure.metric: measure
        for measure in likelihood_measures(nats, num_positions=64, num_pixels=64 * 64, seed=0)
    }
    assert measures["NLL per code"].value == pytest.approx(math.log(1024))
    assert measures["bits per code"].value == pytest.approx(10)
    assert measures["NLL per code, depth 3"].value == pytest.approx(math.log(1024))
    assert measures["bits per dimension, of the codes"].value == pytest.approx(2560 / 12288)
    assert len(measures) == 7
    assert "NLL per code, depth 1" not in [
        measure.metric for measure in likelihood_measures(nats[:, :1], num_positions=64, num_pixels=9, seed=0)
    ]


def test_a_real_model_by_its_probabilities(tiny_gpt: GPT, tiny_rq: RQTransformer) -> None:
    generator = torch.Generator().manual_seed(0)
    cond = torch.randint(1, 20, (3, 6), generator=generator)
    for model in (tiny_gpt, tiny_rq):
        codes = torch.randint(24, (3, *model.code_shape), generator=generator)
        nats = negative_log_likelihood(model, [(codes, cond)])
        with torch.no_grad():
            probabilities = model(codes, cond).logits.double().softmax(dim=-1)
        own = probabilities.gather(-1, codes[..., None])[..., 0]
        expected = -own.log().view(3, 16, -1).mean(dim=1)
        assert torch.allclose(nats, expected, atol=1e-5)
        batches = [(code[None], one[None]) for code, one in zip(codes, cond, strict=True)]
        assert torch.allclose(negative_log_likelihood(model, batches), nats, atol=1e-5)


def test_nothing() -> None:
    model: Any = Guess(2, 0.0)
    with pytest.raises(ValueError, match="no pictures to measure a likelihood on"):
        negative_log_likelihood(model, [])
