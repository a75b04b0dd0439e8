"""`mindalle convert`, `tools/convert_checkpoint.py`: any known checkpoint to a native one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindalle.cli.command import Parser, add_checkpoint_options, check_writable, run, say

EXAMPLES = """\
  {prog} path/to/1.3B minDALL-E-native --dtype fp16
  {prog} rq-vae/cc3m cc3m-native --text-tokenizer minDALL-E/1.3B
  {prog} path/to/vqgan_imagenet_f16_16384 vqgan-native"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Write a checkpoint of minDALL-E, rq-vae-transformer or taming in the native layout.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="checkpoint path, release or hub id")
    add("destination", type=Path, metavar="DST", help="directory to create")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="stored type; default: as loaded, fp32")
    add_checkpoint_options(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "convert_checkpoint.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), convert_checkpoint, argv)


def convert_checkpoint(args: argparse.Namespace) -> None:
    """Load and save."""
    from mindalle.cli.output import atomic_directory, check_free

    destination = args.destination
    check_free(destination)
    check_writable(destination.parent, "DST")
    from mindalle.checkpoint import load_checkpoint, save_checkpoint
    from mindalle.hub import resolve_model
    from stage2_transformer.precision import DTYPES

    source = resolve_model(args.source)
    checkpoint = load_checkpoint(source, text_tokenizer=args.text_tokenizer, use_ema=args.ema)
    with atomic_directory(destination) as directory:
        save_checkpoint(
            directory,
            image_tokenizer=checkpoint.image_tokenizer,
            model=checkpoint.model,
            text_tokenizer=checkpoint.text_tokenizer,
            sampling=checkpoint.sampling,
            card=f"# {destination.name}\n\nConverted from `{source.name}` ({checkpoint.layout} layout).\n",
            dtype=DTYPES[args.dtype] if args.dtype else None,
        )
    model = checkpoint.model
    if model is not None and model.config.condition.kind == "text" and checkpoint.text_tokenizer is None:
        say("no text tokenizer was found: to draw from text, pass --text-tokenizer then or now", is_note=True)
    if (source / "clip.safetensors").exists():
        say("CLIP is not converted: the copy does not rerank by itself", is_note=True)
    say(f"{destination}  {checkpoint.layout} -> native")
