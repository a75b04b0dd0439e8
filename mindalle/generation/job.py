"""What a picture set is: the job that a user gives, and the plan that its files belong to."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch

from checkpoint_io import CheckpointError, config_from_mapping, file_hash, find_parts, tensors_hash
from mindalle.generation.judges import judge_hash, load_judge
from mindalle.hub import resolve_model
from mindalle.parts import PLAN, Plan
from mindalle.pipeline import Pipeline
from mindalle.run import find_run
from stage2_transformer import SamplingParams

logger = logging.getLogger(__name__)
FORMAT = "mindalle-set-1"
Condition: TypeAlias = str | int | None
"""What a picture shows: a text, a class label, or nothing in particular."""


@dataclass(frozen=True, kw_only=True)
class SetJob:
    """What to draw and how: all that a process needs to draw a part."""

    conditions: tuple[Condition, ...]  # each is drawn with seeds of its own, by its place in here
    directory: Path  # of the pictures
    model: str = "emoji"  # bundled name, path, release or hub id
    params: SamplingParams
    num_images: int = 1  # kept of each condition, >= 1
    num_candidates: int = 1  # drawn of each, >= num_images; more need a judge
    seed: int = 0
    precision: str = "fp32"  # of the sequence model
    compile: bool = False  # decode through torch.compile, for GPUs
    use_ema: bool = False  # the averaged weights of an rq-vae checkpoint
    text_tokenizer: str | None = None  # where it is not with the checkpoint
    clip: str | None = None  # that judges; None = the checkpoint's own, if any
    is_ranked: bool = True  # by a CLIP, if there is one
    classifier: str | None = None  # of CLASSIFIERS, that judges pictures of classes
    class_names: tuple[str, ...] = ()  # of all classes, for the classifier "clip"
    file_format: str = "folder"  # of FORMATS
    part_size: int = 256  # conditions of a part, >= 1: what a process that is killed may have drawn in vain
    batch_size: int | None = (
        None  # pictures drawn at once, of any conditions, >= 1; None: see mindalle.memory
    )
    num_threads: int = 1  # of each process, on a CPU: a pixel's last bit can depend on it
    device: str = "cpu"  # cpu, cuda, cuda:N

    def __post_init__(self) -> None:
        for name in ("num_images", "part_size", "batch_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_candidates < self.num_images:
            raise ValueError(
                f"num_candidates must be at least num_images = {self.num_images}, got {self.num_candidates}"
            )
        if not self.conditions:
            raise ValueError("there is nothing to draw: conditions must hold at least one")

    def load(self) -> Pipeline:
        """The model, and the CLIP that judges, if one does; for errors see `Pipeline.from_pretrained`."""
        pipe = Pipeline.from_pretrained(
            self.model,
            device=self.device,
            precision=self.precision,
            clip=self.clip,
            text_tokenizer=self.text_tokenizer,
            use_ema=self.use_ema,
            compile=self.compile,
        )
        if not self.is_ranked:
            pipe.reranker = None
        return pipe


@dataclass(frozen=True, kw_only=True)
class SetPlan(Plan):
    """What all parts of a set have in common; nothing else decides over what a picture looks like."""

    contents: ClassVar[str] = "pictures"
    verb: ClassVar[str] = "draw"

    format: str = FORMAT
    model: str  # SHA-256 of the checkpoint
    use_ema: bool
    precision: str
    pixels: str  # type that they are decoded in, which follows from the precision and the processor
    device: str  # "cpu" or "cuda"
    is_compiled: bool
    num_threads: int
    params: dict[str, Any]  # fields of the SamplingParams
    seed: int
    judge: str  # SHA-256 of its weights; "" without
    classifier: str  # "" without
    conditions: str  # SHA-256
    num_conditions: int
    num_classes: int  # of a model of classes; 0 of any other
    num_images: int
    num_candidates: int
    file_format: str
    part_size: int

    @property
    def num_parts(self) -> int:
        """Runs of `part_size` conditions."""
        return -(-self.num_conditions // self.part_size)

    def part(self, number: int) -> range:
        """The places of a part's conditions."""
        return range(number * self.part_size, min((number + 1) * self.part_size, self.num_conditions))


def plan_set(job: SetJob, pipe: Pipeline, *, model_hash: str | None = None) -> SetPlan:
    """Check a job and tell what identifies its pictures.

    Args:
        job: what to draw.
        pipe: what `job.load()` gives, or a pipeline like it.
        model_hash: what `checkpoint_hash` gives, if it is at hand; None = the files are read.

    Returns:
        The plan.

    Raises:
        ValueError: if the model has no such conditions, nothing can judge, or the judge does not fit.
        ImportError: if the classifier needs a package.
        FileNotFoundError: if its weights cannot be had.
    """
    check_conditions(job.conditions, pipe)
    judge = load_judge(job, pipe)
    if judge is None and job.num_candidates > job.num_images:
        raise ValueError(
            f"nothing can choose {job.num_images} of {job.num_candidates} candidates: a model of texts needs "
            "a CLIP (--clip), one of classes a classifier (--classifier)"
        )
    assert pipe.model is not None
    condition = pipe.model.config.condition
    return SetPlan(
        model=model_hash or checkpoint_hash(job.model, pipe),
        use_ema=job.use_ema,
        precision=job.precision,
        pixels=str(next(pipe.image_tokenizer.decoder.parameters()).dtype),
        is_compiled=job.compile,
        device=torch.device(job.device).type,
        num_threads=job.num_threads,
        params=asdict(job.params),
        seed=job.seed,
        judge="" if judge is None else judge_hash(judge),
        classifier=job.classifier or "",
        conditions=_hash_of([job.conditions, job.class_names]),
        num_conditions=len(job.conditions),
        num_classes=condition.vocab_size if condition.kind == "class" else 0,
        num_images=job.num_images,
        num_candidates=job.num_candidates,
        file_format=job.file_format,
        part_size=job.part_size,
    )


def check_conditions(conditions: Sequence[Condition], pipe: Pipeline) -> None:
    """Refuse what the model cannot draw; say how many texts are longer than it reads.

    Raises:
        ValueError: if the model has another kind of condition, no text tokenizer, or no such class.
    """
    texts = [condition for condition in conditions if isinstance(condition, str)]
    for condition in {condition for condition in conditions if not isinstance(condition, str)}:
        pipe.encode_condition(condition)
    if texts:
        # an empty one, since the words that are lost would be told text by text
        pipe.encode_condition("" if pipe.text_tokenizer is not None else texts[0])
        assert pipe.text_tokenizer is not None
        length = pipe.text_tokenizer.length
        long = [
            text for text, n in zip(texts, pipe.text_tokenizer.count_ids(texts), strict=True) if n > length
        ]
        if long:
            logger.warning(
                "%s of %s prompts are longer than the %d tokens that the model reads, their ends are lost; "
                "the first: %s",
                *(f"{len(long):,}", f"{len(texts):,}", length, long[0]),
            )


def checkpoint_hash(name: str, pipe: Pipeline) -> str:
    """What identifies a checkpoint of any layout.

    Args:
        name: of the checkpoint, see `mindalle.hub.resolve_model`.
        pipe: that was loaded from it, for the text tokenizer, which may come from elsewhere.

    Returns:
        SHA-256, in hex, of the configs and the weights' files of both stages, and the text tokenizer.
    """
    words = pipe.text_tokenizer.tokenizer.to_str() if pipe.text_tokenizer is not None else None
    path = resolve_model(name)
    try:
        parts = sorted(find_parts(path).items())
    except CheckpointError:
        if (run := find_run(path)) is None:
            raise
        codebook_hash = tensors_hash(pipe.image_tokenizer.state_dict())
        return _hash_of([file_hash(run.file), codebook_hash, words])
    hashes = {file: file_hash(file) for file in {part.file for _, part in parts}}
    described = [[key, part.config, part.prefix, hashes[part.file]] for key, part in parts]
    return _hash_of([described, words])


def _hash_of(content: Any) -> str:
    """SHA-256 of what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_plan(directory: Path) -> SetPlan:
    """The plan of a set, finished or not.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        content = json.loads((directory / PLAN).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {content!r:.80}")
        return config_from_mapping(SetPlan, content, where=PLAN)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{directory} holds no usable set of pictures, its {PLAN} is damaged: {error}; choose another "
            "directory, or remove this one to draw again"
        ) from error
