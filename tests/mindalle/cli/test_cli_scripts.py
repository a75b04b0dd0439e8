"""The commands as processes: scripts, the console command, signals, pipes, the real BPE files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cli_results import Command, pixels, texts
from PIL import Image

from mindalle.cli import main as console

ROOT = Path(console.__file__).parents[2]
PROMPT = ("--prompt", "a red apple")


def start(*argv: object, **options: Any) -> subprocess.Popen[str]:
    """Python in a process of its own, with this repository's packages."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    # a shell starts what it puts in the background with SIGINT ignored, and children inherit that
    options.setdefault("preexec_fn", partial(signal.signal, signal.SIGINT, signal.default_int_handler))
    return subprocess.Popen([sys.executable, *map(str, argv)], env=environment, **(pipes | options))


def run(*argv: object, **options: Any) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    process = start(*argv, **options)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.slow
def test_generate_with_the_real_words(fixtures_dir: Path, tmp_path: Path) -> None:
    """The README's first command, on minDALL-E's layout with the released BPE files, 64x64 pixels."""
    code, out, err = run(
        *(ROOT / "tools" / "generate.py", "--model", fixtures_dir / "mindalle-tiny", *PROMPT),
        *("--seed", 0, "--temperature", 0, "--out", tmp_path / "out"),
    )
    assert code == 0, err
    path = tmp_path / "out" / "a-red-apple-seed-0-1.png"
    assert out == f"{path}\n"
    assert texts(path)["prompt"] == "a red apple"
    with Image.open(path) as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")
    assert "seed 0\n" in err
    assert re.search(r"a red apple: 100%.* 256/256 \[.* codes/s\]", err)


@pytest.mark.slow
def test_generate_writes_each_prompt_when_it_is_done_and_stops_at_ctrl_c(
    text_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red car\na green apple\n" * 500)
    process = start(
        *(ROOT / "tools" / "generate.py", "--model", text_model, "--prompts-file", tmp_path / "prompts.txt"),
        *("--out", tmp_path / "out", "--seed", 0),
    )
    assert process.stdout is not None
    printed = [process.stdout.readline().strip() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    printed += out.splitlines()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "generate.py: interrupted"
    assert "Traceback" not in err
    assert 2 <= len(printed) < 1000
    for path in map(Path, printed):
        assert len(pixels(path)) == 3 * 16 * 16
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted([*(Path(path).name for path in printed), "results.jsonl"])  # no halves


@pytest.mark.slow
def test_a_closed_pipe_is_no_crash(checkpoints: Path, photo: Path, tmp_path: Path) -> None:
    """As in `reconstruct.py photo.png | head -1`."""
    reader, writer = os.pipe()
    process = start(
        *(ROOT / "tools" / "reconstruct.py", photo, "--model", checkpoints / "taming", "--out", tmp_path),
        *("--device", "cpu"),  # else it says which one it took
        stdout=writer,
    )
    os.close(writer)
    os.close(reader)
    _, err = process.communicate()
    assert (process.returncode, err) == (1, "")


@pytest.mark.slow
def test_the_console_command(checkpoints: Path, tmp_path: Path) -> None:
    command = ("-m", "mindalle.cli.main", "convert")
    code, out, err = run(*command, checkpoints / "taming", tmp_path / "copy")
    assert (code, out, err) == (0, f"{tmp_path / 'copy'}  taming -> native\n", "")


@pytest.mark.parametrize("script", ["generate", "reconstruct", "convert_checkpoint", "export"])
def test_help_is_quick(script: str) -> None:
    """Without torch, whose import takes seconds."""
    forbidden = ("torch", "numpy", "PIL", "tqdm", "tokenizers", "omegaconf")
    check = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally: print([name for name in {forbidden} if name in sys.modules], file=sys.stderr)"
    )
    begin = time.monotonic()
    code, out, err = run("-c", check, ROOT / "tools" / f"{script}.py")
    assert code == 0
    assert out.startswith(f"usage: {script}.py [-h] [--debug]")
    assert "examples:\n" in out
    assert f"\n  {script}.py " in out
    assert err == "[]\n"
    assert time.monotonic() - begin < 5  # 0.2 s on an idle machine


@pytest.mark.parametrize("name", ["generate", "reconstruct", "convert", "export"])
def test_subcommands_use_the_names_that_were_typed(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as leave:
        console.main([name, "--help"])
    assert leave.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mindalle {name} [-h]")
    assert f"\n  mindalle {name} " in out
    with pytest.raises(SystemExit) as leave:
        console.main([name, "--nonsense"])
    assert leave.value.code == 2
    assert re.fullmatch(
        rf"mindalle {name}: error: .* \(see mindalle {name} --help\)\n", capsys.readouterr().err
    )


def test_the_console_command_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--help"]) == 0
    assert "generate " in capsys.readouterr().out
    assert console.main(["--version"]) == 0
    assert re.fullmatch(r"mindalle \d+\.\d+\.\d+\n", capsys.readouterr().out)
    for argv, problem in (([], "no command given"), (["paint"], "no command 'paint'")):
        assert console.main(argv) == 2
        expected = f"mindalle: error: {problem}; known are generate, reconstruct, convert, train, export"
        assert capsys.readouterr().err.startswith(expected)
    assert all(find_spec(module) for module, _ in console.COMMANDS.values())


def test_a_wrong_checkpoint_is_found_out_before_anything_is_written(
    mindalle: Command, tmp_path: Path
) -> None:
    result = mindalle("generate", "--model", tmp_path, "--out", tmp_path / "out", *PROMPT)
    assert result.code == 1
    assert not (tmp_path / "out").exists()
