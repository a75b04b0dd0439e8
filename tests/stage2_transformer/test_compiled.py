"""Compiled decoding: steps of one shape, the same codes, and (slow) through the real compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequence_models import MODELS, SOME, Model, build, draw_codes, draw_cond, flat_logits
from torch import Tensor

from stage2_transformer import SamplingParams, generate, image_seeds
from stage2_transformer import compiled as module
from stage2_transformer.compiled import compile_steps
from stage2_transformer.int8 import has_int8, quantize_

SEEDS = image_seeds(0, 5)
PARAMS = {
    "plain": SamplingParams(),
    "guided": SamplingParams(cfg_scale=2.5, top_p=0.9),
    "speculative": SamplingParams(window=3, temperature=0.7),
}


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Instead of compiling, note the shapes that would be compiled for."""
    seen: set[Any] = set()

    def note(run_blocks: Any, **options: Any) -> Any:
        assert options == {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}

        def run(x: Tensor, step: Any) -> Tensor:
            seen.add((id(run_blocks.__self__), x.shape, step.mask.shape, step.begin, step.end))
            return run_blocks(x, step)  # type: ignore[no-any-return]

        return run

    monkeypatch.setattr(module.torch, "compile", note)
    return seen


@pytest.mark.parametrize("setting", PARAMS)
@pytest.mark.parametrize("name", SOME)
def test_codes_are_the_same_and_shapes_are_one(name: str, setting: str, shapes: set[Any]) -> None:
    model, cond, params = build(name), draw_cond(MODELS[name], 1), PARAMS[setting]
    expected = generate(model, cond, params, seeds=SEEDS)
    compile_steps(model)
    assert torch.equal(generate(model, cond, params, seeds=SEEDS), expected)
    if setting != "speculative":  # there rows finish one after the other
        assert len(shapes) == (2 if name.startswith("rq") else 1)


@pytest.mark.parametrize("name", MODELS)
def test_decode_equals_forward(name: str, shapes: set[Any]) -> None:
    config, model = MODELS[name], build(name)
    codes, cond = draw_codes(config, 3), draw_cond(config, 3)
    compile_steps(model)
    with torch.no_grad():
        assert_decodes(model, codes, cond)
    assert shapes or config.code_shape == (1, 1, 1)


def assert_decodes(model: Model, codes: Tensor, cond: Tensor | None) -> None:
    expected, flat = flat_logits(model, codes, cond), codes.flatten(1)
    cache = model.make_cache(len(codes))
    logits = [model.prefill(cond, cache)[:, None]]
    logits += [model.decode(flat[:, n : n + 1], cache) for n in range(flat.shape[1] - 1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_int8(), reason="no FBGEMM on this machine")
def test_int8_is_refused() -> None:
    with pytest.raises(ValueError, match="int8 cannot be compiled: take fp32 or bf16"):
        compile_steps(quantize_(build("gpt_text")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_text", "rq_text"])
def test_the_real_compiler(name: str) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 1)
    expected = generate(model, cond, SamplingParams(), seeds=SEEDS)
    compile_steps(model)
    with torch.no_grad():
        assert_decodes(model, draw_codes(MODELS[name], 5), draw_cond(MODELS[name], 5))
    assert torch.equal(generate(model, cond, SamplingParams(), seeds=SEEDS), expected)
