"""`mindalle export`, `tools/export.py`: a training run to a native checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindalle.cli.command import (
    Parser,
    UsageError,
    check_writable,
    positive_int,
    run,
    say,
    with_option_names,
)

if TYPE_CHECKING:
    from mindalle.checkpoint import SamplingDefaults
    from mindalle.run import Run

EXAMPLES = """\
  {prog} runs/vqgan my-tokenizer
  {prog} runs/gpt my-model --top-k 256 --dtype fp16
  {prog} runs/gpt/last.ckpt my-model --clip runs/clip --num-candidates 8
  {prog} runs/clip my-clip"""
SAMPLING = ("temperature", "top_k", "top_p", "cfg_scale", "num_candidates")


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Write a native checkpoint, which Pipeline.from_pretrained loads, from a training run.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory or .ckpt of a run; of a directory last.ckpt")
    add("destination", type=Path, metavar="DST", help="directory to create")
    add("--raw-weights", action="store_true", help="of RUN's last step, where it has averaged ones too")
    add("--card", type=Path, metavar="FILE", help="README.md to store; default: one is written")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="stored type; default: as trained")
    add = parser.add_argument_group("for a sequence model").add_argument
    add("--image-tokenizer", metavar="MODEL", help="run, or any model; default: of the run's config.yaml")
    add("--text-tokenizer", metavar="PATH", help="or model; default: of the run's config.yaml")
    add("--clip", metavar="MODEL", help="run or native directory of a CLIP to put beside it")
    add("--temperature", type=float, metavar="T", help="default to store")
    add("--top-k", type=positive_int, metavar="K", help="default to store")
    add("--top-p", type=float, metavar="P", help="default to store")
    add("--cfg-scale", type=float, metavar="S", help="default to store")
    add("--num-candidates", type=positive_int, metavar="N", help="per picture, to rank; default to store")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "export.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), export_run, argv)


def export_run(args: argparse.Namespace) -> None:
    """Load the run's weights, and of a sequence model all that belongs to it, and save them as native."""
    from mindalle.cli.output import atomic_directory, check_free

    if args.card is not None and not args.card.is_file():
        raise FileNotFoundError(f"no model card at {args.card}")
    check_free(args.destination)
    check_writable(args.destination.parent, "DST")
    sampling = _sampling(args)
    from mindalle.checkpoint import save_checkpoint
    from mindalle.model_card import model_card
    from mindalle.run import clip_of_run, open_run
    from stage2_transformer import STAGE2
    from stage2_transformer.precision import DTYPES

    opened = open_run(args.run)
    if opened.kind in STAGE2:
        parts = _parts_with_model(args, opened)
    else:
        _check_options(args, opened)
        if opened.kind == "clip":
            parts = {"clip": clip_of_run(opened, use_raw=args.raw_weights)}
        else:
            parts = {"image_tokenizer": opened.build(use_raw=args.raw_weights)}
    name, is_raw = args.destination.absolute().name, args.raw_weights
    card = args.card.read_text(encoding="utf-8") if args.card else None
    with atomic_directory(args.destination) as directory:
        save_checkpoint(
            directory,
            **parts,
            sampling=sampling,
            card=model_card(name, opened, **parts, is_raw=is_raw) if card is None else card,
            dtype=DTYPES[args.dtype] if args.dtype else None,
        )
    say(args.destination)


def _sampling(args: argparse.Namespace) -> SamplingDefaults:
    from mindalle.checkpoint import SamplingDefaults
    from stage2_transformer import SamplingParams

    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    num_candidates = given.pop("num_candidates", 1)
    try:
        return SamplingDefaults(params=SamplingParams(**given), num_candidates=num_candidates)
    except ValueError as error:
        raise UsageError(with_option_names(str(error))) from error


def _check_options(args: argparse.Namespace, opened: Run) -> None:
    """Refuse options of a sequence model for a run of anything else."""
    names = ("image_tokenizer", "text_tokenizer", "clip", *SAMPLING)
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: not for a {opened.kind}, which is what {opened.file} holds")


def _parts_with_model(args: argparse.Namespace, opened: Run) -> dict[str, Any]:
    """The sequence model of a run, its two tokenizers, and the CLIP if one is asked for."""
    from mindalle.hub import resolve_text_tokenizer
    from mindalle.run import load_image_tokenizer, load_own_clip
    from mindalle.text import TextTokenizer
    from stage2_transformer.checkpoint import check_fit

    condition = opened.config.condition
    for option in ("text_tokenizer", "clip"):
        if condition.kind != "text" and getattr(args, option) is not None:
            raise UsageError(
                f"--{option.replace('_', '-')} goes with a model that reads text: {opened.file} has the "
                f"condition {condition.kind!r}"
            )
    named = args.image_tokenizer or opened.data_setting("image_tokenizer")
    image_tokenizer = load_image_tokenizer(_needed(named, "--image-tokenizer", opened))
    check_fit(opened.config, image_tokenizer.code_shape, image_tokenizer.codebook(), source=str(opened.file))
    parts: dict[str, Any] = {"image_tokenizer": image_tokenizer}
    parts["model"] = opened.build(image_tokenizer.codebook().detach(), use_raw=args.raw_weights)
    if condition.kind == "text":
        named = args.text_tokenizer or opened.data_setting("text_tokenizer")
        parts["text_tokenizer"] = TextTokenizer.from_file(
            resolve_text_tokenizer(_needed(named, "--text-tokenizer", opened)),
            length=condition.length,
            vocab_size=condition.vocab_size,
        )
    if args.clip is not None:
        parts["clip"] = load_own_clip(args.clip)
    return parts


def _needed(value: Any, option: str, opened: Run) -> Any:
    if not value:
        raise UsageError(f"{option} is needed: there is no config.yaml beside {opened.file} that says which")
    return value
