"""Writing the code cache: pictures through an image tokenizer, part by part, in one process or several."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint_io import atomic_path, config_to_mapping
from mindalle.data.code_cache import (
    HEADER,
    PLAN,
    CacheHeader,
    CachePlan,
    identified_tokenizer,
    part_path,
    read_header,
    read_plan,
)
from mindalle.data.part_encoder import EncodingJob, PartEncoder
from mindalle.download import exclusive
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
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    with exclusive(job.directory / ".lock"):
        tokenizer, tokenizer_hash = identified_tokenizer(job.image_tokenizer)
        plan = _plan(job, tokenizer, tokenizer_hash)
        _begin(job.directory, plan)
        if (job.directory / HEADER).is_file():
            return read_header(job.directory)
        _encode_parts(job, plan, tokenizer, num_processes)
        return _finish(job, plan)


def _plan(job: EncodingJob, tokenizer: QuantizedAutoencoder, tokenizer_hash: str) -> CachePlan:
    if tokenizer.codebook_size > 1 << 16:
        raise ValueError(
            f"codes are stored as uint16, so V must be at most 65536, got {tokenizer.codebook_size}"
        )
    size, step = job.transform.image_size, tokenizer.downsampling
    if size % step:
        raise ValueError(f"image_size must be a multiple of {step} for this image tokenizer, got {size}")
    return CachePlan(
        tokenizer=tokenizer_hash,
        codebook_size=tokenizer.codebook_size,
        code_shape=(size // step, size // step, *tokenizer.code_shape[2:]),
        num_crops=job.num_crops,
        has_latents=job.has_latents,
        transform=config_to_mapping(job.transform),
        seed=job.seed,
        source=job.source.fingerprint,
        num_parts=job.source.num_parts,
        classes=job.source.classes,
    )


def _begin(directory: Path, plan: CachePlan) -> None:
    """Make sure that the directory is this plan's, and free of what a killed process left."""
    if (directory / PLAN).is_file():
        differences = plan.differences(read_plan(directory))
        if differences:
            raise FileExistsError(
                f"{directory} holds codes of another plan ({'; '.join(differences)}): "
                "choose another directory, or remove this one to encode again"
            )
    elif others := sorted(path.name for path in directory.iterdir() if path.name[0] != "."):
        raise FileExistsError(
            f"{directory} is not empty and no code cache, it has {others[0]}: choose another"
        )
    else:
        _write_json(directory / PLAN, plan)
    for leftover in directory.glob(".*-*"):
        leftover.unlink()


def _finish(job: EncodingJob, plan: CachePlan) -> CacheHeader:
    """Count what was written and write the header."""
    count = num_unreadable = num_without_captions = num_without_label = 0
    num_classes = len(plan.classes)
    for number in range(plan.num_parts):
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
    _write_json(job.directory / HEADER, header)
    return header


def _write_json(path: Path, content: CachePlan | CacheHeader) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asdict(content), indent=1), encoding="utf-8")


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
        self.bar = tqdm(
            desc="encoding",
            total=total,
            initial=sum(1 for path in paths for _ in _lines(path)),
            unit=" pictures",
            mininterval=0.1 if sys.stderr.isatty() else 15.0,
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
    report = _Report(job, finished=[number for number in range(plan.num_parts) if is_there[number]])
    with report.bar:
        if num_processes > 1 and len(missing) > 1:
            _encode_in_processes(job, missing, min(num_processes, len(missing)), report)
        else:
            encoder = PartEncoder(job, tokenizer, report.bar.update)
            for number in missing:
                report.finish(encoder.encode(number))


def _encode_in_processes(
    job: EncodingJob, numbers: Sequence[int], num_processes: int, report: _Report
) -> None:
    context = get_context("spawn")  # torch's threads do not survive a fork
    num_pictures, is_stopped = context.Value("q", 0), context.Event()
    num_threads = max(1, torch.get_num_threads() // num_processes)
    pool = ProcessPoolExecutor(
        num_processes, context, _start_worker, (job, num_pictures, is_stopped, num_threads)
    )
    num_before = report.bar.n
    try:
        running = {pool.submit(_encode_in_worker, number) for number in numbers}
        while running:
            done, running = wait(running, timeout=0.5)
            report.bar.update(num_before + num_pictures.value - report.bar.n)
            for future in done:
                report.finish(future.result())
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that encodes was killed, perhaps for want of memory: try fewer --num-processes or a "
            "smaller --batch-size; what is finished is kept"
        ) from error
    finally:
        is_stopped.set()  # the others finish their batch, not their part
        pool.shutdown(cancel_futures=True)


_worker: PartEncoder  # of a process of the pool, which has no other place for it


def _start_worker(job: EncodingJob, num_pictures: Any, is_stopped: Any, num_threads: int) -> None:
    """Prepare a process of the pool: it ends when its parent stops or dies."""
    global _worker
    # Ctrl-C reaches the whole group, but it is the parent that says when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(num_threads)

    def count() -> None:
        if is_stopped.is_set():
            raise InterruptedError
        with num_pictures.get_lock():
            num_pictures.value += 1

    _worker = PartEncoder(job, load_image_tokenizer(job.image_tokenizer), count)


def _encode_in_worker(number: int) -> int:
    return _worker.encode(number)
