"""A run that was stopped goes on as if it had not been: the same batches, losses and weights, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sequence_runs import assert_equal
from train_configs import Config, make_config, read_diary, read_weights, write_config, write_data

from mindalle.cli.train import main as train
from mindalle.training.checkpoints import AtomicCheckpointIO
from stage1_vqgan import VQGAN

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def data(tmp_path: Path, tiny_vqgan: VQGAN) -> Path:
    return write_data(tmp_path, tiny_vqgan)


def with_diary(config: Config, file: Path, **stop: int) -> Config:
    """The config of a run that tells what it does."""
    diary = {"class_path": "train_configs.Diary", "init_args": {"file": str(file), **stop}}
    callbacks = [*config["trainer"]["callbacks"], diary]
    return config | {"trainer": config["trainer"] | {"callbacks": callbacks}}


def configs(kind: str, data: Path, every: int, **stop: int) -> tuple[Path, Path, Path]:
    """Files of three configs: of a run that is not stopped, of one that is, and of the latter going on."""
    files = []
    for name, run, options in (("whole", "whole", {}), ("stopped", "cut", stop), ("resumed", "cut", {})):
        config = make_config(kind, data, data / run)
        config["checkpoint"]["every_n_train_steps"] = every
        config = with_diary(config, data / f"{run}.jsonl", **options)
        files.append(write_config(data / f"{name}.yaml", config))
    return files[0], files[1], files[2]


def check(data: Path, kept: int) -> None:
    """The run that was cut is the whole one, in all steps, and went on from step `kept`."""
    whole, cut = (read_diary(data / f"{run}.jsonl") for run in ("whole", "cut"))
    assert cut == whole
    assert list(whole) == list(range(1, 12))
    done = [line for line in (data / "cut.jsonl").read_text().splitlines() if f'"step": {kept + 1},' in line]
    assert len(done) == 2
    assert_equal(read_weights(data / "cut"), read_weights(data / "whole"))
    for run in ("cut", "whole"):  # the newest under its own name, and as last.ckpt
        assert len(list((data / run).glob("*.ckpt"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "every", "stop"),
    [
        ("vqgan", 3, 7),
        ("gpt", 3, 7),
        pytest.param("clip", 3, 7, marks=pytest.mark.slow),
        pytest.param("gpt", 4, 5, marks=pytest.mark.slow),  # after step 4 an epoch ends
    ],
)
def test_stopped_by_ctrl_c(data: Path, kind: str, every: int, stop: int) -> None:
    whole, stopped, resumed = configs(kind, data, every, interrupt_at=stop)
    assert train(["fit", "--config", str(whole)]) == 0
    with pytest.raises(SystemExit):
        train(["fit", "--config", str(stopped)])
    assert train(["fit", "--config", str(resumed), "--ckpt_path", "last"]) == 0
    check(data, kept=stop // every * every)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "gpt", "clip"])
def test_killed(data: Path, kind: str) -> None:
    """By the system, with a process that reads ahead."""

    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        options: dict[str, Any] = {"env": os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
        command = [sys.executable, str(ROOT / "tools" / "train.py"), "fit", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)

    whole, stopped, resumed = configs(kind, data, 3, kill_at=7)
    workers = ("--data.num_workers", 1)
    result = run("--config", whole, *workers)
    assert result.returncode == 0, result.stderr
    assert run("--config", stopped, *workers).returncode == -signal.SIGKILL
    result = run("--config", resumed, *workers, "--ckpt_path", "last")
    assert result.returncode == 0, result.stderr
    check(data, kept=6)


@pytest.mark.slow
def test_longer_than_planned(data: Path) -> None:
    """The steps after the last regular checkpoint were lost at the end of a training."""
    whole, short, _ = configs("gpt", data, 3)
    constant = ("--model.optimizer.final_share", "1.0")
    assert train(["fit", "--config", str(whole), *constant]) == 0
    assert train(["fit", "--config", str(short), *constant, "--trainer.max_steps", "8"]) == 0
    assert read_weights(data / "cut")["global_step"] == 8
    assert train(["fit", "--config", str(short), *constant, "--ckpt_path", "last"]) == 0
    assert read_diary(data / "cut.jsonl") == read_diary(data / "whole.jsonl")
    assert_equal(read_weights(data / "cut"), read_weights(data / "whole"))


class TestAtomicCheckpoints:
    def test_a_save_that_is_cut_short(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lightning's went through the system's temporary directory, often another disk: a copy in place."""
        path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
        writer.save_checkpoint({"step": 1}, path)
        save = torch.save

        def half(content: Any, file: Path) -> None:
            assert Path(file).parent == tmp_path
            save(content, file)
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise OSError("no space left")

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="no space left"):
            writer.save_checkpoint({"step": 2}, path)
        assert torch.load(path, weights_only=True) == {"step": 1}
        assert list(tmp_path.iterdir()) == [path]

    def test_what_a_killed_one_left_is_removed(self, tmp_path: Path) -> None:
        (tmp_path / ".last-x7.ckpt").write_bytes(b"half of it")
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

    def test_the_command_line_uses_it(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_fabric.utilities.cloud_io._atomic_save", None)
        monkeypatch.setattr("lightning_fabric.plugins.io.torch_io._atomic_save", None)
        config = write_config(data / "clip.yaml", make_config("clip", data, data / "run", max_steps=1))
        assert train(["fit", "--config", str(config)]) == 0
        assert read_weights(data / "run")["global_step"] == 1
