"""What every command shares: one-line errors, exit codes, messages around a progress bar, common checks."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
import tempfile
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
MAX_MESSAGE = 2000
"""Characters of an error: a file of a million keys should not fill the screen."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LESS_MEMORY = {"--batch-size": "a smaller --batch-size", "--precision": "--precision int8"}
"""What takes less memory, by the option that a command must have for it."""


class UsageError(ValueError):
    """The command was called wrongly: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors and `--debug`.

    Args:
        prog: name of the command, for messages.
        description: what it does, in one sentence.
        examples: a command line each, "{prog}" standing for the name.
    """

    def __init__(self, *, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples.replace('{prog}', prog)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the stack trace of an error")

    @property
    def options(self) -> Collection[str]:
        """Names of all options."""
        return self._option_string_actions

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        self.exit(USAGE_ERROR, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def run(parser: Parser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse arguments, run a command, and turn what goes wrong into one line and an exit code.

    Args:
        parser: of the command.
        body: the command.
        argv: arguments; None = the program's own.

    Returns:
        0 for success; 2 for bad usage: options that are wrong, contradict each other, or that the model
        cannot take; 1 for failures: files, network, memory; 130 when interrupted.
    """
    args = parser.parse_intermixed_args(argv)  # options may stand between files
    _log_to_stderr(parser.prog)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")  # of libraries, about their own future
            body(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else the interpreter's last flush complains
        return FAILURE
    except BaseException as error:  # with the panics of libraries in Rust, which are no Exceptions
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        if args.debug:
            traceback.print_exc()
        print(f"{parser.prog}: error: {describe(error, parser.options)}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageError) else FAILURE
    return 0


def describe(error: BaseException, options: Collection[str] = ()) -> str:
    """One line for a person.

    Args:
        error: what was raised.
        options: names of the command's options, which advice may speak of.

    Returns:
        The message of an error meant for users; the type and a hint at --debug for any other.
    """
    return printable(_describe(error, options))


def printable(text: str) -> str:
    """A text from a file or its name as a terminal may show it: one line, not long, nothing that acts."""
    text = " ".join(text.split())
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    # control characters, marks that turn the direction of writing, and surrogates of names that are no UTF-8
    return "".join(
        letter if unicodedata.category(letter) not in ("Cc", "Cf", "Cs") else ascii(letter)[1:-1]
        for letter in text
    )


def _describe(error: BaseException, options: Collection[str]) -> str:
    message = " ".join(str(error).split())
    place = getattr(error, "filename", None)
    system = re.search(r"(?:os error|code:) (\d+)", message)  # safetensors puts what the system says in words
    number = error.errno if isinstance(error, OSError) else int(system[1]) if system else None
    if number in DISK_FULL:
        return (
            f"no space left on the disk{f' of {place}' if place else ''}: free some, or write to another disk"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}{f': {place}' if place else ''}"
    if "can't allocate memory" in message or "out of memory" in message or isinstance(error, MemoryError):
        advice = [
            text
            for option, text in LESS_MEMORY.items()
            if option in options and not (option == "--precision" and "CUDA" in message)  # int8 is for CPUs
        ]
        return f"out of memory: try {' or '.join(advice)}" if advice else "out of memory"
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return message
    return f"{type(error).__name__}: {message} (this is unexpected: --debug shows where)"


def with_option_names(message: str) -> str:
    """A message about SamplingParams in the words of the command line: --top-k, not top_k."""
    names = r"\b(temperature|top_k|top_p|cfg_scale)\b"
    message = re.sub(names, lambda match: f"--{match[0].replace('_', '-')}", message, count=1)
    return re.sub(r"\bNone\b", "leaving it out", message)


def say(line: object, *, is_note: bool = False) -> None:
    """Print a line, above the progress bar if there is one: results to stdout, notes to stderr."""
    line = str(line).encode(errors="backslashreplace").decode()  # of names that are no UTF-8
    file = sys.stderr if is_note else sys.stdout
    if sys.stderr.isatty():
        from tqdm import tqdm  # lazy: --help is quick

        tqdm.write(line, file=file)
        file.flush()
    else:  # in a log the bar is a line of its own
        print(line, file=file, flush=True)


class _Handler(logging.Handler):
    """Logs above the progress bar, and each message once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(self.format(record))
        if line not in self.said:
            self.said.add(line)
            say(line, is_note=True)


def _log_to_stderr(prog: str) -> None:
    handler = _Handler()
    logging.basicConfig(level=logging.WARNING, format=f"{prog}: %(message)s", handlers=[handler], force=True)
    logging.getLogger("mindalle").setLevel(logging.INFO)


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def add_checkpoint_options(parser: argparse._ActionsContainer) -> None:
    """What a checkpoint leaves open to who loads a model of it."""
    parser.add_argument(
        "--text-tokenizer",
        metavar="NAME",
        help="where the checkpoint has none: its file or directory, or a model that has one (minDALL-E/1.3B)",
    )
    add_ema_option(parser)


def add_ema_option(parser: argparse._ActionsContainer) -> None:
    """What a checkpoint leaves open to who loads an image tokenizer of it."""
    help_ = "take the averaged weights of an rq-vae checkpoint"
    parser.add_argument("--ema", action="store_true", help=help_)


def add_data_options(parser: argparse._ActionsContainer) -> None:
    """What a data set leaves open to who reads it."""
    help_ = "run the commands that data named pipe:COMMAND is read from, in a shell"
    parser.add_argument("--allow-pipe", action="store_true", help=help_)


def add_device_options(parser: argparse._ActionsContainer) -> None:
    """Where a command computes, see `choose_machine`."""
    help_ = "auto, cpu, cuda, cuda:1, ... or mps; auto: CUDA, else Apple's mps, else the CPU (auto)"
    parser.add_argument("--device", default="auto", help=help_)
    help_ = "of the CPU; default: 1 to draw with small models, else torch's"
    parser.add_argument("--threads", "--num-threads", type=positive_int, metavar="N", help=help_)


def choose_machine(args: argparse.Namespace) -> None:
    """Put the device that --device means in its place, before anything is loaded, and set --threads.

    Args:
        args: of `add_device_options`; `device` is changed.

    Raises:
        UsageError: if the name is none of a device that the toolkit runs on.
        ValueError: if this machine has no such device.
    """
    import torch

    from mindalle.device import DeviceNameError, choose_device

    try:
        args.device = str(choose_device(args.device))
    except DeviceNameError as error:
        raise UsageError(f"--{error}") from error
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def check_writable(directory: Path, option: str) -> None:
    """Refuse a directory that cannot be written to, before hours of work.

    Args:
        directory: need not exist yet.
        option: that names it, for messages.

    Raises:
        OSError: if it, or what it is to be made in, is a file or not writable.
    """
    existing = next(place for place in (directory, *directory.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise NotADirectoryError(f"{option} must be a directory, but {existing} is a file: choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {directory}: {existing} is not writable: choose another")
    try:
        directory.lstat()
    except FileNotFoundError:  # as it should
        pass
    except OSError as error:
        raise OSError(f"{option}: {error.strerror}: choose another") from error
    try:  # rights do not tell of a disk that is read-only, or of a directory that takes no files
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"{option} {directory}: {existing} takes no files ({error.strerror}): choose another"
        ) from error
