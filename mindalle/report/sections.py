"""The sections of a report: measured one by one into data files, rendered together from those alone."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint_io import atomic_path
from mindalle.benchmark.machine import describe_machine
from mindalle.evaluation.results import PACKAGES
from mindalle.report import best_of, decoding, depths, learning, sampling
from mindalle.report.lab import Lab, ReportJob
from mindalle.report.page import Block, Chapter, Figure, Page, to_html, to_markdown
from mindalle.report.plots import require_matplotlib
from mindalle.report.records import (
    DATA,
    FIGURES,
    Record,
    damaged,
    data_path,
    is_same,
    read_record,
    write_record,
)

logger = logging.getLogger(__name__)
PARTIAL = ".partial"  # folder of pictures that a section still needs


class Section(NamedTuple):
    """A box of the report: `measure` makes data, `show` draws them, and they share nothing else."""

    title: str
    intro: str
    settings: Callable[[Lab], dict[str, Any] | None]  # what decides over the data; None = cannot be measured
    measure: Callable[[Lab, Path], tuple[dict[str, Any], list[str]]]  # results, and what is left out
    show: Callable[[Mapping[str, Any]], Iterator[Block]]


SECTIONS: dict[str, Section] = {
    "decoding": Section(
        "Decoding: caches and depth",
        "How long codes take to draw with and without a cache of keys and values, and in one grid against "
        "several depths of a smaller one.",
        decoding.settings,
        decoding.measure,
        decoding.show,
    ),
    "sampling": Section(
        "Sampling: temperature, top-k, top-p, guidance",
        "The same captions drawn with the same seeds under different settings.",
        sampling.settings,
        sampling.measure,
        sampling.show,
    ),
    "depths": Section(
        "Depths: coarse to fine",
        "What is left of held-out pictures when they are decoded from the first depths of their codes alone.",
        depths.settings,
        depths.measure,
        depths.show,
    ),
    "best_of": Section(
        "Best of N: choosing by CLIP",
        "The checkpoint's CLIP chooses among N candidates; another CLIP says what that brings.",
        best_of.settings,
        best_of.measure,
        best_of.show,
    ),
    "learning": Section(
        "Learning curves",
        "The trainings of the model's parts, as their logs have them.",
        learning.settings,
        learning.measure,
        learning.show,
    ),
}
"""In the order of the page."""


def measure_sections(job: ReportJob, names: Sequence[str]) -> list[str]:
    """Measure what has no data of the same settings.

    Args:
        job: what to measure and how much.
        names: keys of `SECTIONS`.

    Returns:
        The sections that were measured.

    Raises:
        CheckpointError: if a data file is damaged.
        ImportError: if a package is missing.
    """
    require_matplotlib()
    lab = Lab(job)
    return [name for name in names if _measure_section(lab, name)]


def _measure_section(lab: Lab, name: str) -> bool:
    """Measure one section; returns False if there is nothing to do."""
    section, out = SECTIONS[name], lab.job.out
    settings = section.settings(lab)
    if settings is None:
        logger.info("%s: cannot be measured without --runs", name)
        return False
    record = read_record(out, name)
    if record is not None and is_same(record.settings, settings):
        logger.info("%s: there are data of these settings", name)
        return False
    logger.info("%s: measuring", name)
    # of these settings: pictures of others do not mix
    digest = hashlib.sha256(json.dumps([settings, torch.get_num_threads(), lab.job.num_processes]).encode())
    folder = out / PARTIAL / f"{name}-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    results, left_out = section.measure(lab, folder)
    about = {
        "machine": describe_machine(torch.device("cpu")),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "command": lab.job.command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
    }
    write_record(
        out, Record(section=name, settings=settings, about=about, results=results, left_out=left_out)
    )
    for leftover in folder.parent.glob(f"{name}-*"):  # those of other settings, too
        shutil.rmtree(leftover)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
    return True


def render(out: Path) -> list[Path]:
    """Draw the page from the data files.

    Args:
        out: folder of the report.

    Returns:
        The pages: HTML and Markdown.

    Raises:
        FileNotFoundError: if there are no data.
        CheckpointError: if a data file is damaged.
        ValueError: if a sheet of pictures is missing or damaged.
        ImportError: if matplotlib is missing.
    """
    require_matplotlib()
    records = {name: read_record(out, name) for name in SECTIONS}
    found = [record for record in records.values() if record is not None]
    if not found:
        raise FileNotFoundError(f"{out / DATA} holds no data of a report: measure first")
    page = _page(found, [_chapter(out, name, record) for name, record in records.items()])
    for block in (block for chapter in page.chapters for block in chapter.blocks):
        if isinstance(block, Figure) and block.svg is not None:
            with atomic_path(out / FIGURES / block.file) as temporary:
                temporary.write_bytes(block.svg)
    contents = {"report.html": to_html(page, out), "report.md": to_markdown(page)}
    for name, content in contents.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [out / name for name in contents]


def _page(records: Sequence[Record], chapters: Sequence[Chapter]) -> Page:
    models = {str(record.settings["model"])[:8] for record in records if "model" in record.settings}
    names = dict.fromkeys(
        str(record.settings["model_name"]) for record in records if "model_name" in record.settings
    )
    several = f"sections were measured on different models: {', '.join(sorted(models))}"
    return Page(
        title=f"Report of {', '.join(Path(name).name for name in names) or 'a model'}",
        intro="Made by tools/report.py. Every number and figure is drawn from the data files that are named "
        "beside it, which also hold settings, seed, machine, versions and command.",
        warnings=[several] if len(models) > 1 else [],
        chapters=chapters,
    )


def _chapter(out: Path, name: str, record: Record | None) -> Chapter:
    section = SECTIONS[name]
    if record is None:
        reason = "not measured" + (": no runs were named (--runs)" if name == "learning" else "")
        return Chapter(name=name, title=section.title, intro=section.intro, left_out=[reason])
    try:
        return Chapter(
            name=name,
            title=section.title,
            intro=section.intro,
            blocks=list(section.show(record.results)),
            left_out=record.left_out,
            notes=list(dict.fromkeys(_warnings(record.results))),
            about=_about(record),
            data_file=f"{DATA}/{name}.json",
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise damaged(data_path(out, name), error) from error


def _warnings(results: Any) -> Iterator[str]:
    """What measures anywhere in the results warn of."""
    if isinstance(results, Mapping):
        for key, inner in results.items():
            yield from map(str, inner) if key == "warnings" else _warnings(inner)
    elif isinstance(results, list):
        for inner in results:
            yield from _warnings(inner)


def _about(record: Record) -> str:
    """Where data are from, in a line."""
    machine, about, settings = record.about["machine"], record.about, record.settings
    subject = ""
    if "model_name" in settings:
        subject = (
            f"model {settings['model_name']} {settings['model'][:8]}; {settings['num_pictures']} pictures of "
            f"{settings['data_name']}; seed {settings['seed']}; "
        )
    return (
        f"{subject}{machine['processor']}, threads: {machine['threads']}, torch {machine['torch']}; "
        f"measured in {about['seconds']} s on {about['date'][:10]}."
    )
