"""Sets on the disk: read as any data, begun again where they were, refused where they are another's."""

from __future__ import annotations

import json
import os
import resource
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from set_models import PROMPTS, save_class_model

from checkpoint_io import CheckpointError
from mindalle.data import Sample, open_source
from mindalle.generation import SetJob, SetSummary, draw_set, plan_set
from mindalle.generation.painter import Painter
from stage1_vqgan import VQGAN
from stage2_transformer import SamplingParams


def draw(job: SetJob, **options: Any) -> SetSummary:
    pipe = job.load()
    return draw_set(job, plan_set(job, pipe), pipe, **options)


def contents(directory: Path) -> dict[str, bytes]:
    """All files that are not hidden."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name[0] != "."
    }


def samples(directory: Path) -> list[Sample]:
    source = open_source(str(directory))
    found = [sample for part in range(source.num_parts) for sample in source.read(part)]
    assert all(isinstance(sample, Sample) for sample in found)
    return found  # type: ignore[return-value]


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text("utf-8").splitlines()]


class TestReading:
    def test_a_folder_of_texts(self, ranked: SetJob) -> None:
        summary = draw(ranked)
        assert (summary.count, summary.directory) == (14, ranked.directory)
        records, found = results(ranked.directory), samples(ranked.directory)
        assert [sample.key for sample in found] == [record["file"] for record in records]
        assert [sample.captions for sample in found] == [(prompt,) for prompt in PROMPTS for _ in range(2)]
        assert summary.mean_score == pytest.approx(sum(record["score"] for record in records) / 14)
        names = {"plan.json", "captions.jsonl", "results.jsonl", *(record["file"] for record in records)}
        assert set(contents(ranked.directory)) == names

    @pytest.mark.parametrize("file_format", ["folder", "shards"])
    def test_odd_captions(self, job: SetJob, file_format: str) -> None:
        odd = ('a "red"\u2028apple', "two\nlines", "東京 ☃ 😀", "back\\slash")
        draw(replace(job, conditions=odd, file_format=file_format))
        assert [sample.captions for sample in samples(job.directory)[::2]] == [(text,) for text in odd]

    def test_shards_of_texts(self, ranked: SetJob, tmp_path: Path) -> None:
        draw(ranked)
        shards = replace(ranked, directory=tmp_path / "shards", file_format="shards")
        summary = draw(shards)
        records, found = results(shards.directory), samples(shards.directory)
        assert [sample.key for sample in found] == [record.pop("file") for record in records]
        assert [sample.captions for sample in found] == [(prompt,) for prompt in PROMPTS for _ in range(2)]
        in_folder = results(ranked.directory)
        for record in in_folder:
            del record["file"]
        assert records == in_folder
        pictures = [sample.image.tobytes() for sample in samples(ranked.directory)]
        assert [sample.image.tobytes() for sample in found] == pictures
        assert summary.count == 14
        names = {"plan.json", "results.jsonl", *(f"part-{number:05d}.tar" for number in range(3))}
        assert set(contents(shards.directory)) == names
        with tarfile.open(shards.directory / "part-00002.tar") as tar:
            assert tar.getnames() == [
                f"000006-000{j}.{suffix}" for j in (0, 1) for suffix in ("json", "png", "txt")
            ]
            assert {member.mtime for member in tar} == {0}
            about = json.load(tar.extractfile("000006-0001.json"))  # type: ignore[arg-type]
        assert about == {"captions": ["apple"], **records[13]}

    @pytest.mark.parametrize("file_format", ["folder", "shards"])
    def test_classes_keep_their_labels(self, classes: SetJob, file_format: str) -> None:
        """Also where others were not drawn, and 11 comes after 3 by name as by number."""
        draw(replace(classes, file_format=file_format))
        found = {sample.key: sample.label for sample in samples(classes.directory)}
        records = results(classes.directory)
        assert found == {record["file"]: record["class_label"] for record in records}
        assert [record["class_label"] for record in records] == [11, 11, 3, 3, 7, 7]
        assert len(open_source(str(classes.directory)).classes) == 12

    def test_pictures_of_nothing_in_particular(self, job: SetJob, tiny_vqgan: VQGAN, tmp_path: Path) -> None:
        model = save_class_model(tmp_path / "free", tiny_vqgan, num_classes=0)
        job = replace(job, model=model, params=SamplingParams(), num_images=1, num_candidates=1)
        summary = draw(replace(job, conditions=(None,) * 5))
        assert (summary.count, summary.mean_score) == (5, None)
        found = samples(job.directory)
        assert len({sample.image.tobytes() for sample in found}) == 5
        assert {sample.captions for sample in found} == {()}


class TestGoingOn:
    @pytest.mark.parametrize("file_format", ["folder", "shards"])
    def test_only_missing_parts_are_drawn(
        self, job: SetJob, file_format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = replace(job, file_format=file_format)
        draw(replace(job, directory=job.directory.with_name("whole")))
        drawn: list[int] = []
        draw_part = Painter.draw

        def interrupted(self: Painter, number: int) -> Any:
            drawn.append(number)
            if drawn == [0, 1]:
                raise KeyboardInterrupt
            return draw_part(self, number)

        monkeypatch.setattr(Painter, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(job)
        assert "part-00000.jsonl" in contents(job.directory)
        assert "results.jsonl" not in contents(job.directory)
        (job.directory / ".000003-0000-0123456789abcdef.png").write_bytes(
            b"half"
        )  # of a process that was killed
        before = {path: path.stat().st_mtime_ns for path in job.directory.glob("[0p]*0-*[gr]")}
        summary = draw(job)
        assert drawn == [0, 1, 1, 2]
        assert summary.count == 14
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert contents(job.directory) == contents(job.directory.with_name("whole"))
        assert not (job.directory / ".000003-0000-0123456789abcdef.png").exists()

    def test_a_finished_set_is_left_alone(self, job: SetJob, monkeypatch: pytest.MonkeyPatch) -> None:
        summary = draw(job)
        before = {path: path.stat().st_mtime_ns for path in job.directory.glob("*")}
        monkeypatch.setattr(Painter, "draw", None)
        assert draw(job) == summary
        assert {path: path.stat().st_mtime_ns for path in job.directory.glob("*")} == before

    def test_killed_before_the_lines_of_the_parts_were_removed(self, job: SetJob) -> None:
        draw(job)
        before = contents(job.directory)
        (job.directory / "part-00001.jsonl").touch()
        draw(job)
        assert contents(job.directory) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 5}, r"set holds pictures of another plan \(seed: 3 there, 5 wanted\): choose another"),
            (
                {"conditions": PROMPTS[:6]},
                r"conditions: \w{12}... there, \w{12}... wanted; num_conditions: 7 ",
            ),
            ({"num_images": 1, "num_candidates": 1}, "num_images: 2 there, 1 wanted"),
            ({"file_format": "shards"}, "file_format: folder there, shards wanted"),
            ({"num_threads": 2}, "num_threads: 1 there, 2 wanted"),
            ({"compile": True}, "is_compiled: False there, True wanted"),
        ],
    )
    def test_another_plan(self, job: SetJob, changes: dict[str, Any], message: str) -> None:
        draw(job)
        before = contents(job.directory)
        with pytest.raises(FileExistsError, match=message):
            draw(replace(job, **changes))
        assert contents(job.directory) == before
        assert draw(replace(job, batch_size=1, model=f"{job.model}/")).count == 14  # no other pictures

    def test_another_model(self, job: SetJob, ranked: SetJob) -> None:
        draw(job)
        with pytest.raises(FileExistsError, match=r"judge:  there, \w{12}... wanted"):
            draw(replace(ranked, num_candidates=2))

    def test_something_else_is_in_the_directory(self, job: SetJob) -> None:
        job.directory.mkdir()
        (job.directory / "thesis.tex").touch()
        with pytest.raises(FileExistsError, match=r"is not empty and holds no pictures, it has thesis.tex"):
            draw(job)

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "mindalle-set-1"}', "\0", "[" * 100_000])
    def test_a_damaged_plan(self, job: SetJob, content: str) -> None:
        draw(job)
        (job.directory / "plan.json").write_text(content)
        with pytest.raises(
            CheckpointError, match=r"its plan.json is damaged: .*; choose another directory, or"
        ):
            draw(job)

    @pytest.mark.parametrize("name", ["results.jsonl", "part-00001.jsonl"])
    def test_damaged_lines(self, job: SetJob, name: str) -> None:
        draw(job)
        (job.directory / "results.jsonl").unlink()
        for number in range(3):
            (job.directory / f"part-{number:05d}.jsonl").write_text('{"file": "x", "score": null}\n')
        (job.directory / name).write_text('{"file": "x"}\n3\n')
        with pytest.raises(
            CheckpointError, match=f"{name} is damaged: expected a JSON object, got 3; remove it"
        ):
            draw(job)


def test_a_full_disk(job: SetJob) -> None:
    """Really: a limit on the size of files refuses a picture; what was whole is kept, and nothing is half."""
    pipe = job.load()
    plan = plan_set(job, pipe)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # a plan or a picture, but no lines of a part
    try:
        with pytest.raises(OSError, match=r"File too large") as caught:
            draw_set(job, plan, pipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(job.directory)
    assert not [
        path for path in job.directory.iterdir() if path.name.startswith(".") and path.name != ".lock"
    ]
    assert draw_set(job, plan, pipe).count == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"num_candidates": 1}, "num_candidates must be at least num_images = 2, got 1"),
        ({"part_size": 0}, "part_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"conditions": ()}, "there is nothing to draw: conditions must hold at least one"),
        ({"num_candidates": 3}, "nothing can choose 2 of 3 candidates: a model of texts needs a CLIP"),
        ({"conditions": (3,)}, "this model draws from text, got 3"),
        ({"conditions": ("a", None)}, "this model draws from text, got None"),
        ({"classifier": "efflite"}, "a classifier judges pictures of classes, and this model draws none"),
        ({"classifier": "oracle"}, "classifier must be one of efflite, resnet101, clip, got 'oracle'"),
    ],
)
def test_jobs_that_cannot_be(job: SetJob, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(replace(job, **changes))
    assert not job.directory.exists()


def test_a_class_out_of_range(classes: SetJob) -> None:
    with pytest.raises(ValueError, match=r"class label must be in \[0, 12\), got 12"):
        draw(replace(classes, conditions=(3, 12)))
    with pytest.raises(ValueError, match=r"draws classes 0 to 11, got 'a cat'"):
        draw(replace(classes, conditions=("a cat",)))


def test_long_prompts_are_counted(job: SetJob, caplog: pytest.LogCaptureFixture) -> None:
    """Not named one by one: there may be thousands."""
    long = "a red apple on a green car with two red cars"
    plan_set(replace(job, conditions=("a car", long, "apple", long + " again")), job.load())
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "2 of 4 prompts are longer than the 6 tokens that the model reads, their ends are lost; the first: "
        + long
    )


@pytest.mark.parametrize("what", ["weights", "words", "settings"])
def test_a_checkpoint_is_known_by_what_is_in_it(job: SetJob, what: str) -> None:
    before = plan_set(job, job.load()).model
    model = Path(job.model)
    moved = model.rename(model.with_name("moved"))
    job = replace(job, model=str(moved))
    assert plan_set(job, job.load()).model == before
    changes: dict[str, Callable[[], object]] = {
        "weights": lambda: flip_last_byte(moved / "model.safetensors"),
        "words": lambda: replace_text(moved / "text_tokenizer.json", "Lowercase", "NFC"),
        "settings": lambda: replace_text(moved / "config.yaml", "activation: gelu", "activation: quick_gelu"),
    }
    changes[what]()
    assert plan_set(job, job.load()).model != before


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


class Crashing(SetJob):
    """A job whose painters end their process, as a full memory does."""

    def load(self) -> Any:
        os._exit(9)


@pytest.mark.slow
class TestProcesses:
    """Each starts Python anew, which takes seconds."""

    def test_two_draw_what_one_draws(self, ranked: SetJob, tmp_path: Path) -> None:
        draw(ranked)
        plan = plan_set(ranked, ranked.load())
        together = replace(ranked, directory=tmp_path / "together", batch_size=3)
        draw_set(together, plan, num_processes=2)
        assert contents(together.directory) == contents(ranked.directory)

    def test_one_that_dies(self, job: SetJob) -> None:
        plan = plan_set(job, job.load())
        crashing = Crashing(**{name: getattr(job, name) for name in job.__dataclass_fields__})
        with pytest.raises(
            ChildProcessError, match=r"a process that draws was killed.*fewer --num-processes"
        ):
            draw_set(crashing, plan, num_processes=2)

    def test_an_error_in_one(self, job: SetJob) -> None:
        plan = plan_set(job, job.load())
        with pytest.raises(FileNotFoundError, match=r"no such file or directory: \./none"):
            draw_set(replace(job, model="./none"), plan, num_processes=2)
