"""`encode.py`: what it writes and says, what it refuses, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_results import Command
from shard_files import write_pictures, write_shard

from mindalle.data.code_cache import CodeCache, identified_tokenizer


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(6)])
    (tmp_path / "pictures" / "2.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "3.txt").write_text("a square")
    return tmp_path / "pictures"


def test_a_folder(mindalle: Command, checkpoints: Path, pictures: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "new" / "codes", checkpoints / "rq-free"
    options = ("--image-tokenizer", model, "--crops", 3, "--crop", "dalle", "--flip", 0.5, "--latents")
    result = mindalle("encode", pictures, out, *options, "--seed", 4, "--size", 32)
    assert result.code == 0, result.err
    assert result.out == [f"{out}  5 pictures, 3 of 8x8x3 codes each, 1 unreadable, 4 without captions"]
    assert any("skipped 2.png: not a picture" in line for line in result.err)
    assert any("1 of 6 pictures could not be read and were skipped" in line for line in result.err)
    cache = CodeCache(out, tokenizer_hash=identified_tokenizer(str(model))[1])
    assert (
        cache.plan.transform | {"crop": "dalle", "flip_probability": 0.5, "image_size": 32}
        == cache.plan.transform
    )
    assert (cache.plan.seed, cache.plan.num_crops, cache.plan.has_latents) == (4, 3, True)
    assert cache.latents(4, 2).shape[1:] == (8, 8)
    assert [cache.picture(i).key for i in range(5)] == [f"{i}.png" for i in (0, 1, 3, 4, 5)]

    before = {path: path.stat().st_mtime_ns for path in out.glob("*.*")}
    again = mindalle("encode", pictures, out, *options, "--seed", 4, "--size", 32)
    assert (again.code, again.out) == (0, result.out)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_padded_pictures_go_anywhere(
    mindalle: Command, checkpoints: Path, pictures: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "codes", checkpoints / "rq-free"
    options = ("--image-tokenizer", model, "--resize", "pad", "--crops", 8, "--size", 64, "--latents")
    result = mindalle("encode", pictures, out, *options)
    assert result.code == 0, result.err
    cache = CodeCache(out, tokenizer_hash=identified_tokenizer(str(model))[1])
    assert (cache.plan.transform["resize"], cache.plan.transform["crop"]) == ("pad", "random")
    copies = {cache.latents(0, crop).numpy().tobytes() for crop in range(8)}
    assert len(copies) >= 6  # sides are 55 to 64 pixels: the largest is where the centre is


def test_shards(mindalle: Command, checkpoints: Path, tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{name}.tar", range(3)) for name in "ab"]
    result = mindalle("encode", *shards, tmp_path / "codes", "--image-tokenizer", checkpoints / "taming")
    assert result.code == 0, result.err
    assert "6 pictures, 1 of 4x4 codes each, 0 unreadable, 0 without captions" in result.out[0]
    assert np.load(tmp_path / "codes" / "part-00001.npy").shape == (3, 1, 4, 4)
    assert json.loads((tmp_path / "codes" / "plan.json").read_text())["transform"]["image_size"] == 16


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--flip", 2], 2, "--flip must be in [0, 1], got 2.0"),
        (["--crops", 0], 2, "--crops: must be a whole number of at least 1"),
        (["--crop", "left"], 2, "invalid choice: 'left'"),
        (["--crops", 2, "--crop", "center"], 1, "num_crops is 2, but all of them would be the same"),
        (["--size", 18], 1, "image_size must be a multiple of 4"),
        (["--device", "tpu"], 2, "--device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        (["--image-tokenizer", "./none"], 1, "no such file or directory: ./none"),
    ],
)
def test_errors(
    mindalle: Command,
    checkpoints: Path,
    pictures: Path,
    tmp_path: Path,
    options: list[object],
    code: int,
    message: str,
) -> None:
    result = mindalle(
        "encode", pictures, tmp_path / "codes", "--image-tokenizer", checkpoints / "taming", *options
    )
    assert result.code == code
    assert message in result.err[-1]
    assert not (tmp_path / "codes" / "plan.json").exists()


def test_another_plan(mindalle: Command, checkpoints: Path, pictures: Path, tmp_path: Path) -> None:
    command = ("encode", pictures, tmp_path / "codes", "--image-tokenizer", checkpoints / "taming")
    assert mindalle(*command).code == 0
    result = mindalle(*command, "--crops", 2)
    assert result.code == 1
    assert "codes holds codes of another plan (num_crops: 1 there, 2 wanted" in result.err[-1]
    assert "choose another directory, or remove this one to encode again" in result.err[-1]


def has_ended(group: int) -> bool:
    """Whether no process of a group is left after ten seconds; multiprocessing's own takes a moment."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_ctrl_c(checkpoints: Path, tmp_path: Path, num_processes: int) -> None:
    """One line, no half files, no process left behind."""
    shards = [write_shard(tmp_path / f"{i:03d}.tar", range(3)) for i in range(100)]
    options = ("--image-tokenizer", checkpoints / "taming", "--num-processes", num_processes)
    command = ("-m", "mindalle.cli.main", "encode", *shards, tmp_path / "codes", *options)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what it puts in the background with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )
    while not list(tmp_path.glob("codes/part-*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "mindalle encode: interrupted"
    assert "Traceback" not in err
    assert has_ended(process.pid)
    assert 0 < len(list(tmp_path.glob("codes/part-*.npy"))) < 100
    assert not list(tmp_path.glob("codes/.part-*"))
    assert not (tmp_path / "codes" / "header.json").exists()
