"""Section `sampling`: temperature, top-k with top-p, and the scale of guidance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mindalle.evaluation.pictures import measure_pictures, read_samples
from mindalle.progress import progress_bar
from mindalle.report.lab import Lab
from mindalle.report.page import Block, Figure
from mindalle.report.plots import Grid, draw_grids, draw_panels
from mindalle.report.scores import (
    better,
    is_lower_better,
    metric_names,
    networks,
    score,
    score_panels,
    score_table,
    value,
)
from stage2_transformer import SamplingParams

TEMPERATURES, TOP_K = (0.5, 1.0, 5.0), 256
TOP_KS, TOP_PS = (16, 64, 256, None), (0.8, 0.9, 0.95, None)
CFG_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
NUM_ROWS = 3  # pictures of a prompt on a sheet


def settings(lab: Lab) -> dict[str, Any]:
    """What decides over the results."""
    return lab.settings(has_drawings=True) | {
        "temperatures": TEMPERATURES,
        "top_k": TOP_K,
        "top_ks": TOP_KS,
        "top_ps": TOP_PS,
        "cfg_scales": CFG_SCALES,
        "sampling": asdict(lab.pipe.sampling.params),
    }


def measure(lab: Lab, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Draw the captions with every setting and score them; draw a sheet for each temperature.

    Args:
        lab: what to measure with.
        folder: for pictures in the making.

    Returns:
        Rows of params and measures, and what is left out.
    """
    if (reason := lab.cannot_draw()) is not None:
        return {}, [reason]
    base = lab.pipe.sampling.params
    temperatures = {t: replace(base, temperature=t, top_k=TOP_K, top_p=None) for t in TEMPERATURES}
    grid = [replace(base, top_k=k, top_p=p) for k in TOP_KS for p in TOP_PS]
    scales = [replace(base, cfg_scale=scale) for scale in CFG_SCALES]
    wanted = list(dict.fromkeys([*temperatures.values(), *grid, *scales]))
    lab.announce("sampling", len(wanted) * len(lab.captions))
    found = {
        params: _row(lab, folder / f"{number:03d}", params)
        for number, params in enumerate(progress_bar(wanted, desc="sampling", unit=" settings"))
    }
    sheets = {
        t: lab.draw_sheet(f"sampling-temperature-{t:g}.png", params, rows=NUM_ROWS)
        for t, params in temperatures.items()
    }
    results = {
        "base": asdict(base),
        "prompts": list(lab.prompts),
        "temperature": [found[params] | {"sheet": sheets[t]} for t, params in temperatures.items()],
        "grid": [found[params] for params in grid],
        "guidance": [found[params] for params in scales],
    }
    return results, lab.cannot_score()


def _row(lab: Lab, folder: Path, params: SamplingParams) -> dict[str, Any]:
    source = lab.draw(folder, params)
    pictures = measure_pictures(source, read_samples(source), network=lab.network, judge=lab.judge)
    return {"params": asdict(params), "measures": score(lab, pictures)}


def show(results: Mapping[str, Any]) -> Iterator[Block]:
    """Figures and tables of the results."""
    if not results:
        return
    yield from _show_temperature(results)
    base, rows = results["base"], results["grid"]
    how = f"temperature {base['temperature']:g}, guidance {base['cfg_scale']:g}"
    if metric_names(rows):
        grids = [_grid(rows, metric) for metric in metric_names(rows)]
        yield Figure(
            file="sampling-grid.svg",
            svg=draw_grids(grids),
            caption=f"Top-k (rows) by top-p (columns) at {how}. {networks(rows)}.",
            look="The darker, the better: whether the dark fields of the grids are the same ones.",
        )
    rows = results["guidance"]
    scales = [row["params"]["cfg_scale"] for row in rows]
    if metric_names(rows):
        how = f"temperature {base['temperature']:g}, top-k {_setting(base['top_k'])}"
        yield Figure(
            file="sampling-guidance.svg",
            svg=draw_panels(score_panels(rows, scales, "guidance scale (1 = off)")),
            caption=f"Scale of classifier-free guidance at {how}; the bands are 95% intervals. "
            f"{networks(rows)}.",
            look="Whether the distance falls and then rises again (a U), and whether the CLIP score still "
            "grows where it rises.",
        )
        names = [f"{scale:g}" for scale in scales]
        yield score_table(rows, names, "guidance", f"The numbers of the figure above, at {how}.")


def _show_temperature(results: Mapping[str, Any]) -> Iterator[Block]:
    rows, base = results["temperature"], results["base"]
    for row in rows:
        params = row["params"]
        yield Figure(
            file=row["sheet"],
            caption=f"Temperature {params['temperature']:g}, top-k {_setting(params['top_k'])}, guidance "
            f"{params['cfg_scale']:g}: {'; '.join(results['prompts'])} (a column each), the first "
            f"{NUM_ROWS} pictures of each, not chosen.",
            look="How alike the pictures of a column are, and how much of what was asked for they show.",
        )
    if metric_names(rows):
        names = [f"{row['params']['temperature']:g}" for row in rows]
        caption = f"Scores by temperature, guidance {base['cfg_scale']:g}. {networks(rows)}."
        yield score_table(rows, names, "temperature", caption)


def _grid(rows: list[Mapping[str, Any]], metric: str) -> Grid:
    """A metric by top-k and top-p."""
    top_ks, top_ps = (
        list(dict.fromkeys(_setting(row["params"][name]) for row in rows)) for name in ("top_k", "top_p")
    )
    found = {(_setting(row["params"]["top_k"]), _setting(row["params"]["top_p"])): row for row in rows}
    return Grid(
        title=f"{metric} ({better(metric)})",
        row_label="top-k",
        column_label="top-p",
        rows=top_ks,
        columns=top_ps,
        values=[[value(found[k, p], metric) for p in top_ps] for k in top_ks],
        is_lower_better=is_lower_better(metric),
    )


def _setting(found: float | list[int] | None) -> str:
    """A setting for a person."""
    if isinstance(found, list):  # a top-k per depth
        return ", ".join(map(str, found))
    return "all" if found is None else f"{found:g}"
