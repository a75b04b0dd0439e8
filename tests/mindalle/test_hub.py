"""Names of models, the cache and the fetching of a release; a server on the loopback address, no network."""

import hashlib
import http.server
import io
import logging
import re
import shutil
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mindalle import download, hub
from mindalle.hub import RELEASES, Release, bundled_models, cache_dir, resolve_model, resolve_text_tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where nothing is: own home, own cache, an empty working directory, one bundled model."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("MINDALLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.0)
    models = tmp_path / "package" / "models"
    for name in ("tiny", "emoji", "unfinished"):
        (models / name).mkdir(parents=True)
    (models / "tiny" / "config.yaml").touch()
    (models / "emoji" / "config.yaml").touch()
    monkeypatch.setattr(hub, "MODELS_DIRECTORY", models)
    return home


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str) -> Path:
        pytest.fail(f"asked the hub for {repo}")

    monkeypatch.setattr(hub, "_fetch_from_hub", fail)


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["run", "./run", "run/last.ckpt", "run/a/b", "."])
@pytest.mark.parametrize("kind", [str, Path])
def test_existing_path_is_returned_as_it_is(home: Path, name: str, kind: type[str] | type[Path]) -> None:
    (home / "run" / "a" / "b").mkdir(parents=True)
    (home / "run" / "last.ckpt").touch()
    assert resolve_model(kind(name)) == Path(name)
    assert resolve_model(kind(home / name)) == home / name
    assert resolve_model(kind(f"~/{name}")) == home / name


def test_bundled_names_are_listed_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled_models() == ("emoji", "tiny")
    assert resolve_model("emoji") == tmp_path / "package" / "models" / "emoji"
    assert resolve_model(Path("tiny")) == tmp_path / "package" / "models" / "tiny"
    monkeypatch.setattr(hub, "MODELS_DIRECTORY", tmp_path / "absent")
    assert bundled_models() == ()
    with pytest.raises(ValueError, match="bundled: none"):
        resolve_model("emoji")


def test_local_path_comes_before_names(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mindalle")
    (home / "emoji").mkdir()
    (home / "minDALL-E" / "1.3B").mkdir(parents=True)
    assert resolve_model("emoji") == Path("emoji")
    assert resolve_model("minDALL-E/1.3B") == Path("minDALL-E/1.3B")
    assert caplog.text.count("is a local path here, and taken as one") == 2


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "name",
    [
        "./run", "../run", "/absent", "~/run", "~nobody-here/run", ".hidden/run", "run/", "a/b/c",
        "run\\last", "last.ckpt", "run/last.ckpt", "run/model.pt", "run/model.safetensors", "run/config.yaml",
        "rq/ffhq.tar.gz",
    ],
)  # fmt: skip
def test_missing_path_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such file or directory: {name}")):
        resolve_model(name)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["emojis", "unfinished", "Emoji", "a b/c", "two words", "a" * 5000])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no model is called '{name}'; bundled: emoji, tiny;") as caught:
        resolve_model(name)
    assert "released: minDALL-E/1.3B, rq-vae/ffhq" in str(caught.value)
    assert "pass an existing local file or directory (--model PATH)" in str(caught.value)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name(name: str) -> None:
    with pytest.raises(ValueError, match="the name of a model is empty; bundled: emoji"):
        resolve_model(name)


def test_releases_table() -> None:
    assert list(RELEASES) == [
        "minDALL-E/1.3B", "rq-vae/ffhq", "rq-vae/church", "rq-vae/cat", "rq-vae/bedroom",
        "rq-vae/imagenet-480m", "rq-vae/imagenet-821m", "rq-vae/imagenet-1.4b", "rq-vae/imagenet-1.4b-50e",
        "rq-vae/imagenet-3.8b-50e", "rq-vae/cc3m", "rq-vae/cc3m-cc12m-yfcc",
    ]  # fmt: skip
    for release in RELEASES.values():
        assert re.fullmatch(r"https://[a-z.]+/brainrepo/models/.*\.tar\.gz", release.url)
        assert re.fullmatch(r"[0-9a-f]{32}", release.md5)
        assert release.url.split("/")[-2] == release.md5, "the publisher's convention"
        assert release.about
    assert len({release.md5 for release in RELEASES.values()}) == len(RELEASES)


# ---------------------------------------------------------------------------------------------- cache


def test_cache_place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("MINDALLE_CACHE", "~/mine")
    assert cache_dir() == home / "mine"
    monkeypatch.setenv("MINDALLE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mindalle"
    monkeypatch.delenv("MINDALLE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == home / ".cache" / "mindalle"
    assert not cache_dir().exists()


# ---------------------------------------------------------------------------------------------- releases


class Server(http.server.ThreadingHTTPServer):
    archive: bytes
    requests: int


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.archive)))
        self.end_headers()
        self.wfile.write(self.server.archive)

    def log_message(self, format: str, *args: object) -> None:
        pass


def tar_of(**contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"1.3B/{name}.yaml")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that has minDALL-E/1.3B, and a table that says so."""
    server = Server(("127.0.0.1", 0), Handler)
    server.archive, server.requests = tar_of(config=b"stage1: {}\n"), 0
    url = f"http://127.0.0.1:{server.server_address[1]}/1.3B.tar.gz"
    release = Release(url=url, md5=hashlib.md5(server.archive).hexdigest(), about="a test")
    monkeypatch.setitem(RELEASES, "minDALL-E/1.3B", release)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "releases" / "minDALL-E"


def visible(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.endswith(".lock"))


def test_release_is_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        assert resolve_model("minDALL-E/1.3B") == cached(tmp_path) / "1.3B"
    assert (cached(tmp_path) / "1.3B" / "config.yaml").read_bytes() == b"stage1: {}\n"
    assert visible(cached(tmp_path)) == ["1.3B"]  # neither the archive nor scratch remains
    assert server.requests == 1


def test_release_is_fetched_once_by_many(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(resolve_model, ["minDALL-E/1.3B"] * 4))
    assert found == [cached(tmp_path) / "1.3B"] * 4
    assert visible(cached(tmp_path)) == ["1.3B"]
    assert server.requests == 1


def test_cached_release_needs_neither_network_nor_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache shared by many users may be read-only."""

    def fail(*_: object) -> None:
        pytest.fail("wrote to the cache")

    (cached(tmp_path) / "1.3B").mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", fail)
    monkeypatch.setattr(hub, "exclusive", fail)
    assert resolve_model("minDALL-E/1.3B") == cached(tmp_path) / "1.3B"


def no_network(monkeypatch: pytest.MonkeyPatch, server: Server) -> str:
    """Point the release at a closed port; returns the address."""
    closed = Server(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{closed.server_address[1]}/1.3B.tar.gz"
    closed.server_close()
    md5 = hashlib.md5(server.archive).hexdigest()
    monkeypatch.setitem(RELEASES, "minDALL-E/1.3B", Release(url=url, md5=md5, about="a test"))
    return url


def test_no_network_says_what_to_do(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = no_network(monkeypatch, server)
    with pytest.raises(ConnectionError, match=re.escape(f"cannot download {url}: ")) as caught:
        resolve_model("minDALL-E/1.3B")
    message = str(caught.value)
    assert "To use minDALL-E/1.3B without this download: get the archive elsewhere" in message
    assert "pass the directory as a local path (--model PATH)" in message
    assert f"put it as it is in {cached(tmp_path)};" in message
    assert "set MINDALLE_CACHE to a cache that has it" in message
    assert "\n" not in message


def test_archive_put_in_the_cache_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch, server)
    cached(tmp_path).mkdir(parents=True)
    (cached(tmp_path) / "1.3B.tar.gz").write_bytes(server.archive)
    assert resolve_model("minDALL-E/1.3B") == cached(tmp_path) / "1.3B"
    assert visible(cached(tmp_path)) == ["1.3B", "1.3B.tar.gz"]  # what the user brought is the user's


def test_changed_release_is_refused(server: Server, tmp_path: Path) -> None:
    server.archive = tar_of(config=b"other")
    with pytest.raises(ValueError, match=r"checksum of http.*the download was deleted"):
        resolve_model("minDALL-E/1.3B")
    assert visible(cached(tmp_path)) == []


def test_scratch_of_a_killed_process_is_removed(server: Server, tmp_path: Path) -> None:
    (cached(tmp_path) / ".1.3B.abc.unpacking" / "root").mkdir(parents=True)
    (cached(tmp_path) / ".other.abc.unpacking").mkdir()
    resolve_model("minDALL-E/1.3B")
    assert visible(cached(tmp_path)) == [".other.abc.unpacking", "1.3B"]
    assert server.requests == 1


@pytest.mark.usefixtures("server")
def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(
        OSError, match=r"cannot write to the cache .*; set MINDALLE_CACHE to a directory that you"
    ):
        resolve_model("minDALL-E/1.3B")


def test_disk_must_hold_archive_and_contents(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 2 * len(server.archive) - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match=r"^not enough disk space for http"):  # not called unwritable
        resolve_model("minDALL-E/1.3B")
    Usage.free += 1
    resolve_model("minDALL-E/1.3B")


# ------------------------------------------------------------------------------------ text tokenizers


@pytest.mark.parametrize("kind", [str, Path])
def test_text_tokenizer_is_a_path_or_that_of_a_model(
    home: Path, tmp_path: Path, kind: type[str] | type[Path]
) -> None:
    """A release and a directory were no such names; a model fine-tuned with another tokenizer is ruined."""
    bundled = tmp_path / "package" / "models" / "emoji" / "text_tokenizer.json"
    native = home / "native" / "text_tokenizer.json"
    inside = (cached(tmp_path) / "1.3B" / "tokenizer", home / "official" / "tokenizer", home / "bpe16k")
    for directory in (native.parent, *inside):
        directory.mkdir(parents=True)
    for file in (bundled, native):
        file.touch()
    for name, expected in {
        "emoji": bundled,
        "minDALL-E/1.3B": inside[0],
        "~/native": native,
        "~/native/text_tokenizer.json": native,
        "~/official": inside[1],
        "~/bpe16k": inside[2],
        "absent.json": Path("absent.json"),
        "~nobody-here/bpe16k": Path("~nobody-here/bpe16k"),
    }.items():
        assert resolve_text_tokenizer(kind(name)) == expected


# ---------------------------------------------------------------------------------------------- the hub


def test_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    pattern = (
        r"'org/name' is not a released model, and as a Hugging Face hub id it failed: .+; bundled: emoji"
    )
    with pytest.raises(FileNotFoundError, match=pattern) as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)


def test_malformed_hub_id() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'org/na--me' is not a released model, and as .* it failed: "
    ):
        resolve_model("org/na--me")


def test_hub_error_of_many_lines_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("404 Client Error.\n\nRepository Not Found for url: ...\nPlease make sure ...")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"id it failed: 404 Client Error; bundled: ") as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)


def test_hub_id_takes_native_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "config.yaml").touch()
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == tmp_path / "snapshot"
    assert asked == [("org/name", ["config.yaml", "*.safetensors", "*.json", "README.md"])]


def test_hub_repository_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'org/name' on the Hugging Face hub has no config.yaml"):
        resolve_model("org/name")


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        resolve_model("org/name")
