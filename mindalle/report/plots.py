"""Plots: curves in panels, numbers in grids. The same data give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#d1590f", "#2f8a4c", "#8a4fa3", "#7d6b2a", "#5b6770")
"""Of curves, in this order; apart for eyes that do not tell red from green, too."""
PANEL_INCHES = (3.9, 2.75)
PANELS_PER_ROW, PNG_DPI = 2, 150
MAX_MARKERS = 25  # points of a curve that are marked
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a9199",
    "axes.labelcolor": "#333b44",
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "xtick.color": "#4a525b",
    "ytick.color": "#4a525b",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "mindalle",
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of one name."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] | None = None  # 95% intervals; None = without


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves over axes of their own."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    has_log_x: bool = False  # to base 2
    has_log_y: bool = False
    is_discrete: bool = True  # a few settings, each with its tick
    begins_at_zero: bool = False  # the y axis


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A number for each pair of two settings."""

    title: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    is_lower_better: bool = False  # the better, the darker


def require_matplotlib() -> None:
    """Raise ImportError, before hours of work, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "mindalle[report]"') from error


def draw_panels(panels: Sequence[Panel], *, kind: str = "svg") -> bytes:
    """Draw panels side by side, two in a row.

    Args:
        panels: at least one.
        kind: "svg" or "png".

    Returns:
        The file.

    Raises:
        ImportError: if matplotlib is missing.
    """
    with _axes(len(panels)) as (figure, axes):
        for panel, ax in zip(panels, axes, strict=False):
            _draw_panel(ax, panel)
        return _as_file(figure, kind)


def draw_grids(grids: Sequence[Grid]) -> bytes:
    """Draw grids side by side, their numbers written in.

    Args:
        grids: at least one.

    Returns:
        An SVG.

    Raises:
        ImportError: if matplotlib is missing.
    """
    with _axes(len(grids)) as (figure, axes):
        for grid, ax in zip(grids, axes, strict=False):
            _draw_grid(ax, grid)
        return _as_file(figure, "svg")


@contextmanager
def _axes(count: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with so many axes, in the style of the report whatever the user's own is."""
    require_matplotlib()
    from matplotlib import style
    from matplotlib.figure import Figure

    columns = min(count, PANELS_PER_ROW)
    rows = math.ceil(count / columns)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes[count:]:
            ax.axis("off")
        yield figure, axes


def _as_file(figure: Figure, kind: str) -> bytes:
    file = BytesIO()
    if kind == "png":
        figure.savefig(file, format="png", dpi=PNG_DPI)
        return file.getvalue()
    figure.savefig(file, format="svg", metadata={"Date": None})
    # matplotlib ends lines with spaces, which editors and git mark
    return b"\n".join(line.rstrip() for line in file.getvalue().splitlines()) + b"\n"


def _draw_panel(ax: Axes, panel: Panel) -> None:
    for i, curve in enumerate(panel.curves):
        colour = COLOURS[i % len(COLOURS)]
        is_seen = panel.is_discrete or len(curve.x) <= MAX_MARKERS  # a lone point would not be
        ax.plot(curve.x, curve.y, color=colour, label=curve.name, marker="o" if is_seen else None)
        if curve.band is not None:
            low, high = zip(*curve.band, strict=True)
            ax.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.has_log_x:
        ax.set_xscale("log", base=2)
    if panel.has_log_y:
        from matplotlib.ticker import LogLocator, NullLocator

        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
    if panel.is_discrete:
        places = sorted({x for curve in panel.curves for x in curve.x})
        ax.set_xticks(places, [f"{place:g}" for place in places])
        ax.tick_params(axis="x", which="minor", bottom=False)
    if panel.begins_at_zero:
        ax.set_ylim(bottom=0)
    if len(panel.curves) > 1:
        ax.legend()


def _draw_grid(ax: Axes, grid: Grid) -> None:
    values: Any = [[value if math.isfinite(value) else math.nan for value in row] for row in grid.values]
    found = [value for row in values for value in row if not math.isnan(value)] or [0.0]
    low, high = min(found), max(found)
    spread = (high - low) or 1.0
    # the dark half of the colour map would hide the numbers
    limits = {"vmin": low - 0.1 * spread, "vmax": high + 0.9 * spread}
    if grid.is_lower_better:
        limits = {"vmin": low - 0.9 * spread, "vmax": high + 0.1 * spread}
    ax.imshow(values, cmap="Blues_r" if grid.is_lower_better else "Blues", aspect="auto", **limits)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.4g}", ha="center", va="center", color="#14181c")
    ax.set(title=grid.title, xlabel=grid.column_label, ylabel=grid.row_label)
    ax.set_xticks(range(len(grid.columns)), grid.columns)
    ax.set_yticks(range(len(grid.rows)), grid.rows)
    ax.grid(visible=False)
    ax.tick_params(length=0)
