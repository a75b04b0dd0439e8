"""Get a file over a connection that breaks, and unpack an archive without trusting what is in it."""

import contextlib
import errno
import gzip
import hashlib
import http.client
import logging
import lzma
import re
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError, URLError

from filelock import FileLock, Timeout
from tqdm import tqdm

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # failed requests in a row, none of which brought a new byte, before giving up
BACKOFF_SECONDS = 0.5  # wait after the first failure; doubled after each further one
TIMEOUT_SECONDS = 30.0  # of silence from the server
CHUNK_BYTES = 1 << 18  # at most this much is lost when a connection breaks
MAX_MEMBERS = 10_000  # a released archive has about ten
MAX_HEADER_BYTES = 1 << 20  # of a long name or another extension, which tarfile reads at once
MAX_DOWNLOAD_BYTES = 64 << 30  # a server that announces no length may send for ever
MAX_UNPACKED_BYTES = 64 << 30  # the largest release holds 3.9B float32 parameters, 32 GB with their averages

# An HTTP status is an answer, not a broken connection: HTTPError, a URLError, is handled before these.
_CONNECTION_ERRORS = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
_ARCHIVE_ERRORS = (
    tarfile.TarError,
    EOFError,
    RecursionError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    OverflowError,
)
_EXTENSION_TYPES = b"LKxgX"  # long names and pax headers, one letter each


def download(url: str, path: Path, *, md5: str, will_unpack: bool = False) -> Path:
    """Download one file, going on from where an earlier try was cut.

    The bytes gather in `<path>.part`, which becomes `path` when the checksum is right. Safe to call from
    several processes at once: one downloads, the others wait and find the file.

    Args:
        url: http or https.
        path: the file to make. If it is there with the right checksum, nothing is downloaded.
        md5: 32 hexadecimal digits.
        will_unpack: also ask for the free disk space that an unpacked copy needs.

    Returns:
        The path.

    Raises:
        ConnectionError: if the server cannot be reached, keeps breaking off, or answers with an error.
        ValueError: if the checksum of what arrived is wrong; the bytes are deleted.
        OSError: if the disk has too little space for the file, or the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with exclusive(path.with_name(f".{path.name}.lock")):
        for finished in (path, part):  # a process may have been killed just before its rename
            if finished.is_file() and _md5(finished) == md5:
                return finished.replace(path)
        logger.info("downloading %s to %s", url, path)
        _fetch_with_retries(url, part, copies=2 if will_unpack else 1)
        if (got := _md5(part)) != md5:
            part.unlink()
            raise ValueError(
                f"checksum of {url}: got md5 {got}, expected {md5}; the download was deleted. "
                "Try again; if it fails again, the file was changed at its source"
            )
        return part.replace(path)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever has it; the system frees it if its process dies.

    Args:
        path: the lock file; made if absent.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process holds %s: waiting for it to finish", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_with_retries(url: str, part: Path, *, copies: int) -> None:
    """Complete the part file; a connection that breaks is opened again while it brings new bytes."""
    farthest = _size(part)
    failures = 0
    while True:
        try:
            return _fetch(url, part, copies=copies)
        except HTTPError as error:
            error.close()
            if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not part.exists():
                message = f"cannot download {url}: the server answered {error.code} {error.reason}"
                raise ConnectionError(message) from error
            part.unlink()  # as long as the file or longer, yet with another checksum: worthless
            continue
        except _CONNECTION_ERRORS as error:
            cause = error
        # Measured against the farthest byte ever reached: a server that ignores Range and always breaks
        # off at the same place makes no progress.
        failures = 1 if _size(part) > farthest else failures + 1
        farthest = max(farthest, _size(part))
        reason = str(getattr(cause, "reason", cause)) or type(cause).__name__
        if failures >= ATTEMPTS:
            raise ConnectionError(f"cannot download {url}: {reason} ({failures} tries)") from cause
        logger.warning("download of %s interrupted (%s): trying again", url, reason)
        time.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))


def _fetch(url: str, part: Path, *, copies: int) -> None:
    """Make one request for the bytes that the part file lacks, and append them."""
    headers = {"User-Agent": "mindalle", "Accept-Encoding": "identity"}
    if offset := _size(part):
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        start = offset
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            start = 0  # this server sends the whole file whatever is asked
        elif not re.match(rf"bytes {offset}-", response.headers.get("Content-Range", "")):
            part.unlink(missing_ok=True)  # a first request asks for no range
            raise ConnectionError("the server sent another range than asked for")
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        full = f"while downloading {url}: free some space and run again, the download goes on from there"
        with _full_disk_says(part.parent, full), part.open("ab" if start else "wb") as file:
            if total is not None:
                _check_free_space(url, part.parent, total * copies - start)
            bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None)
            with bar:  # hidden where stderr is no terminal
                while chunk := response.read(CHUNK_BYTES):
                    if (start := start + len(chunk)) > MAX_DOWNLOAD_BYTES:
                        part.unlink()
                        most = _gigabytes(MAX_DOWNLOAD_BYTES)
                        raise OSError(f"{url} sends more than {most}, more than any release has")
                    file.write(chunk)
                    bar.update(len(chunk))
    # Short bodies end without an error in http.client.
    if total is not None and _size(part) < total:
        raise ConnectionError(f"the connection closed at byte {_size(part)} of {total}")


@contextlib.contextmanager
def _full_disk_says(directory: Path, what: str) -> Iterator[None]:
    """Replace the bare error of a disk that runs full by one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"the disk of {directory} ran full {what}") from error


def _check_free_space(url: str, directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"not enough disk space for {url}: it needs {_gigabytes(needed)}, {directory} has "
            f"{_gigabytes(free)} free. Free some space, or use a cache on another disk"
        )


def extract(
    archive: Path, directory: Path, *, max_bytes: int = MAX_UNPACKED_BYTES, max_members: int = MAX_MEMBERS
) -> Path:
    """Unpack a tar archive that may be hostile; the directory appears complete or not at all.

    Only regular files and directories are taken, written with this process's default permissions. An
    archive with one top folder is unpacked without it: the directory then holds what the folder holds.

    Args:
        archive: tar, plain or compressed with gzip, bzip2 or xz.
        directory: the place to make. If it exists when unpacking ends, it is left as it is.
        max_bytes: refuse archives whose files take more.
        max_members: refuse archives with more entries.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: if there is no such archive.
        ValueError: if the archive is truncated, corrupt, too large, empty, or has an entry that leaves
            the directory, is a link or a device, or is there twice.
        OSError: if the disk is full or the place cannot be written.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(".unpacking", f".{directory.name}.", directory.parent))
    try:
        root = scratch / "root"  # mkdtemp's own directory would keep its private permissions
        root.mkdir()
        full = f"while unpacking {archive}: free some space and run again"
        try:
            with _full_disk_says(directory.parent, full), tarfile.open(archive, tarinfo=_SafeHeader) as tar:
                _write_members(tar, root, archive, max_bytes, max_members)
        except _ARCHIVE_ERRORS as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
            raise ValueError(
                f"cannot unpack {archive}: {reason}; it is truncated or corrupt: delete it and download again"
            ) from error
        # Hidden entries are what some systems add beside the folder that was packed.
        visible = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        if not visible:
            raise ValueError(f"cannot unpack {archive}: it is empty; download it again")
        source = visible[0] if len(visible) == 1 and visible[0].is_dir() else root
        try:
            source.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was faster, and made the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


class _SafeHeader(tarfile.TarInfo):
    """An entry's header, refused where tarfile itself would fill the memory or run in circles."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_SafeHeader":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENSION_TYPES and header.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError("an entry has an impossible size")
        return header


def _write_members(tar: tarfile.TarFile, root: Path, archive: Path, max_bytes: int, max_members: int) -> None:
    """Write the members below root; names, types and sizes are checked before the first byte of each."""
    data_filter = getattr(tarfile, "data_filter", None)  # in Python 3.10.12, 3.11.4, 3.12 and later
    unpacked = 0
    for count, member in enumerate(tar, start=1):
        unpacked += max(member.size, 0)
        if count > max_members or unpacked > max_bytes:
            raise ValueError(
                f"refused to unpack {archive}: at {member.name!r} it passes {max_members} entries or "
                f"{_gigabytes(max_bytes)}, more than a checkpoint should have"
            )
        target = root / _safe_name(member, archive)
        if data_filter is not None:
            data_filter(member, str(root))  # second line of defence: raises a TarError
        try:
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None, "regular files have data"
            with source, target.open("xb") as file:
                shutil.copyfileobj(source, file)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"refused to unpack {archive}: {member.name!r} is there twice") from error
    # tarfile takes a file that just stops between two members for a complete one: look for the end mark.
    if tar.fileobj is None or tar.fileobj.tell() <= tar.offset:
        raise tarfile.ReadError("the end of the archive is missing")
    tar.fileobj.read(CHUNK_BYTES)  # gzip checks its checksum at its end, behind some 10 kB of padding


def _safe_name(member: tarfile.TarInfo, archive: Path) -> str:
    """Return the member's name if it can only lead to a file or directory below the root."""
    kind = None
    parts = re.split(r"[/\\]", member.name)  # a backslash separates on Windows
    if not parts[0] or re.match(r"[A-Za-z]:", member.name):
        kind = "an absolute path"
    elif ".." in parts:
        kind = "a path that leaves the directory"
    elif member.issym() or member.islnk():
        kind = f"a link to {member.linkname!r}"
    elif not (member.isreg() or member.isdir()):
        kind = "neither a file nor a directory"
    elif member.size < 0 or "\0" in member.name:
        kind = "malformed"
    if kind is not None:
        raise ValueError(f"refused to unpack {archive}: {member.name!r} is {kind}; use another source")
    return member.name


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
