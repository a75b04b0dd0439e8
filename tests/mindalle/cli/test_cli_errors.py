"""What goes wrong is one line that says what, got, expected and how to mend it; 2 = usage, 1 = failure."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_results import Command, Result
from oracle.make import make_mindalle, make_rq, make_taming
from PIL import Image

from mindalle.cli.command import describe
from mindalle.pipeline import Pipeline
from mindalle.text import TextTokenizer

PROMPT = ("--prompt", "a red apple")


def assert_one_line(result: Result, code: int, *words: str, prog: str = "generate.py") -> None:
    """Words are parts of the line in any order; " ... " separates parts."""
    assert len(result.err) == 1, result.err
    assert result.err[0].startswith(f"{prog}: error: ")
    for part in " ... ".join(words).split(" ... "):
        assert part in result.err[0]
    assert result.code == code
    assert result.out == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((*PROMPT, "--temperature", -1), "--temperature must be finite ... got -1"),
        ((*PROMPT, "--temperature", "nan"), "--temperature must be finite"),
        ((*PROMPT, "--temperature", "hot"), "--temperature: invalid float value: 'hot'"),
        ((*PROMPT, "--top-k", 0), "--top-k must be ... got 0; leaving it out keeps all codes"),
        ((*PROMPT, "--top-k", 5, -2), "--top-k must be ... got (5, -2)"),
        ((*PROMPT, "--top-p", 0), "--top-p must be in (0, 1], got 0.0"),
        ((*PROMPT, "--top-p", 1.5), "--top-p must be in (0, 1], got 1.5"),
        (
            (*PROMPT, "--cfg-scale", -0.5),
            "--cfg-scale must be finite ... got -0.5",
        ),
        ((*PROMPT, "--num-images", 0), "--num-images: must be a whole number of at least 1, got '0'"),
        ((*PROMPT, "--num-images", "two"), "--num-images: must be a whole number of at least 1, got 'two'"),
        ((*PROMPT, "--batch-size", -4), "--batch-size: must be a whole number of at least 1, got '-4'"),
        (
            (*PROMPT, "--num-images", 4, "--num-candidates", 3),
            "--num-candidates must be at least --num-images = 4, got 3",
        ),
        ((*PROMPT, "--seed", "x"), "--seed: invalid int value: 'x'"),
        ((*PROMPT, "--seed", "1.5"), "--seed: invalid int value: '1.5'"),
        ((*PROMPT, "--precision", "fp8"), "--precision: invalid choice: 'fp8' (choose from"),
        ((*PROMPT, "--device", "banana"), "--device must be auto, cpu, cuda, cuda:N or mps, got 'banana'"),
        ((*PROMPT, "--device", "meta"), "--device must be auto, cpu, cuda, cuda:N or mps, got 'meta'"),
        ((*PROMPT, "--keep-rows", 2), "--complete IMAGE and --keep-rows N go together"),
        ((*PROMPT, "--complete", "half.png"), "--complete IMAGE and --keep-rows N go together"),
        ((*PROMPT, "--clip", "ViT-B/32", "--no-rerank"), "--clip and --no-rerank contradict each other"),
        (("--prompt", "  "), "--prompt is empty: say what to draw"),
        (("--prompt", "caf\udce9"), "--prompt is not UTF-8 text"),
        ((*PROMPT, "--num-im", 2), "unrecognized arguments: --num-im 2"),
        ((*PROMPT, "--loud"), "unrecognized arguments: --loud"),
    ],
)
def test_options_that_are_wrong_whatever_the_model(
    mindalle: Command, tmp_path: Path, argv: tuple[object, ...], words: str
) -> None:
    """They show before the model is loaded: this one cannot be."""
    result = mindalle("generate", "--model", tmp_path / "none.ckpt", "--out", tmp_path / "out", *argv)
    assert_one_line(result, 2, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "argv", "words"),
    [
        ("mindalle", (), "this model draws from text, got None: pass a prompt (--prompt TEXT)"),
        ("mindalle", ("--class-label", 3), "this model draws from text, got 3"),
        ("mindalle", (*PROMPT, "--top-k", 5, 5), "--top-k needs one value or ... got (5, 5)"),
        (
            "rq-text",
            (*PROMPT, "--top-k", 5, 5),
            "--top-k needs one value or ... 3 ... got (5, 5)",
        ),
        (
            "mindalle-class",
            PROMPT,
            "draws classes 0 to 9, got 'a red apple': pass a class label (--class-label N)",
        ),
        ("mindalle-class", ("--class-label", 10), "class label must be in [0, 10), got 10"),
        ("rq-class", ("--class-label", -1), "class label must be in [0, 10), got -1"),
        ("rq-class", ("--class-label", 1, *PROMPT), "got 'a red apple'"),
        ("mindalle-free", PROMPT, "this model is unconditional, got 'a red apple': pass no prompt"),
        (
            "rq-free",
            ("--class-label", 0),
            "this model is unconditional, got 0: pass no prompt and no class label",
        ),
        ("mindalle-free", ("--cfg-scale", 3), "--cfg-scale 3 needs a prompt or a class to guide towards"),
        ("rq-free", ("--cfg-scale", 0), "this model is unconditional: leave it out"),
    ],
)
def test_options_that_the_model_cannot_take(
    mindalle: Command, checkpoints: Path, tmp_path: Path, model: str, argv: tuple[object, ...], words: str
) -> None:
    result = mindalle("generate", "--model", checkpoints / model, "--out", tmp_path / "out", *argv)
    assert_one_line(result, 2, words)
    assert not (tmp_path / "out").exists()


def test_rows_to_keep(generate: Command, photo: Path) -> None:
    result = generate(*PROMPT, "--complete", photo, "--keep-rows", 4)
    assert_one_line(result, 2, "--keep-rows must be less than the model's 4 rows of codes, got 4")


def test_nothing_is_drawn_if_one_of_many_prompts_is_wrong(
    mindalle: Command, checkpoints: Path, tmp_path: Path
) -> None:
    labels = ("--class-label", 1, "--class-label", 2, "--class-label", 99)
    result = mindalle("generate", "--model", checkpoints / "rq-class", "--out", tmp_path / "out", *labels)
    assert_one_line(result, 2, "got 99")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "prompts.txt holds no prompts: write one per line"),
        (b"\xef\xbb\xbf\n \r\n\t\n", "prompts.txt holds no prompts: write one per line"),
        (b"a cat\nun caf\xe9\n", "prompts.txt is not UTF-8 text: line 2 has a byte 0xe9; save it as UTF-8"),
        ("a cat".encode("utf-16"), "is not UTF-8 text: line 1"),
        (None, "no prompts file at"),
    ],
)
def test_prompt_files(generate: Command, tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    assert_one_line(generate("--prompts-file", tmp_path / "prompts.txt"), 1, words)
    assert_one_line(generate("--prompts-file", tmp_path), 1, "no prompts file at")


def test_cuda_where_there_is_none(generate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = generate(*PROMPT, "--device", "cuda")
    assert_one_line(result, 1, "--device cuda: this machine has no CUDA devices; take cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = generate(*PROMPT, "--device", "cuda:2")
    assert_one_line(result, 1, "--device cuda:2: this machine has 2 CUDA devices")


# images


def broken_images(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    content = whole.read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").write_bytes(b"")
    flipped = bytearray(content)
    flipped[30] ^= 0xFF  # in the header, whose checksum is then wrong
    (folder / "flipped.png").write_bytes(flipped)
    bomb = bytearray(content)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height
    bomb[29:33] = zipfile.crc32(bomb[12:29]).to_bytes(4, "big")  # type: ignore[attr-defined]
    (folder / "bomb.png").write_bytes(bomb)
    Image.new("1", (1, 65000)).save(folder / "line.png")
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return {path.stem: path for path in folder.glob("*.png")}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut", "cut.png is not a readable picture: "),
        ("text", "text.png is not a picture of a known format: expected PNG, JPEG"),
        ("empty", "empty.png is not a picture of a known format"),
        ("flipped", "flipped.png is not"),
        ("bomb", "bomb.png is refused: Image size (3600000000 pixels) exceeds limit"),
        ("line", "line.png is no picture but a line: 1 x 65000 pixels"),
        ("program", "program.png is not a picture of a known format"),
        ("missing", "no image at"),
    ],
)
def test_unreadable_images(
    generate: Command, mindalle: Command, text_model: Path, tmp_path: Path, name: str, words: str
) -> None:
    path = broken_images(tmp_path).get(name, tmp_path / "missing.png")
    result = generate(*PROMPT, "--complete", path, "--keep-rows", 1)
    assert_one_line(result, 1, words)
    result = mindalle("reconstruct", path, "--model", text_model, "--out", tmp_path / "out")
    assert_one_line(result, 1, words, prog="reconstruct.py")
    assert not (tmp_path / "out").exists()


# checkpoints


@pytest.fixture
def copy(checkpoints: Path, tmp_path: Path) -> Any:
    """A checkpoint to damage."""
    return lambda name: Path(shutil.copytree(checkpoints / name, tmp_path / name))


@pytest.mark.parametrize("name", ["./nothing", "nothing.ckpt", "no/such/place"])
def test_a_missing_checkpoint(generate: Command, name: str) -> None:
    assert_one_line(generate("--model", name, *PROMPT), 1, f"no such file or directory: {name}")


def test_an_unknown_model_name_lists_the_known(generate: Command) -> None:
    result = generate("--model", "nothing", *PROMPT)
    assert_one_line(result, 1, "no model is called 'nothing'", "minDALL-E/1.3B", "--model PATH")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9, -1])
@pytest.mark.parametrize(
    ("name", "file"),
    [("mindalle", "stage2_last.ckpt"), ("mindalle-class", "last.ckpt"), ("rq-class", "stage1/model.pt")],
)
def test_a_truncated_checkpoint(generate: Command, copy: Any, name: str, file: str, kept: float) -> None:
    path = copy(name) / file
    content = path.read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept % len(content)
    path.write_bytes(content[:size])
    what = ("--class-label", 1) if "class" in name else PROMPT
    result = generate("--model", path.parents[file.count("/")], *what)
    assert_one_line(result, 1, str(path), f"({size} bytes) is not a readable torch checkpoint", "cut short?")


def test_a_truncated_native_checkpoint(
    generate: Command, mindalle: Command, text_model: Path, tmp_path: Path
) -> None:
    assert mindalle("convert", text_model, tmp_path / "native").code == 0
    path = tmp_path / "native" / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 7, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        result = generate("--model", tmp_path / "native", *PROMPT)
        assert_one_line(result, 1, f"{path} ({size} bytes) is not a readable safetensors file", "cut short?")
    path.unlink()
    assert_one_line(generate("--model", tmp_path / "native", *PROMPT), 1, f"no checkpoint file at {path}")


def test_wrong_keys_are_listed(generate: Command, copy: Any) -> None:
    folder = copy("mindalle")
    path = folder / "stage2_last.ckpt"
    content = torch.load(path, weights_only=True)
    weights = content["state_dict"]
    weights["blocks.0.ln9.weight"] = weights.pop("blocks.0.ln1.weight")
    weights["head_img.weight"] = weights["head_img.weight"][:-1]
    torch.save(content, path)
    result = generate("--model", folder, *PROMPT)
    assert_one_line(
        *(
            result,
            1,
            str(path),
            "does not fit its config",
            "blocks.0.ln9.weight",
            "head_img.weight has shape",
        ),
        *("missing transformer.blocks.0.norm1.weight", "Is this config.yaml the one of these weights?"),
    )


def test_stages_of_different_vocabularies(generate: Command, tmp_path: Path) -> None:
    words = "both must come from one release"
    make_mindalle(tmp_path / "gpt", vocab_size_img=25)
    result = generate("--model", tmp_path / "gpt", *PROMPT)
    assert_one_line(result, 1, "a vocabulary of 25 codes, its image tokenizer 24", words)
    make_rq(tmp_path / "rq", "class", arch__vocab_size=30)
    result = generate("--model", tmp_path / "rq", "--class-label", 1)
    assert_one_line(result, 1, "a vocabulary of 30 codes, its image tokenizer 24", words)
    make_rq(tmp_path / "grid", "class", arch__block_size=[2, 2, 3])
    result = generate("--model", tmp_path / "grid", "--class-label", 1)
    assert_one_line(result, 1, "draws codes of shape (2, 2, 3)", "makes (4, 4, 3)", words)


def test_a_pickle_never_runs_code(mindalle: Command, generate: Command, copy: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    make_taming(tmp_path / "taming", canary=canary)
    result = mindalle("convert", tmp_path / "taming", tmp_path / "out")
    assert_one_line(result, 1, "is refused", "run", prog="convert_checkpoint.py")

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    folder = copy("mindalle")
    (folder / "stage2_last.ckpt").write_bytes(pickle.dumps({"state_dict": Hostile()}, protocol=2))
    assert_one_line(generate("--model", folder, *PROMPT), 1, str(folder / "stage2_last.ckpt"))
    assert not canary.exists()


def test_other_damage(generate: Command, copy: Any, checkpoints: Path, tmp_path: Path) -> None:
    folder = copy("mindalle")
    (folder / "config.yaml").write_text("stage1: [unclosed")
    assert_one_line(generate("--model", folder, *PROMPT), 1, "config.yaml is not valid YAML")
    (folder / "config.yaml").write_text("stage1: {hparams: {ch: 32}}\nstage2: {}\n")
    assert_one_line(generate("--model", folder, *PROMPT), 1, str(folder))
    (tmp_path / "empty").mkdir()
    result = generate("--model", tmp_path / "empty", *PROMPT)
    assert_one_line(
        result, 1, "is no checkpoint of a known layout: it holds nothing. Expected one of: native"
    )
    result = generate("--model", checkpoints / "taming", *PROMPT)
    assert_one_line(result, 1, "this checkpoint holds an image tokenizer only")
    result = generate("--model", checkpoints / "rq-text" / "stage2", *PROMPT)
    assert_one_line(result, 1, "a sequence model but no image tokenizer")
    result = generate("--ema", *PROMPT)
    assert_one_line(result, 1, "has no EMA weights")


def test_text_tokenizers(generate: Command, copy: Any, checkpoints: Path, tmp_path: Path) -> None:
    folder = copy("rq-text")
    words = folder / "text_tokenizer.json"
    words.write_text("{")
    result = generate("--model", folder, *PROMPT)
    assert_one_line(result, 1, f"{words} is not a readable text tokenizer")
    words.unlink()
    result = generate("--model", folder, *PROMPT)
    assert_one_line(
        result, 2, "this checkpoint has no text tokenizer", "--text-tokenizer", "bpe-16k-vocab.json"
    )
    result = generate("--model", folder, *PROMPT, "--text-tokenizer", words)
    assert_one_line(result, 1, f"no text tokenizer at {words}")
    result = generate("--model", folder, *PROMPT, "--text-tokenizer", tmp_path)
    assert_one_line(result, 1, "has no bpe-16k-vocab.json")


def test_what_is_not_used_is_said(generate: Command, mindalle: Command, checkpoints: Path) -> None:
    model = ("--model", checkpoints / "rq-class", "--class-label", 1)
    words = checkpoints / "rq-text" / "text_tokenizer.json"
    result = generate(*model, "--text-tokenizer", words)
    assert result.code == 0
    assert any(f"the text tokenizer {words} is not used" in line for line in result.err)


# where to write


def test_out_is_a_file_or_below_one(generate: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    words = f"--out must be a directory, but {file} is a file: choose another"
    assert_one_line(generate(*PROMPT, "--out", file), 1, words)
    assert_one_line(generate(*PROMPT, "--out", file / "deep" / "er"), 1, words)
    assert file.read_text() == "precious"


def test_out_is_not_writable(generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the system, since the tests may run as root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    result = generate(*PROMPT, "--out", tmp_path / "new" / "out")
    assert_one_line(result, 1, f"{tmp_path} is not writable: choose another")
    assert not (tmp_path / "new").exists()


def test_a_full_disk(generate: Command, tmp_path: Path) -> None:
    """Really: a limit on the size of files refuses a picture, and a device that is full a line."""
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        result = generate(*PROMPT, "--seed", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.code, result.out) == (1, [])
    full = f"generate.py: error: no space left on the disk of {out}: free some, or write to another disk"
    assert result.err[-1] == full
    assert list(out.iterdir()) == []  # no half of a picture

    if Path("/dev/full").exists():
        (out / "results.jsonl").symlink_to("/dev/full")
        result = generate(*PROMPT, "--seed", 0)
        assert result.code == 1
        assert result.err[-1].startswith("generate.py: error: no space left on the disk")
        assert [path.name for path in out.glob("*.png")] == ["a-red-apple-seed-0-1.png"]


# anything else


def test_debug_shows_the_stack(generate: Command) -> None:
    result = generate("--model", "./nothing", *PROMPT, "--debug")
    assert result.code == 1
    assert result.err[0] == "Traceback (most recent call last):"
    assert result.err[-1] == "generate.py: error: no such file or directory: ./nothing"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (MemoryError(), "out of memory: try a smaller --batch-size or --precision int8"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory: try a smaller --batch-size"),
        (KeyError("surprise"), "KeyError: 'surprise' (this is unexpected: --debug shows where)"),
        (FloatingPointError("the model's logits are not finite"), "the model's logits are not finite"),
    ],
)
def test_errors_of_the_machine(
    generate: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "__call__", fail)
    result = generate(*PROMPT)
    assert result.code == 1
    assert result.err[-1].startswith(f"generate.py: error: {line}")
    assert not any("Traceback" in line for line in result.err)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk: free some"),
        (OSError(errno.EDQUOT, "Quota exceeded", "/a"), "no space left on the disk of /a: free some"),
        (
            Exception("Error: I/O error: No space left on device (os error 28)"),
            "no space left on the disk: free",
        ),
        (
            Exception('IoError(Os { code: 28, kind: StorageFull, message: "No" })'),
            "no space left on the disk: free",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "Permission denied: /a"),
        (ValueError("two\n  lines"), "two lines"),
        (ImportError("pip install open-clip-torch"), "pip install open-clip-torch"),
    ],
)
def test_errors_in_one_line(error: Exception, line: str) -> None:
    assert describe(error).startswith(line)
    assert "\n" not in describe(error)


def test_advice_speaks_of_the_options_at_hand() -> None:
    """`--precision bf16` was advised to commands without the option, and takes more memory than int8."""
    assert describe(MemoryError()) == "out of memory"
    assert describe(MemoryError(), ["--batch-size"]) == "out of memory: try a smaller --batch-size"
    full = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert describe(full, ["--precision", "--batch-size"]) == "out of memory: try a smaller --batch-size"


def test_a_tokenizer_with_more_words_than_the_model(generate: Command, copy: Any) -> None:
    folder = copy("mindalle")
    TextTokenizer.train(["many other words than these"] * 2, vocab_size=60, length=6).save(
        folder / "text_tokenizer.json"
    )
    result = generate("--model", folder, "--prompt", "many words")
    assert result.code == 0
