"""Cached decoding gives the logits of the full forward pass, whatever happened to a row before."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from sequence_models import CONDITIONAL, MODELS, SOME, Model, build, draw_codes, draw_cond, flat_logits
from torch import Tensor

BATCH = 4
ALL = range(BATCH)
Script = list[tuple[str, Sequence[int], int]]

SCRIPTS: dict[str, Script] = {
    # what to do, to which rows, with how many codes
    "rows run ahead of each other": [
        ("prefill", ALL, 0),
        ("decode", [0], 4),
        ("decode", [1, 2], 2),
        ("decode", ALL, 1),
        ("decode", [3], 1),
        ("decode", ALL, 1),
        ("decode", [1, 3], 2),
    ],
    "rows rewind": [
        ("prefill", ALL, 0),
        ("decode", ALL, 5),
        ("rewind", [1], 2),
        ("rewind", [3], 0),
        ("decode", [1, 3], 2),
        ("rewind", [0], 4),
        ("decode", ALL, 1),
        ("rewind", ALL, 1),
        ("decode", ALL, 3),
    ],
    "rows rewind within a position": [
        ("prefill", ALL, 0),
        ("decode", ALL, 11),
        ("rewind", [0], 10),
        ("rewind", [1], 9),
        ("rewind", [2], 8),
        ("decode", ALL, 4),
        ("rewind", ALL, 7),
        ("decode", ALL, 1),
    ],
    "an image joins a running batch, another starts anew": [
        ("prefill", [0, 2], 0),
        ("decode", [0, 2], 4),
        ("prefill", [1], 0),
        ("decode", [0, 1, 2], 1),
        ("prefill", [2], 0),
        ("decode", [1, 2], 2),
        ("prefill", [3], 0),
        ("decode", ALL, 1),
    ],
    "rows in any order": [
        ("prefill", [3, 1, 0, 2], 0),
        ("decode", [2, 0, 3, 1], 1),
        ("decode", [1, 0], 1),
        ("decode", [3, 2], 1),
        ("decode", [1, 3, 0, 2], 2),
    ],
}


def random_script(seed: int) -> Script:
    choose = random.Random(seed)
    script: Script = [("prefill", ALL, 0)]
    for _ in range(16):
        rows = choose.sample(ALL, choose.randint(1, BATCH))
        what = choose.choices(["decode", "rewind", "prefill"], [8, 3, 1])[0]
        script.append((what, rows, choose.randint(1, 5)))
    return script


RANDOM = {f"random {seed}": random_script(seed) for seed in range(2)}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_equal(logits: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)


def decode_in_chunks(model: Model, codes: Tensor, cond: Tensor | None, chunk: int) -> Tensor:
    """The logits of every code (B, T, V), by prefill and decode."""
    codes = codes.flatten(1)
    cache = model.make_cache(len(codes))
    logits = [model.prefill(cond, cache)[:, None]]
    logits += [model.decode(part, cache) for part in codes[:, :-1].split(chunk, dim=1)]
    assert cache.num_codes == [codes.shape[1] - 1] * len(codes)
    return torch.cat(logits, dim=1)


CHUNKS = [1, 2, 3, -1]  # codes at a time; -1: all that are ever read, T - 1


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", MODELS)
def test_decode_equals_forward(name: str, chunk: int) -> None:
    config, model = MODELS[name], build(name)
    codes, cond = draw_codes(config, 2), draw_cond(config, 1 if chunk == 1 else 2)
    expected = flat_logits(model, codes, cond if cond is None else cond.expand(2, *cond.shape[1:]))
    assert_equal(decode_in_chunks(model, codes, cond, chunk % codes[0].numel()), expected)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", CONDITIONAL)
def test_decode_equals_forward_with_guidance(name: str, chunk: int) -> None:
    config, model = MODELS[name], build(name)
    codes, cond = draw_codes(config, 2).repeat(2, *[1] * len(config.code_shape)), draw_cond(config, 2)
    cond = torch.cat([cond, model.null_condition(cond)])  # (2B, ...)
    assert_equal(
        decode_in_chunks(model, codes, cond, chunk % codes[0].numel()), flat_logits(model, codes, cond)
    )


@pytest.mark.parametrize("name", MODELS)
def test_decode_follows_the_dtype_of_the_parameters(name: str) -> None:
    config, codes, cond = MODELS[name], draw_codes(MODELS[name], 2), draw_cond(MODELS[name], 2)
    model = build(name).double()
    assert_equal(decode_in_chunks(model, codes, cond, 2), flat_logits(model, codes, cond), atol=1e-12)
    logits = decode_in_chunks(build(name).bfloat16(), codes, cond, 2)
    assert logits.dtype == torch.bfloat16
    is_code = logits.isfinite()
    exact = flat_logits(build(config), codes, cond)
    assert (logits - exact)[is_code].abs().mean() < 0.05


@pytest.mark.parametrize("num_prompts", [1, 2, 4])
@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_prompt_serves_as_many_rows_as_there_are_rows_per_prompt(name: str, num_prompts: int) -> None:
    config, model = MODELS[name], build(name)
    codes, cond = draw_codes(config, BATCH), draw_cond(config, num_prompts)
    expected = flat_logits(model, codes, cond.repeat_interleave(BATCH // num_prompts, dim=0))
    assert_equal(decode_in_chunks(model, codes, cond, 3), expected)


@pytest.mark.parametrize(
    ("name", "script"), [*itertools.product(SOME, SCRIPTS), *itertools.product(MODELS, RANDOM)]
)
def test_the_logits_of_a_row_follow_from_its_codes_alone(name: str, script: str) -> None:
    config, model = MODELS[name], build(name)
    cache = model.make_cache(BATCH)
    codes, done = draw_codes(config, BATCH).flatten(1), [0] * BATCH
    cond = draw_cond(config, BATCH)
    total = codes.shape[1]

    def check(logits: Tensor, rows: list[int], begin: list[int]) -> None:
        expected = flat_logits(model, codes[rows], None if cond is None else cond[rows])
        for row_logits, row_expected, n in zip(logits, expected, begin, strict=True):
            assert_equal(row_logits, row_expected[n : n + len(row_logits)])

    for step, (what, chosen, count) in enumerate((SCRIPTS | RANDOM)[script]):
        rows = list(chosen)
        fresh = draw_codes(config, BATCH, seed=step + 1).flatten(1)
        if what == "prefill":
            if cond is not None:
                cond[rows] = draw_cond(config, len(rows), seed=step)
            part = None if cond is None else cond[rows]
            for row in rows:
                done[row], codes[row] = 0, fresh[row]
            check(model.prefill(part, cache, rows)[:, None], rows, [0] * len(rows))
        elif what == "rewind":
            for row in rows:
                done[row] = min(count, done[row])
                cache.rewind(row, done[row])
                codes[row, done[row] :] = fresh[row, done[row] :]
        else:
            count = min(count, *(total - 1 - done[row] for row in rows))
            if count == 0:
                continue
            new = torch.stack([codes[row, done[row] : done[row] + count] for row in rows])
            logits = model.decode(new, cache, None if rows == list(ALL) else rows)
            check(logits, rows, [done[row] + 1 for row in rows])
            for row in rows:
                done[row] += count
        filled = [row for row in ALL if cache.num_codes[row] >= 0]
        assert [cache.num_codes[row] for row in filled] == [done[row] for row in filled]


@pytest.mark.parametrize("name", SOME)
class TestErrors:
    def test_more_codes_than_an_image_has(self, name: str) -> None:
        model, codes, cond = build(name), draw_codes(MODELS[name], 2).flatten(1), draw_cond(MODELS[name], 2)
        cache = model.make_cache(2)
        model.prefill(cond, cache)
        with pytest.raises(ValueError, match=r"room for \d+ entries a row, got \d+ and \d+ more: an image"):
            model.decode(codes, cache)
        assert cache.num_codes == [0, 0]

    def test_prompts_that_do_not_divide_the_rows(self, name: str) -> None:
        model = build(name)
        with pytest.raises(ValueError, match="conditions must divide the number of images, got 2 and 3"):
            model.prefill(draw_cond(MODELS[name], 2), model.make_cache(3))
        with pytest.raises(ValueError, match="conditions must divide the number of images, got 2 and 1"):
            model.prefill(draw_cond(MODELS[name], 2), model.make_cache(3), [1])

    def test_rewinding_forwards(self, name: str) -> None:
        model, codes = build(name), draw_codes(MODELS[name], 2).flatten(1)
        cache = model.make_cache(2)
        model.prefill(draw_cond(MODELS[name], 2), cache)
        model.decode(codes[:, :2], cache)
        for count in (3, -1):
            with pytest.raises(ValueError, match=rf"row 1 has 2 codes, cannot rewind it to {count}"):
                cache.rewind(1, count)

    def test_a_row_without_a_condition(self, name: str) -> None:
        """Such a row used to give logits as if its condition was the zero vector."""
        model, codes = build(name), draw_codes(MODELS[name], 2).flatten(1)
        cache = model.make_cache(2)
        for rows in ([0], [0, 1]):
            with pytest.raises(ValueError, match="row 0 has no condition yet: call prefill first"):
                model.decode(codes[rows, :1], cache, rows)
        model.prefill(draw_cond(MODELS[name], 1), cache, [0])
        with pytest.raises(ValueError, match="row 1 has no condition yet: call prefill first"):
            model.decode(codes[:, :1], cache)
