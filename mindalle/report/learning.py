"""Section `learning`: the curves of the trainings that made the model, from their TensorBoard folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindalle.evaluation.results import json_number
from mindalle.report.lab import Lab
from mindalle.report.page import Block, Figure
from mindalle.report.plots import Curve, Panel, draw_panels
from mindalle.report.records import number

MAX_POINTS = 200  # of a curve: more are put together
MAX_PANELS = 4  # of a run
PREFIXES = ("train/", "val/")  # of the values that are shown
SHOWN = ("loss", "code_loss", "psnr", "accuracy", "recall_at_1", "recall_at_5")
"""What is shown of all that is logged; of a training that logs none of these, the first by name."""


def settings(lab: Lab) -> dict[str, Any] | None:
    """What decides over the results; None if no runs were named."""
    if not lab.job.runs:
        return None
    files = {
        name: [[file.name, file.stat().st_size] for file in _events(path)] for name, path in lab.job.runs
    }
    return {"runs": files}


def measure(lab: Lab, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the scalars of the runs.

    Args:
        lab: names the runs.
        folder: not used: nothing is drawn.

    Returns:
        For each run its curves: steps and values by name; and nothing that is left out.
    """
    return {"runs": [{"name": name, "curves": read_curves(path)} for name, path in lab.job.runs]}, []


def _events(path: Path) -> list[Path]:
    """The event files of a run, in the order of their making.

    Raises:
        FileNotFoundError: if there are none.
    """
    files = sorted(path.rglob("events.out.tfevents.*"), key=lambda file: file.name)
    if not files:
        raise FileNotFoundError(f"no TensorBoard events in {path} (--runs NAME=DIR)")
    return files


def read_curves(path: Path) -> dict[str, dict[str, Any]]:
    """The scalars of a run, a resumed one's put together.

    Args:
        path: its folder; event files may lie in folders below.

    Returns:
        Name -> steps, values, and of how many values a point is the mean.

    Raises:
        FileNotFoundError: if there are no event files.
        ValueError: if they hold no scalars of a training.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in _events(path):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(PREFIXES):
                # a resumed run repeats steps: what was logged last counts
                found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    if not found:
        raise ValueError(f"the TensorBoard events in {path} hold no train/ or val/ values")
    return {tag: _thinned(sorted(points.items())) for tag, points in sorted(found.items())}


def _thinned(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """At most MAX_POINTS points, each the mean of as many values."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return {
        "steps": [round(step) for step, _ in means],
        "values": [json_number(float(f"{value:.5g}")) for _, value in means],
        "values_per_point": size,
    }


def show(results: Mapping[str, Any]) -> Iterator[Block]:
    """Figures of the results."""
    for place, run in enumerate(results["runs"], start=1):
        panels = _panels(run["curves"])
        sizes = {tag: curve["values_per_point"] for tag, curve in run["curves"].items()}
        thinned = max(sizes.values())
        mean = f" Points are means of up to {thinned} logged values." if thinned > 1 else ""
        yield Figure(
            file=f"learning-{place}.svg",
            svg=draw_panels(panels),
            caption=f"Training of {run['name']}: on training data (train) and held-out data (val).{mean}",
            look="Whether held-out curves still fall (or rise, where more is better) at the end, and how far "
            "from the training's they have come.",
        )


def _panels(curves: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    """A panel for each value, with both sides of it."""
    sides: dict[str, list[Curve]] = {}
    for tag, curve in curves.items():
        side, _, name = tag.partition("/")
        sides.setdefault(name, []).append(
            Curve(name=side, x=curve["steps"], y=[number(value) for value in curve["values"]])
        )
    shown = [name for name in SHOWN if name in sides] or sorted(sides)
    return [
        Panel(
            title=name if len(sides[name]) > 1 else f"{name} ({sides[name][0].name})",
            x_label="step",
            y_label="",
            curves=sides[name],
            is_discrete=False,
        )
        for name in shown[:MAX_PANELS]
    ]
