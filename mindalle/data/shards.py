"""Captioned pictures in WebDataset shards: `KEY.png`, `KEY.json`, `KEY.txt` and `KEY.cls` in tar files."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from glob import glob, has_magic
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import webdataset as wds
from braceexpand import braceexpand
from webdataset.gopen import Pipe

from mindalle.data.captions import Fields
from mindalle.data.members import Layout, RawSample, gathered, headers, layout_of, streamed
from mindalle.data.names import is_picture, is_unread_picture
from mindalle.data.samples import Sample, Unreadable, clean_captions, decode
from mindalle.image import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
FETCH = ["curl", "--connect-timeout", "30", "--retry", "30", "--retry-delay", "2", "-f", "-s", "-g", "-L"]
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "http://": lambda url: [*FETCH, url],
    "https://": lambda url: [*FETCH, url],
    "s3://": lambda url: ["aws", "s3", "cp", url, "-"],
    "gs://": lambda url: ["gsutil", "cat", url],
}
"""How an address begins -> the program that reads it, which no shell starts."""
PIPE = "pipe:"  # what follows is a command for the shell
REMOTE = (*COMMANDS, PIPE)
STOPPED_READING = [23, 141]  # exit codes of a program whose output nobody wants any more
CUT_OFF = (OSError, EOFError, tarfile.TarError)  # what reading from an address fails with when it is cut off
CHUNK = 1 << 16
MAX_SHARDS = 1_000_000  # more are a typing error in a brace pattern

SHUFFLE_BUFFER = 2000  # samples held in memory, as compressed bytes

MAX_LABEL = 1_000_000  # a larger one is damage, and would make as many classes


@dataclass(frozen=True)
class _Index:
    """What a scan of all shards finds."""

    count: int  # samples
    classes: tuple[str, ...]  # "0" to the largest label, or the names; () if most samples have no label
    digest: str  # SHA-256 of names, sizes and times of all files


class Shards:
    """A source over tar files; those that are not local can only be read from front to end.

    Labels have names ("0", "1", ...) only where all shards are local, since all must be seen for it.

    Args:
        name: what the user named.
        urls: absolute paths and addresses, at least one; nothing in them is expanded.
        fields: what the fields of the samples' JSON are called.
        only_captioned: leave out samples without captions.
    """

    def __init__(
        self, name: str, urls: Sequence[str], fields: Fields | None = None, *, only_captioned: bool = False
    ) -> None:
        self.name = name
        self.urls = tuple(urls)
        self.is_local = not any(url.startswith(REMOTE) for url in urls)
        self.fields = fields or Fields()
        self.only_captioned = only_captioned
        firsts = (next(headers(url, ()), {}) for url in self.urls) if self.is_local else iter(())
        self.classes = self._index.classes if any("cls" in first for first in firsts) else ()

    def captioned(self) -> Shards:
        """The same without samples that have no caption."""
        return Shards(self.name, self.urls, self.fields, only_captioned=True)

    @property
    def num_parts(self) -> int:
        """Shards."""
        return len(self.urls)

    def __len__(self) -> int:
        if not self.is_local:
            raise ValueError(f"how many pictures {self.name} holds is not known: set epoch_size")
        return self._index.count

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and times of all files in the shards; of the addresses if some are not local."""
        return (
            self._index.digest if self.is_local else hashlib.sha256("\n".join(self.urls).encode()).hexdigest()
        )

    @cached_property
    def _index(self) -> _Index:
        """A scan of all headers, which takes a while: done when first needed."""
        labels: Counter[str] = Counter()
        count, digest = 0, hashlib.sha256()
        texts = ("json", "txt", "caption") if self.only_captioned else ()
        for url in self.urls:
            for files in headers(url, ("cls", *texts)):
                if self.only_captioned and not self._has_caption(files):
                    continue
                count += 1
                with suppress(UnicodeDecodeError):  # one that is unreadable is left out when it is read
                    labels.update(filter(None, [_label_text(files)]))
                described = {name: value for name, value in files.items() if name != "__url__"}
                digest.update(repr(sorted(described.items())).encode(errors="backslashreplace"))
        is_labelled = 2 * labels.total() >= count  # a stray label makes no classes
        return _Index(count, _classes(labels) if is_labelled else (), digest.hexdigest())

    def _has_caption(self, raw: RawSample) -> bool:
        """Whether a sample has a caption, or one that is damaged, which is told when it is read."""
        try:
            return bool(self._captions(raw))
        except (ValueError, RecursionError):
            return True

    def _captions(self, raw: RawSample) -> tuple[str, ...]:
        """Those of KEY.json, or else the lines of KEY.txt or KEY.caption."""
        captions = self.fields.captions_in(json.loads(raw["json"])) if "json" in raw else ()
        text = raw.get("txt", raw.get("caption"))
        if not captions and text is not None:
            captions = clean_captions(text.decode("utf-8-sig").split("\n"))
        return captions

    def _label(self, raw: RawSample) -> int | None:
        """That of KEY.cls: a number, or the name of a class."""
        text = _label_text(raw)
        return self.classes.index(text) if text in self._names else _number(text)

    @cached_property
    def _names(self) -> frozenset[str]:
        """Of classes that are not numbers."""
        return frozenset(name for name in self.classes if not _is_number(name))

    def read(self, part: int) -> Iterator[Sample | Unreadable]:
        """The samples of a shard; see `Source.read`."""
        return map(self.decode, self.raw(part))

    def raw(self, part: int) -> Iterator[RawSample | Unreadable]:
        """The samples of a shard, not decoded; where the shard itself ends too soon, an Unreadable says so.

        It is out of reach if it is not local, since a lost connection looks like a damaged file, or if the
        system could not read it; a local one that is damaged stays so, and what is readable is all there is.

        Args:
            part: index of the shard.
        """
        errors: list[Exception] = []

        def note(error: Exception) -> bool:
            errors.append(error)
            return True  # = go on

        url = self.urls[part]
        try:
            stream = _open(url)
            layout = Layout() if url.startswith(REMOTE) else layout_of(url)
            samples = (
                gathered(url, layout, note) if layout.is_scattered else streamed(url, stream, layout, note)
            )
            for sample in samples:
                if not self.only_captioned or self._has_caption(sample):
                    yield sample
            # a connection lost between two files looks like the end of the shard: only the command that reads
            # an address knows, and it tells when it has ended
            while stream.read(CHUNK):
                pass
            stream.close()
        except Exception as error:  # of commands, schemes, the system
            errors.append(error)
        is_local = not url.startswith(REMOTE)
        lost = [error for error in errors if isinstance(error, OSError if is_local else CUT_OFF)]
        # of an error's arguments some are WebDataset's: the stream and the name of the shard
        for first in (lost or errors)[:1]:
            reason = ": ".join(part for part in first.args if isinstance(part, str)) or repr(first)
            reason = f"the shard is damaged or out of reach: {reason}"
            yield Unreadable(_shard_name(url), reason, is_out_of_reach=bool(lost))

    def decode(self, raw: RawSample | Unreadable) -> Sample | Unreadable:
        """A sample of what `raw` gives."""
        if isinstance(raw, Unreadable):
            return raw
        key = f"{_shard_name(raw['__url__'])}/{raw['__key__']}"
        key = key.encode(errors="backslashreplace").decode()  # of names that are no text
        suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in raw), None)
        if suffix is None:
            return Unreadable(key, _without_picture(raw))
        try:
            captions, label = self._captions(raw), self._label(raw)
        except (ValueError, RecursionError) as error:
            return Unreadable(key, " ".join(str(error).split()))
        if self.classes and label is None:
            return Unreadable(key, "it has no label (cls), unlike most pictures of the shards")
        return decode(key, BytesIO(raw[suffix]), captions, label)

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each sample in order; () where they cannot be read."""
        for part in range(self.num_parts):
            for raw in self.raw(part):
                if not isinstance(raw, Unreadable):
                    try:
                        captions = self._captions(raw)
                    except (ValueError, RecursionError):
                        captions = ()
                    yield captions


def is_shard(spec: str) -> bool:
    """Whether a path, pattern or address is one of tar files."""
    is_named_so = spec.startswith(REMOTE) or spec.lower().endswith(TAR_SUFFIXES)
    return is_named_so and not os.path.isdir(os.path.expanduser(spec))


def open_shards(specs: Sequence[str | Path], fields: Fields, *, allow_pipe: bool = False) -> Shards:
    """Find the tar files.

    Args:
        specs: what a user typed: paths, patterns with `*` or {000..099}, and addresses. What was found on the
            disk is a Path, and never taken for a pattern or an address.
        fields: what the fields of the samples' JSON are called.
        allow_pipe: whether `pipe:` addresses may run their command.

    Returns:
        The source; its shards are in the order of the patterns.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
        ValueError: if a pattern stands for too many, local shards hold no samples, or a command is named and
            not allowed.
    """
    urls = [
        url
        for spec in specs
        for url in (
            [str(spec.absolute())] if isinstance(spec, Path) else _expand(spec, allow_pipe=allow_pipe)
        )
    ]
    name = str(specs[0]) if len(specs) == 1 else f"{specs[0]} and {len(specs) - 1:,} more"
    shards = Shards(name, urls, fields)
    if shards.is_local and not any(next(headers(url, ()), None) for url in urls):
        raise ValueError(
            f"no pictures in {name}: expected tar files with KEY.png, KEY.jpg, ... beside KEY.json"
        )
    logger.info(
        "read %s as %s shard%s%s",
        name,
        f"{len(urls):,}",
        "s" * (len(urls) != 1),
        f" with {len(shards.classes):,} classes" if shards.classes else "",
    )
    return shards


def _expand(spec: str, *, allow_pipe: bool) -> list[str]:
    """The files or addresses that a pattern stands for; what is on the disk under that very name is it."""
    if os.path.isfile(named := os.path.expanduser(spec)):  # the user's shell may have found it: *.tar
        return [os.path.abspath(named)]
    if spec.startswith(PIPE):
        if not allow_pipe:
            raise ValueError(
                f"{spec} is a command, and commands run only where they are allowed: pass --allow-pipe, or "
                "allow_pipe in Python and in training configs"
            )
        return [spec]  # braces and stars are the shell's
    ranges = re.findall(r"\{(\d+)\.\.(\d+)", spec)
    if math.prod(1 + abs(int(last) - int(first)) for first, last in ranges) > MAX_SHARDS:
        raise ValueError(f"{spec} stands for more than {MAX_SHARDS:,} shards: is a number mistyped?")
    expanded = list(braceexpand(spec))
    if spec.startswith(REMOTE):
        return expanded
    found: list[str] = []
    for pattern in expanded:
        path = str(Path(pattern).expanduser().absolute())
        matches = sorted(glob(path)) if has_magic(path) and not Path(path).exists() else [path]
        if not all(Path(match).is_file() for match in matches) or not matches:
            raise FileNotFoundError(f"no shards match {pattern}: expected WebDataset .tar files")
        found += matches
    return found


def _open(url: str) -> IO[bytes] | Pipe:
    """A stream of the shard; of an address the output of a program, whose failure it raises at the end."""
    if url.startswith(PIPE):
        return Pipe(url.removeprefix(PIPE), mode="rb", shell=True, ignore_status=STOPPED_READING[1:])
    for scheme, command in COMMANDS.items():
        if url.startswith(scheme):
            return Pipe(command(url), mode="rb", ignore_status=STOPPED_READING)
    return open(url, "rb")


def shuffled(samples: Iterator[Any], rng: random.Random) -> Iterator[Any]:
    """WebDataset's shuffle, which holds a part of the samples in memory."""
    return wds.shuffle(SHUFFLE_BUFFER, rng=rng)(samples)  # type: ignore[no-any-return]


def _classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes that labels stand for: all up to the largest number, or, without numbers, the texts."""
    numbers = [int(label) for label in labels if _is_number(label)]
    if not numbers:
        return tuple(sorted(labels))
    return tuple(map(str, range(1 + max((n for n in numbers if 0 <= n < MAX_LABEL), default=-1))))


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _without_picture(raw: RawSample) -> str:
    """Why a sample has no picture, as far as its other files tell."""
    suffixes = [suffix for suffix in raw if not suffix.startswith("__")]
    reason = f"it has no picture ({', '.join(PICTURE_SUFFIXES)}), but {', '.join(suffixes[:5])}"
    if any(is_unread_picture(f"_.{suffix}") for suffix in suffixes):
        return f"{reason}, which is not read: convert it to PNG or JPEG"
    if any(is_picture(f"_.{suffix}") for suffix in suffixes):
        return f"{reason}: keys may hold dots in local shards only"
    return f"{reason}: the files of a sample must be next to each other in shards that are not local"


def _label_text(raw: RawSample) -> str | None:
    """What KEY.cls says."""
    content = raw.get("cls")
    return content.decode("utf-8-sig").strip() if isinstance(content, bytes) else content


def _number(text: str | None) -> int | None:
    """The label that a .cls gives as a number."""
    if text is None:
        return None
    if not _is_number(text):
        raise ValueError(f"its label (cls) must be a number, as others are, got {text!r:.60}")
    label = int(text)
    if not 0 <= label < MAX_LABEL:
        raise ValueError(f"its label (cls) must be in [0, {MAX_LABEL}), got {label}")
    return label


def _shard_name(url: str) -> str:
    """Without the directory, which may differ from machine to machine."""
    return url.rstrip("/").rpartition("/")[2] if not url.startswith(PIPE) else url
