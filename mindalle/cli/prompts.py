"""What a user asks to be drawn: --prompt, --prompts-file, --class-label."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindalle.cli.command import UsageError


def wanted_prompts(args: argparse.Namespace) -> list[str | int | None]:
    """What to draw, in the order of --prompt, --class-label, --prompts-file.

    Args:
        args: of the command.

    Returns:
        Texts and labels; one None if the user names nothing, as for an unconditional model.

    Raises:
        UsageError: if a prompt is empty or no text.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no UTF-8 text or has no prompt.
    """
    prompts: list[str | int | None] = [*args.prompt, *args.class_label]
    if args.prompts_file is not None:
        prompts += read_prompts(args.prompts_file)
    for prompt in prompts:
        if isinstance(prompt, str) and not prompt.strip():
            raise UsageError("--prompt is empty: say what to draw")
        if (
            isinstance(prompt, str)
            and not prompt.isascii()
            and prompt != prompt.encode("utf-8", "ignore").decode()
        ):
            raise UsageError("--prompt is not UTF-8 text: is this terminal's encoding another one?")
    return prompts or [None]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no UTF-8 text or has no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file at {path}: expected a text file with a prompt per line")
    content = path.read_bytes()
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"0x{content[error.start]:02x}"
        raise ValueError(
            f"{path} is not UTF-8 text: line {line} has a byte {byte}; save it as UTF-8"
        ) from error
    if not any(lines):
        raise ValueError(f"{path} holds no prompts: write one per line")
    return [line for line in lines if line]
