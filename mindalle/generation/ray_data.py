"""Parts of a picture set through Ray Data, for more than one machine.

The workers draw and the driver writes, so that they need the model but no disk in common.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mindalle.generation.formats import write_part
from mindalle.generation.job import SetJob, SetPlan
from mindalle.generation.painter import DrawnPicture
from mindalle.parts import Count


class RayPainter:
    """Draws parts in a process of Ray's.

    Args:
        job: what to draw.
        plan: of the job.
    """

    def __init__(self, job: SetJob, plan: SetPlan) -> None:
        from mindalle.generation.drawing import start_painter

        self.painter = start_painter(job, plan, None, count=lambda number: None)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the number of a part -> a row with its pictures."""
        return {"number": row["number"], "pictures": self.painter.draw(int(row["number"]))}


def draw_on_ray(
    job: SetJob, plan: SetPlan, numbers: Sequence[int], *, num_processes: int, count: Count
) -> None:
    """Draw parts on the cluster that Ray is connected to, or finds, or else on this machine.

    Args:
        job: what to draw; the machines must know its model, and its judge, by the same names.
        plan: of the job.
        numbers: of the parts.
        num_processes: of Ray's, each with `num_threads` CPUs or a GPU.
        count: told of the candidates of each part that is written.

    Raises:
        ImportError: if Ray is missing.
        ValueError: if there are not as many CPUs, or no GPU.
        ConnectionError: if there is no cluster, and none can be started.
        ChildProcessError: if Ray gives up on a process.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('--ray needs Ray Data: pip install "mindalle[ray]"') from error
    if not numbers:
        return
    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises any kind, of a cluster out of reach as of one that is slow
        raise ConnectionError(f"Ray cannot be reached or started: {_reason(error)}") from error
    _check_resources(ray.cluster_resources(), plan)
    ray.data.DataContext.get_current().enable_progress_bars = False
    parts = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    drawn = parts.map(
        RayPainter,
        fn_constructor_args=(job, plan),
        compute=ray.data.ActorPoolStrategy(size=min(num_processes, len(numbers))),
        num_cpus=plan.num_threads,
        num_gpus=1 if plan.device == "cuda" else 0,
    )
    try:
        for row in drawn.iter_rows():
            pictures: list[DrawnPicture] = list(row["pictures"])
            write_part(job.directory, plan, int(row["number"]), pictures)
            count(len(plan.part(int(row["number"]))) * plan.num_candidates)
    except ray.exceptions.RayError as error:
        raise ChildProcessError(f"Ray gave up: {_reason(error)}; what is finished is kept") from error


def _check_resources(found: Mapping[str, float], plan: SetPlan) -> None:
    """Refuse what Ray would wait for without end."""
    if plan.device == "cuda" and not found.get("GPU"):
        raise ValueError("--device cuda: no machine of Ray's has a GPU; use --device cpu")
    if found.get("CPU", 0) < plan.num_threads:
        raise ValueError(
            f"--threads must be at most {found.get('CPU', 0):g}, as many CPUs as Ray has, "
            f"got {plan.num_threads}"
        )


def _reason(error: Exception) -> str:
    """The last line of what Ray says: the error of the process, without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
