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
import zlib
from collections.abc import Callable, Iterator, Sequence
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

from mindalle.data.samples import PICTURE_SUFFIXES, Sample, Unreadable, clean_captions, decode

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

RawSample = dict[str, Any]
"""The files of a sample as bytes by suffix, and `__key__`, as WebDataset groups them."""


MAX_LABEL = 1_000_000  # a larger one is damage, and would make as many classes


@dataclass(frozen=True)
class _Index:
    """What a scan of all shards finds."""

    count: int  # samples
    num_classes: int  # largest label + 1
    digest: str  # SHA-256 of names, sizes and times of all files


class Shards:
    """A source over tar files; those that are not local can only be read from front to end.

    Labels have names ("0", "1", ...) only where all shards are local, since all must be seen for it.

    Args:
        name: what the user named.
        urls: absolute paths and addresses, at least one; nothing in them is expanded.
    """

    def __init__(self, name: str, urls: Sequence[str]) -> None:
        self.name = name
        self.urls = tuple(urls)
        self.is_local = not any(url.startswith(REMOTE) for url in urls)
        first = next(_headers(self.urls[0]), {}) if self.is_local else {}
        self.classes = tuple(map(str, range(self._index.num_classes))) if "cls" in first else ()

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
        count, num_classes, digest = 0, 0, hashlib.sha256()
        for url in self.urls:
            for files in _headers(url):
                count += 1
                with suppress(ValueError):  # one that is unreadable is left out when it is read
                    label = _label(files)
                    num_classes = max(num_classes, 0 if label is None else label + 1)
                described = {name: value for name, value in files.items() if name != "__url__"}
                digest.update(repr(sorted(described.items())).encode(errors="backslashreplace"))
        return _Index(count, num_classes, digest.hexdigest())

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
            files = wds.tariterators.tar_file_expander([{"url": url, "stream": stream}], handler=note)
            yield from wds.tariterators.group_by_keys(files, handler=note)
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
            return Unreadable(key, f"it has no picture ({', '.join(PICTURE_SUFFIXES)})")
        try:
            captions, label = _captions(raw), _label(raw)
        except (ValueError, RecursionError) as error:
            return Unreadable(key, " ".join(str(error).split()))
        if self.classes and label is None:
            return Unreadable(key, "it has no label (cls), unlike the first picture of the shards")
        return decode(key, BytesIO(raw[suffix]), captions, label)

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each sample in order; () where they cannot be read."""
        for part in range(self.num_parts):
            for raw in self.raw(part):
                if not isinstance(raw, Unreadable):
                    try:
                        captions = _captions(raw)
                    except (ValueError, RecursionError):
                        captions = ()
                    yield captions


def is_shard(spec: str) -> bool:
    """Whether a path, pattern or address is one of tar files."""
    is_named_so = spec.startswith(REMOTE) or spec.lower().endswith(TAR_SUFFIXES)
    return is_named_so and not os.path.isdir(os.path.expanduser(spec))


def open_shards(specs: Sequence[str | Path], *, allow_pipe: bool = False) -> Shards:
    """Find the tar files.

    Args:
        specs: what a user typed: paths, patterns with `*` or {000..099}, and addresses. What was found on the
            disk is a Path, and never taken for a pattern or an address.
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
    shards = Shards(name, urls)
    if shards.is_local and next((1 for url in urls if next(_headers(url), None)), None) is None:
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


def _headers(path: str) -> Iterator[RawSample]:
    """The samples of a local shard, with sizes and times instead of contents (save for labels)."""

    def members() -> Iterator[dict[str, Any]]:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isreg():
                    is_label = member.name.lower().endswith(".cls") and member.size < 99
                    file = tar.extractfile(member) if is_label else None
                    content = file.read() if file else f"{member.size} {member.mtime}"
                    yield {"fname": member.name, "data": content, "__url__": path}

    try:
        yield from wds.tariterators.group_by_keys(members(), handler=wds.ignore_and_continue)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        logger.warning("%s is damaged: %s", path, error)


def _captions(raw: RawSample) -> tuple[str, ...]:
    """Those of KEY.json, or else the lines of KEY.txt."""
    metadata = json.loads(raw["json"]) if "json" in raw else {}
    if not isinstance(metadata, dict):
        raise ValueError(f"its JSON must be an object, got {metadata!r:.80}")
    captions = clean_captions(metadata.get("captions", metadata.get("caption")))
    if not captions and "txt" in raw:
        captions = clean_captions(raw["txt"].decode("utf-8-sig").split("\n"))
    return captions


def _label(raw: RawSample) -> int | None:
    """That of KEY.cls."""
    if "cls" not in raw:
        return None
    label = int(raw["cls"])
    if not 0 <= label < MAX_LABEL:
        raise ValueError(f"its label (cls) must be in [0, {MAX_LABEL}), got {label}")
    return label


def _shard_name(url: str) -> str:
    """Without the directory, which may differ from machine to machine."""
    return url.rstrip("/").rpartition("/")[2] if not url.startswith(PIPE) else url
