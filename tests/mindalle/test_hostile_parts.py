"""Tokenizers, CLIPs and names that are broken or hostile: one line that is no danger to a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoint_io import CheckpointError, check_finite
from mindalle.cli.command import MAX_MESSAGE, Parser, check_writable, describe, run, say
from mindalle.clip import ClipTokenizer
from mindalle.rerank import ClipReranker
from mindalle.text import TextTokenizer


class Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


def test_errors_are_short_and_do_nothing_to_a_terminal() -> None:
    """A file could clear the screen by a key's name, or fill it with a megabyte."""
    assert describe(ValueError("a\x1b[2J\x07b\u202ec \udcff")) == r"a\x1b[2J\x07b\u202ec \udcff"
    assert describe(ValueError("rote Äpfel, 빨간 🍎")) == "rote Äpfel, 빨간 🍎"
    long = describe(ValueError("begin " + "x" * 10**6 + " end"))
    assert len(long) < MAX_MESSAGE + 10
    assert long.startswith("begin")
    assert long.endswith("end")


def test_a_name_that_is_no_text_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    say(Path("a\udcff.png"))
    assert capsys.readouterr().out == "a\\udcff.png\n"


def test_a_panic_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def panic(args: object) -> None:
        raise Panic("index out of range")

    assert run(Parser(prog="x.py", description="", examples=""), panic, []) == 1
    assert capsys.readouterr().err.startswith("x.py: error: Panic: index out of range")


def test_a_panic_of_the_tokenizers_library_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text_tokenizer.json").write_text("{}")

    class Panicking:
        @staticmethod
        def from_file(path: str) -> None:
            raise Panic("called `unwrap()` on a `None` value")

    monkeypatch.setattr("mindalle.text.Tokenizer", Panicking)
    with pytest.raises(CheckpointError, match=r"text_tokenizer\.json is not a readable text tokenizer"):
        TextTokenizer.from_file(tmp_path / "text_tokenizer.json", length=4)


def test_ids_of_a_clip_beyond_its_vocabulary() -> None:
    """A vocabulary with gaps gave the id of another word's end, or one that no embedding has."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenize = ClipTokenizer(Tokenizer(WordLevel({"apple": 500, "[UNK]": 0}, unk_token="[UNK]")), 8)
    with pytest.raises(ValueError, match="gives the id 500, expected ids below 2"):
        tokenize(["apple"])


def test_weights_that_are_no_numbers_are_refused_by_name() -> None:
    """NaN in an image tokenizer drew black pictures, exit code 0."""
    model = nn.Linear(2, 2)
    check_finite(model, source="x")
    model.bias.data[1] = torch.nan
    with pytest.raises(CheckpointError, match="x is damaged: its bias holds NaN"):
        check_finite(model, source="x")


def test_features_that_are_no_numbers_rank_nothing() -> None:
    """The score was NaN, in results.jsonl too, which is then no JSON."""

    class Broken:
        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return torch.full((len(image), 4), torch.nan)

        def encode_text(self, text: torch.Tensor) -> torch.Tensor:
            return torch.full((len(text), 4), torch.nan)

    reranker = ClipReranker(Broken(), lambda image: torch.zeros(3, 4, 4), lambda texts: torch.zeros(1, 4))
    with pytest.raises(FloatingPointError, match="the CLIP gives features that are NaN"):
        reranker.encode_texts(["a"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a directory that takes no files")
def test_a_directory_that_takes_no_files_is_found_at_once(tmp_path: Path) -> None:
    """Rights do not tell: it was found after drawing."""
    check_writable(tmp_path / "new", "--out")
    with pytest.raises(OSError, match="--out /proc/self/new"):
        check_writable(Path("/proc/self/new"), "--out")
    with pytest.raises(OSError, match="--out: File name too long"):
        check_writable(tmp_path / ("x" * 300), "--out")
    assert not list(tmp_path.iterdir())
