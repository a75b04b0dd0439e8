"""Sets of pictures: what is read of them, what their metrics are called, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_sets import COLOURS, colour_judge, noisy_colours, plain, write_set
from PIL import Image
from shard_files import write_shard
from torch import Tensor

from mindalle.data.samples import open_source
from mindalle.evaluation.comparison import METRICS, Comparison, measure_all
from mindalle.evaluation.distances import frechet_distance
from mindalle.evaluation.features import FeatureNetwork, Features
from mindalle.evaluation.frechet import frechet_measure
from mindalle.evaluation.moments import moments_of
from mindalle.evaluation.pictures import PictureSet, choice_of, measure_pictures, read_samples, square
from mindalle.evaluation.refusal import RefusedError, check_count, refusal
from mindalle.evaluation.results import Measure
from mindalle.image import to_tensor


class Counted:
    """Mean colours, and how often each picture was looked at."""

    def __init__(self) -> None:
        self.num_pictures = 0

    def __call__(self, pictures: Sequence[Image.Image]) -> Features:
        self.num_pictures += len(pictures)
        vectors = torch.stack([to_tensor(picture).mean(dim=(1, 2)) for picture in pictures])
        return Features(vectors, 9 * vectors)


def network(**more: Any) -> FeatureNetwork:
    settings = {"name": "Colour", "weights_hash": "0" * 64, "resize": "none", "num_features": 3}
    return FeatureNetwork(**{**settings, "extract": Counted(), **more})


def given(vectors: Tensor, captions: Sequence[str] = ()) -> PictureSet:
    texts = [(caption,) for caption in captions] or [()] * len(vectors)
    return PictureSet(name="given", fingerprint="", vectors=vectors, logits=vectors, captions=list(texts))


def by_name(measures: Sequence[Measure]) -> dict[str, Measure]:
    return {measure.metric: measure for measure in measures}


def test_every_metric_and_one_look_at_each_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extract = Counted()
    colours = network(extract=extract)
    sets = []
    for name, seed in (("drawn", 0), ("real", 1)):
        source = open_source(str(write_set(tmp_path / name, 120, seed=seed)))
        judge = colour_judge() if name == "drawn" else None
        sets.append(
            measure_pictures(source, read_samples(source), network=colours, judge=judge, batch_size=50)
        )
    assert extract.num_pictures == 240
    pictures, reference = sets
    comparison = Comparison(
        pictures=pictures, reference=reference, network=colours, judge=colour_judge(), judge_hash="1" * 64
    )
    with caplog.at_level("INFO", logger="mindalle"):  # each takes a while
        found = by_name(measure_all(comparison, list(METRICS), may_refuse=False))
    assert [record.getMessage() for record in caplog.records] == [f"measuring {name}" for name in METRICS]
    assert set(found) == {
        *("Colour-FD", "Colour-KD", "Colour-IS", "Colour-precision", "Colour-recall"),
        *("CLIP score", "R-precision of 4"),
    }
    assert pictures.vectors is not None
    assert reference.vectors is not None
    expected = frechet_distance(moments_of(pictures.vectors), moments_of(reference.vectors))
    assert found["Colour-FD"].value == pytest.approx(expected)
    assert found["Colour-FD"].num_images == found["Colour-FD"].num_reference == 120
    assert found["Colour-KD"].details["subset_size"] == 60
    assert found["Colour-precision"].value > 0.8
    assert found["CLIP score"].value > 0.9
    assert found["R-precision of 4"].value == 1
    for measure in found.values():
        assert measure.interval is not None
        assert measure.interval.low <= measure.value <= measure.interval.high
        assert measure.network is not None


def test_a_set_against_itself_and_against_another() -> None:
    vectors = torch.randn(150, 3, generator=torch.Generator().manual_seed(0))
    metrics = ("fd", "kd", "pr")
    same = by_name(
        measure_all(
            Comparison(pictures=given(vectors), reference=given(vectors), network=network()),
            metrics,
            may_refuse=False,
        )
    )
    assert same["Colour-FD"].value == pytest.approx(0, abs=1e-6)
    assert same["Colour-precision"].value == same["Colour-recall"].value == 1
    far = by_name(
        measure_all(
            Comparison(pictures=given(vectors), reference=given(vectors + 10), network=network()),
            metrics,
            may_refuse=False,
        )
    )
    assert far["Colour-FD"].value == pytest.approx(300, rel=1e-5)
    assert far["Colour-precision"].value == far["Colour-recall"].value == 0
    assert far["Colour-KD"].value > 100 * abs(same["Colour-KD"].value)


def test_moments_serve_as_a_reference() -> None:
    vectors, others = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    moments = moments_of(others)
    from_file = Comparison(pictures=given(vectors), reference=moments, network=network())
    from_pictures = Comparison(pictures=given(vectors), reference=given(others), network=network())
    (first,), (second,) = (measure_all(one, ["fd"], may_refuse=False) for one in (from_file, from_pictures))
    assert (first.value, first.num_reference) == (pytest.approx(second.value), 50)


def test_names() -> None:
    """FID is Inception's, in full: not another network's, and not of principal components."""
    vectors = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    reference = moments_of(vectors + 1)
    inception = network(name="Inception", is_inception=True)

    def name(which: FeatureNetwork, **more: Any) -> str:
        return frechet_measure(vectors, reference, which, **more).metric

    assert (name(inception), name(inception, metric="rfd")) == ("FID", "rFID")
    assert name(inception, num_components=2) == "Inception-FD-2"
    assert name(inception, metric="rfd", num_components=2) == "Inception-rFD-2"
    assert (name(network()), name(network(), metric="rfd")) == ("Colour-FD", "Colour-rFD")


def test_too_few() -> None:
    assert refusal("fd", 2048, 50_000, 2048) == (
        "fd takes at least 2,049 pictures on each side, more than features, got 2,048: "
        "fewer features (--feature-dims N), or more pictures"
    )
    assert refusal("fd", 2049, None, 2048) is None  # a file that does not say how many
    assert refusal("kd", 500, 99) == "kd takes at least 100 pictures on each side, got 99"
    assert refusal("is", 99, None) == "is takes at least 100 pictures, got 99"
    with pytest.raises(RefusedError, match="pr takes at least 100"):
        check_count("pr", 1, 1)


def test_what_is_refused_is_named_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    vectors = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    comparison = Comparison(pictures=given(vectors), reference=given(vectors), network=network())
    (measure,) = measure_all(comparison, ["fd", "kd", "is", "pr"], may_refuse=True)
    assert measure.metric == "Colour-FD"
    assert "biased upwards" in measure.warnings[0]
    for metric in ("kd", "is", "pr"):
        assert f"left out: {metric} takes at least 100 pictures" in caplog.text
    with pytest.raises(RefusedError, match="kd takes at least 100"):
        measure_all(comparison, ["fd", "kd"], may_refuse=False)
    assert measure_all(comparison, ["kd", "is"], may_refuse=True) == []


def captioned(captions: Sequence[str], **more: Any) -> Comparison:
    """Pictures of pure colours in the order of `COLOURS`, with these captions."""
    judge = colour_judge()
    pictures = PictureSet(
        name="drawn",
        fingerprint="",
        clip=judge.encode_images([plain(colour) for colour in COLOURS]),
        captions=[(caption,) if caption else () for caption in captions],
        **more,
    )
    return Comparison(pictures=pictures, judge=judge, judge_hash="1" * 64)


def test_perfect_and_shuffled_retrieval() -> None:
    captions = [f"a {colour} car" for colour in COLOURS]
    metrics = ("clip_score", "r_precision")
    perfect = by_name(measure_all(captioned(captions), metrics, may_refuse=False))
    assert (perfect["CLIP score"].value, perfect["R-precision of 4"].value) == (1, 1)
    shuffled = by_name(measure_all(captioned(captions[1:] + captions[:1]), metrics, may_refuse=False))
    assert (shuffled["CLIP score"].value, shuffled["R-precision of 4"].value) == (0, 0)
    some = by_name(measure_all(captioned([captions[0], captions[1], "", ""]), metrics, may_refuse=False))
    assert some["CLIP score"].num_images == 2
    assert some["R-precision of 2"].details == {"candidates": 2, "distinct_captions": 2}
    with pytest.raises(RefusedError, match="drawn has no captions"):
        measure_all(captioned(["", "", "", ""]), metrics, may_refuse=False)
    with pytest.raises(RefusedError, match="r_precision takes at least 2 different captions, got 1"):
        measure_all(captioned(["a red car"] * 4), ["r_precision"], may_refuse=False)


def test_a_clip_that_judges_its_own_choice_is_found_out() -> None:
    captions = [f"a {colour} car" for colour in COLOURS]
    for judges, is_warned in ((frozenset({"1" * 64}), True), (frozenset({"2" * 64}), False)):
        (score,) = measure_all(captioned(captions, judges=judges), ["clip_score"], may_refuse=False)
        assert ["chosen by the CLIP that judges" in warning for warning in score.warnings] == [
            True
        ] * is_warned


def test_a_drawn_folder(tmp_path: Path) -> None:
    """Only what results.jsonl lists, with its prompts: not the contact sheet, which is a picture too."""
    rows = []
    for index, (picture, caption) in enumerate(noisy_colours(3)):
        picture.save(tmp_path / f"{index}.png")
        settings = {"judge_sha256": "a" * 64 if index else None, "num_candidates": 16}
        rows.append({"file": f"{index}.png", "prompt": caption, "settings": settings})
    plain("red").save(tmp_path / "all-sheet.png")
    rows += [{"file": "gone.png", "prompt": "a cat"}, {"file": "bad.png", "class_label": 3}]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path))
    found = measure_pictures(source, read_samples(source), network=network(), judge=None)
    assert found.captions == [("a red car",), ("a yellow car",), ("a green car",)]
    assert (found.judges, found.chosen) == ({"a" * 64}, "best 1 of 16")
    about = found.about("pictures")
    assert (about["num_images"], about["num_unreadable"]) == (3, 2)
    assert about["unreadable"][0].startswith("bad.png: not a picture")
    assert about["unreadable"][1] == "gone.png: results.jsonl lists it, but there is no such file"


def test_how_pictures_were_chosen(tmp_path: Path) -> None:
    """Of each prompt some of its candidates; where all were kept, a judge chose nothing."""
    settings = {"judge_sha256": "a" * 64, "num_candidates": 2}
    rows = [
        {"file": f"{place}-{rank}.png", "number": place, "prompt": "a car", "settings": settings}
        for place in range(2)
        for rank in range(2)
    ]
    for count, chosen in ((4, None), (3, "best 1 of 2")):
        lines = [json.dumps(row) + "\n" for row in rows[:count]]
        (tmp_path / "results.jsonl").write_text("".join(lines))
        for row in rows:
            plain("red").save(tmp_path / str(row["file"]))
        assert choice_of(open_source(str(tmp_path))) == ({"a" * 64}, chosen)


def test_drawn_shards(tmp_path: Path) -> None:
    """Prompts come with the pictures, also where one shard alone is named; results.jsonl has the judge."""
    for number in range(2):
        write_shard(tmp_path / f"part-{number:05d}.tar", range(number * 3, number * 3 + 3))
    row = {"file": "part-00001.tar/0003", "settings": {"judge_sha256": "a" * 64}}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    for name, count in ((tmp_path, 6), (tmp_path / "part-00000.tar", 3)):
        source = open_source(str(name))
        found = measure_pictures(source, read_samples(source), network=network(), judge=None)
        assert (len(found), len(found.unreadable), found.judges) == (count, 0, {"a" * 64})
        assert all(found.captions)


@pytest.mark.parametrize("line", ["[]", '{"file": 3}', '{"file": "a", "prompt": [3]}', "{", "[" * 10_000])
def test_a_damaged_results_file(tmp_path: Path, line: str) -> None:
    plain("red").save(tmp_path / "0.png")
    (tmp_path / "results.jsonl").write_text(f'{{"file": "0.png", "prompt": null}}\n{line}\n')
    source = open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"results.jsonl:2: "):
        list(read_samples(source))


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    source = open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"no readable picture in .*: 0.png: not a picture"):
        measure_pictures(source, read_samples(source), network=network(), judge=None)


def test_limit_and_size(tmp_path: Path) -> None:
    source = open_source(str(write_set(tmp_path / "set", 5)))
    sizes: list[tuple[int, int]] = []

    def look(pictures: Sequence[Image.Image]) -> Features:
        sizes.extend(picture.size for picture in pictures)
        return Features(torch.zeros(len(pictures), 3), None)

    found = measure_pictures(
        source,
        read_samples(source, 2),
        network=network(extract=look),
        judge=None,
        prepare=lambda picture: square(picture, 8),
    )
    assert (len(found), sizes) == (2, [(8, 8), (8, 8)])
