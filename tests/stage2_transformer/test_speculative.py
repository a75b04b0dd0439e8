"""Speculative decoding: images distributed as those of plain decoding, each the same in any batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sequence_models import (
    MODELS,
    SOME,
    Model,
    build,
    draw_codes,
    draw_cond,
    flat_logits,
    gpt,
    num_depths,
    rq,
)
from torch import Tensor

from stage2_transformer import SamplingParams, code_probabilities, generate, image_seeds, iterate_codes
from stage2_transformer import speculative as module
from stage2_transformer.sampling import guide
from stage2_transformer.speculative import correct_drafts

SEEDS = image_seeds(0, 5)
SETTINGS = {
    "plain": SamplingParams(temperature=2.0, window=4),
    "filtered": SamplingParams(temperature=2.0, top_k=3, top_p=0.9, window=4),
    "guided": SamplingParams(temperature=3.0, top_k=3, cfg_scale=2.0, window=4),
}


def chi_square_deviation(counts: Tensor, expected: Tensor) -> float:
    """How many standard deviations the statistic is above its mean; infinite if the impossible came."""
    is_possible = expected > 0
    if counts[~is_possible].any():
        return math.inf
    counts, expected = counts[is_possible].double(), expected[is_possible].double()
    freedom = len(expected) - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def correct_uniformly(q: Tensor, p: Tensor, count: int) -> Tensor:
    """What the test makes of `count` drafts from q."""
    generator = torch.Generator().manual_seed(1)
    drafts = torch.multinomial(q, count, replacement=True, generator=generator)[None]
    u = torch.rand(2, 1, count, generator=generator, dtype=torch.float64)
    old, new = (each.expand(1, count, -1) for each in (q, p))
    codes, is_kept = correct_drafts(drafts, old, new, u[0], u[1])
    assert torch.equal(codes == drafts, is_kept)  # what is redrawn is another code
    overlap = float(torch.minimum(p, q).sum())
    assert abs(float(is_kept.double().mean()) - overlap) < 0.02  # and no more than must be
    return codes[0].bincount(minlength=len(p))


@pytest.mark.parametrize(
    ("q", "p"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]),
        ([0.0, 0.0, 1.0, 0.0], [0.4, 0.3, 0.2, 0.1]),
        ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.7, 0.3]),
        ([0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0]),
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_drafts_from_q_become_codes_from_p(q: list[float], p: list[float]) -> None:
    wanted = torch.tensor(p)
    counts = correct_uniformly(torch.tensor(q), wanted, 20_000)
    if wanted.max() < 1:
        assert chi_square_deviation(counts, 20_000 * wanted) < 4
    assert not counts[wanted == 0].any()


def test_rounding_leaves_something_to_draw_from() -> None:
    """p below q by the last bit at the draft and equal elsewhere: max(0, p - q) is zero everywhere."""
    q = torch.tensor([0.5, 0.25, 0.25])
    p = q.clone()
    p[0] -= 2**-25
    u = torch.full((1, 1), 1 - 2**-53, dtype=torch.float64)
    codes, is_kept = correct_drafts(
        torch.zeros(1, 1, dtype=torch.long), q.view(1, 1, 3), p.view(1, 1, 3), u, u
    )
    assert not is_kept
    assert codes.tolist() == [[2]]


def image_probabilities(model: Model, cond: Tensor | None, params: SamplingParams) -> Tensor:
    """The probability of every image there is, (V^T,), by the chain rule over full forward passes."""
    total, depths = math.prod(model.code_shape), model.code_shape[2] if len(model.code_shape) == 3 else 1
    codes = torch.tensor(list(itertools.product(range(model.vocab_size), repeat=total)))
    many = None if cond is None else cond.expand(len(codes), *cond.shape[1:])
    logits = flat_logits(model, codes, many)  # (V^T, T, V)
    if params.cfg_scale != 1:
        null = flat_logits(model, codes, model.null_condition(many))
        logits = guide(torch.cat([logits, null]), params.cfg_scale)
    probability = torch.ones(len(codes), dtype=torch.float64)
    for n in range(total):
        by_code = code_probabilities(logits[:, n], params, depth=n % depths)
        probability *= by_code.gather(1, codes[:, n : n + 1])[:, 0].double()
    assert abs(float(probability.sum()) - 1) < 1e-4
    return probability


def deviation_of_images(config: Any, params: SamplingParams, num_images: int = 3000) -> float:
    model, cond = build(config, seed=1), draw_cond(config, 1)
    codes = generate(model, cond, params, seeds=image_seeds(3, num_images)).flatten(1)
    size, total = model.vocab_size, codes.shape[1]
    index = (codes * size ** torch.arange(total - 1, -1, -1)).sum(dim=1)
    counts = index.bincount(minlength=size**total)
    with torch.no_grad():
        expected = num_images * image_probabilities(model, cond, params)
    is_rare = expected < 5  # too few for the statistic: one bin of them all
    counts, expected = (
        torch.cat([each[~is_rare], each[is_rare].sum()[None]]) for each in (counts, expected.double())
    )
    return chi_square_deviation(counts, expected)


GRID = gpt("text", vocab_size=4, code_shape=(2, 2))
ROW = gpt("text", vocab_size=3, code_shape=(1, 5))
RESIDUAL = rq("class", code_shape=(1, 2, 2), codebook_sizes=(4, 4))


QUICK = [(GRID, "plain"), (GRID, "filtered"), (GRID, "guided"), (RESIDUAL, "plain")]
SLOW = [(RESIDUAL, "filtered"), (RESIDUAL, "guided"), *((ROW, setting) for setting in SETTINGS)]


@pytest.mark.parametrize(
    ("config", "setting"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_images_are_distributed_as_the_model_says(config: Any, setting: str) -> None:
    assert deviation_of_images(config, SETTINGS[setting]) < 4


def keep_too_much(drafts: Tensor, old: Tensor, new: Tensor, u_keep: Tensor, u_redraw: Tensor) -> Any:
    return correct_drafts(drafts, old, new, 0.7 * u_keep, u_redraw)


def redraw_from_all(drafts: Tensor, old: Tensor, new: Tensor, u_keep: Tensor, u_redraw: Tensor) -> Any:
    codes, is_kept = correct_drafts(drafts, old, new, u_keep, u_redraw)
    return torch.where(
        is_kept, codes, module.draw_codes(new.flatten(0, 1), u_redraw.flatten()).view_as(codes)
    ), (is_kept)


def forget_the_guess(drafts: Tensor, old: Tensor, new: Tensor, u_keep: Tensor, u_redraw: Tensor) -> Any:
    return correct_drafts(drafts, torch.where(old == 1, 0.5, old), new, u_keep, u_redraw)


@pytest.mark.parametrize("broken", [keep_too_much, redraw_from_all, forget_the_guess])
def test_a_broken_test_of_drafts_would_show(
    broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "correct_drafts", broken)
    assert deviation_of_images(GRID, SETTINGS["plain"]) > 8


@pytest.mark.parametrize(
    ("name", "window"), [*((name, 3) for name in MODELS), *((name, 100) for name in SOME)]
)
def test_greedy_equals_plain_decoding(name: str, window: int) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 2)
    scales = (1.0, 2.5) if name in SOME else (1.0,)
    for scale in scales:
        plain = generate(model, cond, SamplingParams(temperature=0, cfg_scale=scale), seeds=SEEDS[:4])
        params = SamplingParams(temperature=0, cfg_scale=scale, window=window)
        assert torch.equal(generate(model, cond, params, seeds=SEEDS[:4]), plain)


@pytest.mark.parametrize("name", SOME)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    """Rows of a batch are at different codes at a time, and finish one after the other."""
    model, cond = build(name), draw_cond(MODELS[name], 1)
    depth = num_depths(MODELS[name])
    for params in (
        SamplingParams(temperature=0.5, window=3),
        SamplingParams(temperature=0.7, top_k=tuple(range(3, 3 + depth)), cfg_scale=2.0, window=5),
    ):
        together = generate(model, cond, params, seeds=SEEDS)
        assert len(together.unique(dim=0)) > 2
        for i, seed in enumerate(SEEDS):
            assert torch.equal(generate(model, cond, params, seeds=[seed])[0], together[i])


@pytest.mark.parametrize("count", [1, 4, -1, None])
@pytest.mark.parametrize("name", SOME)
def test_known_codes_stay_and_the_rest_follows_from_them(name: str, count: int | None) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 2)
    known = draw_codes(MODELS[name], 4, seed=9).flatten(1)[:, :count]
    for scale in (1.0, 2.0):
        plain = SamplingParams(temperature=0, cfg_scale=scale)
        params = SamplingParams(temperature=0, cfg_scale=scale, window=4)
        codes = generate(model, cond, params, seeds=SEEDS[:4], known=known)
        assert torch.equal(codes, generate(model, cond, plain, seeds=SEEDS[:4], known=known))
        assert torch.equal(codes.flatten(1)[:, : known.shape[1]], known)


@pytest.mark.parametrize("name", SOME)
def test_steps_show_final_codes_and_are_fewer(name: str) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 1)
    params = SamplingParams(temperature=0.3, window=6)
    codes = generate(model, cond, params, seeds=SEEDS[:3]).flatten(1)
    steps = [(n, each.clone()) for n, each in iterate_codes(model, cond, params, seeds=SEEDS[:3])]
    numbers = [n for n, _ in steps]
    assert numbers[0] == 0
    assert numbers[-1] == codes.shape[1]
    assert all(after > before for before, after in itertools.pairwise(numbers))
    assert len(steps) < codes.shape[1] + 1
    for n, partial in steps:
        assert torch.equal(partial[:, :n], codes[:, :n])
        assert ((partial == codes) | (partial == 0)).all()


def test_logits_that_are_not_finite_stop_the_loop() -> None:
    model = build("gpt_text")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, draw_cond(MODELS["gpt_text"], 1), SamplingParams(window=4), seeds=[0])


def test_a_window_has_at_least_one_code() -> None:
    with pytest.raises(ValueError, match=r"window must be an integer of at least 1 \(1 = one.*, got 0"):
        SamplingParams(window=0)
