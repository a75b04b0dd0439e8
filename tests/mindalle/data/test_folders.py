"""Pictures in directories: each kind is told from the files, and nothing in them is fatal or trusted."""

from __future__ import annotations

import json
import logging
import os
import pickle
import unicodedata
import zlib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shard_files import draw_picture, encode_picture, write_pictures

from mindalle.data.captions import Fields
from mindalle.data.folders import PART_SIZE, Folder
from mindalle.data.samples import Sample, Source, Unreadable, open_source, seed_of


def read(source: Source) -> list[Sample | Unreadable]:
    return [sample for part in range(source.num_parts) for sample in source.read(part)]


def captions_of(spec: Path) -> dict[str, tuple[str, ...]]:
    samples = read(open_source(str(spec)))
    assert all(isinstance(sample, Sample) for sample in samples)
    return {sample.key: sample.captions for sample in samples}  # type: ignore[union-attr]


def reasons(spec: Path) -> dict[str, str]:
    return {
        sample.key: sample.reason for sample in read(open_source(str(spec))) if isinstance(sample, Unreadable)
    }


class TestKinds:
    def test_plain(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_pictures(tmp_path, ["1.png", "a/0.JPG", "b/c/2.WebP"])
        (tmp_path / "notes.md").touch()
        (tmp_path / ".hidden.png").touch()
        write_pictures(tmp_path / ".cache", ["x.png"])
        source = open_source(str(tmp_path))
        samples = read(source)
        assert [sample.key for sample in samples] == ["1.png", "a/0.JPG", "b/c/2.WebP"]
        assert isinstance(samples[0], Sample)
        assert samples[0].image.tobytes() == draw_picture(0)[0].tobytes()
        assert (samples[0].captions, samples[0].label, source.classes) == ((), None, ())
        assert (len(source), source.num_parts, source.name) == (3, 1, str(tmp_path))
        assert f"read {tmp_path} as pictures: 3 pictures" in caplog.text

    def test_class_folders(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A class without pictures counts, so that labels of training and validation agree."""
        write_pictures(tmp_path, ["cat/1.png", "ant/x/2.png", "cat/0.png"])
        (tmp_path / "bee").mkdir()
        (tmp_path / ".git").mkdir()
        source = open_source(str(tmp_path))
        assert source.classes == ("ant", "bee", "cat")
        labels = [(sample.key, sample.label) for sample in read(source) if isinstance(sample, Sample)]
        assert labels == [("ant/x/2.png", 0), ("cat/0.png", 2), ("cat/1.png", 2)]
        assert f"read {tmp_path} as class folders: 3 classes, 3 pictures" in caplog.text

    def test_sidecars(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_pictures(tmp_path, ["a/1.png", "a/2.PNG", "a/3.jpg"])
        (tmp_path / "a/1.txt").write_bytes("\ufeffone \r\n\n  eins\u2028x\n".encode())
        (tmp_path / "a/2.TXT").write_text("two")
        (tmp_path / "4.txt").write_text("of no picture")
        expected = {"a/1.png": ("one", "eins\u2028x"), "a/2.PNG": ("two",), "a/3.jpg": ()}
        assert captions_of(tmp_path) == expected
        assert list(open_source(str(tmp_path)).captions()) == list(expected.values())
        assert "as pictures with .txt files: 3 pictures, 1 without captions" in caplog.text

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "captions.jsonl",
                '{"file": "a/1.png", "captions": [" red ", ""]}\n\n{"file": "2.png", "caption": "x, y"}',
            ),
            (
                "captions.jsonl",
                '\ufeff{"image": "a/1.png", "text": "red"}\r\n{"file_name": "./2.png", "text": "x, y"}\n',
            ),
            (
                "metadata.jsonl",
                '{"file_name": "a/1.png", "text": "red", "id": 7}\n{"file_name": "2.png", "text": ["x, y"]}',
            ),
            ("captions.csv", '\ufefffile,caption\na/1.png,red\n2.png,"x, y"\n'),
            ("metadata.csv", 'text,file_name\r\nred,a/1.png\r\n"x, y",2.png\r\n'),
            ("captions.tsv", "path\tcaptions\r\na/1.png\tred\r\n2.png\tx, y\r\n"),
        ],
    )
    def test_captions_files(self, tmp_path: Path, name: str, text: str) -> None:
        write_pictures(tmp_path, ["a/1.png", "2.png", "not_named.png"])
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        expected = {"a/1.png": ("red",), "2.png": ("x, y",)}
        assert captions_of(tmp_path) == expected
        assert captions_of(tmp_path / name) == expected

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("captions.jsonl", '{"file": "1.png", "caption": "a\\nb"}\n{"file": "1.png", "caption": "c"}'),
            ("captions.csv", 'file,caption\n1.png,"a\nb"\n1.png,c\n'),
        ],
    )
    def test_several_lines_for_a_picture(self, tmp_path: Path, name: str, text: str) -> None:
        write_pictures(tmp_path, ["1.png"])
        (tmp_path / name).write_text(text)
        assert captions_of(tmp_path) == {"1.png": ("a\nb", "c")}

    def test_quotes_in_tsv(self, tmp_path: Path) -> None:
        """TSV has no quoting: from one opening quote to the next, rows became part of a caption."""
        write_pictures(tmp_path, ["a.png", "b.png", "c.png"])
        (tmp_path / "captions.tsv").write_text(
            'file\tcaption\na.png\t"tis the season\nb.png\tfoo\nc.png\t"bar"\n'
        )
        assert captions_of(tmp_path) == {
            "a.png": ('"tis the season',),
            "b.png": ("foo",),
            "c.png": ('"bar"',),
        }


class TestNames:
    """Which text belongs to which picture, whatever the names went through on the way."""

    def write(self, directory: Path, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text)

    def test_letters_of_another_case(self, tmp_path: Path) -> None:
        """Captions of a.jpg and A.jpg were swapped in some runs: a set was walked in any order."""
        write_pictures(tmp_path, ["a.jpg", "A.jpg", "b.jpg", "C.JPG", "d.jpg", "D.png"])
        self.write(tmp_path, {"a.txt": "a", "A.txt": "A", "B.TXT": "b", "c.Txt": "c", "d.txt": "d"})
        assert captions_of(tmp_path) == {
            "A.jpg": ("A",),
            "a.jpg": ("a",),
            "b.jpg": ("b",),
            "C.JPG": ("c",),
            "d.jpg": ("d",),
            "D.png": (),  # a text that is exactly another picture's is not shared out
        }

    def test_accents_of_macos(self, tmp_path: Path) -> None:
        """Archives made on a Mac hold decomposed names, captions typed elsewhere composed ones."""
        decomposed, composed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFD", "NFC"))
        write_pictures(tmp_path / "a", [f"{decomposed}.png"])
        self.write(tmp_path / "a", {f"{composed}.txt": "coffee"})
        assert captions_of(tmp_path / "a") == {f"{decomposed}.png": ("coffee",)}
        write_pictures(tmp_path / "b", [f"{decomposed}.png", "X.PNG"])
        self.write(tmp_path / "b", {"captions.csv": f"file,caption\n{composed}.png,coffee\nx.png,x\n"})
        assert captions_of(tmp_path / "b") == {f"{decomposed}.png": ("coffee",), "X.PNG": ("x",)}

    def test_leftovers_of_macos(self, tmp_path: Path) -> None:
        """__MACOSX became class 0."""
        write_pictures(tmp_path, ["cat/1.png", "dog/1.png", "__MACOSX/cat/1.png", "cat/._1.png"])
        source = open_source(str(tmp_path))
        assert (source.classes, len(source)) == (("cat", "dog"), 2)

    @pytest.mark.parametrize(
        ("picture", "text", "content"),
        [
            ("a.jpg", "a.jpg.txt", "x"),
            ("a.jpg", "a.caption", "x"),
            ("a.jpg", "a.json", '{"url": "y", "Caption": "x"}'),
            ("images/b/a.jpg", "captions/b/a.txt", "x"),
            ("a.jpg", "captions.txt", "image,caption\na.jpg,x"),
            ("Images/a.jpg", "captions.txt", "image,caption\na.jpg,x"),
            ("a.jpg", "captions.txt", "a.jpg#0\tx"),
            ("a.jpg", "captions.json", '{"a.jpg": "x"}'),
            ("a.jpg", "captions.json", '[{"file_name": "a.jpg", "prompt": ["x"]}]'),
            (
                "a.jpg",
                "captions.json",
                '{"images": [{"id": 7, "file_name": "a.jpg"}],'
                '"annotations": [{"image_id": 7, "caption": "x"}]}',
            ),
        ],
    )
    def test_layouts(self, tmp_path: Path, picture: str, text: str, content: str) -> None:
        write_pictures(tmp_path, [picture])
        self.write(tmp_path, {text: content})
        assert captions_of(tmp_path) == {picture: ("x",)}

    def test_json_of_other_things(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["a.jpg"])
        self.write(tmp_path, {"a.json": '[{"label": "cat"}]'})
        assert captions_of(tmp_path) == {"a.jpg": ()}

    def test_list_of_files(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["x/1.png", "y/2.png", "3.png"])
        self.write(tmp_path, {"lists/train.txt": f"../x/1.png\n\n{tmp_path}/y/2.png\n"})
        source = open_source(str(tmp_path / "lists/train.txt"))
        assert [type(sample) for sample in read(source)] == [Sample, Sample]

    def test_stray_files(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """One text cost class folders their labels, one archive hid the pictures."""
        write_pictures(tmp_path, ["cat/1.png", "cat/2.png", "dog/1.png"])
        self.write(tmp_path, {"cat/1.txt": "a cat", "backup.tar": ""})
        source = open_source(str(tmp_path))
        assert source.classes == ("cat", "dog")
        assert list(source.captions()) == [("a cat",), (), ()]
        assert "holds pictures: 1 .tar beside them not read" in caplog.text

    def test_pictures_that_are_not_read(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Half of a phone's pictures were left out without a word."""
        write_pictures(tmp_path, ["1.jpe", "2.jfif", "3.ppm", "4.jp2"])
        for name in ("5.HEIC", "6.heic", "7.svg"):
            (tmp_path / name).touch()
        assert len(read(open_source(str(tmp_path)))) == 4
        assert "not read are 2 .heic and 1 .svg" in caplog.text
        (tmp_path / "phone").mkdir()
        (tmp_path / "phone/1.heic").touch()
        with pytest.raises(ValueError, match=r"no pictures in .*, got 1 \.heic"):
            open_source(str(tmp_path / "phone"))


class TestTables:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("captions.csv", "file;caption\na.png;x, y\n"),
            ("captions.csv", "filepath\ttitle\na.png\tx, y\n"),
            ("captions.csv", "image_name| comment_number| comment\na.png| 0| x, y\n"),
            ("captions.csv", 'sep=;\nFile Name;Caption\n.\\a.png;"x, y"\n'),
            ("captions.csv", '\ufeffIMAGE PATH,Prompt,\na.png,"x, y",\n,,\n,,,,\n'),
            ("captions.csv", 'file,captions\na.png,"[""x, y""]"\n'),
            ("captions.tsv", 'file,caption\na.png,"x, y"\n'),
        ],
    )
    def test_dialects(self, tmp_path: Path, name: str, text: str) -> None:
        write_pictures(tmp_path, ["a.png"])
        (tmp_path / name).write_text(text)
        assert captions_of(tmp_path) == {"a.png": ("x, y",)}

    def test_brackets_that_are_no_list(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["a.png"])
        (tmp_path / "captions.csv").write_text("file,caption\na.png,[1] a cat\n")
        assert captions_of(tmp_path) == {"a.png": ("[1] a cat",)}

    def test_back_slashes(self, tmp_path: Path) -> None:
        """Of a table made on Windows every picture was missing."""
        write_pictures(tmp_path, ["b/a.png"])
        (tmp_path / "captions.csv").write_text("file,caption\nb\\a.png,x\n")
        assert captions_of(tmp_path) == {"b/a.png": ("x",)}
        for outside in ("..\\a.png", "C:\\a.png", "\\\\server\\a.png"):
            (tmp_path / "captions.csv").write_text(f"file,caption\n{outside},x\n")
            with pytest.raises(ValueError, match="leads out of the directory"):
                open_source(str(tmp_path))

    def test_named_fields(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["a.png"])
        (tmp_path / "captions.csv").write_text("file,caption,where,what\nb.png,b,a.png,x\n")
        (sample,) = read(open_source(str(tmp_path), Fields(image="where", caption="What")))
        assert isinstance(sample, Sample)
        assert (sample.key, sample.captions) == ("a.png", ("x",))
        with pytest.raises(ValueError, match="expected a field how, got file, caption, where, what"):
            open_source(str(tmp_path), Fields(caption="how"))


class TestHostileFiles:
    def test_unreadable_pictures(self, tmp_path: Path) -> None:
        """EPS pictures are programs, which Pillow would have Ghostscript run."""
        write_pictures(tmp_path, ["good.png"])
        picture = encode_picture(draw_picture(0, 64)[0])
        bomb = bytearray(encode_picture(Image.new("1", (16, 16))))
        bomb[16:24] = (50_000).to_bytes(4, "big") * 2  # width and height
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        files = {
            "bomb.png": bytes(bomb),
            "cut.png": picture[: len(picture) // 2],
            "empty.png": b"",
            "line.png": encode_picture(Image.new("L", (3000, 2))),
            "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "text.png": b"text",
        }
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "gone.png").symlink_to("nowhere")
        found = reasons(tmp_path)
        assert sorted(found) == sorted([*files, "gone.png"])
        assert found["gone.png"] == "there is no such file"
        assert found["line.png"] == "no picture but a line: 3000 x 2 pixels"
        for name in ("empty", "program", "text"):
            assert found[f"{name}.png"].startswith("not a picture of a known format")
        assert "exceeds limit" in found["bomb.png"]
        assert found["cut.png"].startswith("not a readable picture: ")
        assert not any("\n" in reason for reason in found.values())

    def test_captions_that_are_no_text(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["1.png", "2.png"])
        (tmp_path / "1.txt").write_bytes(b"\xff\xfe\xff")
        (tmp_path / "2.txt").write_text("two")
        assert reasons(tmp_path) == {"1.png": "its captions cannot be read: expected UTF-8 text"}

    def test_pipes(self, tmp_path: Path) -> None:
        """To open one would wait for ever."""
        write_pictures(tmp_path, ["1.png", "3.png"])
        for name in ("1.txt", "2.png"):
            os.mkfifo(tmp_path / name)
        assert list(reasons(tmp_path)) == ["1.png", "2.png"]

    def test_missing_pictures(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_pictures(tmp_path, ["1.png"])
        lines = [{"file": f"{i}.png", "caption": "x"} for i in range(3)]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert reasons(tmp_path) == dict.fromkeys(["0.png", "2.png"], "there is no such file")
        assert "3 pictures, 2 of them missing" in caplog.text

    def test_links_in_circles(self, tmp_path: Path) -> None:
        write_pictures(tmp_path / "data", ["a/1.png"])
        write_pictures(tmp_path / "elsewhere", ["2.png"])
        (tmp_path / "data/a/up").symlink_to("..")
        (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
        assert sorted(captions_of(tmp_path / "data")) == ["a/1.png", "b/2.png"]

    def test_names_that_are_no_text(self, tmp_path: Path) -> None:
        """Seeds are hashes of the key: half a character in a name stopped the run."""
        (picture,) = write_pictures(tmp_path, ["1.png"])
        os.rename(picture, os.fsencode(tmp_path) + b"/\xff.png")
        (key,) = captions_of(tmp_path)
        assert key == "\\udcff.png"
        assert seed_of(0, key) >= 0


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            (
                "captions.jsonl",
                '{"file": "1.png", "caption": "x"}\n{"file": ',
                r"captions.jsonl:2: Expecting value",
            ),
            ("captions.jsonl", "[1]", r"captions.jsonl:1: expected a JSON object, got \[1\]"),
            ("captions.jsonl", "null", r"captions.jsonl:1: expected a JSON object, got null"),
            ("captions.jsonl", "[" * 100_000, r"captions.jsonl:1: "),
            (
                "captions.jsonl",
                '{"caption": "x"}',
                r"jsonl:1: expected a field file or image or .*, got caption",
            ),
            (
                "captions.jsonl",
                '{"file": "1.png", "heading": "x"}',
                r"jsonl:1: expected a field captions or caption",
            ),
            ("captions.jsonl", '{"file": 1, "caption": "x"}', r"expected the name of a picture file, got 1"),
            ("captions.jsonl", '{"file": "1.png", "caption": 7}', r"jsonl:1: captions must be text, got 7"),
            (
                "captions.jsonl",
                '{"file": "1.png", "caption": "\\ud83d"}',
                r"jsonl:1: .* valid Unicode, got '\\ud83d'",
            ),
            (
                "captions.jsonl",
                '{"file": "../1.png", "caption": "x"}',
                r"1: \.\./1.png leads out of the directory",
            ),
            ("captions.jsonl", '{"file": "a/../../1.png", "caption": "x"}', r"leads out of the directory"),
            (
                "captions.jsonl",
                '{"file": "/etc/x.png", "caption": "x"}',
                r"/etc/x.png leads out of the directory",
            ),
            ("captions.jsonl", "\n", r"captions.jsonl names no pictures: expected a line or row for each"),
            (
                "captions.csv",
                "file,caption\n1.png,a,b\n",
                r"csv:2: expected 2 columns as in the header, got more",
            ),
            (
                "captions.csv",
                "file,caption\n1.png\n",
                r"csv:2: expected 2 columns as in the header, got fewer",
            ),
            (
                "captions.csv",
                "1.png,red\n2.png,green\n",
                r"csv:2: expected a field file or .*, got 1.png, red",
            ),
            ("captions.csv", "file,caption\n1.png," + "x" * 200_000, r"csv:2: field larger than field limit"),
            ("captions.csv", b"file,caption\n1.png,\xff", r"csv:2: 'utf-8' codec can't decode byte 0xff"),
            (
                "captions.csv",
                'file,caption\n1.png,a\n2.png,"b\n3.png,c\n',
                r"csv:4: unexpected end of data, in the row that begins at line 3: is a quote not closed",
            ),
            (
                "captions.csv",
                'file,caption\n1.png,"a\n2.png,b\n3.png,"c\n',
                r"""csv:4: ',' expected after '"', in the row that begins at line 2: is a quote not""",
            ),
            (
                "captions.tsv",
                "file\tcaption\n1.png\ta\tb\n",
                r"tsv:2: .* got more: is there a tab or line break in a caption\?",
            ),
        ],
    )
    def test_captions_files(self, tmp_path: Path, name: str, text: Any, message: str) -> None:
        write_pictures(tmp_path, ["1.png"])
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path))

    def test_two_captions_files(self, tmp_path: Path) -> None:
        for name in ("captions.jsonl", "metadata.csv"):
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match=r"has captions.jsonl and metadata.csv: name the file to read"):
            open_source(str(tmp_path))

    def test_no_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "notes.md").touch()
        with pytest.raises(ValueError, match=r"no pictures in .*: expected png, jpg, .* or \.tar shards"):
            open_source(str(tmp_path))

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"no pictures at .*none: expected a directory, a captions"
        ):
            open_source(str(tmp_path / "none"))

    def test_another_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.zip").touch()
        with pytest.raises(ValueError, match=r"x.zip is no source of pictures: expected a directory, .jsonl"):
            open_source(str(tmp_path / "x.zip"))

    @pytest.mark.parametrize("spec", [[], "", [""]])
    def test_nothing_named(self, spec: Any) -> None:
        with pytest.raises(
            ValueError, match="pictures must be named by a path, a pattern or a list of shards"
        ):
            open_source(spec)

    def test_list_of_folders(self) -> None:
        with pytest.raises(
            ValueError, match=r"may only hold shards \(.tar\), got 'b': name a single directory"
        ):
            open_source(["a.tar", "b"])


class TestFolder:
    @pytest.fixture
    def many(self, tmp_path: Path) -> Source:
        lines = [{"file": f"{i}.png", "caption": str(i)} for i in range(2 * PART_SIZE + 3)]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return open_source(str(tmp_path))

    def test_parts(self, many: Source) -> None:
        assert many.num_parts == 3
        parts = [[sample.key for sample in many.read(part)] for part in range(3)]
        assert [len(part) for part in parts] == [PART_SIZE, PART_SIZE, 3]
        assert list(chain(*parts)) == [f"{i}.png" for i in range(len(many))]

    @pytest.mark.parametrize("index", [-1, 2 * PART_SIZE + 3])
    def test_index(self, many: Folder, index: int) -> None:
        with pytest.raises(IndexError, match=rf"picture {index} of 515"):
            many[index]

    def test_small_to_send_to_workers(self, many: Source) -> None:
        """Millions of Python objects would be copied into every worker as their reference counts change."""
        assert len(pickle.dumps(many)) < 50 * len(many)

    def test_fingerprint(self, tmp_path: Path) -> None:
        """It depends on pictures and captions, not on where they are."""
        prints = set()
        for name in ("x", "y"):
            write_pictures(tmp_path / name, ["1.png", "2.png"])
            (tmp_path / name / "1.txt").write_text("one")
            prints.add(open_source(str(tmp_path / name)).fingerprint)
        assert len(prints) == 1
        (tmp_path / "x/1.txt").write_text("two")
        prints.add(open_source(str(tmp_path / "x")).fingerprint)
        (tmp_path / "x/2.png").write_bytes(b"changed")
        prints.add(open_source(str(tmp_path / "x")).fingerprint)
        write_pictures(tmp_path / "x", ["3.png"])
        prints.add(open_source(str(tmp_path / "x")).fingerprint)
        assert len(prints) == 4


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
