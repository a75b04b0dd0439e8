"""One part of a picture set: codes in batches across prompts, pictures, scores, the best of each prompt.

What floating point leaves open must not depend on how the work is divided: batches have MIN_ROWS rows at
least, and the candidates of a prompt are decoded and judged in groups of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import groupby, islice
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from mindalle.data.samples import seed_of
from mindalle.generation.job import SetJob, SetPlan
from mindalle.generation.judges import load_judge
from mindalle.memory import candidates_at_once
from mindalle.parts import Count
from mindalle.pipeline import Pipeline
from stage2_transformer import generate, image_seeds

MIN_ROWS = 4
"""Of prompts that are read and of codes that are drawn at once: on a CPU, products of matrices with fewer
rows are summed in another order; with these, as measured, a row has the same bits whatever the others are."""

GROUP = 16  # candidates of one prompt that are decoded and judged at once

Draw: TypeAlias = tuple[int, int]  # place of the condition, number of the candidate


@dataclass(frozen=True)
class DrawnPicture:
    """A picture of a set, not yet in a file."""

    key: str  # "000017-0000": place of the condition, place among its pictures
    png: bytes
    record: dict[str, Any]  # all that is needed to draw it again, and its score


class Painter:
    """Draws parts of a set; each process has one.

    Args:
        job: what to draw.
        plan: of the job.
        pipe: what `job.load()` gives.
        count: told of each batch of candidates.
    """

    def __init__(self, job: SetJob, plan: SetPlan, pipe: Pipeline, count: Count) -> None:
        assert pipe.model is not None
        self.job = job
        self.plan = plan
        self.pipe = pipe
        self.model = pipe.model
        self.judge = load_judge(job, pipe)
        self.count = count
        num_draws = plan.part_size * plan.num_candidates
        self.batch_size = job.batch_size or candidates_at_once(pipe.model, num_draws, job.params)

    def draw(self, number: int) -> list[DrawnPicture]:
        """Draw the pictures of a part.

        Args:
            number: of the part.

        Returns:
            Those that are kept, by condition, best first where there was a judge.
        """
        places = self.plan.part(number)
        return [
            picture
            for place, codes in zip(places, self._codes(places), strict=True)
            for picture in self._best(place, codes)
        ]

    def _codes(self, places: Sequence[int]) -> Iterator[Tensor]:
        """The codes (num_candidates, *code_shape) of each condition."""
        wanted = self.job.num_candidates
        draws = ((place, candidate) for place in places for candidate in range(wanted))
        drawn = torch.empty(0, *self.model.code_shape, dtype=torch.int64)
        while batch := list(islice(draws, self.batch_size)):
            drawn = torch.cat([drawn, self._draw_batch(batch).cpu()])
            while len(drawn) >= wanted:
                yield drawn[:wanted]
                drawn = drawn[wanted:]
            self.count(len(batch))

    def _draw_batch(self, draws: Sequence[Draw]) -> Tensor:
        """Codes (B, *code_shape) of candidates of any conditions."""
        padded = [*draws, *[draws[-1]] * (MIN_ROWS - len(draws))]
        stride = _stride([place for place, _ in padded])
        conditions = [self.job.conditions[place] for place, _ in padded[::stride]]
        seeds = [image_seeds(self._seed(place), 1, candidate)[0] for place, candidate in padded]
        cond = self.pipe.encode_conditions(conditions, warns_of_loss=False)  # the plan's maker has warned
        return generate(self.model, cond, self.job.params, seeds=seeds)[: len(draws)]

    def _seed(self, place: int) -> int:
        """Of a condition; of generate.py too, if it is to draw the same picture."""
        return seed_of(self.job.seed, place)

    def _best(self, place: int, codes: Tensor) -> Iterator[DrawnPicture]:
        """Decode and judge the candidates of a condition and keep the best; without a judge the first."""
        condition = self.job.conditions[place]
        device = next(self.pipe.image_tokenizer.parameters()).device
        best: list[tuple[float | None, int, Image.Image]] = []  # score, candidate, picture
        for first in range(0, len(codes), GROUP):
            images = self.pipe.decode(codes[first : first + GROUP].to(device))
            scores: list[float | None] = [None] * len(images)
            if self.judge is not None:
                scores = self.judge.score(images, condition).tolist()
            found = zip(scores, range(first, first + len(images)), images, strict=True)
            best = sorted([*best, *found], key=lambda one: (-(one[0] or 0.0), one[1]))[: self.job.num_images]
        for rank, (score, candidate, image) in enumerate(best):
            file = BytesIO()
            image.save(file, "PNG")
            yield DrawnPicture(
                f"{place:06d}-{rank:04d}", file.getvalue(), self._record(place, candidate, score)
            )

    def _record(self, place: int, candidate: int, score: float | None) -> dict[str, Any]:
        """As in the results of generate.py, and which condition and checkpoint it was."""
        job, condition = self.job, self.job.conditions[place]
        return {
            "class_label" if isinstance(condition, int) else "prompt": condition,
            "number": place,
            "seed": self._seed(place),
            "index": candidate,
            "score": score,
            "model": job.model,
            "model_sha256": self.plan.model,
            "settings": {
                **asdict(job.params),
                "precision": job.precision,
                "ema": job.use_ema,
                "num_candidates": job.num_candidates,
                "clip": job.clip,
                "classifier": job.classifier,
                "judge_sha256": self.plan.judge or None,
                "set_seed": job.seed,
            },
        }


def _stride(places: Sequence[int]) -> int:
    """How many neighbours a condition can serve, to be read once for all of them, if enough rows are left."""
    longest = math.gcd(*(len(list(run)) for _, run in groupby(places)))
    return max(n for n in range(1, longest + 1) if longest % n == 0 and len(places) // n >= MIN_ROWS)
