#!/usr/bin/env python
"""Make the emoji data set: python tools/build_emoji.py data/emoji."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindalle.cli.command import Parser, UsageError, check_writable, positive_int, run, say

if TYPE_CHECKING:
    from emoji_data.packages import Packages
    from emoji_data.rendering import FlagFont

MAX_SIZE = 256  # pixels; drawings are rendered in this size
EXAMPLES = """\
  {prog} data/emoji
  {prog} data/emoji --npm emoji-packages          (kept for the next time)
  {prog} data/emoji --without-noto-flags          (no font needed)
  {prog} data/emoji128 --size 128"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Make captioned emoji of nine openly licensed styles, from npm packages and a font.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="directory of the shards; must not exist, or be empty")
    add("--size", type=positive_int, default=64, metavar="N", help="side of a picture in pixels (64)")
    add(
        "--npm",
        type=Path,
        metavar="DIR",
        help="directory with the packages in node_modules; npm installs them if there are none; "
        "default: a temporary one",
    )
    add("--noto-font", type=Path, metavar="TTF", help="NotoColorEmoji.ttf; default: where Debian has it")
    add("--without-noto-flags", action="store_true", help="leave out the flags that are in that font alone")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "build_emoji.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), build, argv)


def build(args: argparse.Namespace) -> None:
    """Make the data set beside OUT, then give it its name: a killed build leaves no half of one there."""
    if args.size > MAX_SIZE:
        raise UsageError(f"--size must be at most {MAX_SIZE}, got {args.size}")
    if args.noto_font and args.without_noto_flags:
        raise UsageError("--noto-font and --without-noto-flags exclude each other")
    check_writable(args.out.parent, "OUT")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise FileExistsError(f"{args.out} exists: remove it, or choose another OUT")
    from emoji_data.packages import Packages, install
    from emoji_data.rendering import FLAG_FONT, FlagFont

    font = None if args.without_noto_flags else FlagFont(args.noto_font or FLAG_FONT)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}-", dir=args.out.parent) as temporary:
        npm = args.npm or Path(temporary, "npm")
        if not (npm / "node_modules").exists():
            say(f"installing the npm packages to {npm}", is_note=True)
            install(npm)
        made = Path(temporary, "made")
        made.mkdir()
        _make(Packages(npm), font, made, args.size)
        os.replace(made, args.out)  # takes the place of an empty directory too


def _make(packages: Packages, font: FlagFont | None, directory: Path, size: int) -> None:
    """Packages to shards."""
    from emoji_data.concepts import read_concepts
    from emoji_data.drawings import read_drawings
    from emoji_data.pictures import make_pictures, split_pictures
    from emoji_data.shards import write_data

    from mindalle.progress import progress_bar

    logging.getLogger("emoji_data").setLevel(logging.INFO)
    drawings = read_drawings(packages, read_concepts(packages), font)
    splits = split_pictures(make_pictures(progress_bar(drawings, desc="drawing", unit=" drawings"), size))
    write_data(directory, splits)
    say("  ".join(f"{split}: {len(pictures):,}" for split, pictures in splits.items()))


if __name__ == "__main__":
    raise SystemExit(main())
