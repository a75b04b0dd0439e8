"""Pictures in a directory: with a captions file, with a text beside each, in class folders, or alone."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from mindalle.data.captions import TABLES, Fields, is_caption_list, read_captions
from mindalle.data.names import folded, is_leftover, is_picture, is_unread_picture, suffix_of
from mindalle.data.samples import Sample, Unreadable, clean_captions, decode
from mindalle.image import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

CAPTION_FILES = (
    *("captions.jsonl", "captions.csv", "captions.tsv", "captions.json", "captions.txt"),
    *("metadata.jsonl", "metadata.csv"),
)
"""What is looked for in a directory; metadata.* is how Hugging Face's image folders call theirs."""

SIDECARS = (".txt", ".caption", ".json")
"""Suffixes of the captions of one picture, `a.txt` or `a.jpg.txt` of `a.jpg`, in this order."""

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

    def captioned(self) -> Folder:
        """The same without pictures that have no caption; damaged captions are told when they are read."""
        pictures = map(self._picture, range(len(self)))
        kept = (picture for picture in pictures if picture.captions != ())
        return Folder(self.name, self._root, kept, self.classes)

    def _picture(self, index: int) -> _Picture:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        file, size, captions, label = json.loads(self._lines[start : int(self._ends[index])])
        return _Picture(file, size, None if captions is None else tuple(captions), label)


def open_folder(path: Path, fields: Fields) -> Folder:
    """List the pictures of a directory, or of a captions file in it.

    Args:
        path: the directory or the captions file.
        fields: what the columns of a captions file are called.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if there are no pictures, or the captions file cannot be understood.
    """
    if path.is_file() and path.suffix.lower() in TABLES:
        return _open_captioned(str(path), path, fields)
    expected = ", ".join(TABLES)
    if not path.exists():
        raise FileNotFoundError(
            f"no pictures at {path}: expected a directory, a captions file ({expected}) or .tar files"
        )
    if not path.is_dir():
        raise ValueError(f"{path} is no source of pictures: expected a directory, {expected} or .tar")
    files = [path / name for name in CAPTION_FILES if (path / name).is_file()]
    caption_files = [file for file in files if file.suffix != ".txt" or is_caption_list(file)]
    if len(caption_files) > 1:
        names = " and ".join(file.name for file in caption_files)
        raise ValueError(f"{path} has {names}: name the file to read instead of the directory")
    if caption_files:
        return _open_captioned(str(path), caption_files[0], fields)
    return _open_uncaptioned(path, fields)


def has_pictures(root: Path, *, at_least: int) -> bool:
    """Whether a directory holds so many pictures, not counting those in archives."""
    return sum(1 for _ in islice(filter(is_picture, _walk(root)), at_least)) == at_least


def _open_captioned(name: str, caption_file: Path, fields: Fields) -> Folder:
    """The pictures that a captions file names."""
    root = caption_file.parent
    named = read_captions(caption_file, fields)
    if not named:
        raise ValueError(f"{caption_file} names no pictures: expected a line or row for each")
    listing = _Listing(root)
    captions: dict[str, tuple[str, ...]] = {}
    for spelling, texts in named.items():
        file = listing.find(spelling)
        captions[file] = captions.get(file, ()) + texts
    pictures = [_Picture(file, _size(root / file), texts) for file, texts in captions.items()]
    logger.info("read %s as pictures with %s: %s", name, caption_file.name, _count(pictures))
    return Folder(name, root, pictures)


class _Listing:
    """Where the files are that captions name: as written, or in other letters, slashes or accents.

    Args:
        root: the directory of the captions.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def _files(self) -> dict[str, str]:
        """The first file of each folded path, with and without the top directory: Flickr8k's is Images."""
        files = sorted(filter(is_picture, _walk(self._root)), reverse=True)
        below = {folded(file.partition("/")[2]): file for file in files if "/" in file}
        return below | {folded(file): file for file in files}

    def find(self, name: str) -> str:
        """The file that is meant; the name itself if there is none."""
        slashed = PurePosixPath(name.replace("\\", "/")).as_posix()
        for spelling in (name, slashed):
            if _size(self._root / spelling) is not None:
                return spelling
        return self._files.get(folded(slashed), name)


def _open_uncaptioned(root: Path, fields: Fields) -> Folder:
    """Pictures with texts beside them, in class folders, or just pictures."""
    files = sorted(_walk(root))
    names = [file for file in files if is_picture(file)]
    unread = Counter(suffix_of(file) for file in files if is_unread_picture(file))
    if not names:
        got = f", got {_listed(unread)}" if unread else ""
        raise ValueError(
            f"no pictures in {root}: expected {', '.join(PICTURE_SUFFIXES)} files (class folders, or a .txt "
            f"beside each, or one of {', '.join(CAPTION_FILES)}), or .tar shards{got}"
        )
    sidecars = _match(names, [file for file in files if file.lower().endswith(SIDECARS)])
    captions = {name: _sidecar(root, sidecars.get(name), fields) for name in names}
    classes: list[str] = []
    # a stray text makes no captioned data of class folders; one that cannot be read counts as a caption
    if 2 * sum(texts != () for texts in captions.values()) >= len(names):
        kinds = sorted({f".{suffix_of(sidecars[name])}" for name in names if captions[name] != ()})
        kind = f"pictures with {' and '.join(kinds)} files"
    elif all("/" in name for name in names):
        # a directory without pictures counts: so validation can have classes that only training shows
        classes = sorted(
            entry.name for entry in root.iterdir() if entry.is_dir() and not is_leftover(entry.name)
        )
        kind = f"class folders: {len(classes):,} class{'es' * (len(classes) != 1)}"
    else:
        kind = "pictures"
    labels = {name: label for label, name in enumerate(classes)}
    pictures = [
        _Picture(name, _size(root / name), captions[name], labels.get(name.split("/")[0])) for name in names
    ]
    logger.info("read %s as %s%s%s", root, kind, ", " if classes else ": ", _count(pictures))
    if unread:
        logger.warning(
            "%s: not read are %s: convert them to PNG or JPEG if they belong to the data",
            root,
            _listed(unread),
        )
    return Folder(str(root), root, pictures, classes)


def _match(pictures: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """The text file of each picture that has one: of exactly its name, else of its name in other letters.

    A text that is exactly another picture's is not shared out. Where all pictures are in one directory, texts
    may be in another one beside it, under the same names.

    Args:
        pictures: sorted.
        texts: sorted.
    """
    by_stem: dict[str, str] = {}
    for text in sorted(texts, key=lambda text: SIDECARS.index(f".{suffix_of(text)}")):
        by_stem.setdefault(text.rpartition(".")[0], text)
    tops = {picture.partition("/")[0] for picture in pictures}
    if len(tops) == 1 and all("/" in picture for picture in pictures):
        (top,) = tops
        for stem, text in list(by_stem.items()):
            directory, slash, rest = stem.partition("/")
            if slash and directory != top:
                by_stem.setdefault(f"{top}/{rest}", text)
    stems = {picture: (picture.rpartition(".")[0], picture) for picture in pictures}
    found = {p: by_stem[stem] for p, both in stems.items() for stem in reversed(both) if stem in by_stem}
    taken = set(found.values())
    by_folded: dict[str, str] = {}
    for stem, text in by_stem.items():
        if text not in taken:
            by_folded.setdefault(folded(stem), text)
    for picture, both in stems.items():
        near = next((by_folded[folded(stem)] for stem in both if folded(stem) in by_folded), None)
        if picture not in found and near is not None:
            found[picture] = near
    return found


def _walk(root: Path) -> Iterator[str]:
    """Files below a directory that are no leftovers, by relative path; links are followed, not in circles."""
    seen = set()
    for directory, subdirectories, files in os.walk(root, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            subdirectories.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subdirectories[:] = sorted(name for name in subdirectories if not is_leftover(name))
        for name in files:
            if not is_leftover(name):
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


def _listed(counts: Counter[str]) -> str:
    """Such as "3 .heic and 1 .svg"."""
    return " and ".join(f"{number:,} .{suffix}" for suffix, number in sorted(counts.items()))


def _sidecar(root: Path, file: str | None, fields: Fields) -> tuple[str, ...] | None:
    """The lines of a text file, a caption each, or what a JSON file has; None if it is no text."""
    if file is None:
        return ()
    if _size(root / file) is None:
        return None
    try:
        text = (root / file).read_text(encoding="utf-8-sig")
        if file.lower().endswith(".json"):
            metadata = json.loads(text)
            return fields.captions_in(metadata) if isinstance(metadata, dict) else ()  # of other things
        return clean_captions(text.split("\n"))
    except (OSError, ValueError, RecursionError):
        return None
