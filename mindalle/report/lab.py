"""What the sections of a report measure with: the model, its data, the judge, the feature network."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from checkpoint_io import atomic_path
from mindalle.data.samples import Source, open_source
from mindalle.evaluation.features import FEATURES, FeatureNetwork, FeatureOptions, load_judge
from mindalle.evaluation.frechet import check_components
from mindalle.evaluation.model import sequence_model
from mindalle.evaluation.pictures import PictureSet, count_listed, measure_pictures, read_samples
from mindalle.evaluation.refusal import refusal
from mindalle.generation import SetJob, draw_set, open_set, plan_set
from mindalle.generation.job import checkpoint_hash
from mindalle.image import contact_sheet, fit
from mindalle.memory import candidates_at_once
from mindalle.pipeline import Pipeline
from mindalle.progress import progress_bar
from mindalle.report.records import FIGURES
from mindalle.rerank import ClipReranker
from stage2_transformer import GPT, RQTransformer, SamplingParams

logger = logging.getLogger(__name__)
NUM_EXAMPLES = 5  # columns of a sheet
CELL, NUM_COLOURS = 64, 256  # pixels of a picture's side, colours of a sheet: both keep the report small


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """What a report is of, and how much is measured."""

    data: str | None = None  # captioned pictures that the model was not trained on
    allow_pipe: bool = False  # whether their address may be a command
    model: str = "emoji"  # bundled name, path, release or hub id
    text_tokenizer: str | None = None  # where it is not with the checkpoint
    use_ema: bool = False  # the averaged weights of an rq-vae checkpoint
    out: Path
    judge: str | None = None  # the CLIP of all scores, which is not the one that ranks
    features: str = "efflite"  # of FEATURES, for Fréchet distances
    inception_weights: str | None = None  # file
    feature_dims: int = 64  # principal components that Fréchet distances are taken in; 0 = all features
    prompts: tuple[str, ...] = ()  # of the sheets; () = the first captions
    runs: tuple[tuple[str, Path], ...] = ()  # name and TensorBoard folder of each part's training
    num_captions: int = 200  # that every setting draws
    num_candidates: int = 64  # of best-of-N, the largest N
    num_pictures: int | None = None  # of the data; None = all
    lengths: tuple[int, ...] = (8, 12, 16, 24, 32)  # sides of the code grids whose decoding is timed
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)  # whose decoding is timed
    repeats: int = 3  # of timings
    num_processes: int = 1  # that draw
    seed: int = 0
    command: str = ""


class Lab:
    """Everything is loaded when it is first needed, once.

    Args:
        job: what to measure.
    """

    def __init__(self, job: ReportJob) -> None:
        self.job = job

    @cached_property
    def pipe(self) -> Pipeline:
        """The model."""
        job = self.job
        return Pipeline.from_pretrained(
            job.model, device="cpu", text_tokenizer=job.text_tokenizer, use_ema=job.use_ema
        )

    @cached_property
    def unranked(self) -> Pipeline:
        """The model without its CLIP."""
        pipe = self.pipe
        return Pipeline(pipe.image_tokenizer, pipe.model, pipe.text_tokenizer, None, pipe.sampling)

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 that identifies the checkpoint."""
        return checkpoint_hash(self.job.model, self.pipe)

    @property
    def model(self) -> GPT | RQTransformer:
        """The model that draws; raises ValueError if there is none."""
        return sequence_model(self.pipe)

    @cached_property
    def source(self) -> Source:
        """The data."""
        if self.job.data is None:
            raise ValueError("there is nothing to measure on: name the DATA")
        return open_source(self.job.data, allow_pipe=self.job.allow_pipe)

    @cached_property
    def judge(self) -> ClipReranker | None:
        """The CLIP of the scores."""
        if self.job.judge is None:
            return None
        return self.network.clip or load_judge(self.job.judge)

    @cached_property
    def judge_hash(self) -> str | None:
        """SHA-256 of its weights."""
        return self.judge.weights_hash if self.judge is not None else None

    @cached_property
    def network(self) -> FeatureNetwork:
        """The feature network."""
        options = FeatureOptions(inception_weights=self.job.inception_weights, clip=self.job.judge)
        network = FEATURES[self.job.features](options)
        check_components(self.num_components, network)
        return network

    @property
    def num_components(self) -> int | None:
        """See `mindalle.evaluation.comparison.Comparison`."""
        return self.job.feature_dims or None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's pictures."""
        return (self.pipe.image_tokenizer.convnet.image_size,) * 2

    @cached_property
    def reference(self) -> PictureSet:
        """The features of the data's pictures, at the model's size."""
        total = self.num_pictures
        return measure_pictures(
            self.source,
            progress_bar(
                read_samples(self.source, total), desc="reading the data", total=total, unit=" pictures"
            ),
            network=self.network,
            judge=None,
            prepare=partial(fit, size=self.size),
        )

    @property
    def num_pictures(self) -> int:
        """Of the data, as listed, or of shards on the network as many as are wanted.

        Raises:
            ValueError: if nobody has said how many.
        """
        wanted = self.job.num_pictures
        listed = count_listed(self.source, wanted)
        count = wanted if listed is None else listed
        if count is None:
            raise ValueError(
                f"how many pictures {self.source.name} holds is not known: say how many of them to take "
                "with --num-pictures"
            )
        return count

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """What every setting draws: a caption each of pictures of the data, chosen by the seed.

        Raises:
            ValueError: if the data have none.
        """
        rng = random.Random(self.job.seed)
        captions = [rng.choice(texts) for texts in self.source.captions() if texts]
        if not captions:
            raise ValueError(f"{self.source.name} has no captions to draw from")
        return tuple(rng.sample(captions, min(self.job.num_captions, len(captions))))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of the sheets."""
        return self.job.prompts or tuple(dict.fromkeys(self.captions))[:NUM_EXAMPLES]

    def cannot_draw(self) -> str | None:
        """Why there are no drawings to score; None if there are."""
        kind = self.pipe.model.config.condition.kind if self.pipe.model is not None else None
        if kind is None:
            return "this checkpoint holds an image tokenizer alone, which draws nothing"
        return None if kind == "text" else "this model does not draw from text, and scores are of captions"

    def cannot_score(self) -> list[str]:
        """Which scores of drawings there are not, and why."""
        count = len(self.captions)
        dims = self.num_components or self.network.num_features
        problem = refusal("fd", count, self.num_pictures, dims)
        reasons = [f"Fréchet distances: {problem}"] if problem is not None else []
        return reasons + (["CLIP scores: no judge was named (--judge)"] if self.judge is None else [])

    def settings(self, *, has_drawings: bool) -> dict[str, Any]:
        """What decides over a section's numbers, whatever it measures.

        Args:
            has_drawings: whether it scores what the model draws.
        """
        job = self.job
        about: dict[str, Any] = {
            "model": self.model_hash,
            "model_name": job.model,
            "ema": job.use_ema,
            "data": self.source.fingerprint,
            "data_name": self.source.name,
            "num_pictures": self.num_pictures,
            "features": self.network.about(),
            "feature_dims": job.feature_dims,
            "seed": job.seed,
        }
        if not has_drawings or self.cannot_draw() is not None:
            return about
        drawn = {"num_captions": len(self.captions), "prompts": self.prompts, "judge": self.judge_hash}
        return about | drawn

    @cached_property
    def seconds_per_picture(self) -> float:
        """How long a picture takes to draw here, for estimates: a batch is drawn."""
        params = self.pipe.sampling.params
        count = candidates_at_once(self.model, 16, params)
        begin = time.perf_counter()
        self.unranked(self.captions[0], num_images=count, params=params)
        return (time.perf_counter() - begin) / count / self.job.num_processes

    def announce(self, section: str, num_drawings: int) -> None:
        """Say how long drawings will take."""
        minutes = max(1, round(num_drawings * self.seconds_per_picture / 60))
        logger.info("%s: %s pictures to draw, about %d min", section, f"{num_drawings:,}", minutes)

    def draw(self, folder: Path, params: SamplingParams, *, num_candidates: int = 1) -> Source:
        """Draw the captions into a picture set; one whose drawing was killed goes on.

        Args:
            folder: of the set.
            params: how to sample.
            num_candidates: pictures of each caption, all of which are kept; with several a CLIP scores them.

        Returns:
            The pictures.
        """
        job = SetJob(
            conditions=self.captions,
            directory=folder,
            model=self.job.model,
            text_tokenizer=self.job.text_tokenizer,
            use_ema=self.job.use_ema,
            params=params,
            num_images=num_candidates,
            num_candidates=num_candidates,
            seed=self.job.seed,
            is_ranked=num_candidates > 1,
            part_size=max(1, 1024 // num_candidates),  # a part is in memory as a whole
            num_threads=max(1, torch.get_num_threads() // self.job.num_processes),
        )
        pipe = self.pipe if job.is_ranked else self.unranked
        draw_set(
            job, plan_set(job, pipe, model_hash=self.model_hash), pipe, num_processes=self.job.num_processes
        )
        return open_set(folder)

    def draw_sheet(self, file: str, params: SamplingParams, *, rows: int) -> str:
        """Draw a sheet of the prompts, a column each; returns the file's name in figures/."""
        columns: Sequence[list[Image.Image]] = [
            self.unranked(prompt, num_images=rows, params=params, seed=self.job.seed).images
            for prompt in self.prompts
        ]
        return self.write_sheet(file, list(chain(*zip(*columns, strict=True))), columns=len(columns))

    def write_sheet(self, file: str, images: Sequence[Image.Image], *, columns: int) -> str:
        """Keep pictures; returns the file's name in figures/."""
        sheet = contact_sheet(images, columns=columns, cell=CELL)
        with atomic_path(self.job.out / FIGURES / file) as temporary:
            # a palette: a third of the bytes, and hardly seen
            sheet.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)
        return file
