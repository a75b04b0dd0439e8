"""The decoding loop: an image depends on the model, its condition, the parameters and its seed alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle import sampling as oracle
from sequence_models import (
    MODELS,
    SOME,
    Model,
    blocks,
    build,
    draw_codes,
    draw_cond,
    flat_logits,
    gpt,
    num_depths,
    rq,
)
from torch import Tensor

from stage2_transformer import SamplingParams, generate, image_seeds, iterate_codes

SEEDS = image_seeds(0, 8)
GREEDY = SamplingParams(temperature=0)


def slow_generate(
    model: Model,
    cond: Tensor | None,
    params: SamplingParams,
    seeds: Sequence[int],
    known: Tensor | None = None,
) -> Tensor:
    """The same by full forward passes, one for each code; shares nothing with it but the model."""
    total = math.prod(model.code_shape)
    cond = None if cond is None else cond.repeat_interleave(len(seeds) // len(cond), dim=0)
    draws = [
        torch.rand(total, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds
    ]
    codes = torch.zeros(len(seeds), total, dtype=torch.long)
    begin = 0
    if known is not None:
        begin = known.shape[1]
        codes[:, :begin] = known
    for n in range(begin, total):
        logits = flat_logits(model, codes, cond)[:, n]
        temperature, top_k, top_p, scale = (
            value[model.code_depths[n]] if isinstance(value, tuple) else value
            for value in (params.temperature, params.top_k, params.top_p, params.cfg_scale)
        )
        if scale != 1:
            null = flat_logits(model, codes, model.null_condition(cond))[:, n]
            logits = (null + scale * (logits - null)).nan_to_num(-math.inf, neginf=-math.inf)
        if temperature == 0:
            codes[:, n] = logits.argmax(dim=-1)
            continue
        probabilities = oracle.probabilities(logits, temperature, top_k, top_p).tolist()
        for i, row in enumerate(probabilities):
            sums = list(itertools.accumulate(row))
            codes[i, n] = next(code for code, mass in enumerate(sums) if mass > draws[i][n] * sums[-1])
    return codes.view(-1, *model.code_shape)


def params_for(name: str, setting: str) -> SamplingParams:
    depth = num_depths(MODELS[name])
    rising = tuple(1 + 0.5 * d for d in range(depth))
    return {
        "greedy": GREEDY,
        "plain": SamplingParams(),
        "filtered": SamplingParams(temperature=1.5, top_k=tuple(range(3, 3 + depth)), top_p=0.9),
        "guided": SamplingParams(cfg_scale=2.5, top_k=6),
        "by depth": SamplingParams(
            temperature=rising,
            top_k=tuple(range(3, 3 + depth)),
            top_p=tuple(1 - 0.1 * d for d in range(depth)),
            cfg_scale=tuple(reversed(rising)),
        ),
        "greedy guided": SamplingParams(cfg_scale=3.0, temperature=0),
    }[setting]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *itertools.product(MODELS, ["greedy", "filtered"]),
        *itertools.product(SOME, ["plain", "guided", "greedy guided", "by depth"]),
    ],
)
def test_generate_equals_decoding_by_full_forwards(name: str, setting: str) -> None:
    model, params, cond = build(name), params_for(name, setting), draw_cond(MODELS[name], 2)
    cond = cond if setting != "plain" or cond is None else cond[:1]
    assert torch.equal(
        generate(model, cond, params, seeds=SEEDS[:4]), slow_generate(model, cond, params, SEEDS[:4])
    )


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 4, -1, None])  # 4: within a position of three codes; None: all
@pytest.mark.parametrize("name", SOME)
def test_known_codes_stay_and_the_rest_follows_from_them(name: str, count: int | None) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 2)
    for setting, batch in (("plain", 1), ("guided", 4)):
        params = params_for(name, setting)
        known = draw_codes(MODELS[name], batch, seed=9).flatten(1)[:, :count]
        before = known.clone()
        codes = generate(model, cond, params, seeds=SEEDS[:4], known=known)
        assert torch.equal(codes.flatten(1)[:, : known.shape[1]], known.expand(4, -1))
        assert torch.equal(codes, slow_generate(model, cond, params, SEEDS[:4], known))
        assert torch.equal(known, before)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, "plain") for name in (*SOME, "gpt_none", "rq_none")),
        *((name, "guided") for name in ("gpt_text", "rq_sizes_per_depth")),
    ],
)
def test_an_image_is_the_same_in_any_batch(name: str, setting: str) -> None:
    # float noise between batch sizes could cross a code's edge; with these models and seeds none does
    model, cond, params = build(name), draw_cond(MODELS[name], 1), params_for(name, setting)
    together = generate(model, cond, params, seeds=SEEDS)
    assert len(together.unique(dim=0)) > 4
    for size in (1, 3):
        parts = [generate(model, cond, params, seeds=SEEDS[i : i + size]) for i in range(0, 8, size)]
        assert torch.equal(torch.cat(parts), together)
    shuffled = [5, 0, 7, 2]
    codes = generate(model, cond, params, seeds=[SEEDS[i] for i in shuffled])
    assert torch.equal(codes, together[shuffled])


@pytest.mark.parametrize("name", SOME)
def test_an_image_is_the_same_beside_other_prompts(name: str) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 4)
    for scale in (1.0, 2.0):
        params = SamplingParams(cfg_scale=scale)
        together = generate(model, cond, params, seeds=SEEDS)
        for p in range(4):
            alone = generate(model, cond[p : p + 1], params, seeds=SEEDS[2 * p : 2 * p + 2])
            assert torch.equal(alone, together[2 * p : 2 * p + 2])


@pytest.mark.parametrize("make", [gpt, rq])
def test_an_image_is_the_same_with_two_threads(make: Any) -> None:
    wide = blocks(width=128)  # wide enough for torch to share the work
    config = gpt(transformer=wide) if make is gpt else rq(body=wide, head=wide, code_shape=(1, 2, 3))
    model, cond, threads = build(config), draw_cond(config, 1), torch.get_num_threads()
    codes = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            codes.append(generate(model, cond, SamplingParams(), seeds=SEEDS))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*codes)


@pytest.mark.parametrize("name", SOME)
def test_greedy_ignores_seeds_and_sampling_does_not(name: str) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 1)
    assert torch.equal(
        generate(model, cond, GREEDY, seeds=[1, 2]), generate(model, cond, GREEDY, seeds=[3, 3])
    )
    one, other = (generate(model, cond, SamplingParams(), seeds=seeds) for seeds in ([1, 2], [3, 3]))
    assert not torch.equal(one, other)
    assert torch.equal(other[0], other[1])


@pytest.mark.parametrize("name", SOME)
def test_neither_the_global_generator_nor_the_inputs_are_touched(name: str) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 2)
    before, weights = cond.clone(), {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    codes = generate(model, cond, SamplingParams(cfg_scale=2.0), seeds=SEEDS[:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(cond, before)
    assert cond._version == 0  # not even changed and changed back
    torch.manual_seed(1)
    assert torch.equal(generate(model, cond, SamplingParams(cfg_scale=2.0), seeds=SEEDS[:2]), codes)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])


class CountingModel:
    """A model that notes how many rows it is asked to compute."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.num_prompts: list[int] = []
        self.num_rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, cond: Tensor, cache: Any, rows: Sequence[int] | None = None) -> Tensor:
        self.num_prompts.append(len(cond))
        return self.model.prefill(cond, cache, rows)

    def decode(self, codes: Tensor, cache: Any, rows: Sequence[int] | None = None) -> Tensor:
        self.num_rows.append(len(codes))
        return self.model.decode(codes, cache, rows)


@pytest.mark.parametrize("name", SOME)
def test_without_guidance_no_unconditional_half_is_computed_and_a_prompt_is_read_once(name: str) -> None:
    model, cond = CountingModel(build(name)), draw_cond(MODELS[name], 2)
    steps = math.prod(MODELS[name].code_shape) - 1
    generate(model, cond, SamplingParams(cfg_scale=1.0), seeds=SEEDS)
    assert model.num_prompts == [2]
    assert model.num_rows == [8] * steps
    generate(model, cond, SamplingParams(cfg_scale=1.5), seeds=SEEDS)
    assert model.num_prompts == [2, 4]
    assert model.num_rows[steps:] == [16] * steps


@pytest.mark.parametrize("name", SOME)
def test_guidance_of_almost_one_is_almost_none(name: str) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 2)
    codes = [generate(model, cond, SamplingParams(cfg_scale=s), seeds=SEEDS) for s in (1.0, 1 + 1e-6, 4.0)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("name", SOME)
def test_on_step_sees_every_code_once(name: str, count: int) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 1)
    known = draw_codes(MODELS[name], 1).flatten(1)[:, :count]
    steps: list[tuple[int, Tensor]] = []
    codes = generate(
        model,
        cond,
        SamplingParams(),
        seeds=SEEDS[:2],
        known=known,
        on_step=lambda num_done, codes: steps.append((num_done, codes.clone())),
    ).flatten(1)
    assert [num_done for num_done, _ in steps] == list(range(count, codes.shape[1] + 1))
    for num_done, partial in steps:
        assert torch.equal(partial[:, :num_done], codes[:, :num_done])
        assert not partial[:, num_done:].any()
    again = list(iterate_codes(model, cond, SamplingParams(), seeds=SEEDS[:2], known=known))
    assert [num_done for num_done, _ in again] == [num_done for num_done, _ in steps]


@pytest.mark.parametrize("name", SOME)
def test_drawn_codes_can_be_trained_on(name: str) -> None:
    """They used to be inference tensors, which autograd refuses to save and which cannot be edited."""
    model, cond = build(name), draw_cond(MODELS[name], 2)
    codes = generate(model, cond, SamplingParams(), seeds=SEEDS[:2])
    assert codes.dtype == torch.int64
    codes[:, 0] = 1
    model(codes, cond).logits[..., :7].sum().backward()


@pytest.mark.parametrize("name", ["gpt_text", "rq_class"])
def test_logits_that_are_not_finite_stop_the_loop(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, draw_cond(MODELS[name], 1), SamplingParams(), seeds=[0])


@pytest.mark.parametrize("first", [0, 3, 20, 47])
def test_the_loop_asks_for_finite_logits_now_and_then(first: int) -> None:
    """An answer waits for a GPU; a drawing of 16 x 16 codes need not get to its end without one."""
    config = gpt("text", code_shape=(6, 8))
    model, asked = build(config), list[int]()
    decode = model.decode

    def decode_badly(codes: Tensor, cache: Any, rows: Any = None) -> Tensor:
        logits = decode(codes, cache, rows)
        return logits * math.nan if min(cache.num_codes) >= first else logits

    model.decode = decode_badly  # type: ignore[method-assign]
    cond = draw_cond(config, 1)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, cond, SamplingParams(), seeds=[0], on_step=lambda n, _: asked.append(n))
    assert first <= asked[-1] < min(first + 17, 48)


ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "seeds must name at least one image, got none": ("gpt_text", {"seeds": []}),
    r"known codes must be \(2 or 1, at most 6\), got \(2, 7\)": ("gpt_text", {"known": torch.zeros(2, 7)}),
    r"known codes must be \(2 or 1, at most 18\), got \(3, 4\)": ("rq_text", {"known": torch.zeros(3, 4)}),
    r"known codes must be \(2 or 1, at most 6\), got \(1, 2, 3\)": (
        "gpt_text",
        {"known": torch.zeros(1, 2, 3)},
    ),
    r"known codes must be in \[0, 20\), got 0 to 20: .* image tokenizer\?": (
        "rq_class",
        {"known": torch.tensor([[0, 20]])},
    ),
    r"known codes must be in \[0, 20\), got -1 to 3": ("gpt_class", {"known": torch.tensor([[3, -1]])}),
    "known codes must be integers, got torch.float32": ("gpt_class", {"known": torch.tensor([[3.0, 1.0]])}),
    r"top_k needs one value or one per depth \(3\), got \(1, 2\)": (
        "rq_text",
        {"params": SamplingParams(top_k=(1, 2))},
    ),
    r"top_k needs one value or one per depth \(1\), got \(1, 2\)": (
        "gpt_text",
        {"params": SamplingParams(top_k=(1, 2))},
    ),
    "conditions must divide the number of images, got 2 and 3": ("rq_text", {"seeds": [1, 2, 3]}),
    "guidance needs a condition, and this model is unconditional: use cfg_scale=1": (
        "gpt_none",
        {"params": SamplingParams(cfg_scale=2.0)},
    ),
    "this model needs a class condition, got None": ("rq_class", {"cond": None}),
    "this model is unconditional: pass cond=None": ("rq_none", {"cond": torch.tensor([1])}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    name, changed = ERRORS[message]
    arguments = {"cond": draw_cond(MODELS[name], 2), "params": SamplingParams(), "seeds": [1, 2], **changed}
    with pytest.raises(ValueError, match=message):
        generate(build(name), **arguments)
