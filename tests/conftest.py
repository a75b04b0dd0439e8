"""Tiny models, one of every kind, that are built and run in milliseconds, and the conformance fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

# The folders of tests/ are named like the packages, and pytest puts tests/ on the path: they would hide a
# package that is installed in editable mode.
sys.path.insert(0, str(Path(__file__).parents[1]))

from mindalle.pipeline import Pipeline
from mindalle.text import TextTokenizer
from stage1_vqgan import (
    RQVAE,
    VQGAN,
    ConvNetConfig,
    PyramidQuantizerConfig,
    PyramidVAE,
    PyramidVAEConfig,
    ResidualQuantizerConfig,
    RQVAEConfig,
    VectorQuantizerConfig,
    VQGANConfig,
)
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage2_transformer import (
    GPT,
    ConditionConfig,
    GPTConfig,
    RQTransformer,
    RQTransformerConfig,
    TransformerConfig,
)


def pytest_configure(config: pytest.Config) -> None:
    """On the CPU, with one thread per process, as do the processes that tests start: they share two cores."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else `auto` would draw there
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


CAPTIONS = ["a red apple", "a green apple", "a red car", "a green car on a road", "two red cars"]
CONVNET = ConvNetConfig(
    image_size=16,
    channels=32,
    channel_multipliers=(1, 1, 2),  # 16 pixels -> 4 codes along each side
    num_res_blocks=1,
    attention_resolutions=(4,),
    latent_channels=8,
)
TEXT = ConditionConfig(kind="text", vocab_size=64, length=6)


@pytest.fixture(scope="session")
def fixtures_dir(pytestconfig: pytest.Config) -> Path:
    """The conformance fixtures: $MINDALLE_FIXTURES, else `shared/fixtures` beside the repository."""
    named = os.environ.get("MINDALLE_FIXTURES")
    folder = Path(named) if named else pytestconfig.rootpath.parent / "shared" / "fixtures"
    if not folder.is_dir():
        if named and os.environ.get("CI") == "true":
            pytest.fail(f"MINDALLE_FIXTURES names {folder}, which is not a directory")
        pytest.skip(f"no conformance fixtures in {folder}: set MINDALLE_FIXTURES to their folder")
    return folder


@pytest.fixture
def tiny_vqgan() -> VQGAN:
    """16x16 pixels, codes (4, 4), V = 24."""
    quantizer = VectorQuantizerConfig(codebook_size=24, width=8)
    with _seeded(0):
        model = VQGAN(VQGANConfig(convnet=CONVNET, quantizer=quantizer)).eval()
        _spread(model.quantizer.codebook.detach(), _latents(model))
    return model


@pytest.fixture
def tiny_rqvae() -> RQVAE:
    """16x16 pixels, codes (4, 4, 3), one codebook of V = 24 for all depths."""
    quantizer = ResidualQuantizerConfig(codebook_sizes=(24, 24, 24), width=8)
    with _seeded(0):
        model = RQVAE(RQVAEConfig(convnet=CONVNET, quantizer=quantizer, latent_width=8)).eval()
        vectors, table = _latents(model), model.quantizer.tables[0].detach()
        # half of the entries look like latents, half like what a first code leaves over
        _spread(table[:12], vectors)
        _spread(table[12:], 0.5 * (vectors - vectors.roll(1, dims=0)))
    return model


@pytest.fixture
def tiny_pyramid() -> PyramidVAE:
    """16x16 pixels, codes (25,) of scales 1, 2, 2, 4, a codebook of at most V = 24 per scale, phi at work."""
    quantizer = PyramidQuantizerConfig(scales=(1, 2, 2, 4), codebook_sizes=(9, 24, 24, 24), width=8)
    with _seeded(0), torch.no_grad():
        model = PyramidVAE(PyramidVAEConfig(convnet=CONVNET, quantizer=quantizer)).eval()
        for phi in model.quantizer.phi:
            torch.nn.init.normal_(phi.weight, std=0.05)
        vectors = _latents(model)
        grids = rearrange(vectors, "(b h w) c -> b c h w", h=4, w=4)
        model.quantizer.fit(grids, lambda found, number: found[torch.randperm(len(found)).repeat(9)[:number]])
    return model


@pytest.fixture
def tiny_gpt() -> GPT:
    """Text of 6 ids to the codes of `tiny_vqgan`."""
    config = GPTConfig(
        transformer=TransformerConfig(width=32, num_layers=2, num_heads=2),
        condition=TEXT,
        vocab_size=24,
        code_shape=(4, 4),
    )
    with _seeded(0):
        return _with_large_weights(GPT(config))


@pytest.fixture
def tiny_rq(tiny_rqvae: RQVAE) -> RQTransformer:
    """Text of 6 ids to the codes of `tiny_rqvae`."""
    config = RQTransformerConfig(
        body=TransformerConfig(width=32, num_layers=2, num_heads=2),
        head=TransformerConfig(width=32, num_layers=1, num_heads=4),
        condition=TEXT,
        codebook_sizes=(24, 24, 24),
        code_shape=(4, 4, 3),
        codebook_width=8,
    )
    with _seeded(0):
        return _with_large_weights(RQTransformer(config, tiny_rqvae.codebook().detach()))


@pytest.fixture
def tiny_text_tokenizer() -> TextTokenizer:
    """Trained on `CAPTIONS`; fits the text models."""
    tokenizer = TextTokenizer.train(CAPTIONS, vocab_size=TEXT.vocab_size, length=TEXT.length)
    assert tokenizer.vocab_size <= TEXT.vocab_size
    return tokenizer


@pytest.fixture
def tiny_pipeline(tiny_vqgan: VQGAN, tiny_gpt: GPT, tiny_text_tokenizer: TextTokenizer) -> Pipeline:
    """Text to 16x16 pixels, no reranker."""
    return Pipeline(tiny_vqgan, tiny_gpt, tiny_text_tokenizer)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it torch's generator starts from `seed`; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _latents(model: QuantizedAutoencoder) -> Tensor:
    """The latents (M, C) of random pictures."""
    images = torch.rand(8, 3, model.convnet.image_size, model.convnet.image_size) * 2 - 1
    return rearrange(model.encode_latents(images), "b c h w -> (b h w) c")


@torch.no_grad()
def _spread(table: Tensor, vectors: Tensor) -> None:
    """Make a codebook's entries like the latents they are to stand for: else all pictures get one code."""
    table.copy_(vectors[torch.randperm(len(vectors))[: len(table)]])


@torch.no_grad()
def _with_large_weights(model: nn.Module) -> nn.Module:
    """The initial weights give nearly equal logits, in which mistakes would hide."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
    return model.eval()
