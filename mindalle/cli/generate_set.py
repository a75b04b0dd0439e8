"""`mindalle generate-set`, `tools/generate_set.py`: pictures of many prompts or classes."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
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
from mindalle.cli.generate import (
    add_model_options,
    add_sampling_options,
    check_model_options,
    load_pipeline,
    sampling_params,
)
from mindalle.cli.prompts import read_prompts

if TYPE_CHECKING:
    from mindalle.generation import Condition, SetJob
    from mindalle.pipeline import Pipeline

PART_DRAWS = 256  # candidates of a part, unless one prompt has more
ACCEPT = 0.05  # of the candidates of a class, with a classifier
CAPTION_SUFFIXES = (".jsonl", ".csv", ".tsv", ".tar", ".tgz", ".gz")
EXAMPLES = """\
  {prog} captions.txt --out sets/emoji --num-processes 2
  {prog} data/train --captions random --out sets/train --num-processes 2 --num-candidates 8
  {prog} data/val --out sets/val --num-candidates 16 --clip ViT-B/32 --format shards
  {prog} --model rq-vae/imagenet-1.4b --classes all --per-class 50 --out sets/imagenet --device cuda
  {prog} --model rq-vae/imagenet-1.4b --classes 3,7 --per-class 50 --classifier efflite --out sets/best"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Draw a set of pictures to evaluate or train with; killed, it goes on where it was.",
        examples=EXAMPLES,
    )
    group = parser.add_argument_group("what to draw")
    add_data_options(group)
    add = group.add_argument
    help_ = "a caption per line; or a captions file, folder or shards of captioned pictures"
    add("prompts", nargs="?", metavar="PROMPTS", help=help_)
    help_ = "which of a picture's: the first, one drawn by --seed, or all (first)"
    add("--captions", choices=("first", "random", "all"), metavar="WHICH", help=help_)
    add("--classes", metavar="LIST", help="instead of prompts: all, 0-99 or 3,7")
    add(
        "--unconditional", type=positive_int, metavar="N", help="instead: N pictures of nothing in particular"
    )
    help_ = "pictures to keep of each prompt or class (1)"
    add(*("--images-per-prompt", "--per-class"), type=positive_int, default=1, metavar="N", help=help_)
    add(
        "--num-candidates",
        type=positive_int,
        metavar="N",
        help="of each, to choose from by CLIP or classifier; default: the checkpoint's own number times the "
        "pictures kept, or what --accept says",
    )
    add("--classifier", metavar="NAME", help="keep the likeliest of a class by efflite, resnet101 or clip")
    add("--accept", type=float, metavar="SHARE", help=f"of a class's candidates, in (0, 1] ({ACCEPT})")
    add("--class-names", type=Path, metavar="FILE", help="of all classes, one a line: for --classifier clip")
    add_model_options(parser)
    add = add_sampling_options(parser).add_argument
    add("--seed", type=int, default=0, metavar="N", help="of the set (0)")
    help_ = "pictures drawn at once, of any prompts (up to 16, fewer of large models)"
    add("--batch-size", type=positive_int, metavar="N", help=help_)
    add = parser.add_argument_group("how to share the work").add_argument
    add("--num-processes", type=positive_int, default=1, metavar="P", help="that share the parts (1)")
    add("--part-size", type=positive_int, metavar="N", help="prompts that are written at once")
    add("--ray", action="store_true", help="processes of Ray, on its machines; RAY_ADDRESS names a cluster")
    add = parser.add_argument_group("where to").add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="an empty one, or one that was begun")
    add("--format", choices=("folder", "shards"), default="folder", help="PNGs or WebDataset tars (folder)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "generate_set.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), generate_set, argv)


def generate_set(args: argparse.Namespace) -> None:
    """Draw what the set lacks, say what it has."""
    _check_options(args)
    check_writable(args.out, "--out")
    prompts = _prompts(args) if args.prompts is not None else []
    names = tuple(read_prompts(args.class_names)) if args.class_names is not None else ()
    pipe: Pipeline | None = load_pipeline(args)
    assert pipe is not None
    _check_kind(args, pipe)
    from checkpoint_io import CheckpointError
    from mindalle.generation import draw_set, plan_set

    job = _job(args, pipe, prompts or _without_prompts(args, pipe), names)
    try:
        plan = plan_set(job, pipe)
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.num_processes > 1 or args.ray:
        pipe = None  # they load their own, and this one's memory is better theirs
    summary = draw_set(job, plan, pipe, num_processes=args.num_processes, use_ray=args.ray)
    score = "" if summary.mean_score is None else f", mean score {summary.mean_score:.4f}"
    say(f"{summary.directory}  {summary.count:,} pictures of {len(job.conditions):,} {_nouns(args)}{score}")


def _nouns(args: argparse.Namespace) -> str:
    return "classes" if args.classes is not None else "prompts" if args.prompts is not None else "draws"


def _check_options(args: argparse.Namespace) -> None:
    """Options that only make sense together, or not together."""
    named = [args.prompts is not None, args.classes is not None, args.unconditional is not None]
    if sum(named) != 1:
        raise UsageError("say what to draw by one of PROMPTS, --classes LIST and --unconditional N")
    if args.captions is not None and args.prompts is None:
        raise UsageError("--captions is for PROMPTS, which are not given")
    if args.classifier is not None and args.classes is None:
        raise UsageError("--classifier judges pictures of classes: name them by --classes")
    if args.accept is not None and args.classifier is None:
        raise UsageError("--accept is the share that a classifier keeps: name one by --classifier")
    if args.accept is not None and args.num_candidates is not None:
        raise UsageError("--accept and --num-candidates both say how many are drawn: leave one out")
    if args.accept is not None and not 0 < args.accept <= 1:
        raise UsageError(f"--accept must be in (0, 1], got {args.accept:g}")
    if args.class_names is not None and args.classifier != "clip":
        raise UsageError("--class-names is for --classifier clip")
    check_model_options(args)
    if args.num_candidates is not None and args.num_candidates < args.images_per_prompt:
        raise UsageError(
            f"--num-candidates must be at least {args.images_per_prompt}, the pictures to keep, "
            f"got {args.num_candidates}"
        )
    sampling_params(args)


def _check_kind(args: argparse.Namespace, pipe: Pipeline) -> None:
    """What is to be drawn must be what the model draws."""
    if pipe.model is None:
        pipe.encode_condition(None)  # says so
    options = {"text": "PROMPTS", "class": "--classes LIST", "none": "--unconditional N"}
    given = "text" if args.prompts is not None else "class" if args.classes is not None else "none"
    assert pipe.model is not None
    wanted = pipe.model.config.condition.kind
    if given != wanted:
        what = {"text": "draws from text", "class": "draws classes", "none": "is unconditional"}[wanted]
        raise UsageError(f"this model {what}: say what by {options[wanted]}, not by {options[given]}")


def _prompts(args: argparse.Namespace) -> list[str]:
    """The lines of a text file, or the captions of a source of pictures."""
    if Path(args.prompts).is_file() and not args.prompts.lower().endswith(CAPTION_SUFFIXES):
        return read_prompts(Path(args.prompts))
    from mindalle.data import open_source

    found = list(open_source(args.prompts, allow_pipe=args.allow_pipe).captions())
    captioned = [captions for captions in found if captions]
    if not captioned:
        raise ValueError(f"none of the {len(found):,} pictures of {args.prompts} has a caption to draw")
    if len(captioned) < len(found):
        say(f"{len(found) - len(captioned):,} of {len(found):,} pictures have no caption", is_note=True)
    if args.captions == "all":
        return [caption for captions in captioned for caption in captions]
    if args.captions == "random":
        rng = Random(args.seed)
        return [rng.choice(captions) for captions in captioned]
    return [captions[0] for captions in captioned]


def _without_prompts(args: argparse.Namespace, pipe: Pipeline) -> Sequence[Condition]:
    """The labels that --classes means, or as many Nones as --unconditional says."""
    if args.unconditional is not None:
        return [None] * args.unconditional
    if args.classes == "all":
        assert pipe.model is not None
        return range(pipe.model.config.condition.vocab_size)
    labels: list[int] = []
    for part in args.classes.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last >= 1_000_000:  # as many classes as a shard may have
            raise UsageError(
                f"--classes must be all, or labels and ranges such as 0-99,207, got {args.classes!r}"
            )
        labels += range(first, last + 1)
    if len(set(labels)) < len(labels):
        raise UsageError(f"--classes names a class twice: {args.classes}")
    return labels


def _job(
    args: argparse.Namespace, pipe: Pipeline, conditions: Sequence[Condition], class_names: tuple[str, ...]
) -> SetJob:
    """The job that the options describe."""
    from mindalle.generation import SetJob
    from stage2_transformer.precision import precision_of

    num_candidates = args.num_candidates or args.images_per_prompt
    if args.classifier is not None and args.num_candidates is None:
        num_candidates = math.ceil(args.images_per_prompt / (args.accept or ACCEPT))
    elif args.num_candidates is None and args.prompts is not None and pipe.reranker is not None:
        num_candidates = args.images_per_prompt * pipe.sampling.num_candidates
    return SetJob(
        conditions=tuple(conditions),
        directory=args.out,
        model=args.model,
        params=sampling_params(args, pipe),
        num_images=args.images_per_prompt,
        num_candidates=num_candidates,
        seed=args.seed,
        precision=precision_of(pipe.model) if pipe.model is not None else args.precision,
        compile=args.compile,
        use_ema=args.ema,
        text_tokenizer=args.text_tokenizer,
        clip=args.clip,
        is_ranked=not args.no_rerank,
        classifier=args.classifier,
        class_names=class_names,
        file_format=args.format,
        part_size=args.part_size or max(1, PART_DRAWS // num_candidates),
        batch_size=args.batch_size,
        num_threads=args.threads or 1,
        device=args.device,
    )
