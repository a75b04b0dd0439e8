"""The naive decoders: other arithmetic than the fast path's, and the same logits and codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mindalle.benchmark.naive import NaiveModel, naive
from stage2_transformer import (
    GPT,
    ConditionConfig,
    GPTConfig,
    RQTransformer,
    RQTransformerConfig,
    SamplingParams,
    TransformerConfig,
    generate,
    image_seeds,
)

STACK = TransformerConfig(width=16, num_layers=2, num_heads=2)
PLAIN = TransformerConfig(
    width=16, num_layers=3, num_heads=4, activation="quick_gelu", has_attention_bias=False, has_mlp_bias=False
)
TEXT = ConditionConfig(kind="text", vocab_size=30, length=5)
LABEL = ConditionConfig(kind="class", vocab_size=7, length=1)
NOTHING = ConditionConfig(kind="none", vocab_size=1, length=1)


def gpt(condition: ConditionConfig, **fields: Any) -> GPTConfig:
    defaults = {"transformer": STACK, "vocab_size": 20, "code_shape": (3, 4)}
    return GPTConfig(condition=condition, **(defaults | fields))


def rq(condition: ConditionConfig, **fields: Any) -> RQTransformerConfig:
    defaults = {"body": STACK, "head": PLAIN, "code_shape": (2, 3, 3), "codebook_sizes": (20, 20, 20)}
    return RQTransformerConfig(condition=condition, codebook_width=6, **(defaults | fields))


TABLES = {"has_codebook_body": False, "has_codebook_head": False}
CONFIGS = {
    "gpt_text": gpt(TEXT),
    "gpt_class": gpt(LABEL, transformer=PLAIN),
    "gpt_none": gpt(NOTHING),
    "gpt_residual_codes": gpt(TEXT, code_shape=(2, 2, 3)),
    "rq_text": rq(TEXT),
    "rq_none": rq(NOTHING),
    "rq_not_cumulative": rq(LABEL, has_cumulative_head=False),
    "rq_tables": rq(LABEL, **TABLES),
    "rq_table_per_depth": rq(LABEL, **TABLES, has_shared_embedding=False),
    "rq_classifier_per_depth": rq(
        TEXT,
        codebook_sizes=(20, 7, 13),
        has_codebook_body=False,
        has_shared_embedding=False,
        has_shared_classifier=False,
    ),
    "rq_depth_1": rq(TEXT, code_shape=(2, 3, 1), codebook_sizes=(20,)),
}


@torch.no_grad()
def build(name: str) -> GPT | RQTransformer:
    """With weights so large that logits differ."""
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    if isinstance(config, GPTConfig):
        model: GPT | RQTransformer = GPT(config)
    else:
        codebook = torch.randn(config.depth, max(config.codebook_sizes), 6, generator=generator)
        model = RQTransformer(config, codebook)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter.shape[1] ** -0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def condition(model: GPT | RQTransformer, batch: int) -> Tensor | None:
    config = model.config.condition
    if config.kind == "none":
        return None
    shape = (batch, config.length) if config.kind == "text" else (batch,)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_naive_draws_the_codes_of_generate(name: str, temperature: float) -> None:
    """Two prompts for four images, one prefilled per image and the other per prompt."""
    model = build(name)
    cond, params, seeds = condition(model, 2), SamplingParams(temperature=temperature), image_seeds(0, 4)
    fast = generate(model, cond, params, seeds=seeds)
    slow = generate(naive(model), cond, params, seeds=seeds)
    assert torch.equal(fast, slow)
    assert fast.unique().numel() > (3 if temperature else 1)  # no trivial picture
    if cond is not None and temperature:
        assert not torch.equal(fast[0], fast[2])


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_naive_logits_are_those_of_the_full_forward_pass(name: str) -> None:
    model = build(name)
    cond = condition(model, 3)
    codes = generate(model, cond, SamplingParams(), seeds=image_seeds(0, 3))
    expected = model(codes, cond).logits.flatten(1, -2)  # (B, *code_shape, V) -> (B, T, V)
    slow = naive(model)
    cache = slow.make_cache(3)
    first = slow.prefill(cond, cache)
    rest = slow.decode(codes.flatten(1)[:, :-1], cache)
    torch.testing.assert_close(torch.cat([first[:, None], rest], dim=1), expected, rtol=1e-4, atol=1e-4)


def test_guidance_and_known_codes() -> None:
    model = build("rq_text")
    cond, seeds = condition(model, 1), image_seeds(0, 2)
    params = SamplingParams(top_k=5, cfg_scale=2.0)
    known = torch.tensor([[3, 1, 4, 1]])
    fast, slow = (generate(m, cond, params, seeds=seeds, known=known) for m in (model, naive(model)))
    assert torch.equal(fast, slow)


def test_what_the_naive_cache_cannot_do() -> None:
    slow: NaiveModel = naive(build("gpt_text"))
    cache = slow.make_cache(2)
    slow.prefill(torch.zeros(1, 5, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=r"advances all 2 rows at once, got rows \[1\]"):
        slow.decode(torch.zeros(1, 1, dtype=torch.int64), cache, [1])
    with pytest.raises(NotImplementedError, match="without speculation"):
        cache.rewind(0, 0)
