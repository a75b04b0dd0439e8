"""`generate_set.py`: what it draws from, what it says, what it refuses, and how it stops and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_results import Command, pixels
from shard_files import write_pictures, write_shard

from mindalle.cli import generate_set as command
from mindalle.generation import SetJob

ROOT = Path(command.__file__).parents[2]


@pytest.fixture
def generate_set(mindalle: Command, text_model: Path, tmp_path: Path) -> Command:
    """With the text model and `tmp_path / "set"`, unless other arguments come."""
    defaults = ("--model", text_model, "--out", tmp_path / "set")
    return lambda *argv: mindalle("generate_set", *defaults, *argv)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\n  a green car \ntwo red cars\n")
    return path


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[SetJob]:
    """The jobs that were made, not drawn."""
    made: list[SetJob] = []

    def record(job: SetJob, plan: Any, pipe: Any, **options: Any) -> None:
        made.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr("mindalle.generation.draw_set", record)
    return made


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    """All files that are not hidden."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name[0] != "."
    }


def test_prompts_of_a_text_file(
    generate_set: Command, mindalle: Command, text_model: Path, prompts: Path, tmp_path: Path
) -> None:
    result = generate_set(prompts, "--images-per-prompt", 2, "--temperature", 0.9, "--seed", 7)
    assert result.code == 0, result.err
    assert result.out == [f"{tmp_path / 'set'}  6 pictures of 3 prompts"]
    assert any("100%" in line and "6/6" in line for line in result.err)
    records = read_results(tmp_path / "set")
    assert [record["prompt"] for record in records[::2]] == ["a red apple", "a green car", "two red cars"]
    assert {record["settings"]["temperature"] for record in records} == {0.9}

    last = records[5]  # generate.py draws it again
    options = ("--prompt", last["prompt"], "--seed", last["seed"], "--temperature", 0.9, "--num-images", 2)
    again = mindalle("generate", "--model", text_model, *options, "--out", tmp_path / "again")
    assert pixels(again.paths[last["index"]]) == pixels(tmp_path / "set" / last["file"])


def test_the_bundled_model_is_the_default(mindalle: Command, prompts: Path, tmp_path: Path) -> None:
    result = mindalle("generate_set", prompts, "--no-rerank", "--out", tmp_path / "set")
    assert result.code == 0, result.err
    assert read_results(tmp_path / "set")[0]["model"] == "emoji"


@pytest.mark.parametrize("kind", ["captions.jsonl", "captions.csv", "folder", "shards"])
def test_captions_of_pictures(generate_set: Command, jobs: list[SetJob], tmp_path: Path, kind: str) -> None:
    """The first caption of each, or all; pictures need not be there, and one has none."""
    folder = tmp_path / "pictures"
    rows = {"0.png": ["a red car", "a car"], "1.png": [], "2.png": ["two red cars"]}
    if kind == "shards":
        write_shard(folder / "0.tar", range(3), dict(enumerate(rows.values())))
    else:
        write_pictures(folder, ["0.png"])
        lines = [json.dumps({"file": file, "captions": captions}) for file, captions in rows.items()]
        table = ["file,caption"] + [
            f"{file},{text}" for file, texts in rows.items() for text in texts or [""]
        ]
        name = "captions.jsonl" if kind == "folder" else kind
        (folder / name).write_text("\n".join(table if name.endswith("csv") else lines))
    source = folder / kind if kind.startswith("captions") else folder
    result = generate_set(source)
    assert result.code == 130
    assert "1 of 3 pictures have no caption" in result.err
    generate_set(source, "--captions", "all")
    assert [job.conditions for job in jobs] == [
        ("a red car", "two red cars"),
        ("a red car", "a car", "two red cars"),
    ]


def test_random_captions_are_a_function_of_the_seed(
    generate_set: Command, jobs: list[SetJob], tmp_path: Path
) -> None:
    folder, captions = tmp_path / "pictures", ["a red car", "a car"]
    write_pictures(folder, files := [f"{number}.png" for number in range(30)])
    lines = (json.dumps({"file": file, "captions": captions}) for file in files)
    (folder / "captions.jsonl").write_text("\n".join(lines))
    for seed in (0, 0, 1):
        generate_set(folder, "--captions", "random", "--seed", seed)
    first, again, other = (job.conditions for job in jobs)
    assert first == again != other
    assert set(first) == set(other) == set(captions)


@pytest.mark.parametrize(
    ("classes", "labels"), [("all", range(10)), ("7", [7]), ("3,0-2, 9", [3, 0, 1, 2, 9]), ("0-9", range(10))]
)
def test_classes(
    generate_set: Command, checkpoints: Path, jobs: list[SetJob], classes: str, labels: Any
) -> None:
    generate_set("--model", checkpoints / "rq-class", "--classes", classes, "--per-class", 3)
    assert jobs[0].conditions == tuple(labels)
    assert (jobs[0].num_images, jobs[0].num_candidates) == (3, 3)


@pytest.mark.parametrize("file_format", ["folder", "shards"])
def test_a_set_of_classes(generate_set: Command, checkpoints: Path, tmp_path: Path, file_format: str) -> None:
    options = ("--classes", "7,2", "--per-class", 2, "--format", file_format)
    result = generate_set("--model", checkpoints / "rq-class", *options)
    assert result.out == [f"{tmp_path / 'set'}  4 pictures of 2 classes"]
    assert [record["class_label"] for record in read_results(tmp_path / "set")] == [7, 7, 2, 2]


def test_a_set_of_nothing_in_particular(generate_set: Command, checkpoints: Path, tmp_path: Path) -> None:
    result = generate_set("--model", checkpoints / "rq-free", "--unconditional", 5)
    assert result.out == [f"{tmp_path / 'set'}  5 pictures of 5 draws"]


def test_options_reach_the_job(
    generate_set: Command, checkpoints: Path, jobs: list[SetJob], prompts: Path
) -> None:
    sharing = ("--batch-size", 5, "--num-threads", 2, "--part-size", 9)
    generate_set(prompts, *sharing, "--no-rerank", "--seed", 4, "--compile")
    assert jobs[0].compile
    job = jobs[0]
    assert (job.batch_size, job.num_threads, job.part_size, job.is_ranked, job.seed) == (5, 2, 9, False, 4)
    generate_set("--model", checkpoints / "rq-class", "--classes", "all", "--ema", "--per-class", 300)
    assert (jobs[1].use_ema, jobs[1].part_size, jobs[1].num_images, jobs[1].compile) == (True, 1, 300, False)
    generate_set("--model", checkpoints / "rq-text", prompts, "--top-k", 3, 2, 1, "--images-per-prompt", 20)
    assert (jobs[2].params.top_k, jobs[2].part_size, jobs[2].precision) == ((3, 2, 1), 12, "fp32")


CLASSES = ("--model", "rq-class", "--classes")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ((), 2, "say what to draw by one of PROMPTS, --classes LIST and --unconditional N"),
        (("a.txt", "--classes", "all"), 2, "say what to draw by one of PROMPTS, --classes LIST and"),
        (("--unconditional", 0), 2, "--unconditional: must be a whole number of at least 1, got '0'"),
        (("none.txt",), 1, "no pictures at none.txt"),
        (("empty.txt",), 1, "empty.txt holds no prompts: write one per line"),
        (("latin.txt",), 1, "latin.txt is not UTF-8 text: line 2 has a byte 0xe4; save it as UTF-8"),
        (("bad.jsonl",), 1, "bad.jsonl:2: "),
        (("without.jsonl",), 1, "none of the 1 pictures of without.jsonl has a caption to draw"),
        (("p.txt", "--images-per-prompt", 0), 2, "must be a whole number of at least 1, got '0'"),
        (("p.txt", "--num-candidates", 2), 2, "nothing can choose 1 of 2 candidates: a model of texts needs"),
        (
            ("p.txt", "--images-per-prompt", 3, "--num-candidates", 2),
            2,
            "--num-candidates must be at least 3",
        ),
        (("p.txt", "--classifier", "efflite"), 2, "--classifier judges pictures of classes: name them by"),
        (("p.txt", "--temperature", -1), 2, "--temperature must be finite"),
        (("p.txt", "--top-k", 2, 2), 2, "top-k needs one value or one per depth (1), got (2, 2)"),
        (("p.txt", "--clip", "x", "--no-rerank"), 2, "--clip and --no-rerank contradict each other"),
        (("p.txt", "--device", "tpu"), 2, "--device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        (("p.txt", "--out", "p.txt"), 1, "--out must be a directory, but"),
        (("p.txt", "--model", "./none"), 1, "no such file or directory: ./none"),
        (("--classes", "3"), 2, "this model draws from text: say what by PROMPTS, not by --classes LIST"),
        (("p.txt", "--model", "rq-class"), 2, "this model draws classes: say what by --classes LIST, not by"),
        (
            ("p.txt", "--model", "rq-free"),
            2,
            "this model is unconditional: say what by --unconditional N, not",
        ),
        (("p.txt", "--model", "taming"), 1, "this checkpoint holds an image tokenizer only"),
        ((*CLASSES, "3,10"), 2, "class label must be in [0, 10), got 10"),
        ((*CLASSES, "5-3"), 2, "--classes must be all, or labels and ranges such as 0-99,207, got '5-3'"),
        ((*CLASSES, "cat"), 2, "--classes must be all, or labels and ranges such as 0-99,207, got 'cat'"),
        ((*CLASSES, "0-9999999999"), 2, "--classes must be all, or labels and ranges such as"),
        ((*CLASSES, "3,1-4"), 2, "--classes names a class twice: 3,1-4"),
        ((*CLASSES, "3", "--captions", "all"), 2, "--captions is for PROMPTS, which are not given"),
        ((*CLASSES, "3", "--accept", 0.5), 2, "--accept is the share that a classifier keeps: name one by"),
        ((*CLASSES, "3", "--classifier", "efflite", "--accept", 0), 2, "--accept must be in (0, 1], got 0"),
        (
            (*CLASSES, "3", "--classifier", "efflite", "--accept", 0.1, "--num-candidates", 9),
            2,
            "--accept and --num-candidates both say how many are drawn: leave one out",
        ),
        (
            (*CLASSES, "3", "--classifier", "oracle"),
            2,
            "classifier must be one of efflite, resnet101, clip, got",
        ),
        (
            (*CLASSES, "3", "--classifier", "efflite"),
            2,
            "knows the 1,000 classes of ImageNet, and this model",
        ),
        (
            (*CLASSES, "3", "--classifier", "clip"),
            2,
            "the classifier clip needs a CLIP: name it (--clip NAME)",
        ),
        ((*CLASSES, "3", "--class-names", "p.txt"), 2, "--class-names is for --classifier clip"),
    ],
)
def test_errors(
    mindalle: Command,
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[object, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red apple\n")
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("a\nein Äpfel, ä\n".encode("latin-1").replace(b"\xc4", b"A"))
    Path("bad.jsonl").write_text('{"file": "a.png", "captions": ["a"]}\n{"file": \n')
    Path("without.jsonl").write_text('{"file": "a.png", "captions": []}\n')
    names = {path.name: path for path in checkpoints.iterdir()}
    given = [names.get(str(argument), argument) for argument in argv]
    defaults = ("--model", checkpoints / "mindalle", "--out", "set")
    result = mindalle("generate_set", *defaults, *given)
    assert result.code == code
    assert message in result.err[-1]
    assert result.err[-1].startswith("generate_set.py: error: ")
    assert not Path("set").exists()


def test_another_plan(generate_set: Command, prompts: Path, tmp_path: Path) -> None:
    assert generate_set(prompts).code == 0
    result = generate_set(prompts, "--seed", 1)
    assert result.code == 1
    assert "set holds pictures of another plan (seed: 0 there, 1 wanted): choose another" in result.err[-1]
    assert generate_set(prompts, "--batch-size", 1).out == [f"{tmp_path / 'set'}  3 pictures of 3 prompts"]


def test_without_ray_one_line_says_so(
    generate_set: Command, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = generate_set(prompts, "--ray")
    assert result.code == 1
    assert result.err[-1] == 'generate_set.py: error: --ray needs Ray Data: pip install "mindalle[ray]"'


def test_help_is_quick() -> None:
    """Without torch, whose import takes seconds."""
    check = "import sys; from mindalle.cli.generate_set import build_parser; build_parser('x').format_help()"
    forbidden = ("torch", "numpy", "PIL", "tqdm", "ray", "webdataset")
    code = f"{check}; print([name for name in {forbidden} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout == "[]\n"


def start(*argv: object) -> subprocess.Popen[str]:
    """The script in a process, and its children in its group."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "generate_set.py"), *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what it puts in the background with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )


def wait_for_parts(process: subprocess.Popen[str], directory: Path, count: int) -> None:
    while len(list(directory.glob("part-*.jsonl"))) < count:
        assert process.poll() is None
        time.sleep(0.01)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"a red apple on {n} cars\n" for n in range(80)))
    return path


@pytest.mark.slow
class TestKilled:
    """Each starts Python anew, which takes seconds."""

    @pytest.mark.parametrize(("num_processes", "file_format"), [(1, "folder"), (2, "shards")])
    def test_again_and_again(
        self,
        mindalle: Command,
        text_model: Path,
        many: Path,
        tmp_path: Path,
        num_processes: int,
        file_format: str,
    ) -> None:
        """SIGKILL, twice, with other batches each time: in the end the bytes of a set drawn at once."""
        options = ("--model", text_model, many, "--part-size", 2, "--format", file_format)
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert mindalle("generate_set", *options, "--out", whole).code == 0
        for run in (1, 2):
            sharing = ("--num-processes", num_processes, "--batch-size", run)
            process = start(*options, "--out", killed, *sharing)
            wait_for_parts(process, killed, 8 * run)
            process.kill()
            process.communicate()
            time.sleep(0.5)  # its children end by themselves
            assert 8 * run <= len(list(killed.glob("part-*.jsonl"))) < 40
            assert not (killed / "results.jsonl").exists()
        assert mindalle("generate_set", *options, "--out", killed, "--batch-size", 7).code == 0
        assert contents(killed) == contents(whole)
        assert len(read_results(killed)) == len({record["file"] for record in read_results(killed)}) == 80

    def test_a_child_alone(self, text_model: Path, many: Path, tmp_path: Path) -> None:
        """As a machine does that is out of memory."""
        options = ("--model", text_model, many, "--part-size", 1, "--num-processes", 2)
        process = start(*options, "--out", tmp_path / "set")
        wait_for_parts(process, tmp_path / "set", 3)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "error: a process that draws was killed, perhaps for want of memory" in err.splitlines()[-1]
        assert "Traceback" not in err

    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_ctrl_c(self, text_model: Path, many: Path, tmp_path: Path, num_processes: int) -> None:
        """One line, no half files."""
        options = ("--model", text_model, many, "--part-size", 1, "--num-processes", num_processes)
        process = start(*options, "--out", tmp_path / "set")
        wait_for_parts(process, tmp_path / "set", 3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "generate_set.py: interrupted"
        assert "Traceback" not in err
        assert not [path for path in (tmp_path / "set").glob(".*") if path.name != ".lock"]
