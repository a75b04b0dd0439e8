#!/usr/bin/env python
"""Measure a model on held-out emoji: python tools/measure_emoji.py reconstruct data/emoji."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindalle.cli.command import Parser, UsageError, positive_int, run, say

if TYPE_CHECKING:
    from emoji_data.held_out import Record
    from PIL import Image
    from torch import Tensor

    from mindalle import SamplingParams
    from mindalle.pipeline import Pipeline
    from mindalle.rerank import ClipReranker

BATCH = 64
SWEEP = {"temperature": (0.5, 0.7, 0.85, 1.0), "top_k": (64, None), "cfg_scale": (2.0, 3.0, 5.0, 8.0)}
EXAMPLES = """\
  {prog} reconstruct data/emoji --model runs/emoji/rqvae
  {prog} clip data/emoji --judge runs/emoji/clip_judge
  {prog} draw data/emoji --model emoji --judge runs/emoji/clip_judge --num-candidates 16 --out measures.json
  {prog} sweep data/emoji --model emoji --judge runs/emoji/clip_judge --num-captions 60
  {prog} int8 data/emoji --model emoji --judge runs/emoji/clip_judge"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Measure image tokenizer, CLIP and drawings on held-out emoji.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("what", choices=tuple(MEASURES), help="what to measure")
    add("data", type=Path, metavar="DATA", help="folder of the shards, see build_emoji.py")
    add(
        "--model",
        default="emoji",
        metavar="NAME",
        help="bundled name or path; for reconstruct a run too (emoji)",
    )
    add("--judge", metavar="NAME", help="the CLIP that judges: not the one that ranks, or it judges itself")
    add(
        "--num-captions",
        type=positive_int,
        default=200,
        metavar="N",
        help="held-out captions and unseen colours drawn, at most (200)",
    )
    add("--num-candidates", type=positive_int, default=16, metavar="N", help="of best-of-N (16)")
    add("--seed", type=int, default=0, help="of captions and drawings (0)")
    add("--out", type=Path, metavar="FILE", help="JSON to add the results to")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "measure_emoji.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), measure, argv)


def measure(args: argparse.Namespace) -> None:
    """Measure, print, and add to the JSON."""
    if args.what != "reconstruct" and args.judge is None:
        raise UsageError(f"{args.what} needs a CLIP that judges: pass --judge")
    results = MEASURES[args.what](args)
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("out", "debug", "what")}
    entry = {"measure": args.what, "settings": settings, "results": results}
    say(json.dumps(results, indent=1))
    if args.out is not None:
        from mindalle.evaluation import append_results

        append_results(args.out, [entry])


def reconstruct(args: argparse.Namespace) -> dict[str, Any]:
    """PSNR and SSIM on `val_pair`."""
    from emoji_data.held_out import read_records

    from mindalle.evaluation import measure_reconstruction
    from mindalle.run import load_image_tokenizer

    tokenizer = load_image_tokenizer(args.model)
    records = read_records(args.data, "val_pair")
    groups, image_size = iter(lambda: list(islice(records, BATCH)), []), tokenizer.convnet.image_size
    batches = (to_batch(group, image_size) for group in groups)
    (quality,) = measure_reconstruction(tokenizer, batches).by_depth
    return {
        "psnr": quality.psnr.mean().item(),
        "ssim": quality.ssim.mean().item(),
        "num_images": len(quality.psnr),
    }


def to_batch(records: Sequence[Record], image_size: int) -> Tensor:
    """Pictures (B, 3, image_size, image_size) in [-1, 1]."""
    import torch

    from mindalle.image import fit, to_tensor

    return torch.stack([to_tensor(fit(record.image, (image_size, image_size))) for record in records])


def retrieve(args: argparse.Namespace) -> dict[str, Any]:
    """The judge's own R@1 and R@5 on `val_pair`: picture to name, among all names."""
    from emoji_data.held_out import concept_names, read_records

    from mindalle.evaluation.features import load_judge

    judge, names = load_judge(args.judge), concept_names(args.data)
    records = [record for record in read_records(args.data, "val_pair") if "recolored" not in record.about]
    pictures = [record.image for record in records]
    return concept_recall(judge, pictures, [record.about["name"] for record in records], names)


def draw(args: argparse.Namespace) -> dict[str, Any]:
    """Recall of held-out captions and accuracy of unseen colours, with one candidate and the best of N."""
    exam = load_exam(args)
    params = exam.pipe.sampling.params
    results: dict[str, Any] = {"params": asdict(params)}
    has_choice = exam.pipe.reranker is not None and args.num_candidates > 1
    for num_candidates in [1, args.num_candidates] if has_choice else [1]:
        results[f"best_of_{num_candidates}"] = exam.judged(num_candidates, params)
    return results


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """The same for all combinations of `SWEEP`, one candidate; the best sum of R@5 and colours first."""
    from mindalle import SamplingParams

    exam = load_exam(args)
    rows = []
    for values in product(*SWEEP.values()):
        setting: dict[str, Any] = dict(zip(SWEEP, values, strict=True))
        params = SamplingParams(**setting)
        rows.append(setting | exam.judged(1, params))
        say(json.dumps(rows[-1]), is_note=True)
    return {"rows": sorted(rows, key=lambda row: -row["recall_at_5"] - row["colour_accuracy"])}


def int8(args: argparse.Namespace) -> dict[str, Any]:
    """What int8 weights change: the model's distributions over held-out codes, and its drawings."""
    from emoji_data.held_out import read_records, sample

    from mindalle import Pipeline

    exam = load_exam(args)
    rounded = replace(exam, pipe=Pipeline.from_pretrained(args.model, device="cpu", precision="int8"))
    records = sample(list(read_records(args.data, "val_pair")), args.num_captions, args.seed)
    exact_scores, rounded_scores = exam.similarities(), rounded.similarities()
    return divergence(exam.pipe, rounded.pipe, records) | {
        "clip_score_fp32": exact_scores.mean().item(),
        "clip_score_int8": rounded_scores.mean().item(),
        "clip_score_difference_error": (
            (rounded_scores - exact_scores).std() / len(exact_scores) ** 0.5
        ).item(),
        "num_drawings": len(exact_scores),
    }


def divergence(exact: Pipeline, rounded: Pipeline, records: Sequence[Record]) -> dict[str, Any]:
    """Mean KL(exact | rounded) in nats per code, and how often both find the same code likeliest."""
    import torch
    import torch.nn.functional as F

    tokenizer, models = exact.image_tokenizer, [exact.model, rounded.model]
    assert tokenizer is not None
    total, same, count = 0.0, 0, 0
    with torch.inference_mode():
        for first in range(0, len(records), BATCH):
            some = records[first : first + BATCH]
            codes = tokenizer.encode(to_batch(some, tokenizer.convnet.image_size))
            cond = exact.encode_conditions([record.about["captions"][0] for record in some])
            logs, rounded_logs = (
                F.log_softmax(model(codes, cond).logits, dim=-1) for model in models if model is not None
            )
            total += F.kl_div(rounded_logs, logs, log_target=True, reduction="sum").item()
            same += int((logs.argmax(dim=-1) == rounded_logs.argmax(dim=-1)).sum())
            count += codes.numel()
    return {"kl": total / count, "same_likeliest_code": same / count, "num_codes": count}


MEASURES = {"reconstruct": reconstruct, "clip": retrieve, "draw": draw, "sweep": sweep, "int8": int8}


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Who draws what, and who judges it by which names: the same for every setting."""

    pipe: Pipeline
    judge: ClipReranker
    names: list[str]  # of all concepts
    captions: dict[str, str]  # held out, and the names of their concepts
    colours: list[tuple[str, str]]  # pairs of colour and thing that were never seen together
    seed: int

    def judged(self, num_candidates: int, params: SamplingParams) -> dict[str, Any]:
        """Draw the held-out captions and colours and let the judge say what it sees."""
        pictures = draw_prompts(self.pipe, list(self.captions), num_candidates, params, self.seed)
        results = concept_recall(self.judge, pictures, list(self.captions.values()), self.names)
        prompts = [f"{colour} {thing}" for colour, thing in self.colours]
        pictures = draw_prompts(self.pipe, prompts, num_candidates, params, self.seed)
        return results | {
            "colour_accuracy": colour_accuracy(self.judge, pictures, self.colours),
            "num_colours": len(self.colours),
        }

    def similarities(self) -> Tensor:
        """Cosines (n,) of the held-out captions and what is drawn of them, one candidate each."""
        captions = list(self.captions)
        pictures = draw_prompts(self.pipe, captions, 1, self.pipe.sampling.params, self.seed)
        return (self.judge.encode_images(pictures) * self.judge.encode_texts(captions)).sum(dim=-1)


def load_exam(args: argparse.Namespace) -> Exam:
    """The model to draw with, the judge, and what the data ask."""
    from emoji_data.held_out import concept_names, held_out_captions, unseen_colours

    from mindalle import Pipeline
    from mindalle.evaluation.features import load_judge

    return Exam(
        pipe=Pipeline.from_pretrained(args.model, device="cpu"),
        judge=load_judge(args.judge),
        names=concept_names(args.data),
        captions=held_out_captions(args.data, args.num_captions, args.seed),
        colours=unseen_colours(args.data, args.num_captions, args.seed),
        seed=args.seed,
    )


def concept_recall(
    judge: ClipReranker, pictures: Sequence[Image.Image], own: Sequence[str], names: list[str]
) -> dict[str, Any]:
    """How often a picture's name is among the 1 and 5 that the judge finds most similar."""
    import torch

    from mindalle.evaluation import ranks_of_own, recall

    places = {name: place for place, name in enumerate(names)}
    ranks = ranks_of_own(
        judge.encode_images(pictures), judge.encode_texts(names), torch.tensor([places[name] for name in own])
    )
    return {
        "recall_at_1": recall(ranks, 1),
        "recall_at_5": recall(ranks, 5),
        "num_pictures": len(ranks),
        "num_names": len(names),
    }


def colour_accuracy(
    judge: ClipReranker, pictures: Sequence[Image.Image], prompts: Sequence[tuple[str, str]]
) -> float:
    """How often the judge finds the colour that was asked for, among seven of the same thing."""
    from emoji_data.colours import HUES

    colours, found = list(HUES), 0
    for picture, (colour, thing) in zip(pictures, prompts, strict=True):
        texts = judge.encode_texts([f"{one} {thing}" for one in colours])
        (image,) = judge.encode_images([picture])
        found += colours[int((texts @ image).argmax())] == colour
    return found / len(prompts)


def draw_prompts(
    pipe: Pipeline, prompts: Sequence[str], num_candidates: int, params: SamplingParams, seed: int
) -> list[Image.Image]:
    """The best picture of each prompt: what `pipe` draws with this seed, many prompts at a time."""
    from mindalle.progress import progress_bar

    at_once, pictures = max(1, BATCH // num_candidates), []
    for first in progress_bar(range(0, len(prompts), at_once), desc=f"drawing, best of {num_candidates}"):
        some = prompts[first : first + at_once]
        codes = pipe.draw_codes(some, num_candidates=num_candidates, params=params, seed=seed)
        for prompt, candidates in zip(some, codes, strict=True):
            pictures += pipe.choose(candidates, prompt, 1).images
    return pictures


if __name__ == "__main__":
    raise SystemExit(main())
