"""The page: chapters of figures, tables and notes, as Markdown beside its figures and as HTML by itself."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from mindalle.report.records import FIGURES

MAX_WIDTH = 800  # pixels of a figure
MAX_PICTURE_BYTES = 1_000_000  # a sheet of a report takes less than 300 kB
CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 800px; padding: 2.5rem 1.25rem 4rem; background: #fff; color: #22282e;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 .4rem; padding-top: 1.1rem; border-top: 1px solid #dfe3e6; }
a { color: #1f5fa8; }
nav ul { padding-left: 1.2rem; }
figure { margin: 1.8rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; border: 1px solid #e6e9ec; }
figcaption, .about { color: #5b6570; font-size: .85rem; line-height: 1.45; margin-top: .5rem; }
.look { margin: .5rem 0 0; }
.left-out { border-left: 3px solid #d9b36c; background: #fdf8ec; padding: .5rem .9rem; font-size: .92rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e6e9ec; white-space: nowrap; }
th { border-bottom: 2px solid #c3cad0; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
code { font-size: .85em; overflow-wrap: anywhere; }
""".strip()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot, or a sheet of pictures."""

    file: str  # name in figures/
    svg: bytes | None = None  # of a plot; None = a PNG that is there
    caption: str  # what was measured, on how many pictures, with which network
    look: str  # what to look for


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; all columns but the first hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


Block: TypeAlias = Figure | Table


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A section on the page."""

    name: str
    title: str
    intro: str
    blocks: Sequence[Block] = ()
    left_out: Sequence[str] = ()  # what is not here, and why
    notes: Sequence[str] = ()  # what the numbers must be read with
    about: str = ""  # where the data are from; "" = there are none
    data_file: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole report."""

    title: str
    intro: str
    warnings: Sequence[str] = field(default_factory=tuple)
    chapters: Sequence[Chapter]


def to_markdown(page: Page) -> str:
    """The page with links to its figures."""
    return "\n\n".join(_markdown(page)) + "\n"


def _markdown(page: Page) -> Iterator[str]:
    yield f"# {_escaped(page.title)}"
    yield _escaped(page.intro)
    for warning in page.warnings:
        yield f"> {_escaped(warning)}"
    for chapter in page.chapters:
        yield f"## {_escaped(chapter.title)}"
        yield _escaped(chapter.intro)
        for reason in chapter.left_out:
            yield f"> Left out: {_escaped(reason)}"
        for note in chapter.notes:
            yield f"> Note: {_escaped(note)}"
        for block in chapter.blocks:
            if isinstance(block, Table):
                yield _markdown_table(block)
                yield f"*{_escaped(block.caption)}* {_source(chapter)}"
            else:
                yield f"![{_escaped(block.caption)}]({FIGURES}/{check_name(block.file)})"
                yield f"*{_escaped(block.caption)}* {_source(chapter)}"
                yield _escaped(block.look)
        if chapter.about:
            yield f"*{_escaped(chapter.about)}*"


def _source(chapter: Chapter) -> str:
    return f"([data]({chapter.data_file}))"


def _markdown_table(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    rows = [[_escaped(cell) for cell in row] for row in (table.header, *table.rows)]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """A text in which Markdown finds nothing to do; one line."""
    return re.sub(r"([\\`*_\[\]|#<>~])", r"\\\1", " ".join(text.split()))


def to_html(page: Page, out: Path) -> str:
    """The page with all it needs inside: no script, no style sheet, no picture is fetched.

    Args:
        page: whose plots have been written.
        out: of the report.

    Raises:
        ValueError: if a picture is none.
    """
    title = html.escape(page.title)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>\n{CSS}\n</style></head><body>",
        f"<h1>{title}</h1>",
        f"<p>{html.escape(page.intro)}</p>",
        *(f'<p class="left-out">{html.escape(warning)}</p>' for warning in page.warnings),
        "<nav><ul>",
        *(
            f'<li><a href="#{chapter.name}">{html.escape(chapter.title)}</a></li>'
            for chapter in page.chapters
        ),
        "</ul></nav>",
        *(line for chapter in page.chapters for line in _html_chapter(chapter, out)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _html_chapter(chapter: Chapter, out: Path) -> Iterator[str]:
    yield f'<section id="{chapter.name}"><h2>{html.escape(chapter.title)}</h2>'
    yield f"<p>{html.escape(chapter.intro)}</p>"
    for reason in chapter.left_out:
        yield f'<p class="left-out">Left out: {html.escape(reason)}</p>'
    for note in chapter.notes:
        yield f'<p class="left-out">Note: {html.escape(note)}</p>'
    for block in chapter.blocks:
        caption = f"{html.escape(block.caption)} Data: <code>{html.escape(chapter.data_file)}</code>."
        if isinstance(block, Table):
            yield '<figure><div class="scroll"><table>'
            yield _html_row("th", block.header)
            yield from (_html_row("td", row) for row in block.rows)
            yield f"</table></div><figcaption>{caption}</figcaption></figure>"
        else:
            yield f"<figure>{_html_image(block, out)}"
            yield f'<p class="look">{html.escape(block.look)}</p><figcaption>{caption}</figcaption></figure>'
    if chapter.about:
        yield f'<p class="about">{html.escape(chapter.about)}</p>'
    yield "</section>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _html_image(figure: Figure, out: Path) -> str:
    alt = html.escape(figure.caption)
    if figure.svg is not None:
        return f'<img alt="{alt}" src="{_data_uri("image/svg+xml", figure.svg)}">'
    content, width = read_sheet(out, figure.file)
    # small pictures twice as large, if they still fit
    shown = 2 * width if 2 * width <= MAX_WIDTH else min(width, MAX_WIDTH)
    source = _data_uri("image/png", content)
    return f'<img class="pixels" width="{shown}" alt="{alt}" src="{source}">'


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def check_name(file: object) -> str:
    """The name of a figure, which a data file gives, and which must not lead out of its folder.

    Raises:
        ValueError: if it is no plain name.
    """
    if not isinstance(file, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*\.(png|svg)", file):
        raise ValueError(f"a figure's file must be a plain name such as depths.png, got {file!r:.80}")
    return file


def read_sheet(out: Path, file: object) -> tuple[bytes, int]:
    """A PNG that was drawn while measuring, and its width in pixels.

    Raises:
        ValueError: if it is missing, or no PNG.
    """
    path = out / FIGURES / check_name(file)
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_PICTURE_BYTES + 1)
        if len(content) > MAX_PICTURE_BYTES:
            raise ValueError(f"larger than {MAX_PICTURE_BYTES:,} bytes")
        with Image.open(BytesIO(content), formats=("PNG",)) as image:
            image.load()
            return content, image.width
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise ValueError(f"{path} is no sheet of pictures: {error}; measure its section again") from error
