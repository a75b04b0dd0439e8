"""What scripts need, and a small made-up directory of npm packages, as tools/build_emoji.py reads them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

# a script has its own directory on the path
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from emoji_data.packages import pinned_versions
from emoji_data.styles import STYLES

NAMES = {
    "1F34B": ("lemon", 4),
    "1F388": ("balloon", 7),
    "1F34F": ("green apple", 4),  # of those that are left out
    "1F697": ("automobile", 5),
    "1F1EE-1F1F9": ("flag: Italy", 9),
    "1F3FB": ("light skin tone", None),  # a component
}
FILLS = {"1F697": "#1e5fb4", "1F34B": "#fad733", "1F388": "#dc2828", "1F34F": "#3ca03c"}
ALIASES = {"motor": {"parent": "automobile"}, "wreck": {"parent": "automobile", "rotate": 2}}
SHAPES = {  # of 16x16, a different one in each style
    "noto": '<circle cx="8" cy="8" r="7" fill="{}"/>',
    "blob": '<ellipse cx="8" cy="8" rx="7" ry="5" fill="{}"/>',
    "twemoji": '<rect x="1" y="1" width="14" height="14" fill="{}"/>',
    "flat": '<path d="M8 1 L15 15 L1 15 Z" fill="{}"/>',
    "firefox": '<path d="M8 1 L15 8 L8 15 L1 8 Z" fill="{}"/>',
    "emojione": '<rect x="1" y="5" width="14" height="6" fill="{}"/>',
    "streamline": '<rect x="5" y="1" width="6" height="14" fill="{}"/>',
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def characters(code_points: str) -> str:
    return "".join(chr(int(point, 16)) for point in code_points.split("-"))


def write_names(modules: Path) -> None:
    """Those of Unicode, in the layout of emojibase-data and cldr-annotations-full."""
    entries = [
        {
            "label": name,
            "hexcode": code_points,
            "emoji": characters(code_points),
            "tags": ["thing", name.split()[-1]],
            **({} if group is None else {"group": group, "subgroup": 0}),
        }
        for code_points, (name, group) in NAMES.items()
    ]
    groups = {4: "food & drink", 5: "travel & places", 7: "objects", 9: "flags"}
    messages = {
        "groups": [{"order": order, "message": message} for order, message in groups.items()],
        "subgroups": [{"order": 0, "message": "small things"}],
    }
    english = modules / "emojibase-data" / "en"
    write_json(english / "data.json", entries)
    write_json(english / "messages.json", messages)
    for source in ("github", "iamcal", "joypixels", "cldr"):
        write_json(english / f"shortcodes/{source}.json", {"1F697": ["red_car", "it"]})
    keywords = {"🍋": {"default": ["thing", "citrus", "sour fruit"]}}
    write_json(
        modules / "cldr-annotations-full/annotations/en/annotations.json",
        {"annotations": {"annotations": keywords}},
    )


def icon_set(shape: str) -> tuple[dict[str, Any], dict[str, str]]:
    """icons.json and chars.json of a set that draws one shape in the colours of the things."""
    names = {code_points.lower(): NAMES[code_points][0].replace(" ", "-") for code_points in FILLS}
    bodies = {names[point.lower()]: {"body": shape.format(fill)} for point, fill in FILLS.items()}
    return {"icons": bodies, "aliases": ALIASES, "width": 16, "height": 16}, names


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command sets up logging for its process."""
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers


@pytest.fixture(scope="session")
def npm_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages at their pinned versions, each with a handful of drawings."""
    directory = tmp_path_factory.mktemp("npm")
    modules = directory / "node_modules"
    for name, version in pinned_versions().items():
        write_json(modules / name / "package.json", {"name": name, "version": version})
    write_names(modules)
    for style, shape in SHAPES.items():
        icons, names = icon_set(shape)
        if style == "noto":
            icons["icons"]["balloon"]["hidden"] = True
            icons["icons"]["balloon-low"] = {"body": SHAPES["blob"].format("blue")}
            names["1f388-fe0f"] = "balloon-low"
        if style == "streamline":  # has no characters, and things that have no emoji
            names = {}
            icons["icons"]["red-car-2"] = {"body": shape.format("#9650be")}
            icons["icons"]["garden-gnome"] = {"body": SHAPES["flat"].format("#8040a0")}
            icons["icons"]["hand-skin-tone-3"] = {"body": shape.format("#a06040")}
        if style == "firefox":
            icons["icons"]["lemon"]["body"] = SHAPES["noto"].format(FILLS["1F34B"])  # noto's drawing again
            icons["icons"]["balloon"]["body"] = shape.format("white")
            icons["icons"]["automobile"]["body"] = "<circle"  # no SVG
        write_json(modules / STYLES[style].package / "icons.json", icons)
        write_json(modules / STYLES[style].package / "chars.json", names)
    flag = '<circle cx="8" cy="8" r="8" fill="#3ca03c"/><rect x="5" width="6" height="16" fill="#dc2828"/>'
    flags = {
        "icons": {"it": {"body": flag, "hidden": True}, "it-south": {"body": flag}, "xx": {"body": flag}}
    }
    write_json(modules / STYLES["roundflag"].package / "icons.json", flags)
    assets = modules / STYLES["3d"].package / "assets"
    assets.mkdir()
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 20, 60, 40), fill="#1e3c96")
    for name in ("1f697", "1f697-fe0f", "1f1ee-1f1f9"):
        image.save(assets / f"{name}.webp", lossless=True)
        image = image.rotate(20)
    (assets / "1f388.webp").write_bytes(b"RIFF no picture")
    return directory
