"""Decoding in bfloat16: nearly the same pixels, exactly the same codes, and only where it is quick."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stage1_vqgan import RQVAE, VQGAN
from stage1_vqgan import precision as module
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.precision import decode_in_, has_bfloat16, pixel_dtype


@pytest.fixture(params=["tiny_vqgan", "tiny_rqvae"])
def tokenizer(request: pytest.FixtureRequest) -> VQGAN | RQVAE:
    tokenizer: VQGAN | RQVAE = request.getfixturevalue(request.param)
    return copy.deepcopy(tokenizer)


def test_pixels_are_nearly_the_same_and_codes_exactly(tokenizer: QuantizedAutoencoder) -> None:
    side = tokenizer.convnet.image_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        codes = tokenizer.encode(images)
        exact = tokenizer.decode(codes)
        decode_in_(tokenizer, torch.bfloat16)
        assert tokenizer.decoder.conv_in.weight.dtype == torch.bfloat16
        assert torch.equal(tokenizer.encode(images), codes)
        rounded = tokenizer.decode(codes)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    spread = float(exact.std())
    assert float((rounded - exact).square().mean().sqrt()) < 0.05 * spread


def test_float32_changes_nothing(tokenizer: QuantizedAutoencoder) -> None:
    weights = {name: id(weight) for name, weight in tokenizer.named_parameters()}
    decode_in_(tokenizer, torch.float32)
    assert {name: id(weight) for name, weight in tokenizer.named_parameters()} == weights


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_only_beside_models_that_are_not_exact(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_rounded = precision in ("bf16", "int8")
    monkeypatch.setattr(module, "has_bfloat16", lambda device: True)
    assert (pixel_dtype(precision, "cpu") == torch.bfloat16) == is_rounded
    monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    assert pixel_dtype(precision, "cpu") == torch.float32


def test_which_devices_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_avx, has_amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=has_avx: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=has_amx: answer)
        assert has_bfloat16("cpu") == (has_avx or has_amx)
    for is_new in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=is_new, **_: answer)
        assert has_bfloat16("cuda:1") == is_new
    assert not has_bfloat16("mps")


@pytest.mark.parametrize("has_gradients", [True, False])
def test_the_input_of_a_block_is_not_written_to(tokenizer: QuantizedAutoencoder, has_gradients: bool) -> None:
    """Activations are computed in place where no gradients are kept: of what the norms made, not of x."""
    block = tokenizer.decoder.middle.block1
    x = torch.randn(1, block.conv1.in_channels, 4, 4)
    before = x.clone()
    with torch.set_grad_enabled(has_gradients):
        got = block(x)
    assert torch.equal(x, before)
    swish = nn.SiLU()
    expected = x + block.conv2(swish(block.norm2(block.conv1(swish(block.norm1(x))))))
    torch.testing.assert_close(got, expected)
