"""The builder of the emoji data set, on a made-up directory of npm packages."""

from __future__ import annotations

import colorsys
import json
import shutil
import tarfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

pytest.importorskip("resvg_py", reason='drawings are rendered with it: pip install -e ".[emoji]"')

import build_emoji
from emoji_data.captions import readable_name, with_article, write_captions
from emoji_data.colours import HUES, main_colours, one_hue
from emoji_data.concepts import Concept, index_names, read_concepts
from emoji_data.packages import LOCK_DIRECTORY, Packages, pinned_versions
from emoji_data.rendering import FLAG_FONT, FlagFont, render_svg, scaled_on_white, square
from emoji_data.splits import LEFT_OUT, VALIDATION_CONCEPTS, split_of
from emoji_data.styles import STYLES, family_of

from mindalle.data import open_source

Pictures = dict[str, tuple[Image.Image, dict[str, Any]]]
FIELDS = [
    *("concept", "emoji", "name", "style", "group", "subgroup", "keywords"),
    *("colors", "captions", "license", "split"),
]


def build(out: Path, npm: Path, *options: str) -> int:
    return build_emoji.main([str(out), "--npm", str(npm), "--without-noto-flags", *options])


@pytest.fixture(scope="session")
def data(npm_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "emoji"
    assert build(out, npm_directory) == 0
    return out


def read(directory: Path) -> Pictures:
    """All pictures of all shards, by key."""
    pictures: Pictures = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                key, suffix = name.rsplit(".", 1)
                if suffix == "json":
                    assert key not in pictures
                    metadata = json.load(tar.extractfile(name))  # type: ignore[arg-type]
                    with Image.open(tar.extractfile(f"{key}.png")) as image:  # type: ignore[arg-type]
                        pictures[key] = (image.copy(), metadata)
                    assert path.name == f"{metadata['split']}-0000.tar"
    return pictures


def pairs(pictures: Pictures, split: str) -> set[tuple[str, str | None]]:
    """Concepts and the colours that copies of their drawings have."""
    everything = [metadata for _, metadata in pictures.values() if metadata["split"] == split]
    return {(metadata["concept"], metadata.get("recolored")) for metadata in everything}


def concept(name: str, *keywords: str, code_points: str = "1F34E") -> Concept:
    return Concept(
        code_points=code_points, emoji="?", name=name, keywords=keywords, group="objects", subgroup=""
    )


def disc(*fills: str) -> Image.Image:
    """Discs beside each other on a transparent square."""
    image = Image.new("RGBA", (64 * len(fills), 64))
    for i, fill in enumerate(fills):
        ImageDraw.Draw(image).ellipse((64 * i + 4, 4, 64 * i + 59, 59), fill=fill)
    return image


# ------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flag: Italy", "flag of Italy"),
        ("keycap: 5", "keycap 5"),
        ("family: adult, child", "family of adult, child"),
        ("man: bald", "bald man"),
        ("woman: red hair", "woman with red hair"),
        ("person: walking", "person, walking"),
        ("man’s shoe", "man's shoe"),
        ("Japanese “bargain” button", "Japanese bargain button"),
    ],
)
def test_readable_names(name: str, expected: str) -> None:
    assert readable_name(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lemon", "a lemon"),
        ("axe", "an axe"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("glasses", "glasses"),
        ("compass", "a compass"),
        ("bus", "a bus"),
        ("two hearts", "two hearts"),
        ("one o'clock", "one o'clock"),
        ("flag of Italy", "the flag of Italy"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected


def test_captions_of_a_thing_of_one_colour() -> None:
    lemon = concept("Lemon", "lemon", "sour", "SOUR", "it", "!", "citrus fruit")
    assert write_captions(lemon, "blob", [("yellow", 0.6), ("green", 0.3)]) == [
        "lemon",
        "a lemon, blob style",
        "an emoji of a lemon",
        "lemon, sour, citrus fruit",
        "a yellow lemon, blob style",
    ]


@pytest.mark.parametrize(
    ("name", "colours", "expected"),
    [
        ("lemon", [("yellow", 0.5), ("green", 0.3)], ["lemon in yellow and green"]),
        ("lemon", [("white", 0.5), ("yellow", 0.3)], []),  # white is the background's too
        ("lemon", [("yellow", 0.5), ("green", 0.1)], []),
        ("green lemon", [("yellow", 0.9)], []),
        ("flag: Italy", [("green", 0.9)], []),
        ("lemon", [], []),
    ],
)
def test_colours_in_captions(name: str, colours: list[tuple[str, float]], expected: list[str]) -> None:
    assert write_captions(concept(name), "noto", colours)[3:] == expected


# ------------------------------------------------------------------------------------------------ colours


def test_main_colours_are_shares_of_what_is_drawn() -> None:
    assert main_colours(disc("#dc2828")) == [("red", 1.0)]
    (first, share), (second, other) = main_colours(disc("#dc2828", "#dc2828", "#3278dc"))
    assert (first, second) == ("red", "blue")
    assert (share, other) == pytest.approx((2 / 3, 1 / 3), abs=0.05)
    assert main_colours(Image.new("RGBA", (64, 64))) == []


def test_a_drawing_of_one_hue_takes_any() -> None:
    drawing = disc("#fad733")
    hue = one_hue(drawing)
    assert hue is not None
    for colour, degrees in HUES.items():
        turned = hue.turned(colour)
        red, green, blue, _ = turned.getpixel((32, 32))
        assert colorsys.rgb_to_hsv(red, green, blue)[0] * 360 == pytest.approx(degrees, abs=2)
        assert turned.getchannel("A").tobytes() == drawing.getchannel("A").tobytes()
    for colour in ("red", "green", "blue"):
        assert main_colours(hue.turned(colour)) == [(colour, 1.0)]


@pytest.mark.parametrize("fills", [("#dc2828", "#3278dc"), ("#808080",), ("#dc2828", "#101010", "#f0f0f0")])
def test_of_no_hue_or_several(fills: tuple[str, ...]) -> None:
    assert one_hue(disc(*fills)) is None


# ------------------------------------------------------------------------------------------------- splits


def test_a_held_out_drawing_has_no_sibling_in_train() -> None:
    """The flat and the 3D drawings were made after the same master."""
    styles = ["blob", "3d", "flat", "noto", "twemoji"]
    held_out_families = set()
    for code_points in VALIDATION_CONCEPTS:
        thing = concept("thing", code_points=code_points)
        split = {style: split_of(thing, style, styles=styles, recoloured=None) for style in styles}
        families = {
            name: {family_of(style) for style in styles if split[style] == name}
            for name in set(split.values())
        }
        assert families.keys() <= {"train", "val_pair"}
        assert len(families.get("val_pair", ())) <= 1
        assert families["train"].isdisjoint(families.get("val_pair", ()))
        held_out_families |= families.get("val_pair", set())
        for style, colour in product(styles, HUES):  # a copy of a held-out drawing is one, too
            copy = split_of(thing, style, styles=styles, recoloured=colour)
            assert (copy == "val_pair") == (split[style] == "val_pair")
    assert held_out_families == {"blob", "fluent", "noto", "twemoji"}


def test_a_held_out_colour_is_held_out_in_every_style() -> None:
    held_out = 0
    for code_points, colour in product(VALIDATION_CONCEPTS, HUES):
        thing = concept("thing", code_points=code_points)
        splits = {
            split_of(thing, style, styles=["noto", "flat", "3d"], recoloured=colour) for style in STYLES
        }
        assert len(splits) == 1
        held_out += splits == {"val_color"}
    assert held_out / len(VALIDATION_CONCEPTS) / len(HUES) > 0.04


def test_what_no_split_has() -> None:
    for name in LEFT_OUT:
        assert split_of(concept(name), "noto", styles=STYLES, recoloured=None) is None
    lemon = concept("lemon", code_points="1F34B")  # held out in one family, and of the half kept back
    splits = {style: split_of(lemon, style, styles=STYLES, recoloured=None) for style in STYLES}
    assert set(splits.values()) == {"train", None}


# ------------------------------------------------------------------------------------------------ data set


def test_names_find_their_emoji(npm_directory: Path) -> None:
    packages = Packages(npm_directory)
    names = index_names(packages, read_concepts(packages))
    for name in ("automobile", "motor", "redcar"):  # in Unicode, an alias, a shortcode
        assert names[name] == "1F697"
    for name in ("italy", "flagitaly", "italyflag"):
        assert names[name] == "1F1EE-1F1F9"
    assert names.keys().isdisjoint({"it", "wreck", "lightskintone", ""})


def test_what_is_built(data: Path) -> None:
    pictures = read(data)
    originals = {key for key in pictures if "_hue-" not in key}
    assert {
        *("noto_1f697", "blob_1f697", "twemoji_1f697", "flat_1f697", "emojione_1f697"),
        *("streamline_1f697", "streamline_1f697_2", "3d_1f697", "roundflag_1f1ee-1f1f9"),
    } <= originals
    # hidden; white on white; no SVG; noto's again; left out; a flag of unclear origin; no picture; skin
    absent = {"noto_1f388", "firefox_1f388", "firefox_1f697", "firefox_1f34b", "noto_1f34f"}
    absent |= {"3d_1f1ee-1f1f9", "3d_1f388", "noto_1f3fb"}
    assert absent.isdisjoint(pictures)
    assert sum(metadata["name"] == "garden gnome" for _, metadata in pictures.values()) == 1
    for image, metadata in pictures.values():
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert [field for field in metadata if field != "recolored"] == FIELDS
        assert metadata["license"] == STYLES[metadata["style"]].licence


def test_a_copy_in_another_colour(data: Path) -> None:
    pictures = read(data)
    image, metadata = pictures["twemoji_1f697_hue-green"]
    red, green, blue = image.getpixel((32, 32))
    assert green > max(red, blue)
    assert metadata["recolored"] == "green"
    assert metadata["colors"][0][0] == "green"
    assert metadata["captions"] == [
        "green automobile",
        "a green automobile, twemoji style",
        "an emoji of a green automobile",
    ]
    held_out = pairs(pictures, "val_color")
    assert held_out
    assert held_out.isdisjoint(pairs(pictures, "train"))
    assert "twemoji_1f697_hue-blue" not in pictures  # it is blue
    assert not any("_hue-" in key for key in pictures if key.startswith(("roundflag", "blob", "3d")))


def test_captions_and_keywords(data: Path) -> None:
    pictures = read(data)
    assert pictures["noto_1f697"][1]["captions"][:4] == [
        "automobile",
        "an automobile, noto style",
        "an emoji of an automobile",
        "automobile, thing",
    ]
    assert pictures["noto_1f697"][1]["emoji"] == "🚗"
    assert pictures["roundflag_1f1ee-1f1f9"][1]["captions"][0] == "round flag of Italy"


def test_the_same_picture_by_another_name_adds_the_name(
    npm_directory: Path, tmp_path: Path, change: Callable[..., Path]
) -> None:
    icons = STYLES["noto"].package
    npm = change(icons, "icons.json", lambda content: content["icons"]["balloon"].update(SAME))
    assert build(tmp_path / "emoji", npm) == 0
    pictures = read(tmp_path / "emoji")
    assert "noto_1f388" not in pictures
    assert pictures["noto_1f697"][1]["captions"][-1] == "balloon"


SAME = {"hidden": False, "body": '<circle cx="8" cy="8" r="7" fill="#1e5fb4"/>'}


def test_equal_inputs_give_equal_bytes(data: Path, npm_directory: Path, tmp_path: Path) -> None:
    again = tmp_path / "empty"
    again.mkdir()
    assert build(again, npm_directory) == 0
    files = sorted(path.name for path in data.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert {"ATTRIBUTION.md", "README.md", "train-0000.tar", "val_pair-0000.tar"} <= set(files)
    for name in files:
        assert (data / name).read_bytes() == (again / name).read_bytes(), name


def test_the_toolkit_reads_the_shards(data: Path) -> None:
    source = open_source([str(data / "train-*.tar")])
    samples = list(source.read(0))
    assert len(samples) == len(source) > 20
    assert all(sample.captions for sample in samples)  # type: ignore[union-attr]


def test_attribution_names_every_style(data: Path) -> None:
    text = (data / "ATTRIBUTION.md").read_text(encoding="utf-8")
    styles = {metadata["style"] for _, metadata in read(data).values()}
    assert styles == set(STYLES) - {"firefox"}
    assert "firefox" not in text
    for style in styles:
        assert f"- `{style}`: {STYLES[style].credit} Licence: {STYLES[style].licence}." in text
    assert "OFL" not in text  # without the font there is nothing of it
    assert not {style.licence for style in STYLES.values()} - {"Apache-2.0", "CC-BY-4.0", "MIT"}


def test_size(npm_directory: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "emoji", npm_directory, "--size", "24") == 0
    assert {image.size for image, _ in read(tmp_path / "emoji").values()} == {(24, 24)}


# ------------------------------------------------------------------------------------------------ rendering


def test_a_drawing_fills_its_square() -> None:
    image = Image.new("RGBA", (100, 100))
    ImageDraw.Draw(image).rectangle((60, 70, 99, 89), fill="red")  # 40x20
    padded = square(image)
    assert padded is not None
    assert padded.size == (43, 43)
    assert padded.getchannel("A").getbbox() == (1, 11, 41, 31)
    assert scaled_on_white(padded, 43).getpixel((0, 0)) == (255, 255, 255)
    assert square(Image.new("RGBA", (9, 9))) is None


def test_an_svg_cannot_read_other_files() -> None:
    with pytest.raises(ValueError, match="a picture inside"):
        render_svg('<svg xmlns="http://www.w3.org/2000/svg"><image href="/a.png"/></svg>')


@pytest.mark.skipif(not FLAG_FONT.is_file(), reason=f"no font at {FLAG_FONT}")
def test_flags_of_the_font() -> None:
    font = FlagFont(FLAG_FONT)
    flag = square(font.render("🇮🇹"))
    assert flag is not None
    assert {word for word, _ in main_colours(flag)} >= {"red", "green"}
    with pytest.raises(ValueError, match="no glyph"):
        font.render("🇽🇽🇽🇽")


# --------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def change(npm_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the packages with the content of one file changed."""

    def changed(package: str, name: str, edit: Callable[[Any], object]) -> Path:
        npm = tmp_path / "changed"
        shutil.copytree(npm_directory, npm)
        path = npm / "node_modules" / package / name
        content = json.loads(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return npm

    return changed


def test_another_version_is_refused(change: Callable[..., Path]) -> None:
    npm = change("emojibase-data", "package.json", lambda content: content.update(version="1.0.0"))
    version = pinned_versions()["emojibase-data"]
    with pytest.raises(ValueError, match=rf"is 1\.0\.0, expected {version} .* npm install .*data@{version}"):
        Packages(npm)


def test_a_missing_package_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "node_modules").mkdir()
    assert build(tmp_path / "emoji", tmp_path) == 1
    message = capsys.readouterr().err
    assert "no @iconify-json/circle-flags in" in message
    assert "npm install --prefix" in message


def test_without_npm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build(tmp_path / "emoji", tmp_path / "npm") == 1
    assert "npm is not installed: apt-get install npm" in capsys.readouterr().err


def test_a_damaged_package(change: Callable[..., Path]) -> None:
    npm = change("emojibase-data", "en/data.json", lambda content: None)
    path = npm / "node_modules/emojibase-data/en/data.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"data\.json is not there or damaged"):
        Packages(npm).json("emojibase-data", "en/data.json")


def test_font_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fonts-noto-color-emoji.*--without-noto-flags"):
        FlagFont(tmp_path / "none.ttf")
    (tmp_path / "no.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"expected NotoColorEmoji\.ttf"):
        FlagFont(tmp_path / "no.ttf")


def test_what_is_there_is_not_overwritten(
    data: Path, npm_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (data / "train-0000.tar").stat()
    assert build(data, npm_directory) == 1
    assert "exists: remove it" in capsys.readouterr().err
    assert (data / "train-0000.tar").stat() == before


def test_usage_errors(tmp_path: Path, npm_directory: Path) -> None:
    assert build(tmp_path / "emoji", npm_directory, "--size", "512") == 2
    assert build(tmp_path / "emoji", npm_directory, "--noto-font", "a.ttf") == 2


def test_a_build_that_is_stopped_leaves_nothing(
    npm_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emoji_data.shards.attribution", stop)  # the shards are written by then
    assert build(tmp_path / "emoji", npm_directory) == 130
    assert list(tmp_path.iterdir()) == []


def test_every_package_is_locked() -> None:
    lock = json.loads((LOCK_DIRECTORY / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert lock[""]["dependencies"] == pinned_versions()
    for name, version in pinned_versions().items():
        entry = lock[f"node_modules/{name}"]
        assert entry["version"] == version
        assert entry["integrity"].startswith("sha512-")
    assert {style.package for style in STYLES.values()} <= pinned_versions().keys()
