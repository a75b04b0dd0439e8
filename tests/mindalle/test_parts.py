"""Parts of long work: what their processes hear."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mindalle.parts import Count, do_parts


def note_deafness(directory: Path, count: Count) -> Callable[[int], object]:
    """Writes, for each part, whether its process was made deaf to Ctrl-C before it ran a line of Python."""

    def note(number: int) -> None:
        is_blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        (directory / str(number)).write_text(str(is_blocked))

    return note


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no signal masks")
def test_processes_are_deaf_to_ctrl_c_from_the_start(tmp_path: Path) -> None:
    """One that was still importing torch printed its stack when a user pressed Ctrl-C."""
    start = partial(note_deafness, tmp_path)
    do_parts(range(4), start, num_processes=2, count=lambda n: None, finish=lambda n: None, verb="test")
    assert [(tmp_path / str(number)).read_text() for number in range(4)] == ["True"] * 4
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
