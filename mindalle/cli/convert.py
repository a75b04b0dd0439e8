"""`mindalle convert`, `tools/convert_checkpoint.py`: any known checkpoint to a native one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindalle.cli.command import Parser, run

EXAMPLES = """\
  convert_checkpoint.py 1.3B minDALL-E-native --dtype fp16
  convert_checkpoint.py rq-vae/cc3m cc3m-native --text-tokenizer bpe16k/
  convert_checkpoint.py vqgan_imagenet_f16_16384 vqgan-native"""


def build_parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="convert_checkpoint.py",
        description="Write a checkpoint of minDALL-E, rq-vae-transformer or taming-transformers in the native layout.",
        examples=EXAMPLES,
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint path, release or hub id")
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to create")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="stored type; default: as loaded, fp32"
    )
    parser.add_argument("--text-tokenizer", metavar="PATH", help="where it is not with the checkpoint")
    parser.add_argument(
        "--ema", action="store_true", help="take the averaged weights of an rq-vae checkpoint"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(), convert_checkpoint, argv)


def convert_checkpoint(args: argparse.Namespace) -> None:
    """Load and save."""
    from mindalle.checkpoint import load_checkpoint, save_checkpoint
    from mindalle.hub import resolve_model
    from mindalle.pipeline import PRECISIONS

    if args.destination.exists():
        raise FileExistsError(f"{args.destination} exists: choose another DST")
    checkpoint = load_checkpoint(
        resolve_model(args.source), text_tokenizer=args.text_tokenizer, use_ema=args.ema
    )
    save_checkpoint(
        args.destination,
        image_tokenizer=checkpoint.image_tokenizer,
        model=checkpoint.model,
        text_tokenizer=checkpoint.text_tokenizer,
        sampling=checkpoint.sampling,
        card=f"# {args.destination.name}\n\nConverted from `{Path(args.source).name}` ({checkpoint.layout} layout).\n",
        dtype=PRECISIONS[args.dtype] if args.dtype else None,
    )
    print(f"{args.destination}  {checkpoint.layout} -> native")
