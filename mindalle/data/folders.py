"""Pictures in a directory: with a captions file, with a text beside each, in class folders, or alone."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from mindalle.data.samples import PICTURE_SUFFIXES, Sample, Unreadable, clean_captions, decode

logger = logging.getLogger(__name__)

CAPTION_FILES = ("captions.jsonl", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv")
"""What is looked for in a directory; metadata.* is how Hugging Face's image folders call theirs."""

FILE_FIELDS = ("file", "image", "file_name", "filename", "path")
CAPTION_FIELDS = ("captions", "caption", "text")

PART_SIZE = 256  # files of a part: some seconds of encoding, some thousand parts for a million pictures


@dataclass(frozen=True)
class _Picture:
    """One listed picture."""

    file: str  # relative to the directory, "/" between names
    size: int | None  # in bytes; None: there is no such (regular) file
    captions: tuple[str, ...] | None = ()  # None: they cannot be read
    label: int | None = None


class Folder:
    """A source over files of a directory, any of which can be read by its index.

    Args:
        name: what the user named.
        root: the directory.
        pictures: what is listed, in order.
        classes: names of the labels.
    """

    def __init__(
        self, name: str, root: Path, pictures: Iterable[_Picture], classes: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self._root = root
        # one block of bytes: worker processes share it, while they would copy millions of Python objects,
        # whose reference counts they write to
        lines = [json.dumps([p.file, p.size, p.captions, p.label]).encode() for p in pictures]
        self._lines = b"".join(lines)
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self.fingerprint = hashlib.sha256(self._lines).hexdigest()

    @property
    def num_parts(self) -> int:
        """Ranges of 256 files."""
        return -(-len(self) // PART_SIZE)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Sample | Unreadable:
        """Read and decode one picture.

        Args:
            index: in [0, len).
        """
        picture = self._picture(index)
        key = picture.file.encode(errors="backslashreplace").decode()  # of names that are no text
        if picture.size is None:
            return Unreadable(key, "there is no such file")
        if picture.captions is None:
            return Unreadable(key, "its captions cannot be read: expected UTF-8 text")
        return decode(key, self._root / picture.file, picture.captions, picture.label)

    def read(self, part: int) -> Iterator[Sample | Unreadable]:
        """The samples of a part; see `Source.read`."""
        return map(self.__getitem__, range(part * PART_SIZE, min((part + 1) * PART_SIZE, len(self))))

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each listed picture."""
        return (self._picture(index).captions or () for index in range(len(self)))

    def _picture(self, index: int) -> _Picture:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        file, size, captions, label = json.loads(self._lines[start : int(self._ends[index])])
        return _Picture(file, size, None if captions is None else tuple(captions), label)


def open_folder(path: Path) -> Folder:
    """List the pictures of a directory, or of a captions file in it.

    Args:
        path: the directory or the captions file.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if there are no pictures, or the captions file cannot be understood.
    """
    if path.is_file() and path.suffix.lower() in (".jsonl", ".csv", ".tsv"):
        return _open_captioned(str(path), path)
    if not path.exists():
        raise FileNotFoundError(
            f"no pictures at {path}: expected a directory, a captions file (.jsonl, .csv, .tsv) or .tar files"
        )
    if not path.is_dir():
        raise ValueError(f"{path} is no source of pictures: expected a directory, .jsonl, .csv, .tsv or .tar")
    caption_files = [path / name for name in CAPTION_FILES if (path / name).is_file()]
    if len(caption_files) > 1:
        names = " and ".join(file.name for file in caption_files)
        raise ValueError(f"{path} has {names}: name the file to read instead of the directory")
    return _open_captioned(str(path), caption_files[0]) if caption_files else _open_uncaptioned(path)


def _open_captioned(name: str, caption_file: Path) -> Folder:
    """The pictures that a captions file names."""
    root = caption_file.parent
    captions = _read_captions(caption_file)
    if not captions:
        raise ValueError(f"{caption_file} names no pictures: expected a line or row for each")
    pictures = [_Picture(file, _size(root / file), texts) for file, texts in captions.items()]
    logger.info("read %s as pictures with %s: %s", name, caption_file.name, _count(pictures))
    return Folder(name, root, pictures)


def _open_uncaptioned(root: Path) -> Folder:
    """Pictures with texts beside them, in class folders, or just pictures."""
    files = set(_walk(root))
    suffixes = tuple(f".{suffix}" for suffix in PICTURE_SUFFIXES)
    names = sorted(file for file in files if file.lower().endswith(suffixes))
    if not names:
        raise ValueError(
            f"no pictures in {root}: expected {', '.join(PICTURE_SUFFIXES)} files (class folders, or a .txt "
            f"beside each, or one of {', '.join(CAPTION_FILES)}), or .tar shards"
        )
    texts = {file.lower().removesuffix(".txt"): file for file in files if file.lower().endswith(".txt")}
    sidecars = {name: texts.get(name.lower().rpartition(".")[0]) for name in names}
    classes: list[str] = []
    if any(sidecars.values()):
        kind = "pictures with .txt files"
    elif all("/" in name for name in names):
        # a directory without pictures counts: so validation can have classes that only training shows
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        kind = f"class folders: {len(classes):,} class{'es' * (len(classes) != 1)}"
    else:
        kind = "pictures"
    labels = {name: label for label, name in enumerate(classes)}
    pictures = [
        _Picture(name, _size(root / name), _sidecar(root, sidecars[name]), labels.get(name.split("/")[0]))
        for name in names
    ]
    logger.info("read %s as %s%s%s", root, kind, ", " if classes else ": ", _count(pictures))
    return Folder(str(root), root, pictures, classes)


def _walk(root: Path) -> Iterator[str]:
    """Files below a directory that are not hidden, by relative path; links are followed, not in circles."""
    seen = set()
    for directory, subdirectories, files in os.walk(root, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            subdirectories.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subdirectories[:] = sorted(name for name in subdirectories if name[0] != ".")
        for name in files:
            if name[0] != ".":
                yield Path(directory, name).relative_to(root).as_posix()


def _size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None  # to open a pipe would wait for ever


def _count(pictures: Sequence[_Picture]) -> str:
    """How many pictures and captions there are, for the log."""
    captioned = sum(bool(picture.captions) for picture in pictures)
    missing = sum(picture.size is None for picture in pictures)
    counts = [f"{len(pictures):,} picture{'s' * (len(pictures) != 1)}"]
    if 0 < captioned < len(pictures):
        counts.append(f"{len(pictures) - captioned:,} without captions")
    if missing:
        counts.append(f"{missing:,} of them missing")
    return ", ".join(counts)


def _sidecar(root: Path, file: str | None) -> tuple[str, ...] | None:
    """The lines of a text file, a caption each; None if it is no text."""
    if file is None:
        return ()
    if _size(root / file) is None:
        return None
    try:
        return clean_captions((root / file).read_text(encoding="utf-8-sig").split("\n"))
    except (OSError, ValueError):
        return None


class _Lines:
    """The lines of a text file, and the number of the one last read, for messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for self.number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")


def _read_captions(caption_file: Path) -> dict[str, tuple[str, ...]]:
    """The captions of each file; several lines for one add up."""
    captions: dict[str, tuple[str, ...]] = {}
    lines = _Lines(caption_file)
    suffix = caption_file.suffix.lower()
    try:
        for row in _json_rows(lines) if suffix == ".jsonl" else _table_rows(lines, is_tsv=suffix == ".tsv"):
            file = _relative(_field(row, FILE_FIELDS))
            captions[file] = captions.get(file, ()) + clean_captions(_field(row, CAPTION_FIELDS))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{caption_file}:{lines.number}: {error}") from error
    return captions


def _json_rows(lines: Iterable[str]) -> Iterator[Mapping[str, object]]:
    """The objects of a JSON lines file."""
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {line.strip():.60}")
        yield row


def _table_rows(lines: Iterable[str], *, is_tsv: bool) -> Iterator[Mapping[str, object]]:
    """The rows of a table, by the names in its header; in TSV a quote is a character like any other."""
    if is_tsv:
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(lines, strict=True)
    first = 1  # line of the header, then of each row
    try:
        num_columns = len(reader.fieldnames or ())
        first = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():  # what DictReader makes of too many columns and too few
                hint = "a tab or line break in a caption" if is_tsv else "a comma or line break not quoted"
                raise ValueError(
                    f"expected {num_columns} columns as in the header, "
                    f"got {'more' if None in row else 'fewer'}: is there {hint}?"
                )
            yield row
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{error}, in the row that begins at line {first}: is a quote not closed or not doubled?"
        ) from error


def _field(row: Mapping[str, object], names: Sequence[str]) -> object:
    """The value of the field that goes by one of these names."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"expected a field {' or '.join(names)}, got {', '.join(map(str, row)) or 'none'}")


def _relative(file: object) -> str:
    """A file name that stays below its directory."""
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise ValueError(f"expected the name of a picture file, got {file!r:.80}")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{file} leads out of the directory of the captions: expected a path below it")
    return str(path)
