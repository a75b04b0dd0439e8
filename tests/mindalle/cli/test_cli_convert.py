"""`convert_checkpoint.py`: the native copy draws the same pictures, nothing is half written."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from cli_results import Command, pixels

from mindalle.cli.output import atomic_directory
from mindalle.pipeline import Pipeline

PROMPTS = {
    "mindalle": "a red apple",
    "mindalle-class": 3,
    "mindalle-free": None,
    "rq-text": "a red apple",
    "rq-class": 3,
    "rq-free": None,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_copy_draws_the_same_codes(
    mindalle: Command, checkpoints: Path, tmp_path: Path, name: str
) -> None:
    result = mindalle("convert", checkpoints / name, tmp_path / "new" / "copy")
    assert result.code == 0
    layout = {"mindalle": "minDALL-E", "rq": "rq-vae"}[name.split("-")[0]]
    assert result.out == [f"{tmp_path}/new/copy  {layout}{' fine-tuned' * ('mindalle-' in name)} -> native"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["copy"]

    original, copy = (
        Pipeline.from_pretrained(path) for path in (checkpoints / name, tmp_path / "new" / "copy")
    )
    assert copy.sampling == original.sampling
    drawn, again = (pipe(PROMPTS[name], num_images=2, seed=0) for pipe in (original, copy))
    assert torch.equal(again.codes, drawn.codes)
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in drawn.images]


@torch.inference_mode()
def test_a_tokenizer_alone(mindalle: Command, checkpoints: Path, photo: Path, tmp_path: Path) -> None:
    assert mindalle("convert", checkpoints / "taming", tmp_path / "copy").code == 0
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        *("README.md", "config.yaml", "image_tokenizer.safetensors")
    ]
    runs = [
        mindalle("reconstruct", photo, "--model", model, "--out", tmp_path)
        for model in (checkpoints / "taming", tmp_path / "copy")
    ]
    assert runs[0].out[:-1] == runs[1].out[:-1]
    assert pixels(runs[0].paths[-1]) == pixels(runs[1].paths[-1])


def test_options(mindalle: Command, checkpoints: Path, tmp_path: Path) -> None:
    def size(name: str) -> int:
        return (tmp_path / name / "model.safetensors").stat().st_size

    source = checkpoints / "rq-class"
    assert mindalle("convert", source, tmp_path / "plain").code == 0
    assert mindalle("convert", source, tmp_path / "half", "--dtype", "fp16", "--ema").code == 0
    assert size("half") < 0.6 * size("plain")
    averaged = Pipeline.from_pretrained(source, use_ema=True)
    copy = Pipeline.from_pretrained(tmp_path / "half")
    for name, tensor in averaged.model.state_dict().items():
        assert torch.equal(copy.model.state_dict()[name], tensor.half().float())

    (tmp_path / "bare").mkdir()
    for stage in ("stage1", "stage2"):
        (tmp_path / "bare" / stage).symlink_to(checkpoints / "rq-text" / stage)
    result = mindalle("convert", tmp_path / "bare", tmp_path / "mute")
    assert result.code == 0
    assert any("no text tokenizer was found" in line and "--text-tokenizer" in line for line in result.err)
    words = checkpoints / "rq-text" / "text_tokenizer.json"
    result = mindalle("convert", tmp_path / "bare", tmp_path / "able", "--text-tokenizer", words)
    assert (result.code, result.err) == (0, [])
    assert (tmp_path / "able" / "text_tokenizer.json").is_file()


def test_an_existing_destination_is_refused_and_left_alone(
    mindalle: Command, checkpoints: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("copy", "file"):
        result = mindalle("convert", checkpoints / "taming", tmp_path / name)
        assert (result.code, len(result.err)) == (1, 1)
        assert f"{tmp_path / name} exists, and nothing is overwritten: choose another DST" in result.err[0]
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["mine"]
    result = mindalle("convert", checkpoints / "taming", tmp_path / "file" / "copy")
    assert result.code == 1
    assert "DST must be a directory" in result.err[0]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """In a container every process has the same number, by which the temporary directory was named."""
    (tmp_path / f".copy.{os.getpid()}.partial").mkdir()
    with atomic_directory(tmp_path / "copy") as directory:
        (directory / "file").write_text("whole")
    assert (tmp_path / "copy" / "file").read_text() == "whole"


def test_a_failure_leaves_nothing_behind(mindalle: Command, checkpoints: Path, tmp_path: Path) -> None:
    """The disk fills up within the second file: here, a limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = mindalle("convert", checkpoints / "mindalle", tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.code, len(result.err)) == (1, 1)
    assert "no space left on the disk" in result.err[0]
    assert list(tmp_path.iterdir()) == []

    result = mindalle("convert", tmp_path, tmp_path / "copy")
    assert result.code == 1
    assert "is no checkpoint of a known layout" in result.err[0]
    assert list(tmp_path.iterdir()) == []
