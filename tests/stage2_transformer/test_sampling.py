"""From logits to a code: the filters, the draw, the seeds."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import sampling as oracle
from torch import Tensor

from stage2_transformer import SamplingParams, code_probabilities, image_seeds, sample_next
from stage2_transformer.sampling import draw_next, guide, uniforms

ALMOST_ONE = 1 - 2**-53  # the largest number `uniforms` can draw
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_k": 8, "top_p": 0.7},
    {"temperature": 0.7, "top_k": 16, "top_p": 0.9},
]


def draw_logits(rows: int, size: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def sample_many(logits: Tensor, params: SamplingParams, u: Tensor, depth: int = 0) -> Tensor:
    """One row of logits (V,), drawn from once for each number."""
    return sample_next(logits.expand(len(u), -1), params, u, depth)


@pytest.mark.parametrize("settings", FILTERS)
def test_filter_equals_the_oracle(settings: dict[str, Any]) -> None:
    logits = draw_logits(200, 50)
    probabilities = code_probabilities(logits, SamplingParams(**settings))
    expected = oracle.probabilities(logits, **settings)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [3, 7, 10, 30, 100])
def test_top_p_equals_the_oracle_where_sums_meet_p(size: int) -> None:
    """Codes of one probability, p a multiple of it: rounding decides, and must decide as in the originals."""
    logits = torch.zeros(1, size)
    for n in range(1, size):
        kept = code_probabilities(logits, SamplingParams(top_p=n / size)) > 0
        assert kept.sum() == (oracle.probabilities(logits, top_p=n / size) > 0).sum()


def test_filter_equals_the_fixture(fixtures_dir: Path) -> None:
    expected = torch.load(fixtures_dir / "mindalle-tiny" / "expected.pt", weights_only=True)["filter"]
    params = SamplingParams(**{key: expected[key] for key in ("temperature", "top_k", "top_p")})
    probabilities = code_probabilities(expected["logits"], params)
    assert torch.equal(probabilities > 0, expected["probs"] > 0)
    torch.testing.assert_close(probabilities, expected["probs"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 5, 9, 10, 11])
@pytest.mark.parametrize("tied", [False, True])
def test_exactly_k_codes_survive(k: int, tied: bool) -> None:
    logits = draw_logits(20, 10)
    if tied:
        logits = logits.round()
        logits[0] = 1.0
    probabilities = code_probabilities(logits, SamplingParams(top_k=k))
    assert ((probabilities > 0).sum(dim=-1) == min(k, 10)).all()
    for row, kept in zip(logits, probabilities > 0, strict=True):  # none left out beats one that is kept
        assert row[kept].min() >= row.masked_fill(kept, -math.inf).max()


def test_top_k_per_depth() -> None:
    params = SamplingParams(top_k=(1, 4, 2))
    for depth, k in enumerate((1, 4, 2)):
        assert (code_probabilities(draw_logits(3, 10), params, depth) > 0).sum(dim=-1).tolist() == [k] * 3
        codes = sample_many(
            draw_logits(1, 10)[0], params, torch.linspace(0, ALMOST_ONE, 50, dtype=torch.float64), depth
        )
        assert codes.unique().numel() == k
    assert SamplingParams(top_k=[1, 4, 2]) == params  # as YAML has it


@pytest.mark.parametrize(
    ("p", "kept"),
    [(1e-9, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.876, 4), (1.0, 4)],
)
def test_top_p_keeps_the_code_that_crosses_p(p: float, kept: int) -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    assert (code_probabilities(logits, SamplingParams(top_p=p)) > 0).sum() == kept


def test_top_p_of_one_keeps_everything() -> None:
    """In the originals the sum of peaked probabilities reaches 1 early in float32, and the tail is lost."""
    logits = torch.linspace(15, -15, 5000)[None]
    everything = code_probabilities(logits, SamplingParams())
    assert torch.equal(code_probabilities(logits, SamplingParams(top_p=1.0)), everything)
    assert (everything > 0).all()
    assert (oracle.probabilities(logits, top_p=1.0) > 0).sum() < 5000


@pytest.mark.parametrize("settings", FILTERS)
def test_greedy_ignores_filters_and_numbers(settings: dict[str, Any]) -> None:
    logits, params = draw_logits(20, 50), SamplingParams(**{**settings, "temperature": 0.0})
    for u in (0.0, 0.5, ALMOST_ONE):
        codes = sample_next(logits, params, torch.full((20,), u, dtype=torch.float64))
        assert torch.equal(codes, logits.argmax(dim=-1))
    assert torch.equal(code_probabilities(logits, params).argmax(dim=-1), codes)
    assert (code_probabilities(logits, params).sum(dim=-1) == 1).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_small_temperature_is_greedy(temperature: float) -> None:
    """Logits divided by it used to overflow to no numbers, and every code was 0."""
    logits, params = draw_logits(20, 50), SamplingParams(temperature=temperature)
    codes = sample_next(logits, params, uniforms(range(20), 1)[:, 0])
    assert torch.equal(codes, logits.argmax(dim=-1))


@pytest.mark.parametrize("settings", FILTERS)
def test_codes_are_drawn_with_their_probabilities(settings: dict[str, Any]) -> None:
    params, logits, count = SamplingParams(**settings), draw_logits(1, 50, seed=3)[0], 5_000
    expected = count * code_probabilities(logits[None], params)[0].double()
    is_possible = expected > 0

    def frequencies(u: Tensor) -> Tensor:
        return torch.bincount(sample_many(logits, params, u), minlength=50)

    drawn = frequencies(uniforms([0], count)[0])
    assert drawn[~is_possible].sum() == 0
    often = expected >= 5  # where chi-square holds
    chi_square = ((drawn - expected)[often] ** 2 / expected[often]).sum()
    degrees = int(often.sum())
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)

    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (frequencies(grid) - expected).abs().max() <= 1


def test_no_code_of_probability_zero_is_ever_drawn() -> None:
    logits = torch.tensor([-math.inf, 1.0, -math.inf, -300.0, 0.5, 0.5, -math.inf, -math.inf])
    for params in (SamplingParams(), SamplingParams(top_k=7), SamplingParams(top_p=0.99)):
        probabilities = code_probabilities(logits[None], params)[0]
        assert (probabilities > 0).nonzero().flatten().tolist() == [1, 4, 5]
        edges = probabilities.double().cumsum(dim=0)
        edges = (edges / edges[-1]).clamp(max=ALMOST_ONE)
        ends = torch.tensor([0.0, 1e-300, ALMOST_ONE], dtype=torch.float64)
        assert sample_many(logits, params, ends).tolist() == [1, 1, 5]
        u = torch.cat([edges, edges - 2**-53, edges + 2**-53]).clamp(0, ALMOST_ONE)
        assert set(sample_many(logits, params, u).tolist()) == {1, 4, 5}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_are_refused(row: list[float], temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], row])
    with pytest.raises(FloatingPointError, match=r"logits are not finite: .* try fp32, otherwise check"):
        sample_next(logits, SamplingParams(temperature=temperature), torch.zeros(2).double())


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, *FILTERS])
def test_logits_that_are_not_finite_give_codes_that_can_be_read(settings: dict[str, Any]) -> None:
    """The loop finds out some codes later: until then a GPU must not be asked for row V of a table."""
    rows = [[0.0, 1.0, 2.0], [math.nan, 1.0, 0.0], [math.inf, 1.0, 0.0], [-math.inf] * 3]
    rows += [[-math.inf, 1.0, 0.0], [math.nan] * 3]
    u = torch.full((len(rows),), ALMOST_ONE, dtype=torch.float64)
    codes, is_finite = draw_next(torch.tensor(rows), SamplingParams(**settings), u)
    assert is_finite.tolist() == [True, False, False, False, True, False]
    assert 0 <= int(codes.min()) <= int(codes.max()) < 3


@pytest.mark.parametrize("settings", FILTERS)
def test_drawing_among_the_kept_codes_is_drawing_among_all(settings: dict[str, Any]) -> None:
    params, logits, u = SamplingParams(**settings), draw_logits(500, 50, seed=5), uniforms([1], 500)[0]
    cumulative = code_probabilities(logits, params).double().cumsum(dim=-1)
    expected = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(dim=-1)
    assert torch.equal(sample_next(logits, params, u), expected)


def test_guidance() -> None:
    conditional, unconditional = draw_logits(3, 6), draw_logits(3, 6, seed=1)
    both = torch.cat([conditional, unconditional])
    for scale in (0.0, 0.5, 1.0, 4.0):
        expected = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(guide(both, scale), expected)
    both[:, 2:4] = -math.inf  # ruled out in both halves
    guided = guide(both, 4.0)
    assert guided[:, 2:4].isneginf().all()
    assert guided[:, [0, 1, 4, 5]].isfinite().all()


def test_image_seeds_are_the_documented_hash() -> None:
    for seed, i in ((0, 0), (0, 1), (1, 0), (12345, 67), (-3, 2), (2**70, 0)):
        digest = hashlib.sha256(f"{seed}/{i}".encode()).hexdigest()
        assert image_seeds(seed, i + 1)[i] == int(digest[:16], base=16) // 2  # 8 bytes, without the last bit
    assert image_seeds(0, 2) == [3065247057545751466, 6096812863120040317]


def test_image_seeds_are_a_prefix_of_those_of_more_images() -> None:
    seeds = image_seeds(7, 40)
    assert image_seeds(7, 10) == seeds[:10]
    assert image_seeds(7, 5, first=20) == seeds[20:25]
    assert image_seeds(7, 0) == []
    others = [seed for call in range(20) for seed in image_seeds(call, 40)]
    assert len(set(others)) == len(others)
    assert all(0 <= seed < 2**63 for seed in others)


def test_uniforms_depend_on_their_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rows = uniforms([3, 1, 4], 100)
    assert torch.equal(torch.get_rng_state(), before)
    assert rows.shape == (3, 100)
    assert rows.dtype == torch.float64
    assert rows.min() >= 0
    assert rows.max() < 1
    assert torch.equal(uniforms([1], 100)[0], rows[1])
    assert torch.equal(uniforms([4, 4, 3], 100)[1:], rows[[2, 0]])


ERRORS: dict[str, dict[str, Any]] = {
    r"temperature must be finite and >= 0 \(0 = greedy\), got -1": {"temperature": -1.0},
    "temperature must be finite .* got nan": {"temperature": math.nan},
    "temperature must be finite .* got inf": {"temperature": math.inf},
    "top_k must be an integer of at least 1, got 0; None keeps all codes": {"top_k": 0},
    r"top_k must be an integer of at least 1, got \(4, -1\)": {"top_k": (4, -1)},
    "top_k must be an integer of at least 1, got 64.0": {"top_k": 64.0},
    r"top_k must be an integer of at least 1, got \(4, True\)": {"top_k": (4, True)},
    "window must be an integer of at least 1 .*, got 2.5": {"window": 2.5},
    r"top_p must be in \(0, 1\], got 0.0; None keeps all codes": {"top_p": 0.0},
    r"top_p must be in \(0, 1\], got 1.5": {"top_p": 1.5},
    r"top_p must be in \(0, 1\], got nan": {"top_p": math.nan},
    r"cfg_scale must be finite and >= 0 \(1 = no guidance\), got -2": {"cfg_scale": -2.0},
    "cfg_scale must be finite .* got inf": {"cfg_scale": math.inf},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**ERRORS[message])
