"""`mindalle encode`, `tools/encode.py`: pictures to codes, for training a sequence model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindalle.cli.command import (
    Parser,
    UsageError,
    add_data_options,
    add_device_options,
    check_writable,
    choose_machine,
    positive_int,
    run,
    say,
)
from mindalle.cli.data_options import add_fields, fields_of

EXAMPLES = """\
  {prog} data/train runs/codes/train --image-tokenizer runs/tokenizer --num-processes 4
  {prog} data/train runs/codes/train --image-tokenizer rq-vae/cc3m --crops 4 --flip 0.5 --latents
  {prog} 'shards/{0000..0099}.tar' runs/codes/train --image-tokenizer minDALL-E/1.3B --device cuda"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Encode pictures once, with their captions and labels; killed, it goes on where it was.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE", help="a directory, a captions file, or shards (.tar)")
    add("out", type=Path, metavar="OUT", help="directory of the cache")
    add_data_options(parser)
    add_fields(parser)
    add("--image-tokenizer", required=True, metavar="NAME", help="bundled name, checkpoint path or release")
    add("--crops", type=positive_int, default=1, metavar="K", help="per picture: the centre, then random (1)")
    add("--size", type=positive_int, metavar="N", help="side in pixels; default: the tokenizer's")
    add(
        "--resize", choices=("shorter", "pad"), default="shorter", help="what fills the square (shorter side)"
    )
    add(
        "--crop",
        choices=("center", "random", "random_resized", "dalle"),
        help="of all crops but the first (random); with --resize pad: the whole picture, smaller, anywhere",
    )
    add("--flip", type=float, default=0.0, metavar="P", help="chance that one of them is mirrored (0)")
    add("--seed", type=int, default=0, help="of the random crops (0)")
    add("--latents", action="store_true", help="keep the latents too: soft targets (RQ-VAE) need them")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="crops at once (64)")
    add("--num-processes", type=positive_int, default=1, metavar="P", help="that share the work (1)")
    add_device_options(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "encode.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), encode, argv)


def encode(args: argparse.Namespace) -> None:
    """Encode what the cache lacks, say what it has."""
    if not 0 <= args.flip <= 1:
        raise UsageError(f"--flip must be in [0, 1], got {args.flip}")
    check_writable(args.out, "OUT")
    choose_machine(args)
    from mindalle.data import TransformConfig, open_source
    from mindalle.data.encoding import encode_source
    from mindalle.data.part_encoder import EncodingJob
    from mindalle.run import load_image_tokenizer

    size = args.size or load_image_tokenizer(args.image_tokenizer).convnet.image_size
    job = EncodingJob(
        source=open_source(args.source, fields_of(args), allow_pipe=args.allow_pipe),
        image_tokenizer=args.image_tokenizer,
        directory=args.out,
        transform=TransformConfig(
            image_size=size,
            resize=args.resize,
            crop=args.crop or ("center" if args.crops == 1 else "random"),
            flip_probability=args.flip,
        ),
        num_crops=args.crops,
        seed=args.seed,
        has_latents=args.latents,
        batch_size=args.batch_size,
        device=args.device,
    )
    header = encode_source(job, num_processes=args.num_processes)
    shape = "x".join(map(str, header.plan.code_shape))
    say(
        f"{args.out}  {header.count:,} pictures, {header.plan.num_crops} of {shape} codes each, "
        f"{header.num_unreadable:,} unreadable, {header.num_without_captions:,} without captions"
    )
