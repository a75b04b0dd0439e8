"""`convert_checkpoint.py`, `export.py`: the native copy draws the same pictures, nothing is half written."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_results import Command, pixels

from checkpoint_io import config_to_mapping
from mindalle.pipeline import Pipeline
from mindalle.text import TextTokenizer
from stage1_vqgan import VQGAN
from stage2_transformer import GPT

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


def save_run(path: Path, model: Any) -> Path:
    """As Lightning saves a training module of ours."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": config_to_mapping(model.config)}}, path)
    return path


def test_export_of_training_runs(
    mindalle: Command, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT, tiny_text_tokenizer: TextTokenizer
) -> None:
    vqgan, gpt = save_run(tmp_path / "vqgan.ckpt", tiny_vqgan), save_run(tmp_path / "gpt.ckpt", tiny_gpt)
    words = tmp_path / "words.json"
    tiny_text_tokenizer.save(words)
    runs = ("--image-tokenizer", vqgan, "--model", gpt, "--text-tokenizer", words)
    result = mindalle("export", *runs, "--top-k", 7, "--temperature", 0.5, tmp_path / "native")
    assert (result.code, result.out, result.err) == (0, [str(tmp_path / "native")], [])
    config = yaml.safe_load((tmp_path / "native" / "config.yaml").read_text())
    assert config["sampling"] == {"temperature": 0.5, "top_k": 7, "cfg_scale": 1.0, "num_candidates": 1}
    pipe = Pipeline(tiny_vqgan, tiny_gpt, tiny_text_tokenizer)
    copy = Pipeline.from_pretrained(tmp_path / "native")
    params = copy.sampling.params
    assert torch.equal(copy("a red car").codes, pipe("a red car", params=params).codes)

    for options, code, words_of_error in (
        (("--image-tokenizer", vqgan, "--text-tokenizer", words), 2, "pass --model too"),
        ((*runs, "--top-p", 2), 2, "--top-p must be in (0, 1], got 2.0"),
        (("--image-tokenizer", gpt), 1, "hyper-parameters of"),
        (("--image-tokenizer", tmp_path / "nothing.ckpt"), 1, "no checkpoint file at"),
    ):
        result = mindalle("export", *options, tmp_path / "other")
        assert (result.code, len(result.err)) == (code, 1)
        assert words_of_error in result.err[0]
        assert not (tmp_path / "other").exists()
