"""How a picture set lies on the disk, so that `mindalle.data.open_source` reads it with captions and labels.

plan.json              what the parts belong to, written first
000017-0000.png        folder: picture 0 of prompt 17; of classes below 0207/, the folder of their class
captions.jsonl         folder of texts: the caption of each picture
part-00000.tar         shards: KEY.png, KEY.json with score and seed, and KEY.txt or KEY.cls
part-00000.jsonl       while the set is drawn: a line for each picture of a part, written after them
results.jsonl          the lines of all parts, written last
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import webdataset as wds

from checkpoint_io import CheckpointError, atomic_path
from mindalle.data.samples import Source, open_source
from mindalle.generation.job import SetPlan
from mindalle.generation.painter import DrawnPicture

RESULTS, CAPTIONS = "results.jsonl", "captions.jsonl"


def write_folder(directory: Path, plan: SetPlan, number: int, pictures: Sequence[DrawnPicture]) -> list[str]:
    """A PNG each.

    Args:
        directory: of the set.
        plan: of the set.
        number: of the part.
        pictures: of the part.

    Returns:
        For each picture the key under which `open_source` finds it.
    """
    files = []
    for picture in pictures:
        label = picture.record.get("class_label")
        folder = "" if label is None else f"{class_folder(plan, label)}/"
        files.append(f"{folder}{picture.key}.png")
        _write(directory / files[-1], picture.png)
    return files


def write_shard(directory: Path, plan: SetPlan, number: int, pictures: Sequence[DrawnPicture]) -> list[str]:
    """A WebDataset shard without times and owners; arguments and result are those of `write_folder`."""
    path = part_path(directory, number, ".tar")
    content = BytesIO()
    with wds.TarWriter(content, user="", group="", mtime=0, encoder=False) as tar:
        for picture in pictures:
            tar.write({"__key__": picture.key, "png": picture.png, **_sidecars(picture.record)})
    _write(path, content.getvalue())
    return [f"{path.name}/{picture.key}" for picture in pictures]


def _sidecars(record: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a shard beside a picture."""
    text, label = record.get("prompt"), record.get("class_label")
    captions = {} if text is None else {"captions": [text]}
    files = {"json": json.dumps({**captions, **record}, ensure_ascii=False)}
    if text is not None:
        files["txt"] = text
    if label is not None:
        files["cls"] = str(label)
    return {suffix: content.encode() for suffix, content in files.items()}


FORMATS: dict[str, Callable[[Path, SetPlan, int, Sequence[DrawnPicture]], list[str]]] = {
    "folder": write_folder,
    "shards": write_shard,
}
"""What writes the pictures of a part, by the name of the format."""


def class_folder(plan: SetPlan, label: int) -> str:
    """The name of a class's folder: sorted by name, folders are sorted by label."""
    return f"{label:0{len(str(plan.num_classes - 1))}d}"


def make_class_folders(directory: Path, plan: SetPlan) -> None:
    """Make the folders of all classes, if the set has any: labels are counted with those left empty."""
    if plan.file_format == "folder":
        for label in range(plan.num_classes):
            (directory / class_folder(plan, label)).mkdir(exist_ok=True)


def open_set(directory: Path) -> Source:
    """The pictures of a finished set that nobody named, and whose kind need not be told."""
    data = logging.getLogger("mindalle.data")
    level = data.level
    data.setLevel(logging.WARNING)
    try:
        return open_source(str(directory))
    finally:
        data.setLevel(level)


def part_path(directory: Path, number: int, suffix: str = ".jsonl") -> Path:
    """A file of a part; a part with lines is whole."""
    return directory / f"part-{number:05d}{suffix}"


def write_part(directory: Path, plan: SetPlan, number: int, pictures: Sequence[DrawnPicture]) -> None:
    """Write the pictures of a part, then their lines; arguments are those of `write_folder`."""
    files = FORMATS[plan.file_format](directory, plan, number, pictures)
    records = [{"file": file, **picture.record} for file, picture in zip(files, pictures, strict=True)]
    write_lines(part_path(directory, number), records)


def finish_set(directory: Path, plan: SetPlan) -> None:
    """Put the lines of all parts together."""
    records = [
        record for number in range(plan.num_parts) for record in read_lines(part_path(directory, number))
    ]
    if plan.file_format == "folder" and records[0].get("prompt") is not None:
        captions = ({"file": record["file"], "captions": [record["prompt"]]} for record in records)
        write_lines(directory / CAPTIONS, captions)
    write_lines(directory / RESULTS, records)


def remove_part_lines(directory: Path, plan: SetPlan) -> None:
    """Of a finished set."""
    for number in range(plan.num_parts):
        part_path(directory, number).unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What the lines of a file hold.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"expected a JSON object, got {record!r:.80}")
                yield record
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; remove it to draw what it tells of again"
        ) from error


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, atomically."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    _write(path, "".join(lines).encode())


def _write(path: Path, content: bytes) -> None:
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:  # which names the temporary file, or none
        raise OSError(
            error.errno, error.strerror or os.strerror(error.errno or 0), str(path.parent)
        ) from error
