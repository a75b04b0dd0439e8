"""Plots and pages: the same bytes for the same data, nothing of the data becomes markup."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mindalle.report.page import Chapter, Figure, Page, Table, to_html, to_markdown
from mindalle.report.plots import Curve, Grid, Panel, draw_grids, draw_panels


def some_panel() -> Panel:
    curves = [Curve(name="a", x=[1, 2, 4], y=[1.0, float("nan"), 3.0], band=[(0, 2), (1, 3), (2, 4)])]
    return Panel(title="t", x_label="x", y_label="y", curves=curves, has_log_x=True)


def test_plots_follow_from_the_data_alone() -> None:
    import matplotlib

    plots = [draw_panels([some_panel()] * 3)]
    grid = Grid(
        title="t", row_label="r", column_label="c", rows=["1"], columns=["1", "2"], values=[[1.0, 1.0]]
    )
    plots.append(draw_grids([grid, grid]))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.hashsalt": None}):
        assert draw_panels([some_panel()] * 3) == plots[0]
        assert draw_grids([grid, grid]) == plots[1]
    assert b"dc:date" not in plots[0]
    assert plots[0] != draw_panels([some_panel()] * 2)


def test_plots_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib: pip install "mindalle\[report\]"'):
        draw_panels([some_panel()])


def test_texts_are_no_markup(tmp_path: Path) -> None:
    evil = "<img src=http://x> | [a](http://x) *b* `c`"
    blocks = [
        Figure(file="a.svg", svg=b"<svg/>", caption=evil, look=evil),
        Table(header=["name", evil], rows=[["1", evil]], caption=evil),
    ]
    chapter = Chapter(
        name="a",
        title=evil,
        intro=evil,
        blocks=blocks,
        left_out=[evil],
        notes=[evil],
        about=evil,
        data_file="d",
    )
    page = Page(title=evil, intro=evil, warnings=[evil], chapters=[chapter])
    html, markdown = to_html(page, tmp_path), to_markdown(page)
    assert "<img src=http" not in html
    assert html.count("&lt;img src=http") == 16
    ours = markdown.replace("([data](d))", "").replace("![", "").replace("*", "")
    assert re.search(r"(?<!\\)[<\[`]", ours) is None
    row = r"| 1 | \<img src=http://x\> \| \[a\](http://x) \*b\* \`c\` |"
    assert row in markdown
