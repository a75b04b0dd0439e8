"""Downloads against a real server on the loopback address, and hostile archives; no network."""

import errno
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from mindalle import download as module
from mindalle.download import download, exclusive, extract

BODY = bytes(range(256)) * 4000  # 1 MB: several chunks
MD5 = hashlib.md5(BODY).hexdigest()


# ---------------------------------------------------------------------------------------------- a server


class Server(http.server.ThreadingHTTPServer):
    """Serves one body, as badly as it is told to."""

    body: bytes
    honours_range: bool
    sends_length: bool
    range_shift: int  # the first byte of an answer lies this far from the one asked for
    unasked_parts: int  # so many of the next requests are answered as if they had asked for a range
    status: int | None  # answer every request with this error
    cuts: list[int]  # bytes that the next requests get before their connection closes; then whole ones
    always_cut: int | None
    pause: float  # seconds before the second half of each answer
    ranges: list[str | None]  # Range header of each request so far

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/1.3B.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if server.status is not None:
            self.send_error(server.status)
            return
        start = 0
        if asked is not None and server.honours_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-")) + server.range_shift
            if start >= len(server.body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        elif server.unasked_parts:
            server.unasked_parts -= 1
            self.send_response(206)
        else:
            self.send_response(200)
        body = server.body[start:]
        if server.sends_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else server.always_cut
        body = body[:cut]
        try:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(server.pause)
            self.wfile.write(body[len(body) // 2 :])
        except OSError:
            pass  # the client left

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.body, server.honours_range, server.sends_length, server.range_shift = BODY, True, True, 0
    server.unasked_parts = 0
    server.status, server.cuts, server.always_cut, server.pause, server.ranges = None, [], None, 0.0, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the code wanted to wait between tries: it never does here."""
    waited: list[float] = []

    class Time:
        sleep = staticmethod(waited.append)

    monkeypatch.setattr(module, "time", Time)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return waited


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "1.3B.tar.gz"


def put_part(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    return part


def files(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.endswith(".lock"))


# ---------------------------------------------------------------------------------------------- download


def test_downloads_once(server: Server, path: Path) -> None:
    assert download(server.url, path, md5=MD5) == path
    assert path.read_bytes() == BODY
    assert files(path.parent) == ["1.3B.tar.gz"]
    assert download(server.url, path, md5=MD5) == path
    assert server.ranges == [None]


def test_goes_on_from_a_part(server: Server, path: Path) -> None:
    put_part(path, BODY[:123_456])
    download(server.url, path, md5=MD5)
    assert server.ranges == ["bytes=123456-"]
    assert path.read_bytes() == BODY


def test_starts_over_when_range_is_ignored(server: Server, path: Path) -> None:
    server.honours_range = False
    put_part(path, BODY[:123_456])
    download(server.url, path, md5=MD5)
    assert server.ranges == ["bytes=123456-"]
    assert path.read_bytes() == BODY


def test_starts_over_when_another_range_comes(server: Server, path: Path) -> None:
    server.range_shift = 7
    put_part(path, BODY[:1000])
    download(server.url, path, md5=MD5)
    assert server.ranges == ["bytes=1000-", None]
    assert path.read_bytes() == BODY


def test_a_range_that_nobody_asked_for(server: Server, path: Path) -> None:
    """There was no part to delete, and it was deleted."""
    server.unasked_parts = 1
    download(server.url, path, md5=MD5)
    assert server.ranges == [None, None]
    assert path.read_bytes() == BODY


def test_complete_part_needs_no_network(path: Path) -> None:
    put_part(path, BODY)
    download("http://127.0.0.1:9/absent", path, md5=MD5)
    assert path.read_bytes() == BODY
    assert files(path.parent) == ["1.3B.tar.gz"]


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_part_that_is_complete_but_wrong_is_dropped(server: Server, path: Path, extra: bytes) -> None:
    """The server answers 416 (nothing after that byte): going on is impossible, starting over is not."""
    put_part(path, b"x" * len(BODY) + extra)
    download(server.url, path, md5=MD5)
    assert server.ranges == [f"bytes={len(BODY) + len(extra)}-", None]
    assert path.read_bytes() == BODY


def test_wrong_file_in_place_is_replaced(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"something else")
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == BODY


def test_broken_connections_go_on_where_they_broke(server: Server, path: Path, sleeps: list[float]) -> None:
    server.cuts = [300_000, 200_000]
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert sleeps == [0.5, 0.5]


def test_any_number_of_breaks_while_bytes_arrive(server: Server, path: Path) -> None:
    server.cuts = [50_000] * (3 * module.ATTEMPTS)
    download(server.url, path, md5=MD5)
    assert path.read_bytes() == BODY


def test_gives_up_when_nothing_new_arrives(server: Server, path: Path, sleeps: list[float]) -> None:
    """Without Range each try begins at zero: bytes arrive, but never further ones."""
    server.honours_range, server.always_cut = False, 400_000
    with pytest.raises(
        ConnectionError, match=r"cannot download http://127.* closed at byte 400000 of 1024000"
    ):
        download(server.url, path, md5=MD5)
    assert len(server.ranges) == module.ATTEMPTS
    assert sleeps == [0.5, 1.0, 2.0]
    assert files(path.parent) == ["1.3B.tar.gz.part"]  # kept for the next run


def test_silent_server_is_left(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.1)
    server.pause = 60
    with pytest.raises(ConnectionError, match="timed out"):
        download(server.url, path, md5=MD5)


def test_refused_connection(path: Path, sleeps: list[float]) -> None:
    closed = Server(("127.0.0.1", 0), Handler)
    url = closed.url
    closed.server_close()
    with pytest.raises(
        ConnectionError, match=re.escape(f"cannot download {url}: ") + r".*refused.*\(4 tries\)"
    ):
        download(url, path, md5=MD5)
    assert sleeps == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("status", [403, 404, 500, 416])
def test_error_status_is_final(server: Server, path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(
        ConnectionError, match=rf"cannot download http://127.*: the server answered {status} \w+"
    ):
        download(server.url, path, md5=MD5)
    assert len(server.ranges) == 1


def test_wrong_checksum_deletes_the_bytes(server: Server, path: Path) -> None:
    expected = "0" * 32
    with pytest.raises(ValueError, match=f"got md5 {MD5}, expected {expected}; the download was deleted"):
        download(server.url, path, md5=expected)
    assert files(path.parent) == []


def test_short_body_without_length_fails_the_checksum(server: Server, path: Path) -> None:
    server.sends_length, server.cuts = False, [1000]
    with pytest.raises(ValueError, match="checksum"):
        download(server.url, path, md5=MD5)
    assert files(path.parent) == []


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))


def test_space_is_checked_first(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, len(BODY) - 1)
    with pytest.raises(OSError, match=r"not enough disk space for http.*needs 0.0 GB.*has 0.0 GB free"):
        download(server.url, path, md5=MD5)
    assert len(server.ranges) == 1
    put_part(path, BODY[:1])  # one byte less to fetch: just enough
    download(server.url, path, md5=MD5)


def test_space_for_the_unpacked_copy(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, 2 * len(BODY) - 1)
    with pytest.raises(OSError, match="not enough disk space"):
        download(server.url, path, md5=MD5, will_unpack=True)
    disk_with(monkeypatch, 2 * len(BODY))
    download(server.url, path, md5=MD5, will_unpack=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_that_fills_up(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.with_name(path.name + ".part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"the disk of .* ran full while downloading http.*goes on from there"):
        download(server.url, path, md5=MD5)


# The module is run as a file, so that the child does not import the rest of the package.
CHILD = """
import pathlib, runpy, sys
module, url, path, md5 = sys.argv[1:]
runpy.run_path(module)["download"](url, pathlib.Path(path), md5=md5)
"""


def start_child(server: Server, path: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", CHILD, str(module.__file__), server.url, str(path), MD5])


def test_two_processes_share_one_download(server: Server, path: Path) -> None:
    server.pause = 0.5
    children = [start_child(server, path) for _ in range(2)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert server.ranges == [None]
    assert path.read_bytes() == BODY


def test_killed_process_leaves_no_lock(server: Server, path: Path) -> None:
    server.pause = 60
    child = start_child(server, path)
    part = path.with_name(path.name + ".part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    begun = part.stat().st_size
    server.pause = 0
    download(server.url, path, md5=MD5)
    assert server.ranges == [None, f"bytes={begun}-"]
    assert path.read_bytes() == BODY


def test_lock_excludes_and_waits(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with exclusive(tmp_path / "lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive(tmp_path / "lock"):
        thread.start()
        thread.join(timeout=0.2)
        order.append("first")
    thread.join(timeout=5)
    assert order == ["first", "second"]


# ---------------------------------------------------------------------------------------------- archives

Entry = tuple[str, bytes]


def make_tar(path: Path, *entries: Entry | tarfile.TarInfo, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


CHECKPOINT: tuple[Entry | tarfile.TarInfo, ...] = (
    special("1.3B", tarfile.DIRTYPE),
    ("1.3B/config.yaml", b"stage1: {}\n"),
    ("1.3B/tokenizer/vocab.json", b"{}"),
)


@pytest.fixture(params=["with data_filter", "without data_filter"])
def _both_pythons(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10.0 to 3.10.11 lack tarfile's filters: our own checks must do."""
    if request.param == "without data_filter":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python has none")


@pytest.mark.usefixtures("_both_pythons")
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_extracts_without_the_top_folder(tmp_path: Path, mode: str) -> None:
    archive = make_tar(tmp_path / "a.tar", *CHECKPOINT, mode=mode)
    directory = tmp_path / "deep" / "1.3B"
    assert extract(archive, directory) == directory
    assert (directory / "config.yaml").read_bytes() == b"stage1: {}\n"
    assert (directory / "tokenizer" / "vocab.json").read_bytes() == b"{}"
    assert files(directory.parent) == ["1.3B"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["./1.3B/config.yaml"], ["config.yaml"]),
        (["1.3B/config.yaml", "._1.3B"], ["config.yaml"]),
        (["stage1/model.pt", "stage2/model.pt"], ["stage1", "stage2"]),
        (["config.yaml"], ["config.yaml"]),
    ],
)
def test_top_folder(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", *((name, b"x") for name in names))
    assert files(extract(archive, tmp_path / "out")) == expected


def test_permissions_of_the_archive_are_not_taken(tmp_path: Path) -> None:
    setuid = tarfile.TarInfo("top/run")
    setuid.mode, setuid.uid = 0o6777, 12345
    locked = tarfile.TarInfo("top/locked")
    locked.mode = 0
    directory = extract(make_tar(tmp_path / "a.tar.gz", setuid, locked), tmp_path / "out")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for made, plain in [("out/run", "file"), ("out/locked", "file"), ("out", "folder")]:
        assert stat.S_IMODE((tmp_path / made).stat().st_mode) == stat.S_IMODE(
            (tmp_path / plain).stat().st_mode
        )
    assert (directory / "run").stat().st_uid == os.getuid()


@pytest.mark.usefixtures("_both_pythons")
@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (("ABSOLUTE/evil", b"x"), "an absolute path"),
        (("\\evil", b"x"), "an absolute path"),
        (("C:evil", b"x"), "an absolute path"),
        (("../evil", b"x"), "a path that leaves the directory"),
        (("1.3B/../../evil", b"x"), "a path that leaves the directory"),
        (("1.3B\\..\\..\\evil", b"x"), "a path that leaves the directory"),
        (("..", b"x"), "a path that leaves the directory"),
        (special("1.3B/evil", tarfile.SYMTYPE, "config.yaml"), "a link to 'config.yaml'"),
        (special("evil", tarfile.SYMTYPE, "/etc"), "a link to '/etc'"),
        (special("1.3B/evil", tarfile.LNKTYPE, "1.3B/config.yaml"), "a link to '1.3B/config.yaml'"),
        (special("1.3B/evil", tarfile.FIFOTYPE), "neither a file nor a directory"),
        (special("1.3B/evil", tarfile.CHRTYPE), "neither a file nor a directory"),
        (special("1.3B/evil", tarfile.BLKTYPE), "neither a file nor a directory"),
    ],
)
def test_hostile_entries_are_refused(tmp_path: Path, entry: Entry | tarfile.TarInfo, why: str) -> None:
    if not isinstance(entry, tarfile.TarInfo):
        entry = (entry[0].replace("ABSOLUTE", str(tmp_path)), entry[1])
    name = entry.name if isinstance(entry, tarfile.TarInfo) else entry[0]
    home = tmp_path / "cache"
    home.mkdir()
    archive = make_tar(home / "a.tar.gz", *CHECKPOINT, entry)
    with pytest.raises(ValueError, match=re.escape(f"refused to unpack {archive}: {name!r} is {why}")):
        extract(archive, home / "out")
    assert files(home) == ["a.tar.gz"]
    assert files(tmp_path) == ["cache"]


def test_null_in_a_name_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("top/file")
    info.pax_headers = {"path": "top/fi\0le"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(ValueError, match="is malformed"):
        extract(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
def test_bomb_in_a_header_is_refused(tmp_path: Path, kind: bytes) -> None:
    """tarfile reads the body of an extension header at once: a small archive can ask for all the memory."""
    for size in (module.MAX_HEADER_BYTES + 1, 1 << 40):
        header = special("header", kind)
        header.size = size
        (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with pytest.raises(ValueError, match="truncated or corrupt"):
            extract(tmp_path / "a.tar", tmp_path / "out")
        archive = make_tar(tmp_path / "a.tar", ("top/file", b"1"), mode="w")
        member = archive.read_bytes()[:1024]
        archive.write_bytes(member + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with pytest.raises(ValueError, match="an entry has an impossible size"):
            extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a.tar"]


def test_negative_size_is_refused(tmp_path: Path) -> None:
    """Some versions of tarfile go back to the same header for ever."""
    header = special("top/again", tarfile.REGTYPE)
    header.size = -1024
    archive = make_tar(tmp_path / "a.tar", ("top/file", b"1"), mode="w")
    archive.write_bytes(archive.read_bytes()[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match="truncated or corrupt"):
        extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(
    "second",
    [
        ("top/file", b"2"),
        ("top/file/below", b"2"),
        ("top/file/far/below", b"2"),
        special("top/file", tarfile.DIRTYPE),
    ],
)
def test_entry_that_is_there_twice(tmp_path: Path, second: Entry | tarfile.TarInfo) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", ("top/file", b"1"), second)
    with pytest.raises(ValueError, match=r"'top/file.*' is there twice"):
        extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a.tar.gz"]


def test_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", ("top/a", bytes(600_000)), ("top/bomb", bytes(600_000)))
    copied: list[object] = []
    copy = shutil.copyfileobj

    def counting(source: io.BytesIO, file: io.BytesIO) -> None:
        copied.append(file)
        copy(source, file)

    monkeypatch.setattr(shutil, "copyfileobj", counting)
    with pytest.raises(ValueError, match=r"at 'top/bomb' it passes 10000 entries or 0.0 GB"):
        extract(archive, tmp_path / "out", max_bytes=1_000_000)
    assert len(copied) == 1
    assert files(tmp_path) == ["a.tar.gz"]
    extract(archive, tmp_path / "out", max_bytes=1_200_000)


def test_too_many_entries(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", *((f"top/{i}", b"") for i in range(11)))
    with pytest.raises(ValueError, match=r"at 'top/10' it passes 10 entries"):
        extract(archive, tmp_path / "out", max_members=10)
    assert files(tmp_path) == ["a.tar.gz"]
    extract(archive, tmp_path / "out", max_members=11)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_archive(tmp_path: Path, mode: str, kept: float) -> None:
    noise = random.Random(0).randbytes(300_000)  # does not compress
    archive = make_tar(tmp_path / "a", ("top/config.yaml", b"x"), ("top/model.ckpt", noise), mode=mode)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(
        ValueError, match=r"cannot unpack .*truncated or corrupt: delete it and download again"
    ):
        extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a"]


def test_archive_cut_between_two_entries(tmp_path: Path) -> None:
    """tarfile itself takes this one for complete, so a checkpoint would lack files without an error."""
    archive = make_tar(tmp_path / "a.tar", ("top/a", b"x" * 512), ("top/b", b"y" * 512), mode="w")
    archive.write_bytes(archive.read_bytes()[:1024])  # header and data of the first
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["top/a"]
    with pytest.raises(ValueError, match="the end of the archive is missing; it is truncated or corrupt"):
        extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize(
    "body", [random.Random(0).randbytes(99_999), bytes(random.Random(0).choices(b"0123456789", k=99_999))]
)
def test_corrupt_archive(tmp_path: Path, mode: str, body: bytes) -> None:
    """What gzip cannot compress it stores as it is: there its checksum alone can tell."""
    archive = make_tar(tmp_path / "a", ("top/model", body), mode=mode)
    broken = bytearray(archive.read_bytes())
    broken[len(broken) // 2 : len(broken) // 2 + 50] = b"\xff" * 50
    archive.write_bytes(broken)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a"]


def test_corrupt_compression(tmp_path: Path) -> None:
    plain = make_tar(tmp_path / "a", ("top/model", bytes(99_999)), mode="w").read_bytes()
    deflate = zlib.compressobj(wbits=31)  # gzip
    half = deflate.compress(plain[:50_000]) + deflate.flush(zlib.Z_SYNC_FLUSH)
    (tmp_path / "a").write_bytes(half + b"\xff" * 50)
    with pytest.raises(ValueError, match="invalid block type; it is truncated or corrupt"):
        extract(tmp_path / "a", tmp_path / "out")
    assert files(tmp_path) == ["a"]


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", bytes(100)])
def test_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or corrupt") as caught:
        extract(tmp_path / "a", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == ["a"]


def test_empty_archive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is empty"):
        extract(make_tar(tmp_path / "a.tar"), tmp_path / "out")
    assert files(tmp_path) == ["a.tar"]


def test_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file.*absent.tar"):
        extract(tmp_path / "absent.tar", tmp_path / "out")
    assert files(tmp_path) == []


def test_directory_made_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", *CHECKPOINT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert extract(archive, tmp_path / "out") == tmp_path / "out"
    assert files(tmp_path) == ["a.tar.gz", "out"]
    assert files(tmp_path / "out") == ["mine"]


def test_file_in_the_way(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", *CHECKPOINT)
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="out"):
        extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a.tar.gz", "out"]


def test_disk_that_fills_up_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = make_tar(tmp_path / "a.tar.gz", *CHECKPOINT)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="ran full while unpacking"):
        extract(archive, tmp_path / "out")
    assert files(tmp_path) == ["a.tar.gz"]
