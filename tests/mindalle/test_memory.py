"""How much is computed at once: within bounds, and the same pictures as ever."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mindalle import memory
from mindalle.memory import candidates_at_once, decode_in_parts
from mindalle.pipeline import Pipeline
from stage1_vqgan import VQGAN
from stage2_transformer import GPT, RQTransformer, SamplingParams
from stage2_transformer.checkpoint import build_model
from stage2_transformer.gpt import GPTConfig

PLAIN, GUIDED = SamplingParams(), SamplingParams(cfg_scale=3.0)


def test_the_size_of_a_cache(tiny_gpt: GPT, tiny_rq: RQTransformer) -> None:
    cache = tiny_gpt.make_cache(3)
    assert tiny_gpt.cache_bytes * 3 == cache.keys.nbytes + cache.values.nbytes
    caches = tiny_rq.make_cache(2)
    tensors = (caches.body.keys, caches.body.values, caches.head.keys, caches.head.values)
    assert tiny_rq.cache_bytes * 2 == sum(tensor.nbytes for tensor in tensors)
    before = tiny_gpt.cache_bytes
    assert tiny_gpt.bfloat16().cache_bytes * 2 == before


def test_candidates_of_a_small_model_are_drawn_by_16(tiny_gpt: GPT) -> None:
    assert [candidates_at_once(tiny_gpt, n, PLAIN) for n in (1, 15, 16, 17, 32, 33)] == [1, 15, 16, 9, 16, 11]
    assert candidates_at_once(tiny_gpt, 16, GUIDED) == 16


def test_candidates_of_a_large_model_keep_its_cache_in_bounds() -> None:
    """minDALL-E's shape, which took 2.6 GB for 16 candidates, and twice as much with guidance."""
    model = build_model(GPTConfig(), torch.empty(1, 16384, 256))
    assert model.cache_bytes == 2 * 42 * 1536 * (64 + 255) * 4
    assert [candidates_at_once(model, n, PLAIN) for n in (1, 9, 10, 16, 27)] == [1, 9, 5, 8, 9]
    assert [candidates_at_once(model, n, GUIDED) for n in (1, 4, 16)] == [1, 4, 4]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_pipeline_keeps_within_bounds(
    tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, cfg_scale: float
) -> None:
    params = SamplingParams(cfg_scale=cfg_scale)
    expected = tiny_pipeline("a red apple", num_images=7, params=params, batch_size=7)
    assert isinstance(tiny_pipeline.model, GPT)
    monkeypatch.setattr(memory, "CACHE_BYTES", 5 * tiny_pipeline.model.cache_bytes)
    sizes = []
    result = tiny_pipeline(
        "a red apple", num_images=7, params=params, on_step=lambda preview: sizes.append(len(preview.codes))
    )
    assert max(sizes) == (4 if cfg_scale == 1 else 2)
    assert torch.equal(result.codes, expected.codes)
    assert [a.tobytes() for a in result.images] == [b.tobytes() for b in expected.images]


def test_pictures_are_decoded_in_parts(tiny_vqgan: VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def decode(codes: Tensor) -> Tensor:
        sizes.append(len(codes))
        return VQGAN.decode(tiny_vqgan, codes)

    codes = torch.randint(tiny_vqgan.codebook_size, (5, *tiny_vqgan.code_shape))
    with torch.no_grad():
        expected = tiny_vqgan.decode(codes)
        monkeypatch.setattr(tiny_vqgan, "decode", decode)
        monkeypatch.setattr(memory, "PIXELS", 2 * tiny_vqgan.convnet.image_size**2)
        torch.testing.assert_close(decode_in_parts(tiny_vqgan, codes), expected)
        monkeypatch.setattr(memory, "PIXELS", 1)
        torch.testing.assert_close(decode_in_parts(tiny_vqgan, codes[:2]), expected[:2])
    assert sizes == [2, 2, 1, 1, 1]
