"""The files of a tar shard as samples: which belong together, without leftovers and in whatever order."""

from __future__ import annotations

import logging
import tarfile
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import webdataset as wds

from mindalle.data.names import is_leftover, is_picture

logger = logging.getLogger(__name__)

RawSample = dict[str, Any]
"""The files of a sample as bytes by suffix, and `__key__`, as WebDataset groups them."""

DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error)
OTHER_SUFFIXES = ("txt", "caption", "json", "cls")  # that a sample's files have besides pictures'

Handler = Callable[[Exception], bool]


@dataclass(frozen=True)
class Layout:
    """How the files of a shard make samples."""

    pictures: Container[str] = ()  # names up to the first dot that have a picture, `KEY.png`
    has_dots: bool = False  # whether keys may hold dots
    is_scattered: bool = False  # files of a sample are not next to each other

    def key_of(self, path: str) -> tuple[str | None, str | None]:
        """The key and the suffix of a file; None if it is of no sample.

        WebDataset ends a key at the first dot. Where `KEY.png` is, `KEY.mask.png` belongs to it; where it is
        not, `2024.05.png` is a picture of its own.
        """
        key, suffix = wds.tariterators.base_plus_ext(path)
        if key is None or not self.has_dots or "." not in suffix or key in self.pictures:
            return key, suffix
        stem, _, last = path.rpartition(".")
        is_known = is_picture(path) or last.lower() in OTHER_SUFFIXES
        return (stem, last) if is_known else (key, suffix)


def layout_of(path: str) -> Layout:
    """The layout of a local shard, as far as its headers can be read."""
    names: list[str] = []
    with suppress(*DAMAGE), tarfile.open(path) as tar:
        names.extend(member.name for member in tar if member.isreg() and not is_leftover(member.name))
    pairs = ((name, *wds.tariterators.base_plus_ext(name)) for name in names)
    pictures = {key for name, key, suffix in pairs if key and "." not in suffix and is_picture(name)}
    layout = Layout(pictures, has_dots=True)
    keys = [key for name in names if (key := layout.key_of(name)[0]) is not None]
    num_runs = sum(key != previous for key, previous in zip(keys, [None, *keys], strict=False))
    return Layout(pictures, has_dots=True, is_scattered=num_runs > len(set(keys)))


def streamed(url: str, stream: Any, layout: Layout, note: Handler) -> Iterator[RawSample]:
    """The samples of a stream that is read from front to end.

    Args:
        url: of the shard.
        stream: of its bytes.
        layout: of the shard.
        note: told of errors; True = go on.
    """
    files = wds.tariterators.tar_file_expander(
        [{"url": url, "stream": stream}], handler=note, select_files=lambda name: not is_leftover(name)
    )
    return wds.tariterators.group_by_keys(files, keys=layout.key_of, handler=note)  # type: ignore[no-any-return]


def gathered(path: str, layout: Layout, note: Handler) -> Iterator[RawSample]:
    """The samples of a local shard whose files lie apart; see `streamed`."""
    with tarfile.open(path) as tar:
        members = _in_order(list(_regular(tar)), layout)
        files = ({"fname": m.name, "data": _content(tar, m), "__url__": path} for m in members)
        yield from wds.tariterators.group_by_keys(files, keys=layout.key_of, handler=note)


def headers(path: str, contents: Container[str]) -> Iterator[RawSample]:
    """The samples of a local shard, with sizes and times instead of contents.

    Args:
        path: of the shard.
        contents: suffixes of files that are read all the same.
    """
    layout = layout_of(path)

    def files() -> Iterator[dict[str, Any]]:
        with tarfile.open(path) as tar:
            members = _in_order(list(_regular(tar)), layout) if layout.is_scattered else _regular(tar)
            for member in members:
                suffix = member.name.lower().rpartition(".")[2]
                is_read = suffix in contents and (suffix != "cls" or member.size < 99)
                data = _content(tar, member) if is_read else f"{member.size} {member.mtime}"
                yield {"fname": member.name, "data": data, "__url__": path}

    try:
        yield from wds.tariterators.group_by_keys(
            files(), keys=layout.key_of, handler=wds.ignore_and_continue
        )
    except DAMAGE as error:
        logger.warning("%s is damaged: %s", path, error)


def _regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    return (member for member in tar if member.isreg() and not is_leftover(member.name))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _in_order(members: list[tarfile.TarInfo], layout: Layout) -> list[tarfile.TarInfo]:
    """The files of each sample together, samples in the order of their first file."""
    first: dict[str | None, int] = {}
    for member in members:
        first.setdefault(layout.key_of(member.name)[0], len(first))
    return sorted(members, key=lambda member: first[layout.key_of(member.name)[0]])
