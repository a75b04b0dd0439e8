"""Writing the code cache: pictures through an image tokenizer, part by part, in one process or several."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from checkpoint_io import config_to_mapping
from mindalle.data.code_cache import (
    HEADER,
    CacheHeader,
    CachePlan,
    identified_tokenizer,
    part_path,
    read_header,
    read_plan,
)
from mindalle.data.part_encoder import EncodingJob, PartEncoder
from mindalle.download import exclusive
from mindalle.parts import Count, begin, do_parts, write_json
from mindalle.progress import progress_bar
from mindalle.run import load_image_tokenizer
from stage1_vqgan.autoencoder import QuantizedAutoencoder

logger = logging.getLogger(__name__)
NUM_NAMED = 10  # unreadable pictures that are named; all are in the cache


def encode_source(job: EncodingJob, *, num_processes: int = 1) -> CacheHeader:
    """Encode what a cache lacks of its parts; an encoding that was killed goes on.

    Args:
        job: what to encode.
        num_processes: that share the parts, >= 1. What they write does not depend on how many they are.

    Returns:
        The header of the finished cache.

    Raises:
        FileExistsError: if the directory holds a cache of another plan, or something else.
        ValueError: if the tokenizer does not fit, or no picture can be read.
        CheckpointError: if the cache or the tokenizer is damaged.
        ChildProcessError: if a process dies.
        ConnectionError: if shards were out of reach; what is encoded is kept.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    with exclusive(job.directory / ".lock"):
        tokenizer, tokenizer_hash = identified_tokenizer(job.image_tokenizer)
        plan = _plan(job, tokenizer, tokenizer_hash)
        begin(job.directory, plan, read_plan)
        if (job.directory / HEADER).is_file():
            return read_header(job.directory)
        _encode_parts(job, plan, tokenizer, num_processes)
        return _finish(job, plan)


def _plan(job: EncodingJob, tokenizer: QuantizedAutoencoder, tokenizer_hash: str) -> CachePlan:
    if tokenizer.codebook_size > 1 << 16:
        raise ValueError(
            f"codes are stored as uint16, so V must be at most 65536, got {tokenizer.codebook_size}"
        )
    return CachePlan(
        tokenizer=tokenizer_hash,
        codebook_size=tokenizer.codebook_size,
        code_shape=tokenizer.code_shape_at(job.transform.image_size),
        num_crops=job.num_crops,
        has_latents=job.has_latents,
        transform=config_to_mapping(job.transform),
        seed=job.seed,
        source=job.source.fingerprint,
        num_parts=job.source.num_parts,
        classes=job.source.classes,
    )


def _finish(job: EncodingJob, plan: CachePlan) -> CacheHeader:
    """Count what was written and write the header."""
    parts = range(plan.num_parts)
    num_missing = sum(not part_path(job.directory, number).is_file() for number in parts)
    if num_missing:
        raise ConnectionError(
            f"{num_missing} of {plan.num_parts} shards of {job.source.name} could not be read to the end, "
            f"the .unreadable files in {job.directory} say why: encode again to go on with them; without "
            "those that are gone for good, in another directory"
        )
    count = num_unreadable = num_without_captions = num_without_label = 0
    num_classes = len(plan.classes)
    for number in parts:
        for picture in _lines(part_path(job.directory, number, ".jsonl")):
            count += 1
            num_without_captions += not picture["captions"]
            num_without_label += picture["label"] is None
            num_classes = max(num_classes, 1 + (picture["label"] or 0))
        num_unreadable += sum(1 for _ in _lines(part_path(job.directory, number, ".unreadable")))
    if not count:
        raise ValueError(
            f"none of the {num_unreadable} pictures of {job.source.name} can be read: "
            f"the .unreadable files in {job.directory} say why"
        )
    if num_unreadable:
        logger.warning(
            "%d of %d pictures could not be read and were skipped", num_unreadable, num_unreadable + count
        )
    header = CacheHeader(
        plan=plan,
        count=count,
        num_unreadable=num_unreadable,
        num_without_captions=num_without_captions,
        num_classes=0 if num_without_label else num_classes,
    )
    write_json(job.directory / HEADER, header)
    return header


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """What the lines of a file hold; nothing if there is none."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


class _Report:
    """What a person sees of the encoding: one bar over all pictures, the first of those that are skipped."""

    def __init__(self, job: EncodingJob, finished: Iterable[int]) -> None:
        self.directory = job.directory
        self.num_named = 0
        try:
            total = len(job.source)
        except (TypeError, ValueError):  # of shards on the network, which nobody has counted
            total = None
        suffixes = (".jsonl", ".unreadable")
        paths = [part_path(job.directory, number, suffix) for number in finished for suffix in suffixes]
        self.bar = progress_bar(
            desc="encoding",
            total=total,
            initial=sum(1 for path in paths for _ in _lines(path)),
            unit=" pictures",
        )

    def finish(self, number: int) -> None:
        """Name the pictures of a part that were skipped."""
        unreadable = _lines(part_path(self.directory, number, ".unreadable"))
        for picture in islice(unreadable, NUM_NAMED - self.num_named):
            logger.warning("skipped %s: %s", picture["key"], picture["reason"])
            self.num_named += 1


def _encode_parts(
    job: EncodingJob, plan: CachePlan, tokenizer: QuantizedAutoencoder, num_processes: int
) -> None:
    """Encode the parts that are missing."""
    is_there = [part_path(job.directory, number).is_file() for number in range(plan.num_parts)]
    missing = [number for number in range(plan.num_parts) if not is_there[number]]
    if not missing:
        return
    is_alone = min(num_processes, len(missing)) == 1
    num_threads = None if is_alone else max(1, torch.get_num_threads() // num_processes)
    start = partial(_start_encoder, job, tokenizer if is_alone else None, num_threads)
    report = _Report(job, finished=[number for number in range(plan.num_parts) if is_there[number]])
    with report.bar:
        do_parts(
            missing,
            start,
            num_processes=num_processes,
            count=report.bar.update,
            finish=report.finish,
            verb=plan.verb,
        )


def _start_encoder(
    job: EncodingJob, tokenizer: QuantizedAutoencoder | None, num_threads: int | None, count: Count
) -> Callable[[int], object]:
    """What encodes parts in this process; without a tokenizer it loads its own."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return PartEncoder(job, tokenizer or load_image_tokenizer(job.image_tokenizer), count).encode
