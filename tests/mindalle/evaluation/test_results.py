"""Intervals that hold the truth 95 times in 100, and files of results that survive."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mindalle.evaluation import append_results, read_results
from mindalle.evaluation.intervals import mean_interval, resampled_interval
from mindalle.evaluation.results import Context, Measure, mean_measure, table


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 7
    interval = mean_interval(values, seed=0)
    assert interval is not None
    margin = 1.96 * values.std().item() / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean().item() - margin, abs=0.1 * margin)
    assert interval.high == pytest.approx(values.mean().item() + margin, abs=0.1 * margin)
    assert "1000 bootstrap resamples" in interval.rule
    assert mean_interval(values, seed=0) == interval
    assert mean_interval(values, seed=1) != interval
    assert mean_interval(values[:1], seed=0) is None
    assert mean_interval(torch.tensor([1.0, math.inf]), seed=0) is None


def test_the_interval_of_a_mean_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(100):
        interval = mean_interval(torch.rand(50, generator=generator), seed=seed)
        assert interval is not None
        hits += interval.low <= 0.5 <= interval.high
    assert 88 <= hits <= 100


def test_the_interval_of_a_measure_is_about_its_value() -> None:
    """A standard deviation of resamples is too small and varies; here it would be 0.05 around 1."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    value = values.std().item()
    interval = resampled_interval(lambda indices: values[indices].std().item(), 200, value, seed=0)
    assert (interval.low + interval.high) / 2 == pytest.approx(value)
    assert interval.high - value == pytest.approx(1.96 * value / math.sqrt(400), rel=0.5)
    constant = resampled_interval(lambda indices: 3.0, 200, 3.0, seed=0)
    assert (constant.low, constant.high) == (3, 3)


def context(name: str = "emoji", reference: str | None = "real") -> Context:
    return Context(
        subject={"kind": "pictures", "name": name, "fingerprint": "0"},
        reference={"name": reference} if reference is not None else None,
        seed=3,
        command="evaluate.py images a b",
        date="2025-01-01T00:00:00+00:00",
    )


def measure(metric: str = "PSNR", value: float = 20.0, **more: Any) -> Measure:
    return Measure(metric=metric, value=value, num_images=5, **more)


def test_a_record_has_the_whole_protocol(tmp_path: Path) -> None:
    network = {"name": "EffLite", "sha256": "ab" * 32, "resize": "clean: PIL"}
    values = torch.tensor([1.0, 2.0, 6.0])
    record = context().record(mean_measure("PSNR", values, unit="dB", seed=0, network=network))
    append_results(tmp_path / "new" / "results.json", [record])
    (found,) = read_results(tmp_path / "new" / "results.json")
    assert found == record
    assert (found["metric"], found["value"], found["unit"], found["num_images"]) == ("PSNR", 3, "dB", 3)
    assert found["features"] == network
    assert 1 <= found["interval_95"][0] < 3 < found["interval_95"][1] <= 6
    assert (found["seed"], found["command"]) == (3, "evaluate.py images a b")
    assert found["reference"] == {"name": "real"}
    assert set(found["versions"]) >= {"mindalle", "torch", "torchmetrics", "pillow"}


def test_what_json_has_no_number_for() -> None:
    record = context().record(measure(value=math.inf))
    assert (record["value"], record["interval_95"]) == ("inf", None)
    json.dumps(record, allow_nan=False)
    assert any("inf" in line for line in table([record]))


def test_several_writers(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_results(path, [{"number": i}]), range(24)))
    assert sorted(entry["number"] for entry in read_results(path)) == list(range(24))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".results.json.lock", "results.json"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[" * 100_000, '[{"a": 1}', "\xff"])
def test_a_file_that_is_none_of_results_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results.json is no file of results"):
        append_results(path, [{"metric": "PSNR"}])
    assert path.read_bytes() == content.encode("latin-1")


def test_a_table_keeps_references_and_sides_apart() -> None:
    """rFID, and FIDs of another reference, are in blocks of their own, each under what it compares."""
    records = [
        context("drawn", "train").record(measure("FID", 12.0)),
        context("drawn", "val").record(measure("FID", 14.0)),
        Context(
            **{**vars(context("vqgan", "val")), "subject": {"kind": "reconstructions by", "name": "vqgan"}}
        ).record(measure("rFID", 5.0)),
        context("drawn", "train").record(measure("KID", 0.01)),
    ]
    lines = table(records)
    blocks = "\n".join(lines).split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [
        "pictures drawn against train",
        "pictures drawn against val",
        "reconstructions by vqgan against val",
    ]
    assert [[line.split()[0] for line in block.splitlines()[2:]] for block in blocks] == [
        ["FID", "KID"],
        ["FID"],
        ["rFID"],
    ]
