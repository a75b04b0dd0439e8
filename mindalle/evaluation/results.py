"""What was measured, and how: a record for each number, a file of them, a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint_io import atomic_path
from mindalle.download import exclusive
from mindalle.evaluation.intervals import Interval, mean_interval

FORMAT = "mindalle-results-1"
PACKAGES = ("mindalle", "torch", "torchvision", "torchmetrics", "pillow")
"""Whose versions can change a number."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number with what it takes to compare it."""

    metric: str  # its name, that of the feature network in it: FID is Inception's alone
    value: float
    unit: str | None = None  # dB, nats, bits, cosine; None = a plain number
    interval: Interval | None = None  # 95%; None = too few pictures
    num_images: int  # that were measured
    num_reference: int | None = (
        None  # they were compared with; None = no such set, or a file that does not say
    )
    network: Mapping[str, Any] | None = None  # feature network: name, SHA-256 of its weights, resize rule
    details: Mapping[str, Any] = field(default_factory=dict)  # settings of this metric: splits, k, ...
    warnings: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As it stands in a file: JSON throughout, infinities and NaN as text."""
        interval = self.interval
        return {
            "metric": self.metric,
            "value": json_number(self.value),
            "unit": self.unit,
            "interval_95": [json_number(interval.low), json_number(interval.high)] if interval else None,
            "interval_rule": interval.rule if interval else None,
            "num_images": self.num_images,
            "num_reference": self.num_reference,
            "features": dict(self.network) if self.network is not None else None,
            "details": dict(self.details),
            "warnings": list(self.warnings),
        }


def mean_measure(metric: str, values: Tensor, *, seed: int, **more: Any) -> Measure:
    """The mean of a value per picture, with its interval.

    Args:
        metric: its name.
        values: (n,), n >= 1.
        seed: of the interval's resampling.
        more: other fields of the `Measure`.

    Returns:
        The measure.
    """
    return Measure(
        metric=metric,
        value=values.double().mean().item(),
        interval=mean_interval(values, seed=seed),
        num_images=len(values),
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all numbers of a command have in common."""

    subject: Mapping[str, Any]  # what was measured: kind, name, SHA-256 or fingerprint, unreadable pictures
    reference: Mapping[str, Any] | None  # what it was compared with; None = nothing
    seed: int
    command: str
    date: str  # UTC, ISO 8601

    def record(self, measure: Measure) -> dict[str, Any]:
        """A measure as it stands in a file, with what it has in common with others."""
        return {
            "format": FORMAT,
            **measure.record(),
            "subject": dict(self.subject),
            "reference": dict(self.reference) if self.reference is not None else None,
            "seed": self.seed,
            "command": self.command,
            "date": self.date,
            "versions": {name: metadata.version(name) for name in PACKAGES},
        }


def json_number(value: float) -> float | str:
    """A number as JSON has it, which knows no infinity: "inf", "nan"."""
    return value if math.isfinite(value) else str(value)


def append_results(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a JSON array, whole or not at all, also where several processes do so.

    Args:
        path: the file; made if absent.
        records: to add.

    Raises:
        ValueError: if there is a file that is no such array.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f".{path.name}.lock")):
        entries = [*read_results(path), *records] if path.exists() else list(records)
        with atomic_path(path) as temporary:
            temporary.write_text(
                json.dumps(entries, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
            )


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file.

    Args:
        path: that `append_results` wrote.

    Returns:
        The records, in the order they came.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON array of objects.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of results: {error}; name another, or remove it") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is no file of results: expected a JSON array of objects; name another")
    return entries


def table(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Records for a person, a block for each pair of sides: numbers of different sides share no column.

    Args:
        records: of `Context.record`.

    Returns:
        Lines.
    """
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        blocks.setdefault(_sides(record), []).append(record)
    lines: list[str] = []
    for sides, members in blocks.items():
        lines += ["", sides] if lines else [sides]
        width = max(len(_title(member)) for member in members)
        lines.append(f"  {'metric':<{width}}  {'value':>10}  {'95% interval':<23}  {'pictures':>8}  features")
        lines += [_row(member, width) for member in members]
    return lines


def _sides(record: Mapping[str, Any]) -> str:
    """What was compared with what."""
    subject, reference = record["subject"], record["reference"]
    text = f"{subject['kind']} {subject['name']}"
    if subject.get("chosen"):
        text += f" ({subject['chosen']})"
    return f"{text} against {reference['name']}" if reference is not None else text


def _row(record: Mapping[str, Any], width: int) -> str:
    interval = record["interval_95"]
    bounds = f"{_short(interval[0])} to {_short(interval[1])}" if interval is not None else "-"
    features = record["features"]
    network = (
        f"{features['name']} {features['sha256'][:8]}, {features['resize'].partition(':')[0]}"
        if features
        else ""
    )
    return (
        f"  {_title(record):<{width}}  {_short(record['value']):>10}  {bounds:<23}  "
        f"{record['num_images']:>8}  {network}".rstrip()
    )


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['metric']} ({record['unit']})" if record["unit"] else str(record["metric"])


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
