"""What the name of a file tells: whether it is a picture, a text or a leftover, and what is the same name."""

from __future__ import annotations

import unicodedata

from mindalle.image import PICTURE_SUFFIXES

UNREAD_SUFFIXES = (
    *("heic", "heif", "hif", "jxl", "jxr", "svg", "svgz", "psd", "tga", "ico", "pcx", "dds", "exr", "hdr"),
    *("dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "eps", "pfm", "xcf", "avif", "jp2", "j2k"),
)
"""Of pictures that are not read: they are named and counted. Some are read where Pillow can."""


def is_leftover(path: str) -> bool:
    """Whether a file is no data: hidden, or what macOS leaves in archives and on foreign disks.

    Args:
        path: relative, "/" between names.
    """
    names = [name for name in path.split("/") if name not in ("", ".")]
    return any(name[0] == "." or name == "__MACOSX" for name in names)


def suffix_of(path: str) -> str:
    """Behind the last dot of a name, in lower case; "" without one."""
    stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return suffix.lower() if stem and dot else ""


def is_picture(path: str) -> bool:
    """Whether a file is taken for a picture that can be read."""
    return suffix_of(path) in PICTURE_SUFFIXES


def is_unread_picture(path: str) -> bool:
    """Whether a file is a picture of a kind that is not read."""
    return suffix_of(path) in UNREAD_SUFFIXES and not is_picture(path)


def folded(name: str) -> str:
    """The same for names that differ in case only, or in how accents are encoded (NFC, macOS's NFD)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
