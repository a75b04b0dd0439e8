"""`mindalle generate`, `tools/generate.py`: prompts to pictures."""

from __future__ import annotations

import argparse
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindalle.cli.command import (
    Parser,
    UsageError,
    add_checkpoint_options,
    add_device_options,
    check_writable,
    choose_machine,
    positive_int,
    run,
    say,
    with_option_names,
)
from mindalle.cli.prompts import wanted_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from mindalle.cli.progress import Progress
    from mindalle.pipeline import Generation, Pipeline
    from stage2_transformer import SamplingParams

EXAMPLES = """\
  {prog} --prompt "a red apple"
  {prog} --prompt "a red apple" --prompt "a blue cat" --num-images 4 --num-candidates 32 --seed 0
  {prog} --model minDALL-E/1.3B --clip ViT-B/32 --prompt "a painting of a fox" --top-k 256 --precision int8
  {prog} --model path/to/rq-vae/imagenet_1.4B --class-label 207 --num-images 8
  {prog} --prompt "a cat" --complete half.png --keep-rows 4"""

SMALL_MODEL = 100_000_000
"""Weights of a sequence model below which one thread draws: the sizes that are not decoded in int8 either."""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog, description="Draw pictures from a prompt, a class, or nothing.", examples=EXAMPLES
    )
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to draw; repeatable")
    add("--prompts-file", type=Path, metavar="FILE", help="a prompt per line; empty lines are skipped")
    add("--class-label", type=int, action="append", default=[], metavar="N", help="to draw; repeatable")
    add("--num-images", type=positive_int, default=1, metavar="N", help="to keep per prompt (1)")
    add(
        "--num-candidates",
        type=positive_int,
        metavar="N",
        help="to draw and choose from by CLIP; default: the checkpoint's own number times the pictures kept",
    )
    add("--complete", type=Path, metavar="IMAGE", help="keep the top of this picture, draw the rest")
    add("--keep-rows", type=positive_int, metavar="N", help="rows of codes to keep of --complete")
    add_model_options(parser)
    add = add_sampling_options(parser).add_argument
    add("--seed", type=int, metavar="N", help="repeats a picture; without it one is drawn and printed")
    add(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="pictures drawn at once (up to 16, fewer of a large model)",
    )
    add = parser.add_argument_group("where to").add_argument
    add("--out", type=Path, default=Path("outputs"), metavar="DIR", help="nothing is overwritten (outputs)")
    add("--preview", action="store_true", help="write the growing pictures to NAME-preview.png")
    return parser


def add_model_options(parser: Parser) -> None:
    """Which model draws, and which CLIP ranks; see `load_pipeline`."""
    group = parser.add_argument_group("with which model")
    add = group.add_argument
    add("--model", default="emoji", help="bundled name, checkpoint path, release or hub id (emoji)")
    add_checkpoint_options(group)
    add("--clip", metavar="NAME", help="rerank with ViT-B/32, a .pt file or a native directory")
    add("--no-rerank", action="store_true", help="no choice by CLIP: a prompt's pictures are drawn once each")
    add_device_options(group)
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
        default="auto",
        help="of the transformer; auto: by device and size (auto)",
    )
    add("--compile", action="store_true", help="compile decoding: for GPUs; slow to start, not in int8")


def check_model_options(args: argparse.Namespace) -> None:
    """Raise UsageError if options of `add_model_options` contradict each other."""
    if args.no_rerank and args.clip is not None:
        raise UsageError("--clip and --no-rerank contradict each other: leave one out")
    if args.compile and args.precision == "int8":
        raise UsageError("--compile is for --precision fp32, bf16 or fp16, got int8: leave one out")


def add_sampling_options(parser: Parser) -> argparse._ArgumentGroup:
    """How codes are drawn, see `sampling_params`; the group takes further options."""
    group = parser.add_argument_group("how to sample (defaults come from the checkpoint)")
    add = group.add_argument
    add(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        help="0 = greedy; one, or one per depth",
    )
    add(
        "--top-k",
        type=int,
        nargs="+",
        metavar="K",
        help="keep the K likeliest codes; likewise",
    )
    add("--top-p", type=float, nargs="+", metavar="P", help="keep this much probability, in (0, 1]")
    add(
        "--cfg-scale",
        type=float,
        nargs="+",
        metavar="S",
        help="guidance to the prompt; 1 = off",
    )
    add(
        "--speculative",
        type=positive_int,
        nargs="?",
        const=8,
        metavar="W",
        help="guess and test W codes at a time (8): fewer passes, as good pictures, but others",
    )
    return group


def main(argv: Sequence[str] | None = None, prog: str = "generate.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), generate_pictures, argv)


def generate_pictures(args: argparse.Namespace) -> None:
    """Load the model, draw for every prompt, write the results."""
    prompts = wanted_prompts(args)
    _check_options(args)
    check_writable(args.out, "--out")  # what is wrong shows before the model loads, if it can
    pipe = load_pipeline(args)
    _check_conditions(pipe, prompts)
    params = sampling_params(args, pipe)
    known = _known(pipe, args)
    _say_what_is_unused(pipe, args)
    seed = args.seed if args.seed is not None else secrets.randbelow(1 << 32)
    say(f"seed {seed}", is_note=True)
    from mindalle.cli.progress import Progress

    num_pictures = sum(
        pipe.count_candidates(prompt, args.num_images, args.num_candidates) for prompt in prompts
    )
    num_codes = math.prod(pipe.image_tokenizer.code_shape) - (known.shape[1] if known is not None else 0)
    with Progress(num_pictures * num_codes) as progress:
        painter = _Painter(args=args, pipe=pipe, params=params, seed=seed, known=known, progress=progress)
        for number, prompt in enumerate(prompts, start=1):
            painter.draw(prompt, f"{number}/{len(prompts)} " if len(prompts) > 1 else "")


def _check_options(args: argparse.Namespace) -> None:
    """Options that only make sense together, or not together."""
    if (args.complete is None) != (args.keep_rows is None):
        raise UsageError("--complete IMAGE and --keep-rows N go together")
    check_model_options(args)
    if args.num_candidates is not None and args.num_candidates < args.num_images:
        raise UsageError(
            f"--num-candidates must be at least --num-images = {args.num_images}, got {args.num_candidates}"
        )
    sampling_params(args)
    if args.complete is not None and not args.complete.is_file():
        raise FileNotFoundError(f"no image at {args.complete}")


def sampling_params(args: argparse.Namespace, pipe: Pipeline | None = None) -> SamplingParams:
    """The checkpoint's defaults (before it is loaded: plain ones), except for what the user says."""
    from stage2_transformer.sampling import PER_DEPTH, SamplingParams

    by_depth = {name: getattr(args, name) for name in PER_DEPTH}
    given: dict[str, Any] = {
        name: value[0] if len(value) == 1 else tuple(value)
        for name, value in by_depth.items()
        if value is not None
    }
    if args.speculative is not None:
        given["window"] = args.speculative
    try:
        params = replace(pipe.sampling.params if pipe else SamplingParams(), **given)
        if pipe is not None:
            params.check_depths(len(pipe.image_tokenizer.codebook_sizes))
    except ValueError as error:
        raise UsageError(with_option_names(str(error))) from error
    if pipe is not None and params.is_guided and _condition(pipe) == "none":
        scales = params.cfg_scale if isinstance(params.cfg_scale, tuple) else (params.cfg_scale,)
        shown = " ".join(f"{scale:g}" for scale in scales)
        raise UsageError(
            f"--cfg-scale {shown} needs a prompt or a class to guide towards, and this model is "
            "unconditional: leave it out"
        )
    return params


def load_pipeline(args: argparse.Namespace) -> Pipeline:
    """The model that the options name, ready to draw."""
    choose_machine(args)
    import torch

    from mindalle.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(
        args.model,
        device=args.device,
        precision=args.precision,
        clip=args.clip,
        text_tokenizer=args.text_tokenizer,
        use_ema=args.ema,
        compile=args.compile,
    )
    if args.no_rerank:
        pipe.reranker = None
    if args.threads is None and args.device == "cpu" and _is_small(pipe):
        torch.set_num_threads(1)
    return pipe


def _is_small(pipe: Pipeline) -> bool:
    """Whether threads would wait for each other longer than they compute: see docs/performance.md."""
    return pipe.model is None or sum(weight.numel() for weight in pipe.model.parameters()) < SMALL_MODEL


def _condition(pipe: Pipeline) -> str:
    return "none" if pipe.model is None else pipe.model.config.condition.kind


def _check_conditions(pipe: Pipeline, prompts: Sequence[str | int | None]) -> None:
    """Refuse what the model cannot draw before anything is drawn; words it cannot read are named here."""
    if pipe.model is None:
        pipe.encode_condition(None)  # says so
    try:
        for prompt in prompts:
            pipe.encode_condition(prompt)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _known(pipe: Pipeline, args: argparse.Namespace) -> Tensor | None:
    """Codes of the rows of `--complete` to keep, or None."""
    if args.complete is None:
        return None
    from mindalle.image import open_image

    rows = pipe.image_tokenizer.code_shape[0]
    if args.keep_rows >= rows:
        raise UsageError(
            f"--keep-rows must be less than the model's {rows} rows of codes, got {args.keep_rows}"
        )
    return pipe.known_codes(open_image(args.complete), args.keep_rows)


def _say_what_is_unused(pipe: Pipeline, args: argparse.Namespace) -> None:
    is_text = _condition(pipe) == "text"
    if is_text and pipe.reranker is None and not args.no_rerank:
        say("not reranked: this checkpoint has no CLIP; --clip NAME reranks", is_note=True)
    if not is_text and args.clip is not None:
        say("not reranked: --clip judges by a prompt, which this model does not take", is_note=True)


@dataclass(frozen=True, kw_only=True)
class _Painter:
    """Draws prompt after prompt with the same settings."""

    args: argparse.Namespace
    pipe: Pipeline
    params: SamplingParams
    seed: int
    known: Tensor | None
    progress: Progress

    def draw(self, prompt: str | int | None, counter: str) -> None:
        """Draw and save the pictures of a prompt; if interrupted, those that are finished."""
        import torch

        from mindalle.cli.output import free_stem, picture_suffixes, slug

        args = self.args
        title = {str: str(prompt), int: f"class {prompt}"}.get(type(prompt), "unconditional")
        stem = slug(f"{title[:40]} seed {self.seed}")
        preview = None
        if args.preview:
            suffixes = [*picture_suffixes(args.num_images), "-preview.png"]
            preview = args.out / f"{free_stem(args.out, stem, suffixes)}-preview.png"
            say(f"preview in {preview}", is_note=True)
        self.progress.begin(f"{counter}{title[:30]}", preview)
        num_candidates = self.pipe.count_candidates(prompt, args.num_images, args.num_candidates)
        try:
            result = self.pipe(
                prompt,
                num_images=args.num_images,
                num_candidates=args.num_candidates,
                params=self.params,
                seed=self.seed,
                batch_size=args.batch_size,
                known=self.known,
                on_step=self.progress.show,
            )
        except KeyboardInterrupt:
            if self.progress.finished:
                codes = torch.cat(self.progress.finished)
                result = self.pipe.choose(codes, prompt, min(args.num_images, len(codes)))
                self._save(stem, prompt, result, len(codes))
            raise
        self._save(stem, prompt, result, num_candidates)

    def _save(self, stem: str, prompt: str | int | None, result: Generation, num_candidates: int) -> None:
        from mindalle.cli.output import save_results

        records = self._records(prompt, result, num_candidates)
        paths = save_results(self.args.out, stem, result.images, records)
        for path, record in zip(paths, records, strict=True):
            say(path if record["score"] is None else f"{path}  score {record['score']:.3f}")

    def _records(
        self, prompt: str | int | None, result: Generation, num_candidates: int
    ) -> list[dict[str, Any]]:
        """One mapping per picture with all that is needed to draw it again."""
        from stage2_transformer.precision import precision_of

        args, judge = self.args, self.pipe.reranker
        settings = {
            **asdict(self.params),
            "precision": precision_of(self.pipe.model) if self.pipe.model is not None else args.precision,
            "ema": args.ema,
            "num_candidates": num_candidates,
            "clip": args.clip,
            "judge_sha256": judge.weights_hash if judge is not None and result.scores is not None else None,
            "complete": str(args.complete) if args.complete else None,
            "keep_rows": args.keep_rows,
        }
        return [
            {
                "class_label" if isinstance(prompt, int) else "prompt": prompt,
                "seed": self.seed,
                "index": index,
                "score": result.scores[rank] if result.scores is not None else None,
                "model": str(args.model),
                "settings": settings,
            }
            for rank, index in enumerate(result.indices)
        ]
