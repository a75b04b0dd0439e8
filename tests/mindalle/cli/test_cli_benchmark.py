"""benchmark.py on tiny models: what it reports, and what it refuses. How fast they are is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from cli_results import Command
from PIL import Image

from mindalle.benchmark import machine, shapes
from mindalle.benchmark.machine import peak_memory, reset_peak_memory
from mindalle.benchmark.measure import against_limits, by_position, decoding_work
from stage1_vqgan import (
    ConvNetConfig,
    ResidualQuantizerConfig,
    RQVAEConfig,
    VectorQuantizerConfig,
    VQGANConfig,
)
from stage2_transformer import ConditionConfig, GPTConfig, RQTransformerConfig, TransformerConfig
from stage2_transformer.int8 import has_int8

ROOT = Path(machine.__file__).parents[2]
CONVNET = ConvNetConfig(
    image_size=16, channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, latent_channels=8
)
STACK = TransformerConfig(width=32, num_layers=3, num_heads=2)
TINY = {
    "tiny-gpt": shapes.Shape(
        image_tokenizer=VQGANConfig(
            convnet=CONVNET, quantizer=VectorQuantizerConfig(codebook_size=24, width=8)
        ),
        model=GPTConfig(
            transformer=STACK,
            condition=ConditionConfig(kind="text", vocab_size=16, length=5),
            vocab_size=24,
            code_shape=(4, 4),
        ),
    ),
    "tiny-rq": shapes.Shape(
        image_tokenizer=RQVAEConfig(
            convnet=CONVNET,
            quantizer=ResidualQuantizerConfig(codebook_sizes=(24, 24, 24), width=8),
            latent_width=8,
        ),
        model=RQTransformerConfig(
            body=STACK,
            head=STACK,
            condition=ConditionConfig(kind="class", vocab_size=5, length=1),
            codebook_sizes=(24, 24, 24),
            code_shape=(4, 4, 3),
            codebook_width=8,
        ),
    ),
}
DECODE = {
    "variant": str,
    "precision": str,
    "batch_size": int,
    "seconds": float,
    "seconds_of_all_repeats": list,
    "prefill_seconds": float,
    "code_seconds": float,
    "first_code_seconds": float,
    "middle_code_seconds": float,
    "last_code_seconds": float,
    "growth": float,
    "curve_seconds": list,
    "images_per_second": float,
    "peak_memory_bytes": int,
    "bytes_per_code": float,
    "bandwidth_share": float,
    "multiply_adds_per_code": float,
    "multiply_add_share": float,
    "extrapolated": dict,
    "speedup": (float, type(None)),
}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in TINY.items():
        monkeypatch.setitem(shapes.SHAPES, name, shape)
    monkeypatch.setattr(machine, "ARRAY_BYTES", 1 << 24)  # quick
    monkeypatch.setattr(machine, "MATRIX_SIDE", 128)


@pytest.mark.parametrize("shape", TINY)
def test_the_report(mindalle: Command, tmp_path: Path, shape: str) -> None:
    argv = ["--shape", shape, "--layers", 2, "--batch-size", 1, 3, "--repeats", 2, "--compare", "naive"]
    files = ["--json", tmp_path / "speed.json", "--plot", tmp_path / "speed.png"]
    result = mindalle("benchmark", *argv, "--train", *files)
    assert (result.code, result.err) == (0, [])
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert set(report["machine"]) == {"device", "processor", "threads", "system", "python", "torch"}
    assert report["command"].startswith(f"benchmark.py --shape {shape} --layers 2")
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    assert min(report["limits"].values()) > 1e8
    model = report["model"]
    assert (model["name"], model["num_layers"], model["has_random_weights"]) == (shape, 2, True)
    assert model["num_codes"] == (16 if shape == "tiny-gpt" else 48)
    rows = report["decode"]
    assert [(row["variant"], row["batch_size"]) for row in rows] == [
        ("fp32", 1),
        ("naive", 1),
        ("fp32", 3),
        ("naive", 3),
    ]
    for row in rows:
        assert set(row) == set(DECODE)
        assert all(isinstance(row[name], kind) for name, kind in DECODE.items())
        assert len(row["seconds_of_all_repeats"]) == 2
        assert 0 < row["prefill_seconds"] < row["seconds"]
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["seconds"])
        assert row["extrapolated"]["num_layers"] == 3
        assert row["code_seconds"] < row["extrapolated"]["code_seconds"] < 2 * row["code_seconds"]
        assert (row["speedup"] is None) == (row["variant"] == "naive")
    assert rows[0]["speedup"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])
    assert [row["batch_size"] for row in report["image_tokenizer"]] == [1, 3]
    assert report["training"]["batch_size"] == 3
    assert min(report["training"][f"stage{i}_images_per_second"] for i in (1, 2)) > 0
    assert any("extrapolated to all 3 layers by bytes read, not measured" in line for line in result.out)
    assert result.out[-2:] == [str(tmp_path / "speed.json"), str(tmp_path / "speed.png")]
    with Image.open(tmp_path / "speed.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 16) or []) > 5  # both curves are there


def test_a_checkpoint(mindalle: Command, text_model: Path) -> None:
    result = mindalle("benchmark", "--model", text_model, "--repeats", 1, "--cfg-scale", 2)
    assert (result.code, result.err) == (0, [])
    assert not any("naive" in line or "extrapolated" in line for line in result.out)
    assert any(line.startswith("fp32 ") for line in result.out)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_precision_and_speculation(mindalle: Command, tmp_path: Path, precision: str) -> None:
    """The naive decode stays in fp32 and draws one code at a time."""
    if precision == "int8" and not has_int8():
        pytest.skip("int8 needs an x86 CPU and torch's FBGEMM")
    argv = ["--shape", "tiny-gpt", "--repeats", 1, "--compare", "naive", "--json", tmp_path / "speed.json"]
    result = mindalle("benchmark", *argv, "--precision", precision, "--speculative", 4)
    assert (result.code, result.err) == (0, [])
    rows = json.loads((tmp_path / "speed.json").read_text())["decode"]
    assert [row["variant"] for row in rows] == [f"{precision} window 4", "naive"]
    assert [row["precision"] for row in rows] == [precision, "fp32"]
    assert rows[0]["bytes_per_code"] < rows[1]["bytes_per_code"]


@pytest.mark.parametrize(
    ("code", "argv", "words"),
    [
        (2, ["--model", "emoji", "--shape", "emoji"], "--model and --shape exclude each other"),
        (2, ["--layers", "2"], "--layers is for --shape"),
        (2, ["--shape", "huge"], "--shape must be one of mindalle-1.3b, rq-1.4b"),
        (2, ["--shape", "tiny-gpt", "--layers", "4"], "--layers must be in [1, 3] for this shape, got 4"),
        (2, ["--plot", "speed.pdf"], "--plot must end in .png, got speed.pdf"),
        (2, ["--json", "."], "--json must be a file"),
        (2, ["--batch-size", "0"], "--batch-size: must be a whole number of at least 1, got '0'"),
        (2, ["--cfg-scale", "-1"], "--cfg-scale must be finite and >= 0"),
        (2, ["--compare", "wisely"], "--compare: invalid choice: 'wisely'"),
        (1, ["--model", "nowhere/at/all"], "no such file or directory: nowhere/at/all"),
    ],
)
def test_errors(mindalle: Command, code: int, argv: list[str], words: str) -> None:
    result = mindalle("benchmark", *argv)
    assert (result.code, len(result.err)) == (code, 1)
    assert words in result.err[0]


def test_a_tokenizer_alone_draws_nothing(mindalle: Command, checkpoints: Path) -> None:
    result = mindalle("benchmark", "--model", checkpoints / "taming")
    assert (result.code, len(result.err)) == (1, 1)
    assert "has an image tokenizer alone: pass a model that draws" in result.err[0]


def test_every_shape_is_a_model_whose_stages_fit() -> None:
    for shape in shapes.SHAPES.values():
        with torch.device("meta"):
            tokenizer, model = shapes.build_random(shape, "fp32", torch.device("meta"), num_layers=1)
        assert tuple(tokenizer.code_shape) == tuple(model.code_shape)
        assert tokenizer.codebook_size == model.vocab_size


def test_the_sizes_are_those_of_the_releases() -> None:
    """Bytes of the big models by hand: 12 C^2 weights a layer, C V of the output layer, in 4 bytes or 1."""
    gpt, rq = shapes.SHAPES["mindalle-1.3b"].model, shapes.SHAPES["rq-1.4b"].model
    matrices, cached = 42 * 12 * 1536**2 + 1536 * 16384, 2 * 42 * 1536 * (64 + 128)
    assert decoding_work(gpt, 1, "fp32").bytes_read == 4 * (matrices + cached)
    assert decoding_work(gpt, 8, "int8").bytes_read == matrices + 8 * 4 * cached
    assert decoding_work(gpt, 8, "int8", is_guided=True).multiply_adds == 16 * (matrices + cached)
    matrices = (42 / 4 + 6) * 12 * 1536**2 + 1536 * 16384  # the body reads once per position
    cached = 2 * 1536 * (42 / 4 * (1 + 32) + 6 * 2.5)
    assert decoding_work(rq, 2, "bf16").bytes_read == 2 * (matrices + 2 * cached)


def test_times_by_position() -> None:
    """A first step that only samples is left out; parts of a residual model are whole positions."""
    curve = by_position([99.0, *(float(i) for i in range(64))], depth=1)
    assert (len(curve), curve[0], curve[4], curve[-1]) == (9, 3.5, 31.5, 59.5)
    body_and_head = [5.0, 1.0, 1.0, 1.0]
    assert set(by_position([0.0, *(16 * body_and_head)], depth=4)) == {2.0}
    assert by_position([1.0], depth=1) == [1.0]
    assert by_position([9.0, 1.0, 2.0], depth=4) == [1.5]


def test_shares_of_the_limits() -> None:
    work = decoding_work(TINY["tiny-gpt"].model, 1, "fp32")
    limits = {"bytes_per_second": work.bytes_read, "multiply_adds_per_second": 2 * work.multiply_adds}
    shares = against_limits(work, 2.0, limits)
    assert (shares["bandwidth_share"], shares["multiply_add_share"]) == (0.5, 0.25)


def test_peak_memory_counts_what_was_freed() -> None:
    device = torch.device("cpu")
    if not reset_peak_memory(device):
        pytest.skip("this system cannot reset a process's peak memory")
    before = peak_memory(device)
    torch.ones(25_000_000)
    assert before + 90e6 < peak_memory(device) < before + 130e6
    reset_peak_memory(device)
    assert peak_memory(device) < before + 50e6


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, mindalle.cli.benchmark; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
