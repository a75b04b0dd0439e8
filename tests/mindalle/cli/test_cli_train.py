"""`train.py`: what it refuses and says, what it keeps, how a run is validated and started from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_results import Command, Result
from shard_files import write_pictures
from train_configs import make_config, write_config, write_data

from mindalle.run import open_run
from mindalle.training import GPTTraining
from stage1_vqgan import VQGAN

SLOW = pytest.mark.slow
KINDS = ["clip", pytest.param("gpt", marks=SLOW), pytest.param("vqgan", marks=SLOW)]


@pytest.fixture
def data(tmp_path: Path, tiny_vqgan: VQGAN) -> Path:
    return write_data(tmp_path, tiny_vqgan)


@pytest.fixture
def fit(mindalle: Command, data: Path) -> Command:
    """`fit("gpt", "--trainer.max_steps", 2)`, three steps unless told otherwise, into `data / "run"`."""

    def call(kind: str, *argv: object, command: str = "fit", **trainer: Any) -> Result:
        config = make_config(kind, data, data / "run", **{"max_steps": 3, **trainer})
        file = write_config(data / f"{kind}.yaml", config)
        return mindalle("train", command, "--config", file, *argv)

    return call


def assert_error(result: Result, code: int, *parts: str) -> None:
    """One line (below a progress bar, if there is one) that has these parts."""
    lines = [line for line in result.err if line.strip() and not line.startswith("encoding: ")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("train.py: error: ")
    for part in parts:
        assert part in lines[0]
    assert result.code == code
    assert result.out == []


class TestUsage:
    """Everything that can be seen before anything is built."""

    @pytest.mark.parametrize(
        ("argv", "parts"),
        [
            (["--trainer.max_stepz", 3], ["unrecognized arguments: --trainer.max_stepz 3"]),
            (["--trainer.max_step", 3], ["--trainer.max_step"]),  # no abbreviations
            (["--trainer.max_steps", "many"], ['"trainer.max_steps"', "Expected", "int", "Got value: many"]),
            (["--model.lr", 3], ['"model"', "VQGANTraining", "'lr' is not accepted"]),
            (["--model.config.code_book", 3], ["VQGANConfig", "'code_book' is not accepted"]),
            (["--model.config.quantizer.codebooksize", 3], ["--quantizer.codebooksize=3"]),
            (["--data.batchsize", 3], ['"data"', "ImageData", "'batchsize' is not accepted"]),
            (["--data.batch_size", "two"], ['"batch_size"', "int", "Got value: two"]),
            (["--checkpoint.every", 3], ["unrecognized arguments: --checkpoint.every 3"]),
            (["--model", "NoSuchModel"], ['"model"', "NoSuchModel"]),
            (
                ["--config", "nowhere.yaml"],
                ["--config nowhere.yaml: no such file, and no recipe of this name"],
            ),
        ],
    )
    def test_of_options(self, fit: Command, argv: list[object], parts: list[str]) -> None:
        assert_error(fit("vqgan", *argv), 2, *parts, "(see train.py fit --help)")

    @pytest.mark.parametrize("place", ["", "trainer", "model.init_args", "data.init_args", "checkpoint"])
    def test_unknown_key_in_the_file(self, mindalle: Command, data: Path, place: str) -> None:
        config = make_config("gpt", data, data / "run")
        section = config
        for name in filter(None, place.split(".")):
            section = section[name]
        section["colour"] = "red"
        result = mindalle("train", "fit", "--config", write_config(data / "wrong.yaml", config))
        assert_error(result, 2, "colour")

    def test_no_command(self, mindalle: Command) -> None:
        assert_error(mindalle("train", "frobnicate"), 2, "invalid choice: 'frobnicate'", "'fit', 'validate'")


def test_help_has_examples(mindalle: Command) -> None:
    """Also that of the command as a whole, which names no config."""
    for arguments in (("--help",), ("fit", "--help")):
        result = mindalle("train", *arguments)
        assert result.code == 0
        assert "  train.py fit --config configs/toy/vqgan.yaml" in result.out


MISFITS = [
    ("vqgan", ["--model.config.quantizer.codebook_size", 0], ["codebook_size", "at least 1, got 0"]),
    ("vqgan", ["--data.train", "nowhere"], ["no pictures at nowhere: expected a directory"]),
    ("vqgan", ["--data.train", "broken"], ["no readable picture in broken: ", "not a picture of"]),
    ("vqgan", ["--trainer.max_steps", -1], ["the training needs an end: set trainer.max_steps"]),
    ("gpt", ["--data.text_tokenizer", "none.json"], ["no text tokenizer at none.json: train one", "6"]),
    ("gpt", ["--model.config.code_shape", [8, 8]], ["(8, 8), its image tokenizer makes (4, 4)"]),
    ("clip", ["--data.transform.image_size", 24], ["(B, 3, 16, 16)", "transform.image_size to 16"]),
]
RARER_MISFITS = [
    ("vqgan", ["--data.train", "empty"], ["no pictures in empty: expected png"]),
    ("vqgan", ["--data.transform.image_size", 24], ["(B, 3, 16, 16)", "got (2, 3, 24, 24)"]),
    ("vqgan", ["--trainer.accelerator", "cuda"], ["can not run on your system"]),
    ("vqgan", ["--trainer.enable_checkpointing", "false"], ["enable_checkpointing=False"]),
    ("vqgan", ["--ckpt_path", "nowhere.ckpt"], ["no training run at nowhere.ckpt"]),
    ("gpt", ["--data.image_tokenizer", "./none"], ["no such file or directory: ./none"]),
    ("gpt", ["--data.train", "empty"], ["no pictures in empty"]),
    ("gpt", ["--data.train", "broken"], ["none of the 3 pictures of broken can be read"]),
    ("gpt", ["--data.train", "silent"], ["2 of 2 pictures", "have no caption: set condition to"]),
    ("gpt", ["--data.cache_dir", "null"], ["is not encoded yet: set cache_dir"]),
    ("gpt", ["--data.text_length", 7], ["gives 7 ids", "the model reads 6"]),
    ("gpt", ["--model.config.vocab_size", 25], ["vocabulary of 25 codes, its image tokenizer 24"]),
    ("clip", ["--model.text_tokenizer", "none.json"], ["no tokenizer at none.json"]),
    ("clip", ["--data.train", "silent"], ["no picture of", "silent has a caption, none of"]),
]


@pytest.mark.parametrize(
    ("kind", "argv", "parts"), [*MISFITS, *(pytest.param(*row, marks=SLOW) for row in RARER_MISFITS)]
)
def test_what_does_not_go_together(
    fit: Command, data: Path, monkeypatch: pytest.MonkeyPatch, kind: str, argv: list[object], parts: list[str]
) -> None:
    monkeypatch.chdir(data)
    (data / "empty").mkdir()
    write_pictures(data / "silent", ["0.png", "1.png"])
    for path in write_pictures(data / "broken", [f"{index}.png" for index in range(3)]):
        path.write_bytes(b"no picture")
    assert_error(fit(kind, *argv), 1, *parts)
    assert not list(data.rglob("*.ckpt"))


@SLOW
def test_codes_of_another_tokenizer(fit: Command, data: Path) -> None:
    assert fit("gpt").code == 0
    shutil.rmtree(data / "run")
    tokenizer = data / "tokenizer" / "image_tokenizer.safetensors"
    content = bytearray(tokenizer.read_bytes())
    content[-1] ^= 1
    tokenizer.write_bytes(content)
    assert_error(fit("gpt"), 1, "codes", "another", "tokenizer: ")


def test_debug_shows_where(fit: Command) -> None:
    result = fit("vqgan", "--data.train", "nowhere", "--debug")
    assert result.code == 1
    assert "Traceback (most recent call last):" in result.err
    assert result.err[-1].startswith("train.py: error: no pictures at nowhere")


def test_a_bug_keeps_its_stack_trace(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(GPTTraining, "configure_optimizers", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        fit("gpt")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestFolder:
    """A folder holds one run."""

    def test_another_run_is_refused(self, fit: Command, data: Path) -> None:
        """It overwrote config.yaml and left a last-v1.ckpt that was newer than last.ckpt."""
        assert fit("clip").code == 0
        before = snapshot(data / "run")
        assert {"config.yaml", "last.ckpt"} <= set(before)
        expected = "run already holds a run (step 3): continue it with --ckpt_path last, or choose another tr"
        assert_error(fit("clip", "--data.batch_size", 4), 1, expected)
        shutil.copytree(data / "run", data / "other")
        assert_error(fit("clip", "--ckpt_path", data / "other" / "last.ckpt"), 1, expected)
        assert snapshot(data / "run") == before

    def test_the_last_of_no_run(self, fit: Command, data: Path, caplog: pytest.LogCaptureFixture) -> None:
        """So that one command starts a run and goes on with it."""
        assert fit("clip", "--ckpt_path", "last").code == 0
        warnings = [record.message for record in caplog.records if record.name == "mindalle.cli.train"]
        assert warnings == [f"no checkpoint in {data / 'run'} yet: starting from the beginning"]
        caplog.clear()
        assert fit("clip", "--ckpt_path", "last", max_steps=4).code == 0
        assert open_run(data / "run").num_steps == 4
        assert not [record for record in caplog.records if record.name == "mindalle.cli.train"]
        # the settings of the second, without where it started: that would hold for all who use the file
        settings = yaml.safe_load((data / "run" / "config.yaml").read_text())
        assert (settings["trainer"]["max_steps"], settings["ckpt_path"]) == (4, None)

    @SLOW
    def test_a_damaged_checkpoint(self, fit: Command, data: Path) -> None:
        assert fit("clip").code == 0
        last = data / "run" / "last.ckpt"
        last.write_bytes(last.read_bytes()[:5000])
        (other,) = (path.name for path in (data / "run").glob("epoch*.ckpt"))
        damaged = "last.ckpt (5000 bytes) is not a readable torch checkpoint"
        assert_error(fit("clip", "--ckpt_path", "last"), 1, damaged, f"The run's others: {other}")
        assert_error(fit("clip"), 1, "run already holds a run: continue")
        assert fit("clip", "--ckpt_path", data / "run" / other, max_steps=4).code == 0
        assert open_run(data / "run").num_steps == 4

    @SLOW
    def test_a_checkpoint_of_another_model(self, fit: Command, data: Path) -> None:
        """Dropout alone may change on the way."""
        assert fit("gpt").code == 0
        last = ("--ckpt_path", data / "run" / "last.ckpt")
        result = fit("gpt", *last, "--model.config.transformer.width", 64, max_steps=4)
        assert_error(result, 1, "another model than model.config describes (transformer.width 32 there, 64 h")
        assert_error(fit("clip", *last, max_steps=4), 1, "(kind gpt there, clip here")
        assert fit("gpt", *last, "--model.config.transformer.residual_dropout", 0, max_steps=4).code == 0

    def test_a_checkpoint_chooses_no_class(self, fit: Command, data: Path) -> None:
        """Lightning's command line builds what the file's hyper-parameters name."""
        assert fit("clip").code == 0
        last = data / "run" / "last.ckpt"
        content = torch.load(last, weights_only=True)
        content["hyper_parameters"] = {"_class_path": "subprocess.Popen", "args": "false"}
        torch.save(content, last)
        assert fit("clip", "--ckpt_path", last, max_steps=4).code == 0

    def test_a_dry_run_leaves_nothing(
        self, fit: Command, data: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert fit("clip").code == 0
        assert "read " in caplog.text  # a run says what the data were taken for
        assert " pictures" in caplog.text
        before = snapshot(data / "run")
        assert fit("clip", "--trainer.fast_dev_run", "true").code == 0
        assert snapshot(data / "run") == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_started_from_may_go(fit: Command, data: Path, kind: str) -> None:
    assert fit(kind).code == 0
    start, run = data / "start", data / "run"
    run.rename(start)
    options = ["--model.config", "null", "--model.pretrained", start]
    if kind == "clip":
        options += ["--model.text_tokenizer", "null"]
    if kind == "gpt":
        condition = "{kind: text, vocab_size: 64, length: 6}"
        options += ["--model.condition", condition]
    result = fit(kind, *options)
    assert result.code == 0, result.err
    shutil.rmtree(start)
    result = fit(kind, *options, "--ckpt_path", "last", max_steps=5)
    assert result.code == 0, result.err
    assert open_run(run).num_steps == 5
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["init_args"]["pretrained"] == str(start)  # where it came from


@pytest.mark.parametrize("kind", KINDS)
def test_validate(fit: Command, mindalle: Command, data: Path, kind: str) -> None:
    """With the averaged weights, if there are any; the run's folder stays as it is."""
    assert_error(fit(kind, command="validate"), 1, "no checkpoint in", "to validate: say which with --ckpt_p")
    assert_error(fit(kind, "--ckpt_path", "last", command="validate"), 1, "no checkpoint in")
    assert fit(kind).code == 0
    before = snapshot(data / "run")
    result = mindalle("train", "validate", "--config", data / "run" / "config.yaml", "--ckpt_path", "last")
    assert result.code == 0, result.err
    assert any("val/loss" in line for line in result.out)
    assert snapshot(data / "run") == before


@SLOW
def test_a_loss_that_is_no_number(fit: Command, data: Path) -> None:
    """What was saved before is of use, with a lower rate."""
    assert fit("gpt").code == 0
    before = snapshot(data / "run")
    wild = ("--ckpt_path", "last", "--model.optimizer.learning_rate", 1e30)
    result = fit("gpt", *wild, max_steps=9)
    names = ("loss is nan at step ", "; the batch: ", ".png", "--ckpt_path last and a lower learning_rate")
    assert_error(result, 1, *names)
    assert {**snapshot(data / "run"), "config.yaml": b""} == {**before, "config.yaml": b""}
    result = fit("gpt", "--ckpt_path", "last", "--model.optimizer.learning_rate", 1e-4, max_steps=9)
    assert result.code == 0, result.err
    assert open_run(data / "run").num_steps == 9


def test_unreadable_pictures_are_skipped(
    fit: Command, data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("2.png", "5.png"):
        (data / "pictures" / name).write_bytes(b"no picture")
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(data)}}
    with caplog.at_level(logging.WARNING, logger="mindalle"):
        assert fit("clip", max_steps=8, logger=logger, log_every_n_steps=1).code == 0  # two epochs
    messages = [record.message for record in caplog.records if record.name.startswith("mindalle")]
    for name in ("2.png", "5.png"):
        assert sum(f"skipped {name}: not a picture" in message for message in messages) == 2  # train and val
    assert sum("2 pictures could not be read in epoch" in message for message in messages) == 2
    (table,) = data.rglob("metrics.csv")
    names, *rows = table.read_text().splitlines()
    column = names.split(",").index("train/skipped")
    assert {row.split(",")[column] for row in rows} == {"", "1.0", "2.0"}
