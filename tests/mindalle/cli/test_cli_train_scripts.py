"""`train.py` as a process: two processes that learn as one, and the whole way from pictures to pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from train_configs import make_config, read_diary, read_weights, write_config, write_data

from mindalle.run import open_run
from stage1_vqgan import VQGAN

ROOT = Path(__file__).resolve().parents[3]


def run(script: str, *argv: object, cwd: Path | None = None) -> tuple[str, str]:
    """Output and errors of a script that succeeds."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / script), *map(str, argv)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "vqgan"])
def test_two_processes_learn_as_one(tmp_path: Path, tiny_vqgan: VQGAN, kind: str) -> None:
    """The batches of the two are those of the one, so are the losses of a GPT; a VQGAN's adversary and
    codebooks see half a batch each. What is written is written once.
    """
    data = write_data(tmp_path, tiny_vqgan)
    sheets = [{"class_path": "mindalle.training.ReconstructionSheet"}] if kind == "vqgan" else []
    diaries = {}
    for name, batch_size, devices in (("one", 4, 1), ("two", 2, 2)):
        diary = {"class_path": "train_configs.Diary", "init_args": {"file": str(data / f"{name}.jsonl")}}
        trainer = {"max_steps": 6, "enable_progress_bar": True, "logger": True}
        config = make_config(kind, data, data / name, callbacks=[*sheets, diary], **trainer)
        config["data"]["init_args"]["batch_size"] = batch_size
        config["trainer"] |= {"devices": devices, "strategy": "ddp" if devices == 2 else "auto"}
        if kind == "gpt":  # each process draws its own
            config["model"]["init_args"]["null_probability"] = 0.0
            config["model"]["init_args"]["config"] |= {
                "transformer": {"width": 32, "num_layers": 2, "num_heads": 2}
            }
            config["data"]["init_args"]["bpe_dropout"] = 0.0
        out, err = run("train.py", "fit", "--config", write_config(data / f"{name}.yaml", config))
        diaries[name] = read_diary(data / f"{name}.jsonl")
        lines = (out + err).replace("\r", "\n").splitlines()
        assert len([line for line in lines if line.startswith("Epoch 0:   0%") and "?it/s]" in line]) == 1
    one, two = diaries["one"], diaries["two"]
    assert list(two) == list(one) == list(range(1, 7))
    for step in one:
        assert two[step]["keys"] == one[step]["keys"][::2]  # rank 0 has every second of them
        if kind == "gpt":
            assert two[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-4)
    names = [
        sorted(str(path.relative_to(data / name)) for path in (data / name).rglob("*")) for name in diaries
    ]
    kept = [[name for name in some if "events" not in name] for some in names]
    assert kept[0] == kept[1]
    assert len([name for name in names[1] if "events" in name]) == 1
    assert read_weights(data / "two")["global_step"] == 6
    open_run(data / "two").build(tiny_vqgan.codebook().detach())


@pytest.mark.slow
def test_from_pictures_to_pictures(tmp_path: Path) -> None:
    """The toy configs, as they tell it themselves, shortened: tokenizers, codes, models, drawings."""
    for name in ("examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)

    def train(name: str, steps: int) -> None:
        short = ("--trainer.max_steps", steps, "--trainer.val_check_interval", steps)
        run("train.py", "fit", "--config", f"configs/toy/{name}.yaml", *short, cwd=tmp_path)
        assert open_run(tmp_path / "runs" / "toy" / name).num_steps == steps

    comments = [f"#   python tools/{line}" for line in ("train_tokenizer.py", "encode.py")]
    commands = [
        line.removeprefix("#   python tools/").split()
        for line in (ROOT / "configs" / "toy" / "gpt.yaml").read_text().splitlines()
        if line.startswith(tuple(comments))
    ]
    assert [script for script, *_ in commands] == ["train_tokenizer.py", "encode.py"]
    train("vqgan", 20)
    for script, *argv in commands:
        run(script, *argv, cwd=tmp_path)
    train("gpt", 20)
    train("clip", 10)
    assert list((tmp_path / "runs/toy/vqgan/samples").glob("reconstructions_*20.png"))
    assert list((tmp_path / "runs/toy/gpt/samples").glob("prompts_*20.png"))
    run("export.py", "runs/toy/gpt", "my-model", "--clip", "runs/toy/clip", "--top-k", 16, cwd=tmp_path)
    options = ("--num-images", 2, "--num-candidates", 3, "--seed", 0, "--out", "drawn")
    out, _ = run("generate.py", "--model", "./my-model", "--prompt", "a red circle", *options, cwd=tmp_path)
    assert len(out.splitlines()) == 2
    assert all("score" in line for line in out.splitlines())
    for line in out.splitlines():
        with Image.open(tmp_path / line.split("  ")[0]) as image:
            assert image.size == (32, 32)
    parts = yaml.safe_load((tmp_path / "my-model" / "config.yaml").read_text())
    assert {"image_tokenizer", "model", "clip", "sampling"} <= set(parts)
