"""Section `best_of`: the best of 1, 2, 4, ... candidates by the checkpoint's CLIP, scored by another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindalle.data.samples import Sample, Source, Unreadable
from mindalle.evaluation.pictures import RESULTS, PictureSet, measure_pictures, read_samples
from mindalle.generation.formats import read_lines
from mindalle.image import open_image
from mindalle.report.lab import NUM_EXAMPLES, Lab
from mindalle.report.page import Block, Figure
from mindalle.report.plots import draw_panels
from mindalle.report.scores import metric_names, networks, score, score_panels, score_table


def settings(lab: Lab) -> dict[str, Any]:
    """What decides over the results."""
    ranker = lab.pipe.reranker
    return lab.settings(has_drawings=True) | {
        "num_candidates": lab.job.num_candidates,
        "ranker": ranker.weights_hash if ranker is not None else None,
    }


def measure(lab: Lab, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Draw all candidates once; the best of N is chosen among the first N of each caption.

    Args:
        lab: what to measure with.
        folder: for pictures in the making.

    Returns:
        A row of measures for each N, and what is left out.
    """
    reason = lab.cannot_draw()
    if reason is None and lab.pipe.reranker is None:
        reason = "this checkpoint has no CLIP, so that nothing chooses among candidates"
    if reason is not None:
        return {}, [reason]
    most = lab.job.num_candidates
    lab.announce("best_of", most * len(lab.captions))
    source = lab.draw(folder / "candidates", lab.pipe.sampling.params, num_candidates=most)
    directory = Path(source.name)
    records = list(read_lines(directory / RESULTS))
    kept = {n: best_of(records, n) for n in counts(most)}
    everything = _measure_files(lab, source, {row["file"] for row in _flat(kept)})
    rows = [
        {
            "num_candidates": n,
            "ranker_score": sum(row["score"] for row in best) / len(best),
            "measures": score(lab, _subset(everything, [row["file"] for row in best])),
        }
        for n, best in kept.items()
    ]
    sheet_rows = [n for n in counts(most) if n in (1, 4, 16) or n == most]
    pictures = [open_image(directory / row["file"]) for n in sheet_rows for row in kept[n][:NUM_EXAMPLES]]
    columns = min(NUM_EXAMPLES, len(lab.captions))
    results = {
        "rows": rows,
        "sheet": lab.write_sheet("best-of.png", pictures, columns=columns),
        "sheet_rows": sheet_rows,
        "captions": list(lab.captions[:columns]),
    }
    return results, lab.cannot_score()


def counts(most: int) -> list[int]:
    """1, 2, 4, ... and the largest number itself."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return [*powers, most]


def best_of(records: Sequence[Mapping[str, Any]], n: int) -> list[Mapping[str, Any]]:
    """The best-scored of the first n candidates of each caption, in the captions' order.

    Args:
        records: of a picture set: number of the caption, index of the candidate, score.
        n: >= 1.
    """
    best: dict[int, Mapping[str, Any]] = {}
    for row in records:
        place = row["number"]
        if row["index"] < n and (place not in best or _rank(row) > _rank(best[place])):
            best[place] = row
    return [best[place] for place in sorted(best)]


def _rank(row: Mapping[str, Any]) -> tuple[float, int]:
    return row["score"], -row["index"]  # of equals the first, as where pictures are drawn


def _flat(kept: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    return (row for rows in kept.values() for row in rows)


def _measure_files(lab: Lab, source: Source, files: set[str]) -> tuple[PictureSet, dict[str, int]]:
    """The features of some pictures of a set, and which row is whose."""
    places: dict[str, int] = {}

    def wanted() -> Iterator[Sample | Unreadable]:
        for sample in read_samples(source):
            if sample.key in files:
                places[sample.key] = len(places)
                yield sample

    return measure_pictures(source, wanted(), network=lab.network, judge=lab.judge), places


def _subset(everything: tuple[PictureSet, dict[str, int]], files: Sequence[str]) -> PictureSet:
    found, places = everything
    rows = [places[file] for file in files]
    return PictureSet(
        name=found.name,
        fingerprint=found.fingerprint,
        vectors=found.vectors[rows] if found.vectors is not None else None,
        clip=found.clip[rows] if found.clip is not None else None,
        captions=[found.captions[row] for row in rows],
        judges=found.judges,
    )


def show(results: Mapping[str, Any]) -> Iterator[Block]:
    """Figures and tables of the results."""
    if not results:
        return
    rows = results["rows"]
    drawn = ", ".join(map(str, results["sheet_rows"]))
    yield Figure(
        file=results["sheet"],
        caption=f"The picture kept of the first N candidates, N = {drawn} from top to bottom: "
        f"{'; '.join(results['captions'])} (a column each).",
        look="Whether pictures further down show their caption better, and where the choice stops changing.",
    )
    numbers = [row["num_candidates"] for row in rows]
    if metric_names(rows):
        yield Figure(
            file="best-of.svg",
            svg=draw_panels(score_panels(rows, numbers, "candidates N", has_log_x=True)),
            caption="The best of N candidates by the checkpoint's CLIP, as another CLIP and the feature "
            f"network see it; all N are of the same drawings. {networks(rows)}.",
            look="What each doubling of N, which takes twice the time, still brings; where a curve turns, "
            "the ranking CLIP's taste no longer helps.",
        )
    shown = [row | {"measures": [_ranker_measure(row), *row["measures"]]} for row in rows]
    names = list(map(str, numbers))
    yield score_table(shown, names, "N", f"Scores of the picture kept of N candidates. {networks(rows)}.")


def _ranker_measure(row: Mapping[str, Any]) -> dict[str, Any]:
    """The score by which pictures were chosen, which grows with N by construction."""
    return {"metric": "own CLIP, which ranks", "value": row["ranker_score"], "interval_95": None}
