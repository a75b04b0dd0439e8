"""Reports measured and rendered as a whole, on a model of 16x16 pixels."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import write_tokenizer
from oracle.make import make_rq
from report_models import save_model, small_job
from shard_files import write_shard
from torch.utils.tensorboard import SummaryWriter

from mindalle.report import best_of, decoding, sampling
from mindalle.report.lab import Lab
from mindalle.report.records import read_record
from mindalle.report.sections import SECTIONS, measure_sections, render
from stage1_vqgan import RQVAE, VQGAN
from stage2_transformer import GPT, RQTransformer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few settings and short sequences."""
    monkeypatch.setattr(sampling, "TEMPERATURES", (0.5, 5.0))
    monkeypatch.setattr(sampling, "TOP_KS", (4, None))
    monkeypatch.setattr(sampling, "TOP_PS", (0.9, None))
    monkeypatch.setattr(sampling, "CFG_SCALES", (1.0, 2.0))
    monkeypatch.setattr(decoding, "GRID", (4, 4))
    monkeypatch.setattr(decoding, "RESIDUAL", (2, 2, 4))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_whole_report(tiny_rqvae: RQVAE, tiny_rq: RQTransformer, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_rqvae, tiny_rq, has_clip=True)
    job = small_job(tmp_path, model)
    assert measure_sections(job, list(SECTIONS)) == ["decoding", "sampling", "depths", "best_of"]
    pages = render(job.out)
    before = tree(job.out)
    # nothing is measured twice, and the same data give the same bytes
    assert measure_sections(job, list(SECTIONS)) == []
    assert render(job.out) == pages
    assert tree(job.out) == before
    assert not (job.out / ".partial").exists()

    html, markdown = (path.read_text() for path in pages)
    fetched = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', html)
    assert fetched
    assert all(address.startswith(("data:image/", "#")) for address in fetched)
    assert "<script" not in html
    figures = re.findall(r"\]\(figures/([^)]+)\)", markdown)
    assert len(figures) == len(set(figures)) == html.count("<img") == 11
    assert {f"figures/{name}" for name in figures} <= set(before)
    for section in SECTIONS:
        pictures = [len(content) for name, content in before.items() if name.endswith(".png")]
        assert sum(pictures) < 300_000, section

    guidance = read_record(job.out, "sampling").results["guidance"]  # type: ignore[union-attr]
    clip, distance = guidance[1]["measures"]
    assert (clip["metric"], clip["num_images"], distance["num_reference"]) == ("CLIP score", 6, 12)
    assert f"| 2 | {clip['value']:.4g} " in markdown.replace("\\", "")
    assert f"<td>{distance['value']:.4g} [" in html
    rows = read_record(job.out, "best_of").results["rows"]  # type: ignore[union-attr]
    assert [row["num_candidates"] for row in rows] == [1, 2, 4]
    scores = [row["ranker_score"] for row in rows]
    assert scores == sorted(scores)


def test_what_is_left_out_is_said(tiny_vqgan: VQGAN, tiny_gpt: GPT, tmp_path: Path) -> None:
    """A model without CLIP and depth, too few pictures for a distance, no judge."""
    model = save_model(tmp_path / "model", tiny_vqgan, tiny_gpt, has_clip=False)
    job = small_job(tmp_path, model, judge=str(tmp_path / "judge"), feature_dims=15, num_captions=3)
    assert measure_sections(job, ["best_of", "depths", "learning"]) == ["best_of", "depths"]
    html, markdown = (path.read_text() for path in render(job.out))
    for page in (html, markdown.replace("\\", "")):
        assert "Left out: this checkpoint has no CLIP, so that nothing chooses among candidates" in page
        assert "Left out: depths: this tokenizer has one code per position" in page
        assert "Left out: Fréchet distances: rfd takes at least 16 pictures" in page
        assert "Left out: not measured: no runs were named (--runs)" in page
    (row,) = read_record(job.out, "depths").results["by_depth"]  # type: ignore[union-attr]
    assert [measure["metric"] for measure in row["measures"]] == ["PSNR", "SSIM"]


def test_averaged_weights_and_a_text_tokenizer(tmp_path: Path) -> None:
    """Without these options text releases of rq-vae had no report."""
    make_rq(tmp_path / "model", "text")
    words = str(write_tokenizer(tmp_path))
    job = small_job(tmp_path, str(tmp_path / "model"), text_tokenizer=words, use_ema=True, num_captions=2)
    lab = Lab(job)
    assert len(lab.draw(tmp_path / "set", lab.pipe.sampling.params)) == 2
    assert json.loads((tmp_path / "set" / "plan.json").read_text())["use_ema"] is True
    plain = Lab(small_job(tmp_path, job.model, text_tokenizer=words))
    ours, theirs = lab.model.state_dict(), plain.model.state_dict()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    assert lab.settings(has_drawings=True) != plain.settings(has_drawings=True)


def test_more_components_than_features_are_refused(tiny_rqvae: RQVAE, tmp_path: Path) -> None:
    """Before anything is drawn."""
    model = save_model(tmp_path / "model", tiny_rqvae, None, has_clip=False)
    with pytest.raises(ValueError, match="--feature-dims must be at most 16, the features of CLIP, got 17"):
        measure_sections(small_job(tmp_path, model, feature_dims=17), ["depths"])


def test_shards_on_the_network(tiny_rqvae: RQVAE, tmp_path: Path) -> None:
    """Nobody has counted them: the report, which has no such option, said "set epoch_size"."""
    model = save_model(tmp_path / "model", tiny_rqvae, None, has_clip=False)
    write_shard(tmp_path / "set.tar", range(5))
    address = f"pipe:cat {tmp_path / 'set.tar'}"
    with pytest.raises(ValueError, match=r"is not known: say how many of them to take with --num-pictures"):
        measure_sections(small_job(tmp_path, model, data=address, allow_pipe=True), ["depths"])
    job = small_job(tmp_path, model, data=address, allow_pipe=True, num_pictures=4)
    assert measure_sections(job, ["depths"]) == ["depths"]
    record = read_record(job.out, "depths")
    assert record is not None
    assert record.settings["num_pictures"] == 4
    assert record.results["codebooks"][0]["measures"][0]["num_images"] == 4


def test_other_settings_are_measured_again(tiny_rqvae: RQVAE, tmp_path: Path) -> None:
    """And a tokenizer alone draws nothing."""
    model = save_model(tmp_path / "model", tiny_rqvae, None, has_clip=False)
    assert measure_sections(small_job(tmp_path, model), ["depths"]) == ["depths"]
    assert measure_sections(small_job(tmp_path, model, num_captions=5), ["depths"]) == []
    assert measure_sections(small_job(tmp_path, model, seed=1), ["depths"]) == ["depths"]
    record = read_record(tmp_path / "out", "depths")
    assert record is not None
    assert (record.settings["seed"], record.about["command"]) == (1, "a test")
    depths = [row["depth"] for row in record.results["by_depth"]]
    assert depths == [row["depth"] for row in record.results["codebooks"]] == [1, 2, 3]
    assert {one["metric"] for row in record.results["by_depth"] for one in row["measures"]} == {
        "PSNR",
        "SSIM",
        "CLIP-rFD-2",
    }
    job = small_job(tmp_path, model)
    assert measure_sections(job, ["decoding", "sampling"]) == ["decoding", "sampling"]
    assert "an image tokenizer alone, which draws nothing" in render(job.out)[0].read_text()


def test_the_best_of_the_first_n() -> None:
    scores = {0: [0.1, 0.5, 0.5, 0.9], 1: [0.7, 0.2, 0.3, 0.1]}
    records = [
        {"number": place, "index": index, "score": score, "file": f"{place}-{index}"}
        for place, row in scores.items()
        for index, score in sorted(enumerate(row), key=lambda one: (-one[1], -one[0]))
    ]
    assert best_of.counts(1) == [1]
    assert best_of.counts(4) == [1, 2, 4]
    assert best_of.counts(6) == [1, 2, 4, 6]
    for n, files in ((1, ["0-0", "1-0"]), (2, ["0-1", "1-0"]), (3, ["0-1", "1-0"]), (4, ["0-3", "1-0"])):
        assert [row["file"] for row in best_of.best_of(records, n)] == files


def test_damaged_data_is_one_clear_error(tiny_rqvae: RQVAE, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_rqvae, None, has_clip=False)
    job = small_job(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="holds no data of a report: measure first"):
        render(job.out)
    measure_sections(job, ["depths"])
    path = job.out / "data" / "depths.json"
    whole = path.read_text()

    def damage(**changes: object) -> str:
        content = json.loads(whole)
        return json.dumps(content | {"results": content["results"] | changes})

    for content in (
        whole[: len(whole) // 2],
        "[]",
        '{"format": "another"}',
        json.dumps(json.loads(whole) | {"unknown": 1}),
        json.dumps(json.loads(whole) | {"section": "best_of"}),
        json.dumps(json.loads(whole) | {"about": {}}),
        damage(by_depth=[{"depth": 1}]),
        damage(codebooks="none"),
        damage(sheet="../../model/config.yaml"),
        damage(sheet="/etc/passwd"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"depths\.json|plain name"):
            render(job.out)
    path.write_text(whole)
    (job.out / "figures" / "depths.png").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(ValueError, match=r"depths\.png is no sheet of pictures"):
        render(job.out)


def test_curves_that_are_no_numbers(tiny_rqvae: RQVAE, tmp_path: Path) -> None:
    """The loss of a run that diverged was "not JSON compliant", and no page was made."""
    writer = SummaryWriter(str(tmp_path / "run"))
    for step, loss in enumerate((2.0, math.inf, math.nan)):
        writer.add_scalar("train/loss", loss, step)
    writer.close()
    model = save_model(tmp_path / "model", tiny_rqvae, None, has_clip=False)
    job = small_job(tmp_path, model, runs=(("GPT", tmp_path / "run"),))
    assert measure_sections(job, ["learning"]) == ["learning"]
    (run,) = read_record(job.out, "learning").results["runs"]  # type: ignore[union-attr]
    assert run["curves"]["train/loss"]["values"] == [2.0, "inf", "nan"]
    assert "Training of GPT" in render(job.out)[0].read_text()


def test_a_killed_section_goes_on(
    tiny_vqgan: VQGAN, tiny_gpt: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drawn is not drawn again, and is gone when the section is done."""
    model = save_model(tmp_path / "model", tiny_vqgan, tiny_gpt, has_clip=False)
    job = small_job(tmp_path, model, num_captions=3)
    score, calls = sampling.score, []

    def killed(*arguments: Any) -> list[dict[str, Any]]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(sampling, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_sections(job, ["sampling"])
    drawn = {path: path.stat().st_mtime_ns for path in job.out.rglob("results.jsonl")}
    assert len(drawn) == 3
    assert read_record(job.out, "sampling") is None

    kept = {}

    def noted(*arguments: Any) -> list[dict[str, Any]]:
        kept.update({path: path.stat().st_mtime_ns for path in job.out.rglob("results.jsonl")})
        return score(*arguments)

    monkeypatch.setattr(sampling, "score", noted)
    assert measure_sections(job, ["sampling"]) == ["sampling"]
    assert len(kept) == len(calls) + 4  # seven settings, of which three were drawn before
    assert {path: kept[path] for path in drawn} == drawn
    assert not (job.out / ".partial").exists()
    record = read_record(job.out, "sampling")
    assert record is not None
    assert len(record.results["grid"]) == 4
    assert record.left_out == []
