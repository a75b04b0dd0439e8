"""Where pictures go: names that are free, PNGs that say how they were made, a contact sheet, results.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from checkpoint_io import atomic_path
from mindalle.image import contact_sheet

RESULTS = "results.jsonl"


def free_stem(directory: Path, name: str) -> str:
    """A file stem in a directory that no file there begins with.

    Args:
        directory: need not exist.
        name: any text, such as a prompt; letters, digits and dashes of it are kept.

    Returns:
        "a-red-apple", or "a-red-apple-2" if there are files of that name, and so on.
    """
    slug = re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:60] or "image"
    taken = {path.name for path in directory.glob("*")}
    stem, number = slug, 1
    while any(re.match(rf"{re.escape(stem)}(-\d+|-sheet|-preview)?\.png$", entry) for entry in taken):
        number += 1
        stem = f"{slug}_{number}"
    return stem


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks, atomically."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_results(
    directory: Path, stem: str, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]], title: str
) -> list[Path]:
    """Write pictures best first, a contact sheet if there are several, and a line each in results.jsonl.

    Args:
        directory: to write to.
        stem: of the files' names, from `free_stem`.
        images: best first.
        records: one per picture: prompt, seed, index, score and settings; goes to text chunks and results.jsonl.
        title: caption of pictures without a score on the sheet.

    Returns:
        The files of the pictures.
    """
    paths = []
    for rank, (image, record) in enumerate(zip(images, records, strict=True), start=1):
        path = directory / f"{stem}-{rank}.png"
        save_png(path, image, {key: _as_text(value) for key, value in record.items() if value is not None})
        paths.append(path)
    if len(images) > 1:
        scores = [record.get("score") for record in records]
        captions = [title if score is None else f"{score:.3f}" for score in scores]
        save_png(directory / f"{stem}-sheet.png", contact_sheet(images, captions=captions), {"prompt": title})
    with (directory / RESULTS).open("a", encoding="utf-8") as file:
        for path, record in zip(paths, records, strict=True):
            file.write(json.dumps({"file": path.name, **record}, ensure_ascii=False) + "\n")
    return paths


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
