"""Parts of long work: what their processes hear."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from checkpoint_io import atomic_path
from mindalle.parts import PLAN, Count, Plan, begin, do_parts


def note_deafness(directory: Path, count: Count) -> Callable[[int], object]:
    """Writes, for each part, whether its process was made deaf to Ctrl-C before it ran a line of Python."""

    def note(number: int) -> None:
        is_blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        (directory / str(number)).write_text(str(is_blocked))

    return note


@dataclass(frozen=True, kw_only=True)
class Nothing(Plan):
    contents, verb = "nothing", "do"


def half_written(path: Path) -> tuple[Path, object]:
    """A temporary file, and what would remove it at the end of a process that is not killed."""
    writing = atomic_path(path)
    temporary = writing.__enter__()
    temporary.write_bytes(b"half")
    return temporary, writing


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """A user's own .pre-commit-config.yaml was deleted, and a .Trash-1000 ended the command."""
    (tmp_path / ".Trash-1000").mkdir()
    (tmp_path / ".Trash-0123456789abcdef").mkdir()
    mine = tmp_path / ".pre-commit-config.yaml"
    mine.write_text("repos: []")
    for _ in range(2):  # begun, gone on with
        begin(tmp_path, Nothing(), lambda directory: Nothing())
        assert mine.read_text() == "repos: []"
    names = ("part-00000.npy", "part-00000.latents.npy", "below/000001-0000.png", "names")
    halves = [half_written(tmp_path / name) for name in names]
    assert all(half.is_file() for half, _ in halves)
    begin(tmp_path, Nothing(), lambda directory: Nothing())
    assert not any(half.exists() for half, _ in halves)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "below") == sorted(
        (".Trash-1000", ".Trash-0123456789abcdef", mine.name, PLAN)
    )


def test_nothing_is_removed_where_nothing_was_begun(tmp_path: Path) -> None:
    """The file may be another command's, which is writing it."""
    half, _writing = half_written(tmp_path / "model.ckpt")
    begin(tmp_path, Nothing(), lambda directory: Nothing())
    assert half.is_file()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no signal masks")
def test_processes_are_deaf_to_ctrl_c_from_the_start(tmp_path: Path) -> None:
    """One that was still importing torch printed its stack when a user pressed Ctrl-C."""
    start = partial(note_deafness, tmp_path)
    do_parts(range(4), start, num_processes=2, count=lambda n: None, finish=lambda n: None, verb="test")
    assert [(tmp_path / str(number)).read_text() for number in range(4)] == ["True"] * 4
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
