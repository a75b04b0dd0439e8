"""`mindalle train-tokenizer`, `tools/train_tokenizer.py`: captions to a text tokenizer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindalle.cli.command import (
    Parser,
    UsageError,
    add_data_options,
    check_writable,
    positive_int,
    run,
    say,
)
from mindalle.cli.data_options import add_fields, fields_of

if TYPE_CHECKING:
    from mindalle.data.captions import Fields
    from mindalle.text import TextTokenizer

EXAMPLES = """\
  {prog} data/train --vocab-size 4096 --length 32 --out runs/text_tokenizer.json
  {prog} 'shards/{0000..0099}.tar' --out runs/text_tokenizer.json
  {prog} captions.txt more.txt --out runs/text_tokenizer.json"""
BATCH = 4096  # captions whose ids are counted at once


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Train a BPE tokenizer, lower case, on the captions that a model is to be trained on.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "captions",
        nargs="+",
        metavar="SOURCE",
        help="captioned pictures (directory, captions file, shards), or a .txt file with a caption a line",
    )
    add_data_options(parser)
    add_fields(parser)
    add("--vocab-size", type=positive_int, default=16384, metavar="N", help="words to learn at most (16384)")
    add(
        "--length",
        type=positive_int,
        default=64,
        metavar="N",
        help="ids per caption that the model will read: says how many captions would be cut (64)",
    )
    add("--out", type=Path, required=True, metavar="JSON", help="text_tokenizer.json to write")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "train_tokenizer.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), train_tokenizer, argv)


def train_tokenizer(args: argparse.Namespace) -> None:
    """Read the captions, train, write, and say how long captions are in ids."""
    if args.vocab_size < 4:
        raise UsageError(f"--vocab-size must be at least 4, got {args.vocab_size}")
    if args.out.suffix != ".json":
        raise UsageError(f"--out must be a .json file, got {args.out}")
    if os.path.lexists(args.out):
        raise FileExistsError(f"{args.out} exists, and nothing is overwritten: choose another --out")
    check_writable(args.out.parent, "--out")
    from mindalle.progress import progress_bar
    from mindalle.text import TextTokenizer

    read = (
        caption
        for name in args.captions
        for caption in _read_captions(name, fields_of(args), allow_pipe=args.allow_pipe)
    )
    captions = list(progress_bar(read, desc="reading", unit=" captions"))
    if not captions:
        raise ValueError(
            f"no captions in {', '.join(args.captions)}: expected captioned pictures, or a .txt file with a "
            "caption a line"
        )
    say(f"training on {len(captions):,} captions", is_note=True)
    tokenizer = TextTokenizer.train(captions, vocab_size=args.vocab_size, length=args.length)
    tokenizer.save(args.out)
    say(f"{args.out}  {tokenizer.vocab_size:,} of {args.vocab_size:,} words")
    for line in _describe_lengths(tokenizer, captions):
        say(line)


def _read_captions(name: str, fields: Fields, *, allow_pipe: bool) -> Iterator[str]:
    """The captions of a source or of a text file."""
    from mindalle.data import open_source

    path = Path(name).expanduser()
    if path.suffix.lower() != ".txt" or not path.is_file():
        for captions in open_source(name, fields, allow_pipe=allow_pipe).captions():
            yield from captions
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                caption = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: expected UTF-8 text, got {line[:40]!r}") from error
            if caption:
                yield caption


def _describe_lengths(tokenizer: TextTokenizer, captions: Sequence[str]) -> list[str]:
    """How many ids captions have, and what --length does to them."""
    import numpy as np

    from mindalle.progress import progress_bar

    batches = [captions[first : first + BATCH] for first in range(0, len(captions), BATCH)]
    lengths = np.array(
        [
            count
            for batch in progress_bar(batches, desc="counting ids", unit=" batches")
            for count in tokenizer.count_ids(batch)
        ]
    )
    num_cut = int((lengths > tokenizer.length).sum())
    return [
        f"ids per caption  median {np.median(lengths):.0f}, 99% up to {np.quantile(lengths, 0.99):.0f}, "
        f"longest {lengths.max()}",
        f"cut at --length {tokenizer.length}  {num_cut:,} captions, {num_cut / len(lengths):.2%}",
    ]
