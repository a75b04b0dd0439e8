"""The command: usage errors, and a page made of data alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_results import Command

from mindalle.cli import report as command
from mindalle.report.records import Record, write_record
from mindalle.report.sections import SECTIONS

ROOT = Path(command.__file__).parents[2]


def some_record() -> Record:
    curves = {"train/loss": {"steps": [1, 2], "values": [3.0, 2.0], "values_per_point": 1}}
    machine = {"processor": "a CPU", "threads": 1, "torch": "2"}
    about = {"machine": machine, "seconds": 1.0, "date": "2026-01-01T00:00:00", "command": "a test"}
    results = {"runs": [{"name": "GPT", "curves": curves}]}
    return Record(section="learning", settings={"runs": {}}, about=about, results=results)


def test_the_sections_are_those_of_the_report() -> None:
    assert tuple(SECTIONS) == command.SECTIONS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--only", "depth"], "argument --only: invalid choice: 'depth'"),
        ([], "there is nothing to measure sampling, depths, best_of on: name the DATA, choose other"),
        (["--only", "learning", "depths"], "there is nothing to measure depths on: name the DATA"),
        (["--render-only", "--only", "depths"], "leave --only out"),
        (["data", "--feature-dims", "-1"], "--feature-dims must be at least 0 (0 = all), got -1"),
        (["data", "--features", "clip"], "--features clip takes the judge's: name it with --judge"),
        (["data", "--runs", "GPT"], "--runs must be NAME=DIR, got 'GPT'"),
        (["data", "--runs", "GPT=nowhere"], "--runs GPT: nowhere is no directory"),
        (["data", "--runs", "a=.", "--runs", "a=."], "--runs names a run twice"),
    ],
)
def test_usage_errors(mindalle: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = mindalle("report", *arguments, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in result.err[-1]
    assert not (tmp_path / "out").exists()


def test_options_reach_the_job(mindalle: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    monkeypatch.setattr("mindalle.report.sections.measure_sections", lambda job, names: jobs.append(job))
    monkeypatch.setattr("mindalle.report.sections.render", lambda out: [])
    options = ("--text-tokenizer", "words.json", "--ema", "--num-pictures", 9, "--seed", 3)
    assert mindalle("report", "data", "--out", tmp_path, *options).code == 0
    assert mindalle("report", "--only", "learning", "decoding", "--out", tmp_path).code == 0  # read no data
    job, without = jobs
    assert without.data is None
    assert (job.text_tokenizer, job.use_ema, job.num_pictures, job.seed) == ("words.json", True, 9, 3)


@pytest.mark.slow
def test_a_page_of_data_alone(mindalle: Command, tmp_path: Path) -> None:
    """Rendering needs neither model nor runs; a damaged data file is one line."""
    result = mindalle("report", "--render-only", "--out", tmp_path)
    assert (result.code, result.err) == (
        1,
        [f"report.py: error: {tmp_path / 'data'} holds no data of a report: measure first"],
    )
    write_record(tmp_path, some_record())
    script = [sys.executable, str(ROOT / "tools" / "report.py"), "--render-only", "--out", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "report.html"), str(tmp_path / "report.md")]
    assert "Training of GPT" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "figures" / "learning-1.svg").is_file()
    (tmp_path / "data" / "learning.json").write_text("{")
    result = mindalle("report", "--render-only", "--out", tmp_path)
    assert result.code == 1
    assert len(result.err) == 1
    assert "learning.json holds no data of this section" in result.err[0]


def test_without_the_extra(mindalle: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = mindalle("report", "no-such-data", "--out", tmp_path)
    assert result.code == 1
    assert result.err == ['report.py: error: plots need matplotlib: pip install "mindalle[report]"']
