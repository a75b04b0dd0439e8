"""Scores of drawn pictures: how they are measured, and how they are shown for a row of settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mindalle.evaluation.comparison import Comparison, measure_all
from mindalle.evaluation.pictures import PictureSet
from mindalle.evaluation.refusal import refusal
from mindalle.report.lab import Lab
from mindalle.report.page import Table
from mindalle.report.plots import Curve, Panel
from mindalle.report.records import number, text

LOWER_IS_BETTER = ("FD", "FID")  # parts of the names of such metrics


def score(lab: Lab, pictures: PictureSet) -> list[dict[str, Any]]:
    """The judge's CLIP score and the Fréchet distance to the data, as far as they can be had.

    Args:
        lab: has the judge and the data.
        pictures: with the features of both networks.

    Returns:
        A record of each measure.
    """
    dims = lab.num_components or lab.network.num_features
    metrics = ["clip_score"] if lab.judge is not None else []
    if refusal("fd", len(pictures), len(lab.reference), dims) is None:
        metrics.append("fd")
    comparison = Comparison(
        pictures=pictures,
        reference=lab.reference,
        network=lab.network,
        judge=lab.judge,
        judge_hash=lab.judge_hash,
        num_components=lab.num_components,
        seed=lab.job.seed,
    )
    measures = measure_all(comparison, metrics, may_refuse=False) if metrics else []
    return [measure.record() for measure in measures]


def metric_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics of rows, each with its measures, in their order."""
    return list(dict.fromkeys(measure["metric"] for row in rows for measure in row["measures"]))


def find(row: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """A row's measure of a metric; None if it has none."""
    return next((measure for measure in row["measures"] if measure["metric"] == metric), None)


def value(row: Mapping[str, Any], metric: str) -> float:
    """The number of a measure; NaN if there is none."""
    measure = find(row, metric)
    return number(measure["value"]) if measure is not None else math.nan


def is_lower_better(metric: str) -> bool:
    """Whether a metric is a distance."""
    return any(name in metric for name in LOWER_IS_BETTER)


def better(metric: str) -> str:
    """The same in words, for an axis."""
    return f"{'lower' if is_lower_better(metric) else 'higher'} is better"


def curve(rows: Sequence[Mapping[str, Any]], places: Sequence[float], metric: str, name: str) -> Curve:
    """A metric by setting, with its intervals, if all have one.

    Args:
        rows: one per setting.
        places: of the settings on the x axis.
        metric: its name.
        name: of the curve.
    """
    measures = [find(row, metric) for row in rows]
    bands = [measure["interval_95"] for measure in measures if measure is not None and measure["interval_95"]]
    band = [(number(low), number(high)) for low, high in bands] if len(bands) == len(rows) else None
    return Curve(name=name, x=places, y=[value(row, metric) for row in rows], band=band)


def score_panels(
    rows: Sequence[Mapping[str, Any]], places: Sequence[float], label: str, *, has_log_x: bool = False
) -> list[Panel]:
    """A panel for each metric; arguments as of `curve`, and the label of the x axis."""
    return [
        Panel(
            title=metric,
            x_label=label,
            y_label=better(metric),
            curves=[curve(rows, places, metric, metric)],
            has_log_x=has_log_x,
        )
        for metric in metric_names(rows)
    ]


def score_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], label: str, caption: str) -> Table:
    """A row per setting, a column per metric.

    Args:
        rows: one per setting.
        names: of the settings.
        label: what is set.
        caption: what was measured.
    """
    metrics = metric_names(rows)
    lines = [
        [name, *(_cell(find(row, metric)) for metric in metrics)]
        for name, row in zip(names, rows, strict=True)
    ]
    return Table(header=[label, *(f"{metric} [95%]" for metric in metrics)], rows=lines, caption=caption)


def _cell(measure: Mapping[str, Any] | None) -> str:
    if measure is None:
        return "-"
    interval = measure["interval_95"]
    bounds = f" [{text(interval[0], 3)}, {text(interval[1], 3)}]" if interval is not None else ""
    return f"{text(measure['value'])}{bounds}"


def networks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which networks scored how many pictures, for a caption."""
    described = {}
    for measure in (measure for row in rows for measure in row["measures"]):
        network, reference = measure["features"], measure["num_reference"]
        against = f" against {reference}" if reference is not None else ""
        by = f" by {network['name']} {network['sha256'][:8]}" if network is not None else ""
        described[measure["metric"]] = f"{measure['metric']} of {measure['num_images']} pictures{against}{by}"
    return "; ".join(described.values()) or "Nothing was scored"
