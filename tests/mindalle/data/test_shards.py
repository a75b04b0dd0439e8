"""Shards: what an entry becomes, where they are found, and that damage is told and not fatal."""

from __future__ import annotations

import logging
import os
import shlex
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from shard_files import draw_picture, encode_picture, write_shard, write_tar

from mindalle.data.captions import Fields
from mindalle.data.samples import Sample, Source, Unreadable, open_source
from mindalle.data.shards import Shards

PICTURE = encode_picture(draw_picture(0)[0])


def read(source: Source) -> list[Sample | Unreadable]:
    return [sample for part in range(source.num_parts) for sample in source.read(part)]


def keys(spec: str | list[str]) -> list[str]:
    return [sample.key for sample in read(open_source(spec))]


class TestFindShards:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        for i, name in enumerate(("b-0.tar", "b-1.tar", "b-2.tar", "a.TAR")):
            write_shard(tmp_path / name, [i])
        (tmp_path / "other.zip").touch()
        return tmp_path

    @pytest.mark.parametrize(
        ("specs", "found"),
        [
            (["b-*.tar"], ["b-0.tar", "b-1.tar", "b-2.tar"]),
            (["b-{0..1}.tar"], ["b-0.tar", "b-1.tar"]),
            (["b-{2,0}.tar"], ["b-2.tar", "b-0.tar"]),
            (["b-[01].tar", "a.TAR"], ["b-0.tar", "b-1.tar", "a.TAR"]),
            ([""], ["b-0.tar", "b-1.tar", "b-2.tar"]),  # the directory
        ],
    )
    def test_patterns(self, directory: Path, specs: list[str], found: list[str]) -> None:
        source = open_source([str(directory / spec) for spec in specs])
        assert isinstance(source, Shards)
        assert [Path(url).name for url in source.urls] == found
        assert len(source) == len(found) == source.num_parts

    @pytest.mark.parametrize("pattern", ["c-*.tar", "none.tar", "b-{2..3}.tar"])
    def test_empty_pattern(self, directory: Path, pattern: str) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"no shards match .*\.tar: expected WebDataset .tar files"
        ):
            open_source([str(directory / "b-0.tar"), str(directory / pattern)])

    def test_endless_pattern(self, directory: Path) -> None:
        with pytest.raises(ValueError, match=r"stands for more than 1,000,000 shards: is a number mistyped"):
            open_source(str(directory / "b-{0..99999999999}.tar"))

    def test_no_samples(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {})
        with pytest.raises(ValueError, match=r"no pictures in .*0.tar: expected tar files with KEY.png"):
            open_source(str(tmp_path / "0.tar"))

    def test_odd_paths(self, tmp_path: Path) -> None:
        """What looks like a pattern or an address may be a directory."""
        shard = write_shard(tmp_path / "a:b [x] #1/0.tar", [3])
        assert keys(str(shard)) == ["0.tar/0003"]


class TestSamples:
    def one(self, tmp_path: Path, **files: bytes) -> Sample | Unreadable:
        entries = {f"a/7.{suffix}": content for suffix, content in files.items()}
        (sample,) = read(open_source(str(write_tar(tmp_path / "0.tar", entries))))
        assert sample.key == "0.tar/a/7"
        return sample

    @pytest.mark.parametrize(
        ("files", "captions"),
        [
            ({"json": b'{"captions": ["a", " \\u6771 ", ""], "url": "x"}'}, ("a", "東")),
            ({"json": b'{"caption": "a"}', "txt": b"b"}, ("a",)),
            ({"json": b'{"width": 16}', "txt": b"\xef\xbb\xbfb\n\nc\n"}, ("b", "c")),
            ({"json": b'{"caption": null}'}, ()),
            ({}, ()),
        ],
    )
    def test_captions(self, tmp_path: Path, files: dict[str, bytes], captions: tuple[str, ...]) -> None:
        sample = self.one(tmp_path, png=PICTURE, **files)
        assert isinstance(sample, Sample)
        assert sample.image.tobytes() == draw_picture(0)[0].tobytes()
        assert sample.captions == captions
        assert list(open_source(str(tmp_path / "0.tar")).captions()) == [captions]

    @pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        picture = encode_picture(draw_picture(0, 50)[0], suffix.lower())
        sample = self.one(tmp_path, **{suffix: picture})
        assert isinstance(sample, Sample)
        assert sample.image.size == (50, 50)

    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({"txt": b"a"}, "it has no picture (png, jpg, "),
            ({"png": b"text"}, "not a picture of a known format"),
            ({"png": PICTURE[:60]}, "not a readable picture: "),
            ({"png": PICTURE, "json": b'{"captions": ['}, "Expecting value"),
            ({"png": PICTURE, "json": b"[" * 100_000}, ""),
            ({"png": PICTURE, "json": b"[]"}, "its JSON must be an object, got []"),
            ({"png": PICTURE, "json": b'{"captions": [1]}'}, "captions must be text, got 1"),
            ({"png": PICTURE, "json": b'{"captions": ["\\ud83d"]}'}, "captions must be valid Unicode"),
            ({"png": PICTURE, "txt": b"\xff"}, "'utf-8' codec can't decode"),
            ({"png": PICTURE, "cls": b"-1"}, "its label (cls) must be in [0, 1000000), got -1"),
            ({"png": PICTURE, "cls": b"9999999999"}, "its label (cls) must be in [0, 1000000)"),
        ],
    )
    def test_unreadable(self, tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
        sample = self.one(tmp_path, **files)
        assert isinstance(sample, Unreadable)
        assert sample.reason.startswith(reason)

    def test_labels(self, tmp_path: Path) -> None:
        files = {"0.png": PICTURE, "0.cls": b"2\n", "1.png": PICTURE, "1.cls": b"0", "2.png": PICTURE}
        source = open_source(str(write_tar(tmp_path / "0.tar", files)))
        assert source.classes == ("0", "1", "2")
        first, second, third = read(source)
        assert isinstance(first, Sample)
        assert isinstance(second, Sample)
        assert (first.label, second.label) == (2, 0)
        assert third == Unreadable("0.tar/2", "it has no label (cls), unlike most pictures of the shards")

    @pytest.mark.parametrize("text", ['{"text": "x"}', '{"Title": ["x"]}'])
    def test_field_names(self, tmp_path: Path, text: str) -> None:
        """A shard's "text" was not read, though a table's was."""
        sample = self.one(tmp_path, png=PICTURE, json=text.encode())
        assert isinstance(sample, Sample)
        assert sample.captions == ("x",)
        other = {"0.png": PICTURE, "0.json": b'{"caption": "y", "what": "x"}'}
        source = open_source(str(write_tar(tmp_path / "0.tar", other)), Fields(caption="what"))
        assert list(source.captions()) == [("x",)]

    def test_leftovers_of_macos(self, tmp_path: Path) -> None:
        """._1.png cost the picture its caption, since a name that begins with a dot ends a sample."""
        write_tar(
            tmp_path / "0.tar",
            {
                "./._1.png": b"x",
                "1.png": PICTURE,
                "._1.txt": b"x",
                "1.txt": b"a",
                "__MACOSX/1.png": PICTURE,
                ".DS_Store": b"",
            },
        )
        (tmp_path / "._0.tar").write_bytes(b"x")
        source = open_source(str(tmp_path))
        assert len(source) == 1
        (sample,) = read(source)
        assert isinstance(sample, Sample)
        assert (sample.key, sample.captions) == ("0.tar/1", ("a",))

    def test_keys_with_dots(self, tmp_path: Path) -> None:
        """All pictures of a day became one sample without a picture."""
        files = {"24.05.a.png": PICTURE, "24.05.a.txt": b"a", "24.05.b.png": PICTURE, "24.05.b.txt": b"b"}
        masked = {"1.mask.png": b"x", "1.png": PICTURE, "1.txt": b"c"}
        found = read(open_source(str(write_tar(tmp_path / "0.tar", files | masked))))
        assert [(s.key, s.captions) for s in found if isinstance(s, Sample)] == [
            *(("0.tar/24.05.a", ("a",)), ("0.tar/24.05.b", ("b",)), ("0.tar/1", ("c",)))
        ]

    def test_files_that_lie_apart(self, tmp_path: Path) -> None:
        """All pictures, then all texts: each was half a sample."""
        files = {"1.png": PICTURE, "2.png": PICTURE, "1.txt": b"a", "2.txt": b"b"}
        shard = write_tar(tmp_path / "0.tar", files)
        source = open_source(str(shard))
        assert len(source) == 2
        found = read(source)
        assert [(s.key, s.captions) for s in found if isinstance(s, Sample)] == [
            *(("0.tar/1", ("a",)), ("0.tar/2", ("b",)))
        ]
        *_, text = read(open_source(f"pipe:cat {shlex.quote(str(shard))}", allow_pipe=True))
        assert isinstance(text, Unreadable)
        assert "but txt: the files of a sample must be next to each other" in text.reason

    def test_pictures_that_are_not_read(self, tmp_path: Path) -> None:
        sample = self.one(tmp_path, heic=b"x", txt=b"a")
        assert isinstance(sample, Unreadable)
        assert sample.reason.endswith("but heic, txt, which is not read: convert it to PNG or JPEG")

    def test_names_of_classes(self, tmp_path: Path) -> None:
        files = {"0.png": PICTURE, "0.cls": b"dog\n", "1.png": PICTURE, "1.cls": b"cat"}
        source = open_source(str(write_tar(tmp_path / "0.tar", files)))
        assert source.classes == ("cat", "dog")
        assert [s.label for s in read(source) if isinstance(s, Sample)] == [1, 0]
        files = {"0.png": PICTURE, "0.cls": b"1", "1.png": PICTURE, "1.cls": b"cat"}
        _, stray = read(open_source(str(write_tar(tmp_path / "0.tar", files))))
        assert isinstance(stray, Unreadable)
        assert stray.reason == "its label (cls) must be a number, as others are, got 'cat'"

    @pytest.mark.parametrize("first", [b"", b"text" * 999, None])
    def test_classes_despite_the_first_shard(self, tmp_path: Path, first: bytes | None) -> None:
        """A damaged first shard took the labels of all the others, one with a stray label all pictures."""
        write_tar(tmp_path / "1.tar", {"0.png": PICTURE, "0.cls": b"0", "1.png": PICTURE, "1.cls": b"1"})
        write_tar(tmp_path / "0.tar", {"7.png": PICTURE})
        if first is not None:
            (tmp_path / "0.tar").write_bytes(first)
        source = open_source(str(tmp_path))
        assert source.classes == ("0", "1")
        assert [s.label for s in read(source) if isinstance(s, Sample)] == [0, 1]

    def test_stray_label(self, tmp_path: Path) -> None:
        files = {"0.png": PICTURE, "0.cls": b"0", **{f"{i}.png": PICTURE for i in range(1, 4)}}
        source = open_source(str(write_tar(tmp_path / "0.tar", files)))
        assert source.classes == ()
        assert len([s for s in read(source) if isinstance(s, Sample)]) == 4


class TestDamagedShards:
    @pytest.mark.parametrize("damage", ["truncated", "no tar", "empty", "missing"])
    def test_others_are_read(self, tmp_path: Path, damage: str) -> None:
        first = write_shard(tmp_path / "0.tar", range(4), size=64)
        write_shard(tmp_path / "1.tar", [8, 9])
        if damage == "truncated":
            first.write_bytes(first.read_bytes()[:2600])  # inside the third picture
        elif damage != "missing":
            first.write_bytes(b"" if damage == "empty" else b"text" * 999)
        source = open_source(str(tmp_path))
        if damage == "missing":  # deleted since
            first.unlink()
        samples = read(source)
        assert [s.key for s in samples if isinstance(s, Sample)][-2:] == ["1.tar/0008", "1.tar/0009"]
        damaged = [s for s in samples if isinstance(s, Unreadable) and s.key == "0.tar"]
        assert len(damaged) == 1
        assert damaged[0].reason.startswith("the shard is damaged or out of reach: ")
        assert len(damaged[0].reason) < 300

    def test_fingerprint(self, tmp_path: Path) -> None:
        prints = [open_source(str(write_shard(tmp_path / "a/0.tar", range(3)))).fingerprint]
        prints.append(open_source(str(write_shard(tmp_path / "b/0.tar", range(3)))).fingerprint)
        prints.append(
            open_source(str(write_shard(tmp_path / "b/0.tar", range(3), {2: ["other"]}))).fingerprint
        )
        prints.append(open_source(str(write_shard(tmp_path / "b/0.tar", range(4)))).fingerprint)
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3


class TestRemoteShards:
    @pytest.fixture
    def address(self, tmp_path: Path) -> Iterator[str]:
        for i in range(2):
            write_shard(tmp_path / f"{i}.tar", [2 * i, 2 * i + 1])
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def test_http(self, address: str) -> None:
        assert keys(f"{address}/{{0..1}}.tar") == ["0.tar/0000", "0.tar/0001", "1.tar/0002", "1.tar/0003"]

    def test_missing(self, address: str) -> None:
        first, *others = read(open_source([f"{address}/2.tar", f"{address}/1.tar"]))
        assert isinstance(first, Unreadable)
        assert first.reason.startswith("the shard is damaged or out of reach: ")
        assert [sample.key for sample in others] == ["1.tar/0002", "1.tar/0003"]

    def test_out_of_reach(self, address: str, tmp_path: Path) -> None:
        """What may come another time, as the contents of a damaged local file never will."""
        local = tmp_path / "0.tar"
        remote = open_source([f"{address}/0.tar", f"{address}/2.tar"])
        sources = (open_source(str(local)), remote)
        os.truncate(local, 600)  # inside the first picture
        found = [sample for source in sources for sample in read(source)]
        assert [sample.key for sample in found] == ["0.tar", "0.tar", "2.tar"]
        assert [sample.is_out_of_reach for sample in found if isinstance(sample, Unreadable)] == [
            *(False, True, True)
        ]

    def test_cut_between_two_files(self, tmp_path: Path) -> None:
        """To a tar reader that is the end; only the command knows that there was more, and says so later."""
        shard = write_shard(tmp_path / "0.tar", [5, 6])
        with tarfile.open(shard) as tar:
            end = tar.getmember("0006.png").offset
        sample, lost = read(
            open_source(f"pipe:head -c {end} {shard}; exec >&-; sleep 0.3; exit 18", allow_pipe=True)
        )
        assert sample.key.endswith("exit 18/0005")
        assert isinstance(lost, Unreadable)
        assert lost.is_out_of_reach

    def test_duplicate_names_are_no_lost_connection(self, tmp_path: Path) -> None:
        shard = tmp_path / "0.tar"
        with tarfile.open(shard, "w") as tar:
            for _ in range(2):
                member = tarfile.TarInfo("0.png")
                member.size = len(PICTURE)
                tar.addfile(member, BytesIO(PICTURE))
        source = open_source(f"pipe:cat {shard}", allow_pipe=True)
        lost = [sample for sample in read(source) if isinstance(sample, Unreadable)]
        assert [sample.is_out_of_reach for sample in lost] == [False]

    def test_pipe(self, tmp_path: Path) -> None:
        shard = write_shard(tmp_path / "0.tar", [5])
        command = f"pipe:cat {shlex.quote(str(shard))}"
        (sample,) = read(open_source(command, allow_pipe=True))
        assert sample.key == f"{command}/0005"

    def test_s3(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Read by the AWS command line; a quote in an address stays a quote."""
        shard = write_shard(tmp_path / "0.tar", [5])
        aws = tmp_path / "bin/aws"
        aws.parent.mkdir()
        aws.write_text(f'#!/bin/sh\n[ "$*" = "s3 cp s3://bucket/it\'s; 0.tar -" ] && cat {shard}\n')
        aws.chmod(0o755)
        monkeypatch.setenv("PATH", f"{aws.parent}:/usr/bin:/bin")
        assert keys("s3://bucket/it's; 0.tar") == ["it's; 0.tar/0005"]

    def test_length(self) -> None:
        source = open_source("http://127.0.0.1:1/0.tar")
        with pytest.raises(ValueError, match=r"how many pictures http:.* holds is not known: set epoch_size"):
            len(source)
        assert len(source.fingerprint) == 64


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


class TestNamesAreNoCommands:
    """`open_source(".")` took a file called `pipe:...` for an address, and ran it."""

    NAME = "pipe:touch marker #.tar"

    def test_a_file_that_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_shard(tmp_path / self.NAME, [5])
        for spec in (".", str(tmp_path), self.NAME, [self.NAME], "*.tar"):  # typed by the shell's own *.tar
            for allow_pipe in (False, True):
                (sample,) = read(open_source(spec, allow_pipe=allow_pipe))
                assert sample.key.endswith(f"{self.NAME}/0005")
        assert [path.name for path in tmp_path.iterdir()] == [self.NAME]

    @pytest.mark.parametrize(
        "name", ["{a,b}.tar", "{0..9999999}.tar", "[ab].tar", "*.tar", "s3:.tar", "~x.tar", "{.tar"]
    )
    def test_a_pattern_that_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_shard(tmp_path / name, [5])
        for spec in (".", f"./{name}"):
            assert keys(spec) == [f"{name}/0005"]

    def test_a_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("pipe:touch marker").mkdir()
        write_shard(Path("pipe:touch marker/{a,b}.tar"), [5])
        assert keys("pipe:touch marker") == ["{a,b}.tar/0005"]
        assert not Path("marker").exists()

    @pytest.mark.parametrize("spec", [NAME, ["pipe:touch marker"]])
    def test_a_command_that_is_typed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str | list[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            ValueError, match=r"pipe:touch marker.* is a command.*--allow-pipe, or allow_pipe"
        ):
            open_source(spec)
        assert not Path("marker").exists()

    def test_no_shell_reads_addresses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for address in ("http", "https", "gs", "s3"):
            read(open_source(f"{address}://[';touch marker;'$(touch marker).tar"))
        assert not Path("marker").exists()
