"""What the tests of sequence training start from."""

from __future__ import annotations

import pytest
from torch import Tensor

from stage1_vqgan import RQVAE
from stage2_transformer import GPT, RQTransformer


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_gpt: GPT, tiny_rq: RQTransformer) -> GPT | RQTransformer:
    """The one that `sequence_runs.both` asks for."""
    return tiny_gpt if request.param == "gpt" else tiny_rq


@pytest.fixture
def table(tiny_rqvae: RQVAE) -> Tensor:
    """The codebook (D, V, C) of the tiny RQ-VAE."""
    return tiny_rqvae.codebook().detach()
