"""What is drawn: each picture is its own, whatever is drawn beside it, and the best are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image
from set_models import PROMPTS
from torch import Tensor

from mindalle.data.samples import seed_of
from mindalle.generation import SetJob, plan_set
from mindalle.generation import painter as painter_module
from mindalle.generation.painter import DrawnPicture, Painter
from stage2_transformer import image_seeds


def draw(job: SetJob) -> list[DrawnPicture]:
    pipe = job.load()
    plan = plan_set(job, pipe)
    painter = Painter(job, plan, pipe, count=lambda number: None)
    return [picture for number in range(plan.num_parts) for picture in painter.draw(number)]


def pixels(picture: DrawnPicture) -> bytes:
    with Image.open(BytesIO(picture.png)) as image:
        return image.tobytes()


def contents(pictures: list[DrawnPicture]) -> list[tuple[str, bytes, str]]:
    return [(picture.key, picture.png, json.dumps(picture.record)) for picture in pictures]


def test_the_pipeline_draws_the_same(job: SetJob) -> None:
    """With the seed of the record, as generate.py takes it."""
    pipe, pictures = job.load(), draw(job)
    assert [picture.key for picture in pictures] == [f"{i:06d}-{j:04d}" for i in range(7) for j in range(2)]
    for picture in pictures:
        record = picture.record
        expected = pipe(record["prompt"], num_images=2, params=job.params, seed=record["seed"])
        assert pixels(picture) == expected.images[record["index"]].tobytes()
        assert record["prompt"] == PROMPTS[record["number"]]
        assert record["seed"] == seed_of(3, record["number"])
        assert record["settings"]["cfg_scale"] == 1.5
    assert len({picture.png for picture in pictures}) == 14


def test_the_best_by_clip(ranked: SetJob) -> None:
    pipe, pictures = ranked.load(), draw(ranked)
    indices = set()
    for number, prompt in enumerate(PROMPTS):
        best, second = pictures[2 * number : 2 * number + 2]
        expected = pipe(
            prompt, num_images=2, num_candidates=5, params=ranked.params, seed=best.record["seed"]
        )
        assert [best.record["index"], second.record["index"]] == expected.indices
        assert [best.record["score"], second.record["score"]] == expected.scores
        assert [pixels(best), pixels(second)] == [image.tobytes() for image in expected.images]
        assert best.record["score"] > second.record["score"]
        indices.add(best.record["index"])
    assert len(indices) > 1  # or the first would do


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 100}, {"part_size": 1}, {"part_size": 7}]
)
def test_neither_batches_nor_parts_change_anything(ranked: SetJob, changes: dict[str, int]) -> None:
    """No code of these lies so near an edge that the last bit of a logit decides."""
    assert contents(draw(replace(ranked, **changes))) == contents(draw(ranked))


def test_many_candidates_are_judged_in_groups(ranked: SetJob, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = draw(ranked)
    monkeypatch.setattr(painter_module, "GROUP", 2)
    in_groups = draw(ranked)
    assert [picture.record["index"] for picture in in_groups] == [
        picture.record["index"] for picture in pictures
    ]
    scores = [[picture.record["score"] for picture in some] for some in (in_groups, pictures)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_prompt_is_not_changed_by_those_after_it(job: SetJob) -> None:
    few = contents(draw(replace(job, conditions=PROMPTS[:4])))
    assert few == contents(draw(job))[: len(few)]


def test_equal_prompts_have_seeds_of_their_own(job: SetJob) -> None:
    pictures = draw(replace(job, conditions=("a red apple",) * 3))
    assert len({picture.png for picture in pictures}) == 6
    assert contents(pictures) != contents(draw(replace(job, conditions=("a red apple",) * 3, seed=4)))


def test_a_condition_is_read_once_for_neighbours(job: SetJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as four rows are left, of prompts as of pictures: fewer would be computed otherwise."""
    calls: list[tuple[int, int]] = []
    draw_codes = painter_module.generate

    def record(model: object, cond: Tensor, params: object, *, seeds: list[int]) -> Tensor:
        calls.append((len(cond), len(seeds)))
        return draw_codes(model, cond, params, seeds=seeds)  # type: ignore[arg-type]

    monkeypatch.setattr(painter_module, "generate", record)
    draw(replace(job, batch_size=8, part_size=7))  # 0 0 1 1 2 2 3 3 | 4 4 5 5 6 6
    draw(replace(job, batch_size=5))  # 0 0 1 1 2 | 2; 3 3 4 4 5 | 5; 6 6
    draw(replace(job, num_images=16, num_candidates=16, conditions=PROMPTS[:1], batch_size=16))
    assert calls == [(4, 8), (6, 6), *[(5, 5), (4, 4)] * 2, (4, 4), (4, 16)]


@pytest.mark.parametrize("kind", ["job", "classes"])
def test_the_bits_of_logits_do_not_depend_on_batches(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Else a code changed now and then: one of a hundred pictures or so, at the bundled model's guidance."""
    draw_codes = painter_module.generate
    found: dict[int, Tensor] = {}

    def record(model: Any, cond: Tensor, params: Any, *, seeds: list[int]) -> Tensor:
        seen: list[Tensor] = []
        with monkeypatch.context() as patch:
            for name in ("prefill", "decode"):
                method = getattr(model, name)
                patch.setattr(model, name, lambda *args, _do=method: (seen.append(_do(*args)), seen[-1])[1])
            codes = draw_codes(model, cond, params, seeds=seeds)
        # (2B, V) of the prefill, (2B, 1, V) of each code after it
        logits = torch.stack([step.reshape(len(step), -1) for step in seen], dim=1)
        found.update({seed: logits[row] for row, seed in enumerate(seeds)})
        return codes

    monkeypatch.setattr(painter_module, "generate", record)
    job: SetJob = replace(request.getfixturevalue(kind), part_size=7)
    draw(replace(job, batch_size=16))
    expected = found.copy()
    for batch_size in (1, 3, 5):
        found.clear()
        draw(replace(job, batch_size=batch_size))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[seed], expected[seed]) for seed in found)


def test_classes(classes: SetJob) -> None:
    pipe, pictures = classes.load(), draw(classes)
    for picture in pictures:
        label = picture.record["class_label"]
        assert label == (11, 3, 7)[picture.record["number"]]
        assert "prompt" not in picture.record
        expected = pipe(label, num_images=2, params=classes.params, seed=picture.record["seed"])
        assert pixels(picture) == expected.images[picture.record["index"]].tobytes()


def test_progress_is_told_batch_by_batch(job: SetJob) -> None:
    pipe, counts = job.load(), []
    plan = plan_set(job, pipe)
    painter = Painter(job, plan, pipe, counts.append)
    for number in range(plan.num_parts):
        painter.draw(number)
    assert counts == [4, 2, 4, 2, 2]


def test_seeds_are_documented(job: SetJob) -> None:
    """Codes follow from the set's seed, the place of the prompt and the number of the candidate alone."""
    pipe = job.load()
    seeds = image_seeds(seed_of(job.seed, 5), 2)
    cond = pipe.encode_condition(PROMPTS[5])
    assert pipe.model is not None
    codes = painter_module.generate(pipe.model, cond, job.params, seeds=seeds)
    with torch.inference_mode():
        images = pipe.decode(codes)
    assert [pixels(picture) for picture in draw(job)[10:12]] == [image.tobytes() for image in images]
