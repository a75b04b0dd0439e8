"""What every command shares: one-line errors, exit codes, logging."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


class UsageError(ValueError):
    """The command was called wrongly: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors and `--debug`."""

    def __init__(self, *, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the stack trace of an error")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run(parser: Parser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse arguments, run a command, and turn what goes wrong into one line and an exit code.

    Args:
        parser: of the command.
        body: the command.
        argv: arguments; None = the program's own.

    Returns:
        0 for success, 1 for failures, 2 for bad usage, 130 when interrupted.
    """
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format=f"{parser.prog}: %(levelname)s: %(message)s", force=True)
    logging.getLogger("mindalle").setLevel(logging.INFO)
    try:
        body(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"{parser.prog}: error: {describe(error)}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageError) else FAILURE
    return 0


def describe(error: Exception) -> str:
    """One line for a person.

    Args:
        error: what was raised.

    Returns:
        The message of an error meant for users; the type and a hint at --debug for any other.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk of {error.filename or 'the output'}: free some or choose another --out"
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    if isinstance(error, (ValueError, FileNotFoundError, OSError, ImportError, FloatingPointError)):
        return message
    if isinstance(error, MemoryError) or "can't allocate memory" in message or "out of memory" in message:
        return "out of memory: try a smaller --batch-size or --precision bf16"
    return f"{type(error).__name__}: {message} (this is unexpected: --debug shows where)"


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
