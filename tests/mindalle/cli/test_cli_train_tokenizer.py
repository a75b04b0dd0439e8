"""`train_tokenizer.py`: captions from pictures or texts, how long they are in ids, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_results import Command
from shard_files import write_pictures, write_shard

from mindalle.text import TextTokenizer

LINES = ["A red square", "a blue square", "the blue circle on a red square", "circle"]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n\n".join(LINES) + "\n \n", encoding="utf-8")
    return path


def test_text_files(mindalle: Command, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "words.json"
    result = mindalle("train_tokenizer", words, words, "--vocab-size", 200, "--length", 3, "--out", out)
    assert result.code == 0, result.err
    tokenizer = TextTokenizer.from_file(out, length=8)
    assert (
        tokenizer.tokenizer.to_str()
        == TextTokenizer.train(LINES * 2, vocab_size=200, length=3).tokenizer.to_str()
    )
    lengths = sorted(tokenizer.count_ids(LINES))
    assert lengths == [1, 3, 3, 7]
    assert result.out == [
        f"{out}  {tokenizer.vocab_size} of 200 words",
        "ids per caption  median 3, 99% up to 7, longest 7",
        "cut at --length 3  2 captions, 25.00%",
    ]
    assert any("training on 8 captions" in line for line in result.err)


def test_captions_of_pictures(mindalle: Command, tmp_path: Path) -> None:
    """Of several sources; no picture is decoded: these cannot be."""
    shard = write_shard(tmp_path / "0.tar", range(2), {0: ["red", "a red square"], 1: []})
    for path in write_pictures(tmp_path / "pictures", ["0.png", "1.png"]):
        path.write_bytes(b"broken")
    (tmp_path / "pictures" / "0.txt").write_text("a blue circle\na circle\n")
    out = tmp_path / "words.json"
    result = mindalle("train_tokenizer", shard, tmp_path / "pictures", "--vocab-size", 60, "--out", out)
    assert result.code == 0, result.err
    assert any("training on 4 captions" in line for line in result.err)
    assert TextTokenizer.from_file(out, length=4).tokenizer.encode("a red circle").tokens == [
        *("a</w>", "red</w>", "circle</w>")
    ]
    assert sorted(json.loads(out.read_text())["model"]["vocab"].values())[-1] < 60


@pytest.mark.parametrize(
    ("name", "content", "options", "code", "message"),
    [
        ("empty.txt", b"\n \n", [], 1, "no captions in {path}: expected captioned pictures, or a .txt file"),
        ("bytes.txt", b"fine\n\xff\xfe\n", [], 1, "{path}:2: expected UTF-8 text, got b'\\xff\\xfe\\n'"),
        ("words.md", b"words", [], 1, "{path} is no source of pictures"),
        ("fine.txt", b"words", ["--vocab-size", 3], 2, "--vocab-size must be at least 4, got 3"),
        ("fine.txt", b"words", ["--length", 0], 2, "--length: must be a whole number of at least 1"),
        ("fine.txt", b"words", ["--out", "words.txt"], 2, "--out must be a .json file, got words.txt"),
    ],
)
def test_errors(
    mindalle: Command,
    tmp_path: Path,
    name: str,
    content: bytes,
    options: list[object],
    code: int,
    message: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    result = mindalle("train_tokenizer", path, "--out", tmp_path / "words.json", *options)
    assert result.code == code
    assert message.format(path=path) in result.err[-1]
    assert not (tmp_path / "words.json").exists()


def test_nothing_is_overwritten(mindalle: Command, words: Path, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text("precious")
    result = mindalle("train_tokenizer", words, "--out", tmp_path / "words.json")
    assert (result.code, len(result.err)) == (1, 1)
    assert "words.json exists, and nothing is overwritten: choose another --out" in result.err[0]
    assert (tmp_path / "words.json").read_text() == "precious"


def test_nothing_there(mindalle: Command, tmp_path: Path) -> None:
    result = mindalle("train_tokenizer", tmp_path / "none.txt", "--out", tmp_path / "words.json")
    assert result.code == 1
    assert f"no pictures at {tmp_path / 'none.txt'}" in result.err[-1]
