"""Captioned pictures from anywhere: what a source gives, and how its kind is told from what a user names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from mindalle.data.names import is_leftover
from mindalle.image import decode_image

if TYPE_CHECKING:
    from mindalle.data.captions import Fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A picture and what is known of it."""

    key: str  # where it came from: unique in its source, the same on every machine
    image: Image.Image  # RGB, upright, transparency on white
    captions: tuple[str, ...]  # stripped, none empty; () without
    label: int | None  # index in the source's classes; None without


@dataclass(frozen=True)
class Unreadable:
    """A picture that is listed but cannot be read."""

    key: str  # as of a sample
    reason: str  # one line
    is_out_of_reach: bool = False  # a shard, the rest of which may come when it is read again


class Source(Protocol):
    """Captioned pictures in a fixed order, cut into parts that can be read independently."""

    @property
    def name(self) -> str:
        """What the user named."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels; () if the pictures have none."""

    @property
    def num_parts(self) -> int:
        """Independent pieces: ranges of a folder's files, or one shard each."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what is listed: of names, sizes, captions and labels, not of pixels.

        The same on every machine, so no time of a file in a folder counts: there, a picture that is made
        anew with exactly as many bytes goes unnoticed.
        """

    def __len__(self) -> int:
        """Samples as listed; unreadable ones count."""

    def read(self, part: int) -> Iterator[Sample | Unreadable]:
        """The samples of a part, read and decoded one by one.

        Args:
            part: in [0, num_parts).
        """

    def captioned(self) -> Source:
        """The same without samples that have no caption."""

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each listed sample in order, without decoding pictures; () where it has none."""


def open_source(
    spec: str | Sequence[str], fields: Fields | None = None, *, allow_pipe: bool = False
) -> Source:
    """Find out what is named and list it.

    Args:
        spec: a directory (with a captions file, with a .txt, .caption or .json for each picture, of class
            folders, or of pictures), a captions file, a .txt list of files, or WebDataset shards: .tar files,
            patterns with `*` or {000..099}, http(s)://, s3:// and gs:// addresses, pipe: commands, or a list
            of these. Only what is named here can be a pattern or an address; what lies in a directory is a
            file, whatever it is called.
        fields: what the fields of captions files and of the shards' JSON are called; None = the known names.
        allow_pipe: whether `pipe:COMMAND` may run its command in a shell, and read what that writes.

    Returns:
        The source; what it is taken for is logged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no pictures, its captions cannot be understood, or it is a command and
            commands are not allowed.
    """
    # the kinds are built from what this file defines
    from mindalle.data.captions import Fields
    from mindalle.data.folders import has_pictures, open_folder
    from mindalle.data.shards import is_shard, open_shards

    fields = fields or Fields()
    specs = [spec] if isinstance(spec, str) else list(spec)
    if not specs or not all(isinstance(one, str) and one for one in specs):
        raise ValueError(f"pictures must be named by a path, a pattern or a list of shards, got {spec!r}")
    if all(map(is_shard, specs)):
        return open_shards(specs, fields, allow_pipe=allow_pipe)
    if len(specs) > 1:
        stranger = next(one for one in specs if not is_shard(one))
        raise ValueError(
            f"a list of sources may only hold shards (.tar), got {stranger!r}: name a single directory, "
            "or put the pictures into one"
        )
    path = Path(specs[0]).expanduser()
    tars = path.glob("*.tar") if path.is_dir() else ()
    shards = sorted(tar for tar in tars if not is_leftover(tar.name))
    if shards and not has_pictures(path, at_least=len(shards)):
        return open_shards(shards, fields)
    if shards:
        logger.warning(
            "%s holds pictures: %d .tar beside them not read, such as %s", path, len(shards), shards[0]
        )
    return open_folder(path, fields)


def decode(
    key: str, file: Path | BytesIO, captions: tuple[str, ...], label: int | None
) -> Sample | Unreadable:
    """Decode a picture file that belongs to a sample.

    Args:
        key: of the sample.
        file: path or contents.
        captions: cleaned.
        label: or None.

    Returns:
        The sample, or why there is none.
    """
    try:
        return Sample(key, decode_image(file), captions, label)
    except FileNotFoundError:
        return Unreadable(key, "there is no such file")
    except ValueError as error:
        return Unreadable(key, str(error))


def clean_captions(captions: object) -> tuple[str, ...]:
    """What a file has as captions: one text, a list of texts, or null.

    Args:
        captions: as parsed.

    Returns:
        The texts, stripped, without empty ones.

    Raises:
        ValueError: if they are anything else, or no tokenizer can read them.
    """
    listed = [] if captions is None else captions if isinstance(captions, list) else [captions]
    texts: list[str] = []
    for text in listed:
        if not isinstance(text, str):
            raise ValueError(
                f"captions must be text, got {text!r:.80}: expected a string or a list of strings"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can write it
            raise ValueError(f"captions must be valid Unicode, got {text!r:.80}") from error
        texts.append(text.strip())
    return tuple(filter(None, texts))


def seed_of(*place: object) -> int:
    """The seed of a random choice, a function of where it is made and of nothing else.

    Args:
        place: such as seed, epoch and key.

    Returns:
        The first 8 bytes, big-endian, of SHA-256 of the place joined by "/", shifted right to 63 bits.
    """
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
