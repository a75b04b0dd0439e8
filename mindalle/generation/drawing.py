"""Drawing a picture set: what is missing of it, in one process or several, on one machine or several."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mindalle.download import exclusive
from mindalle.generation.formats import (
    RESULTS,
    finish_set,
    make_class_folders,
    part_path,
    read_lines,
    remove_part_lines,
    write_part,
)
from mindalle.generation.job import SetJob, SetPlan, read_plan
from mindalle.generation.painter import Painter
from mindalle.parts import Count, begin, do_parts
from mindalle.pipeline import Pipeline
from mindalle.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class SetSummary:
    """What is in a finished set."""

    directory: Path
    count: int  # pictures
    mean_score: float | None  # None where nobody judged


def draw_set(
    job: SetJob, plan: SetPlan, pipe: Pipeline | None = None, *, num_processes: int = 1, use_ray: bool = False
) -> SetSummary:
    """Draw what a set lacks of its parts; a set whose drawing was killed goes on.

    Args:
        job: what to draw.
        plan: what `plan_set` makes of it.
        pipe: what `job.load()` gives; None = it is loaded. Several processes load their own.
        num_processes: that share the parts, >= 1. What they draw does not depend on how many they are.
        use_ray: let Ray run them, on the machines of its cluster.

    Returns:
        What is in the set.

    Raises:
        FileExistsError: if the directory holds a set of another plan, or something else.
        CheckpointError: if the set or the checkpoint is damaged.
        ChildProcessError: if a process dies.
        ImportError: if Ray is asked for and missing.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    with exclusive(job.directory / ".lock"):
        begin(job.directory, plan, read_plan)
        if not (job.directory / RESULTS).is_file():
            make_class_folders(job.directory, plan)
            _draw_parts(job, plan, pipe, num_processes, use_ray=use_ray)
            finish_set(job.directory, plan)
        summary = _summary(job.directory)
        remove_part_lines(job.directory, plan)
    return summary


def _summary(directory: Path) -> SetSummary:
    records = list(read_lines(directory / RESULTS))
    scores = [record["score"] for record in records if record.get("score") is not None]
    return SetSummary(
        directory=directory,
        count=len(records),
        mean_score=sum(scores) / len(scores) if scores else None,
    )


def _draw_parts(
    job: SetJob, plan: SetPlan, pipe: Pipeline | None, num_processes: int, *, use_ray: bool
) -> None:
    """Draw the parts that are missing."""
    is_there = [part_path(job.directory, number).is_file() for number in range(plan.num_parts)]
    missing = [number for number in range(plan.num_parts) if not is_there[number]]
    finished = sum(len(plan.part(number)) for number in range(plan.num_parts) if is_there[number])
    with progress_bar(
        desc="drawing",
        total=plan.num_conditions * plan.num_candidates,
        initial=finished * plan.num_candidates,
        unit=" pictures",
    ) as bar:
        if use_ray:
            from mindalle.generation.ray_data import draw_on_ray

            draw_on_ray(job, plan, missing, num_processes=num_processes, count=bar.update)
            return
        num_threads = torch.get_num_threads()
        is_alone = min(num_processes, len(missing)) == 1
        try:
            do_parts(
                missing,
                partial(_start_painter, job, plan, pipe if is_alone else None),
                num_processes=num_processes,
                count=bar.update,
                finish=lambda number: None,
                verb=plan.verb,
            )
        finally:
            torch.set_num_threads(num_threads)


def _start_painter(
    job: SetJob, plan: SetPlan, pipe: Pipeline | None, count: Count
) -> Callable[[int], object]:
    """What draws and writes parts in this process."""
    painter = start_painter(job, plan, pipe, count)
    return lambda number: write_part(job.directory, plan, number, painter.draw(number))


def start_painter(job: SetJob, plan: SetPlan, pipe: Pipeline | None, count: Count) -> Painter:
    """Prepare this process to draw parts.

    Args:
        job: what to draw.
        plan: of the job.
        pipe: what `job.load()` gives; None = it is loaded.
        count: see `Painter`.

    Returns:
        What draws them.
    """
    torch.set_num_threads(job.num_threads)
    if pipe is None:
        logging.getLogger("mindalle").setLevel(logging.ERROR)  # the process that made the plan has said it
    return Painter(job, plan, pipe or job.load(), count)
