"""`mindalle generate`, `tools/generate.py`: prompts to pictures."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mindalle.cli.command import Parser, UsageError, positive_int, run

if TYPE_CHECKING:
    from mindalle.pipeline import Generation, Pipeline, Preview
    from stage2_transformer import SamplingParams

EXAMPLES = """\
  generate.py --prompt "a red apple"
  generate.py --prompt "a red apple" --prompt "a blue cat" --num-images 4 --num-candidates 32 --seed 0
  generate.py --model minDALL-E/1.3B --clip ViT-B/32 --prompt "a painting of a fox" --top-k 256 --precision bf16
  generate.py --model path/to/rq-vae/imagenet_1.4B --class-label 207 --num-images 8
  generate.py --prompt "a cat" --complete half.png --keep-rows 4"""


def build_parser() -> Parser:
    """The command's options."""
    parser = Parser(prog="generate.py", description="Draw pictures from a prompt or a class.", examples=EXAMPLES)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to draw; repeatable")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="a prompt per line; empty lines are skipped")
    what.add_argument("--class-label", type=int, action="append", default=[], metavar="N", help="repeatable")
    what.add_argument("--num-images", type=positive_int, default=1, metavar="N", help="to keep per prompt (1)")
    what.add_argument("--num-candidates", type=positive_int, metavar="N", help="to draw and choose from by CLIP")
    what.add_argument("--complete", type=Path, metavar="IMAGE", help="keep the top of this picture, draw the rest")
    what.add_argument("--keep-rows", type=positive_int, metavar="N", help="rows of codes to keep of --complete")
    model = parser.add_argument_group("with which model")
    model.add_argument("--model", default="emoji", help="bundled name, checkpoint path, release or hub id (emoji)")
    model.add_argument("--text-tokenizer", metavar="PATH", help="where it is not with the checkpoint")
    model.add_argument("--ema", action="store_true", help="take the averaged weights of an rq-vae checkpoint")
    model.add_argument("--clip", metavar="NAME", help="rerank with ViT-B/32, a .pt file or a native directory")
    model.add_argument("--no-rerank", action="store_true", help="keep the first pictures drawn")
    model.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    model.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the transformer (fp32)")
    how = parser.add_argument_group("how to sample (defaults come from the checkpoint)")
    how.add_argument("--temperature", type=float, metavar="T", help="0 = greedy")
    how.add_argument("--top-k", type=int, nargs="+", metavar="K", help="keep the K likeliest codes; RQ: one per depth")
    how.add_argument("--top-p", type=float, metavar="P", help="keep codes with this much probability, in (0, 1]")
    how.add_argument("--cfg-scale", type=float, metavar="S", help="guidance; 1 = off")
    how.add_argument("--seed", type=int, metavar="N", help="repeats a picture; without it one is drawn and printed")
    how.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="candidates at once (16)")
    out = parser.add_argument_group("where to")
    out.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="nothing is overwritten (outputs)")
    out.add_argument("--preview", action="store_true", help="write the growing pictures to NAME-preview.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(), generate_pictures, argv)


def generate_pictures(args: argparse.Namespace) -> None:
    """Load the model, draw for every prompt, write the results."""
    prompts = _prompts(args)
    _check(args)
    overrides = _sampling_overrides(args)  # a wrong option shows before the model loads
    args.out.mkdir(parents=True, exist_ok=True)
    seed = args.seed if args.seed is not None else secrets.randbelow(1 << 32)
    pipe = _load(args)
    try:
        params = replace(pipe.sampling.params, **overrides)
        params.check_depths(_num_depths(pipe))
    except ValueError as error:
        raise UsageError(str(error)) from error
    known = _known(pipe, args)
    print(f"seed {seed}", file=sys.stderr)
    for prompt in prompts or [None]:
        _generate_one(pipe, args, prompt, seed=seed, params=params, known=known)


def _prompts(args: argparse.Namespace) -> list[str | int]:
    prompts: list[str | int] = [*args.prompt, *args.class_label]
    if args.prompts_file is not None:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompts_file} is not UTF-8 text: {error}") from error
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise ValueError(f"{args.prompts_file} holds no prompts: write one per line")
        prompts += lines
    if any(isinstance(prompt, str) and not prompt.strip() for prompt in prompts):
        raise UsageError("--prompt is empty: say what to draw")
    return prompts


def _check(args: argparse.Namespace) -> None:
    """Options that only make sense together."""
    if (args.complete is None) != (args.keep_rows is None):
        raise UsageError("--complete IMAGE and --keep-rows N go together")
    if args.num_candidates is not None and args.num_candidates < args.num_images:
        raise UsageError(
            f"--num-candidates must be at least --num-images = {args.num_images}, got {args.num_candidates}"
        )
    if args.complete is not None and not args.complete.is_file():
        raise FileNotFoundError(f"no image at {args.complete}")


def _sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What the user says about sampling, as fields of SamplingParams."""
    from stage2_transformer.sampling import SamplingParams

    top_k = None if args.top_k is None else args.top_k[0] if len(args.top_k) == 1 else tuple(args.top_k)
    given = {"temperature": args.temperature, "top_k": top_k, "top_p": args.top_p, "cfg_scale": args.cfg_scale}
    overrides = {name: value for name, value in given.items() if value is not None}
    try:
        SamplingParams(**overrides)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return overrides


def _load(args: argparse.Namespace) -> Pipeline:
    from mindalle.pipeline import Pipeline

    _check_device(args.device)
    pipe = Pipeline.from_pretrained(
        args.model,
        device=args.device,
        precision=args.precision,
        clip=None if args.no_rerank else args.clip,
        text_tokenizer=args.text_tokenizer,
        use_ema=args.ema,
    )
    if args.no_rerank:
        pipe.reranker = None
    elif pipe.reranker is None and args.num_candidates:
        print("no CLIP weights with this checkpoint: not reranked (--clip NAME reranks)", file=sys.stderr)
    return pipe


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device is available; use --device cpu")


def _num_depths(pipe: Pipeline) -> int:
    shape = pipe.image_tokenizer.code_shape
    return shape[2] if len(shape) == 3 else 1


def _known(pipe: Pipeline, args: argparse.Namespace) -> Any:
    """Codes of the rows of `--complete` to keep, or None."""
    if args.complete is None:
        return None
    from mindalle.image import open_image

    rows = pipe.image_tokenizer.code_shape[0]
    if args.keep_rows >= rows:
        raise UsageError(f"--keep-rows must be less than the model's {rows} rows of codes, got {args.keep_rows}")
    return pipe.known_codes(open_image(args.complete), args.keep_rows)


def _generate_one(
    pipe: Pipeline, args: argparse.Namespace, prompt: str | int | None, *, seed: int, params: SamplingParams, known: Any
) -> None:
    from mindalle.cli.output import free_stem, save_results

    title = {str: str(prompt), int: f"class {prompt}"}.get(type(prompt), "unconditional")
    stem = free_stem(args.out, f"{title[:48]} seed {seed}")
    with _Progress(title, args.out / f"{stem}-preview.png" if args.preview else None) as progress:
        result = pipe(
            prompt,
            num_images=args.num_images,
            num_candidates=args.num_candidates,
            params=params,
            seed=seed,
            batch_size=args.batch_size,
            known=known,
            on_step=progress.show,
        )
    records = _records(result, args, prompt, seed=seed, params=params)
    for path, record in zip(save_results(args.out, stem, result.images, records, title), records, strict=True):
        print(f"{path}  score {record['score']:.3f}" if record["score"] is not None else path)


def _records(
    result: Generation, args: argparse.Namespace, prompt: str | int | None, *, seed: int, params: SamplingParams
) -> list[dict[str, Any]]:
    """One mapping per picture with all that is needed to draw it again."""
    settings = {
        **asdict(params),
        "precision": args.precision,
        "num_candidates": args.num_candidates,
        "complete": str(args.complete) if args.complete else None,
        "keep_rows": args.keep_rows,
    }
    scores = result.scores or [None] * len(result.images)
    return [
        {
            "prompt" if not isinstance(prompt, int) else "class_label": prompt,
            "seed": seed,
            "index": index,
            "score": score,
            "model": str(args.model),
            "settings": settings,
        }
        for index, score in zip(result.indices, scores, strict=True)
    ]


class _Progress:
    """A bar with codes per second over all batches of a prompt, and the preview file."""

    def __init__(self, title: str, preview: Path | None) -> None:
        self.bar = tqdm(desc=title[:40], unit="code", total=0)
        self.preview = preview
        self.last_done = 0
        self.rows_shown = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()

    def show(self, preview: Preview) -> None:
        """Count the codes drawn; write the preview at the end of each row of codes."""
        batch_size = len(preview.codes)
        if preview.num_done <= self.last_done or self.bar.total == 0:  # a new batch begins
            self.bar.total += preview.num_codes * batch_size
            self.last_done = self.rows_shown = 0
        self.bar.update((preview.num_done - self.last_done) * batch_size)
        self.last_done = preview.num_done
        rows = preview.num_done * preview.codes.shape[1] // preview.num_codes
        if self.preview is not None and rows > self.rows_shown:
            self.rows_shown = rows
            self._write(preview)

    def _write(self, preview: Preview) -> None:
        from mindalle.cli.output import save_png
        from mindalle.image import contact_sheet

        assert self.preview is not None
        save_png(self.preview, contact_sheet(preview.images), {})
