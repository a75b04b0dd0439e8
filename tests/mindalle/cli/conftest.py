"""The commands, called in this process, on small checkpoints of every layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_results import Command, Result, brightness
from oracle.make import make_mindalle, make_mindalle_finetuned, make_rq, make_taming
from PIL import Image
from torch import Tensor

from mindalle.rerank import ClipReranker
from mindalle.text import TextTokenizer

CAPTIONS = ["a red apple", "a green apple", "a red car", "a green car on a road", "two red cars"]


@pytest.fixture
def mindalle(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`mindalle("generate", "--prompt", ...)` as the scripts do it; the process is left as it was."""
    root, own = logging.getLogger(), logging.getLogger("mindalle")
    before = (list(root.handlers), root.level, own.level)

    def call(name: str, *argv: object) -> Result:
        module = import_module(f"mindalle.cli.{name}")
        capsys.readouterr()
        try:
            code = module.main([str(argument) for argument in argv])
        except SystemExit as leave:  # argparse
            code = leave.code
        out, err = capsys.readouterr()
        lines = err.replace("\r", "\n").splitlines()
        device = [line for line in lines if ": device " in line]
        return Result(code, out.splitlines(), [line for line in lines if line not in device], device)

    yield call
    root.handlers[:], level, own_level = before
    root.setLevel(level)
    own.setLevel(own_level)


@pytest.fixture
def generate(mindalle: Command, text_model: Path, tmp_path: Path) -> Command:
    """`generate.py` with the text model and `tmp_path / "out"`, unless other arguments come."""
    defaults = ("--model", text_model, "--out", tmp_path / "out")
    return lambda *argv: mindalle("generate", *defaults, *argv)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16x16 pixels, codes (4, 4) or (4, 4, 3), V = 24; texts of 6 ids, or 10 classes."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("mindalle", "rq-text"):
        (root / name).mkdir()
        TextTokenizer.train(CAPTIONS, vocab_size=40, length=6).save(root / name / "text_tokenizer.json")
    make_mindalle(root / "mindalle")
    make_mindalle_finetuned(root / "mindalle-class", "class")
    make_mindalle_finetuned(root / "mindalle-free", "none")
    make_rq(root / "rq-text", "text")
    make_rq(root / "rq-class", "class")
    make_rq(root / "rq-free", "none", ema=False)
    make_taming(root / "taming")
    return root


@pytest.fixture(scope="session")
def text_model(checkpoints: Path) -> Path:
    return checkpoints / "mindalle"


@pytest.fixture
def clip_of_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """--clip NAME loads a judge that likes bright pictures."""

    class Judge:
        weights_hash = "b" * 64

        def score(self, images: Sequence[Image.Image], prompt: str) -> Tensor:
            assert isinstance(prompt, str)
            return torch.tensor([brightness(image) for image in images])

    monkeypatch.setattr(ClipReranker, "from_pretrained", lambda name, device: Judge())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of random pixels, as large as the models'."""
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
