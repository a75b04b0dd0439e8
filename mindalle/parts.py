"""Long work cut into parts: a directory that belongs to one plan, and processes that share what it lacks.

A part is written atomically, by whichever process, and what it holds follows from the plan alone. So work
that was killed goes on with the parts that are missing, and several processes write what one does.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from checkpoint_io import atomic_path, leftover_files

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all parts in a directory have in common: parts of different plans do not mix."""

    contents: ClassVar[str]  # of the directory, for messages: "codes"
    verb: ClassVar[str]  # what is done: "encode"

    def differences(self, other: Plan) -> list[str]:
        """What another plan has otherwise: "num_crops: 1 there, 4 wanted"."""
        # through JSON, in which tuples and lists are one
        mine, theirs = (json.loads(json.dumps(asdict(plan))) for plan in (self, other))
        return [
            f"{name}: {short(theirs[name])} there, {short(mine[name])} wanted"
            for name in mine
            if mine[name] != theirs[name]
        ]


P = TypeVar("P", bound=Plan)
Count: TypeAlias = Callable[[int], object]
"""Told how many items, such as pictures, were done since it was last told."""


def short(value: Any) -> str:
    """A value for a message, hashes cut."""
    text = str(value)
    return f"{text[:12]}..." if isinstance(value, str) and len(text) == 64 else text


def begin(directory: Path, plan: P, read_plan: Callable[[Path], P]) -> None:
    """Make sure that a directory is a plan's, and free of what a killed process left.

    Args:
        directory: exists; locked, if other processes may come here.
        plan: that its parts belong to.
        read_plan: reads the one that is there.

    Raises:
        FileExistsError: if the directory holds parts of another plan, or something else.
    """
    if (directory / PLAN).is_file():
        differences = plan.differences(read_plan(directory))
        if differences:
            raise FileExistsError(
                f"{directory} holds {plan.contents} of another plan ({'; '.join(differences)}): "
                f"choose another directory, or remove this one to {plan.verb} again"
            )
        for leftover in leftover_files(directory):
            leftover.unlink()
    else:
        check_empty(directory, plan.contents)
        write_json(directory / PLAN, plan)


def check_empty(directory: Path, contents: str) -> None:
    """Refuse a directory that holds something, and no plan.

    Args:
        directory: exists.
        contents: that it could hold, see `Plan`.

    Raises:
        FileExistsError: names the first file of what is there; hidden ones do not count.
    """
    if others := sorted(path.name for path in directory.iterdir() if path.name[0] != "."):
        raise FileExistsError(
            f"{directory} is not empty and holds no {contents}, it has {others[0]}: choose another"
        )


def write_json(path: Path, content: Any) -> None:
    """Write a dataclass, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asdict(content), indent=1), encoding="utf-8")


def do_parts(
    numbers: Sequence[int],
    start: Callable[[Count], Callable[[int], object]],
    *,
    num_processes: int,
    count: Count,
    finish: Callable[[int], object],
    verb: str,
) -> None:
    """Do parts, in this process or in several.

    Args:
        numbers: of the parts.
        start: called once in each process; makes what does a part by its number, and tells of each item on
            the way. Can be pickled, if there are several processes.
        num_processes: that share the parts, >= 1; with 1 it is this one.
        count: called here.
        finish: called here, with the number of each part that is done.
        verb: what is done, for messages.

    Raises:
        ChildProcessError: if a process dies.
    """
    num_processes = min(num_processes, len(numbers))
    if num_processes > 1:
        _do_in_processes(numbers, start, num_processes, count, finish, verb)
    elif numbers:
        do = start(count)
        for number in numbers:
            do(number)
            finish(number)


def _do_in_processes(
    numbers: Sequence[int],
    start: Callable[[Count], Callable[[int], object]],
    num_processes: int,
    count: Count,
    finish: Callable[[int], object],
    verb: str,
) -> None:
    context = get_context("spawn")  # torch's threads do not survive a fork
    num_done, is_stopped = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (start, num_done, is_stopped))
    num_counted = 0
    try:
        with _ctrl_c_held_back():
            running = {pool.submit(_do_in_worker, number) for number in numbers}
        while running:
            done, running = wait(running, timeout=0.5)
            num_new = num_done.value - num_counted
            count(num_new)
            num_counted += num_new
            for future in done:
                finish(future.result())
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"a process that {verb}s was killed, perhaps for want of memory: try fewer --num-processes or a "
            "smaller --batch-size; what is finished is kept"
        ) from error
    finally:
        is_stopped.set()  # the others finish their batch, not their part
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Start processes that are deaf to Ctrl-C from their first moment: their parent says when to stop.

    It reaches the whole group. The parent hears it when this is over.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_started: Callable[[], Callable[[int], object]]  # of a process of the pool, which has no other place for it


def _start_worker(start: Callable[[Count], Callable[[int], object]], num_done: Any, is_stopped: Any) -> None:
    """Prepare a process of the pool: it ends when its parent stops or dies."""
    global _started
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    def count(number: int) -> None:
        if is_stopped.is_set():
            raise InterruptedError
        with num_done.get_lock():
            num_done.value += number

    # not here: of what goes wrong while a pool's process is prepared, its parent learns nothing
    _started = cache(lambda: start(count))


def _do_in_worker(number: int) -> int:
    _started()(number)
    return number
