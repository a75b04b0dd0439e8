"""Where results go: names that are free, PNGs that say how they were made, a contact sheet, results.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from checkpoint_io import atomic_path
from mindalle.image import contact_sheet

RESULTS = "results.jsonl"


def slug(text: str) -> str:
    """A text, such as a prompt, as the stem of a file name: its letters, digits and underscores."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-") or "image"


def free_stem(directory: Path, stem: str, suffixes: Sequence[str]) -> str:
    """A file stem with which no file is in the way.

    Args:
        directory: need not exist.
        stem: wanted.
        suffixes: of all files to write, such as "-1.png".

    Returns:
        The stem, or with "_2" after it if one of its files is there, and so on.
    """
    free, number = stem, 1
    while any(os.path.lexists(directory / f"{free}{suffix}") for suffix in suffixes):
        number += 1
        free = f"{stem}_{number}"
    return free


def picture_suffixes(num_images: int) -> list[str]:
    """The ends of the names of all files that `save_results` may write."""
    return [*(f"-{rank}.png" for rank in range(1, num_images + 1)), "-sheet.png"]


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks, atomically.

    Raises:
        OSError: with the directory's name, if it cannot be written.
    """
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    try:
        with atomic_path(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
    except OSError as error:  # Pillow names no file, atomic_path its temporary one
        raise OSError(error.errno, error.strerror or str(error), str(path.parent)) from error


def save_results(
    directory: Path, stem: str, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write pictures best first, a contact sheet if there are several, and a line each in results.jsonl.

    Args:
        directory: to write to; made if need be.
        stem: of the files' names, made free.
        images: best first.
        records: one per picture: prompt, seed, index, score and settings; goes to text chunks and
            results.jsonl.

    Returns:
        The files of the pictures.
    """
    stem = free_stem(directory, stem, picture_suffixes(len(images)))
    paths = [directory / f"{stem}-{rank}.png" for rank in range(1, len(images) + 1)]
    for path, image, record in zip(paths, images, records, strict=True):
        save_png(path, image, _as_texts(record))
    if len(images) > 1:
        captions = [_caption(rank, record) for rank, record in enumerate(records, start=1)]
        about = {
            key: value
            for key, value in records[0].items()
            if key in ("prompt", "class_label", "seed", "model")
        }
        save_png(directory / f"{stem}-sheet.png", contact_sheet(images, captions=captions), _as_texts(about))
    lines = [
        json.dumps({"file": path.name, **record}, ensure_ascii=False) + "\n"
        for path, record in zip(paths, records, strict=True)
    ]
    with (directory / RESULTS).open("a", encoding="utf-8") as file:
        file.write("".join(lines))  # at once: several runs may share the directory
    return paths


def _caption(rank: int, record: Mapping[str, Any]) -> str:
    return f"{rank}" if record.get("score") is None else f"{rank}: {record['score']:.3f}"


def _as_texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Text chunks: strings as they are, all else as JSON, what is None left out."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in record.items()
        if value is not None
    }


def check_free(path: Path) -> None:
    """Raise FileExistsError if there is something at the path."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists, and nothing is overwritten: choose another DST")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory beside `path`; on a clean exit it becomes `path`, otherwise it is removed.

    Args:
        path: must not exist; its parents are made.

    Yields:
        Where to write.

    Raises:
        FileExistsError: if `path` exists.
    """
    check_free(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
