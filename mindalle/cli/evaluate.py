"""`mindalle evaluate`, `tools/evaluate.py`: the numbers of tokenizers, of pictures and of models."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mindalle.cli.command import (
    Parser,
    add_checkpoint_options,
    add_data_options,
    add_device_options,
    add_ema_option,
    positive_int,
    run,
)

METRICS = ("fd", "kd", "is", "pr", "clip_score", "r_precision")
RECONSTRUCTION_METRICS = ("pixels", "perceptual", "rfd", "codebook")
METRICS_HELP = (
    "fd, kd and is are FID, KID and Inception Score with Inception, and named by the network with others; pr "
    "is precision and recall; what cannot be had is left out and named, unless it was asked for"
)
EXAMPLES = {
    "reconstruct": """\
  {prog} path/to/vqgan imagenet/val --out results.json
  {prog} emoji my-pictures --features efflite --perceptual efflite
  {prog} path/to/rq-vae my-pictures --depths --metrics pixels codebook""",
    "images": """\
  {prog} drawn real --out results.json
  {prog} drawn imagenet_256_train.npz --resize torch --metrics fd is
  {prog} drawn real --features efflite --feature-dims 64 --clip ViT-B/32
  {prog} real --save-stats real.npz""",
    "model": """\
  {prog} emoji my-pictures --features efflite --limit 2000
  {prog} path/to/model coco/val --clip ViT-B/32 --save-images drawn --out results.json
  {prog} path/to/model my-pictures --metrics nll""",
}


class Mode(NamedTuple):
    """What can be evaluated."""

    build: Callable[[str], Parser]
    body: Callable[[argparse.Namespace, str], None]  # gets the options and the command line
    summary: str


def main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """Run the command that the first argument names; returns its exit code."""
    what, *rest = (list(argv) if argv is not None else sys.argv[1:]) or [""]
    command = shlex.join([prog, what, *rest])
    if what in MODES:
        mode = MODES[what]
        return run(mode.build(f"{prog} {what}"), lambda args: mode.body(args, command), rest)
    lines = [f"  {name:<12} {mode.summary}" for name, mode in MODES.items()]
    if what in ("-h", "--help"):
        first = [EXAMPLES[name].splitlines()[0].replace("{prog}", f"{prog} {name}") for name in MODES]
        usage = f"usage: {prog} MODE ...  ({prog} MODE --help says more)"
        print("\n".join([usage, "", *lines, "", "examples:", *first]))
        return 0
    problem = f"no mode {what!r}" if what else "no mode given"
    print(f"{prog}: error: {problem}; known are {', '.join(MODES)} (see {prog} --help)", file=sys.stderr)
    return 2


def build_reconstruct_parser(prog: str) -> Parser:
    """Options of `reconstruct`."""
    about = "Measure an image tokenizer: PSNR, SSIM, perceptual distance, rFID, use of its codebooks."
    parser = Parser(prog=prog, description=about, examples=EXAMPLES["reconstruct"])
    add = parser.add_argument
    add("tokenizer", metavar="TOKENIZER", help="bundled name, path, training run, release or hub id")
    add("data", metavar="DATA", help="pictures: folder or WebDataset shards")
    add_ema_option(parser)
    add("--depths", action="store_true", help="residual codes: decode from 1, 2, ... D depths")
    names = ("lpips", "efflite", "none")
    add("--perceptual", choices=names, default="lpips", help="perceptual distance (lpips, a download)")
    add("--metrics", nargs="+", choices=RECONSTRUCTION_METRICS, help="what to measure (all)")
    return _add_common(parser)


def build_images_parser(prog: str) -> Parser:
    """Options of `images`."""
    about = "Measure pictures against others: FID, KID, IS, precision and recall, CLIP score, R-precision."
    parser = Parser(prog=prog, description=about, examples=EXAMPLES["images"])
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder or shards; of a drawn folder what its results.jsonl lists")
    add("reference", metavar="REFERENCE", nargs="?", help="folder, shards, or .npz of mu and sigma")
    add("--metrics", nargs="+", choices=METRICS, help=f"what to measure (all that can be): {METRICS_HELP}")
    add("--size", type=positive_int, metavar="N", help="first resize and cut both sides to NxN pixels")
    add("--save-stats", type=Path, metavar="NPZ", help="write mu and sigma of IMAGES")
    return _add_common(parser)


def build_model_parser(prog: str) -> Parser:
    """Options of `model`."""
    about = "Measure a model: likelihood of a data set, and a picture drawn for each caption or class of it."
    parser = Parser(prog=prog, description=about, examples=EXAMPLES["model"])
    add = parser.add_argument
    add("model", metavar="MODEL", help="bundled name, checkpoint path, release or hub id")
    add("data", metavar="DATA", help="captioned pictures: folder or WebDataset shards")
    add_checkpoint_options(parser)
    choices = ("nll", *METRICS)
    add("--metrics", nargs="+", choices=choices, help=f"what to measure (all that can be): {METRICS_HELP}")
    add("--save-images", type=Path, metavar="DIR", help="keep the drawn pictures in a new folder")
    return _add_common(parser)


def _add_common(parser: Parser) -> Parser:
    add_data_options(parser)
    add = parser.add_argument
    networks = ("inception", "efflite", "clip")
    add("--features", choices=networks, default="inception", help="feature network (inception, a download)")
    add("--inception-weights", metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth, if at hand")
    add("--clip", metavar="NAME", help="CLIP that judges: OpenAI's name, file, checkpoint or training run")
    add("--resize", choices=("clean", "torch"), default="clean", help="to the network's size (clean)")
    add(
        "--feature-dims", type=positive_int, metavar="N", help="FD in N principal components of the reference"
    )
    add("--limit", type=positive_int, metavar="N", help="only the first N pictures of each side")
    add("--batch-size", type=positive_int, default=32, metavar="N", help="pictures at once (32)")
    add("--seed", type=int, default=0, help="of drawings, subsets and intervals (0)")
    add_device_options(parser)
    add("--out", type=Path, metavar="JSON", help="file of results to add to")
    return parser


def _reconstruct(args: argparse.Namespace, command: str) -> None:
    from mindalle.cli.evaluate_modes import evaluate_tokenizer  # lazy: --help is quick

    evaluate_tokenizer(args, command)


def _images(args: argparse.Namespace, command: str) -> None:
    from mindalle.cli.evaluate_modes import evaluate_images

    evaluate_images(args, command)


def _model(args: argparse.Namespace, command: str) -> None:
    from mindalle.cli.evaluate_modes import evaluate_model

    evaluate_model(args, command)


MODES: dict[str, Mode] = {
    "reconstruct": Mode(build_reconstruct_parser, _reconstruct, "an image tokenizer on pictures"),
    "images": Mode(build_images_parser, _images, "pictures against other pictures and their captions"),
    "model": Mode(build_model_parser, _model, "a model on captioned pictures: likelihood and drawings"),
}
