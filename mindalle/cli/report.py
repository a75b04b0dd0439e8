"""`mindalle report`, `tools/report.py`: a page of figures of a model, each drawn from data beside it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindalle.cli.command import (
    Parser,
    UsageError,
    add_checkpoint_options,
    add_data_options,
    check_writable,
    positive_int,
    run,
    say,
)

SECTIONS = ("decoding", "sampling", "depths", "best_of", "learning")
READ_DATA = ("sampling", "depths", "best_of")  # of these
QUICK: dict[str, Any] = {
    "num_captions": 16,
    "num_candidates": 4,
    "num_pictures": 64,
    "feature_dims": 8,
    "lengths": (4, 8),
    "batch_sizes": (1, 4),
    "repeats": 1,
}
EXAMPLES = """\
  {prog} 'data/emoji/val_pair-*.tar' --model emoji --judge runs/emoji/clip_judge --out docs/report
  {prog} my-pictures --model path/to/model --only depths best_of --judge ViT-B/32 --out report
  {prog} my-pictures --out report --runs "image tokenizer=runs/emoji/rqvae" --runs CLIP=runs/emoji/clip
  {prog} --only learning --runs CLIP=runs/emoji/clip --out report
  {prog} --render-only --out docs/report"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Measure a model section by section and make a page of figures: HTML and Markdown.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    help_ = f"captioned pictures not trained on, folder or shards, for {', '.join(READ_DATA)}"
    add("data", metavar="DATA", nargs="?", help=help_)
    add_data_options(parser)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the report, its data and figures")
    add("--model", default="emoji", metavar="NAME", help="bundled name, checkpoint path or hub id (emoji)")
    add_checkpoint_options(parser)
    add("--judge", metavar="NAME", help="the CLIP of the scores: not the one that ranks, or it judges itself")
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all)")
    add("--render-only", action="store_true", help="measure nothing, make the page from the data at hand")
    add("--runs", action="append", default=[], metavar="NAME=DIR", help="TensorBoard folder of a training")
    add("--prompt", action="append", default=[], metavar="TEXT", help="of the sheets (the first captions)")
    add("--num-captions", type=positive_int, metavar="N", help="drawn with every setting (200)")
    add("--num-candidates", type=positive_int, metavar="N", help="largest N of best-of-N (64)")
    add("--num-pictures", type=positive_int, metavar="N", help="only the first N of the data (all)")
    networks = ("efflite", "inception", "clip")
    add("--features", choices=networks, default="efflite", help="network of FD (efflite); clip: the judge")
    add("--inception-weights", metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth, if at hand")
    add("--feature-dims", type=int, metavar="N", help="principal components of FD, 0 = all (64)")
    add("--quick", action="store_true", help="a few pictures of each: to try it out, the numbers mean little")
    add("--num-processes", type=positive_int, default=1, metavar="N", help="that draw (1)")
    add("--seed", type=int, default=0, help="of captions, drawings and intervals (0)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "report.py") -> int:
    """Run the command; returns its exit code."""
    command = shlex.join([prog, *(argv if argv is not None else sys.argv[1:])])
    return run(build_parser(prog), lambda args: report(args, command), argv)


def report(args: argparse.Namespace, command: str) -> None:
    """Measure what has no data yet, and make the page of all data.

    Args:
        args: of `build_parser`.
        command: the command line, for the data.

    Raises:
        UsageError: if options exclude each other or are incomplete.
    """
    names = args.only or SECTIONS
    if args.data is None and not args.render_only and set(names) & set(READ_DATA):
        raise UsageError(
            f"there is nothing to measure {', '.join(name for name in names if name in READ_DATA)} on: name "
            "the DATA, choose other sections with --only, or pass --render-only"
        )
    if args.render_only and args.only is not None:
        raise UsageError("--render-only makes the page of all data: leave --only out")
    if args.feature_dims is not None and args.feature_dims < 0:
        raise UsageError(f"--feature-dims must be at least 0 (0 = all), got {args.feature_dims}")
    if args.features == "clip" and args.judge is None:
        raise UsageError("--features clip takes the judge's: name it with --judge")
    runs = _runs(args.runs)
    check_writable(args.out, "--out")
    # lazy: --help is quick
    from mindalle.report.lab import ReportJob
    from mindalle.report.sections import measure_sections, render

    if not args.render_only:
        amounts: dict[str, Any] = QUICK if args.quick else {}
        for name in ("num_captions", "num_candidates", "num_pictures", "feature_dims"):
            if getattr(args, name) is not None:
                amounts = amounts | {name: getattr(args, name)}
        job = ReportJob(
            data=args.data,
            allow_pipe=args.allow_pipe,
            model=args.model,
            text_tokenizer=args.text_tokenizer,
            use_ema=args.ema,
            out=args.out,
            judge=args.judge,
            features=args.features,
            inception_weights=args.inception_weights,
            prompts=tuple(args.prompt),
            runs=runs,
            num_processes=args.num_processes,
            seed=args.seed,
            command=command,
            **amounts,
        )
        measure_sections(job, names)
    for path in render(args.out):
        say(path)


def _runs(named: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """NAME=DIR, which must be there."""
    runs = []
    for one in named:
        name, is_pair, path = one.partition("=")
        if not is_pair or not name.strip() or not path:
            raise UsageError(f"--runs must be NAME=DIR, got {one!r}")
        if not Path(path).is_dir():
            raise UsageError(f"--runs {name}: {path} is no directory")
        runs.append((name.strip(), Path(path)))
    if len(dict(runs)) < len(runs):
        raise UsageError("--runs names a run twice: give each a name of its own")
    return tuple(runs)
