"""The data of a report: one JSON file for each section, which its figures are drawn from and nothing else.

data/SECTION.json     settings, machine, versions, command and date, results
figures/*.png         pictures that were drawn while measuring
figures/*.svg         plots of the data
report.md             the page beside its figures
report.html           the page by itself
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_io import CheckpointError, atomic_path

FORMAT = "mindalle-report-1"
DATA, FIGURES = "data", "figures"  # folders of a report
MAX_BYTES = 20_000_000  # of a data file: real ones are smaller by far


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured for a section."""

    format: str = FORMAT
    section: str  # a key of `mindalle.report.sections.SECTIONS`
    settings: dict[str, Any]  # what decides over the results: not measured again while they are the same
    about: dict[str, Any]  # machine, versions, command, date, seconds that it took
    results: dict[str, Any]  # of the section's own shape
    left_out: list[str] = field(default_factory=list)  # what is not in the results, and why


def data_path(out: Path, section: str) -> Path:
    """The data file of a section."""
    return out / DATA / f"{section}.json"


def write_record(out: Path, record: Record) -> None:
    """Write a section's data, atomically."""
    content = json.dumps(asdict(record), indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_path(data_path(out, record.section)) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8")


def read_record(out: Path, section: str) -> Record | None:
    """The data of a section; None if it has not been measured.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = data_path(out, section)
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {content!r:.80}")
        record = Record(**content)
        types = {"settings": dict, "about": dict, "results": dict, "left_out": list}
        wrong = [name for name, kind in types.items() if not isinstance(getattr(record, name), kind)]
        if wrong or record.section != section:
            raise ValueError(f"expected section {section}, got {record.section!r:.80}; wrong: {wrong}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, error) from error
    return record


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error of a data file that cannot be used."""
    return CheckpointError(
        f"{path} holds no data of this section: {type(error).__name__}: {error}; remove it to measure again"
    )


def is_same(settings: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two settings are equal as JSON, in which tuples and lists are one."""
    return bool(json.loads(json.dumps(settings)) == json.loads(json.dumps(others)))


def number(value: float | str) -> float:
    """A number of a data file, which `json_number` of mindalle.evaluation.results wrote."""
    return float(value)


def text(value: float | str, digits: int = 4) -> str:
    """A number for a person, of so many digits."""
    found = number(value)
    if not math.isfinite(found):
        return str(found)
    return f"{found:.0f}" if abs(found) >= 10 ** (digits - 1) else f"{found:.{digits}g}"
