"""Pictures in folders and WebDataset shards, made by a test."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle")


def draw_picture(index: int, size: int = 16) -> tuple[Image.Image, str]:
    """A coloured square or circle on white, and what it is."""
    colour, shape = COLOURS[index % 4], SHAPES[index // 4 % 2]
    image = Image.new("RGB", (size, size), "white")
    box = (size // 4, size // 4, size - size // 4, size - size // 4)
    draw = ImageDraw.Draw(image)
    (draw.rectangle if shape == "square" else draw.ellipse)(box, fill=colour)
    return image, f"a {colour} {shape}"


def encode_picture(image: Image.Image, suffix: str = "png") -> bytes:
    file = BytesIO()
    jpegs = dict.fromkeys(("jpg", "jpe", "jfif"), "JPEG")
    image.save(file, {**jpegs, "jp2": "JPEG2000"}.get(suffix, suffix))
    return file.getvalue()


def write_pictures(directory: Path, names: Sequence[str], *, size: int = 16) -> list[Path]:
    """Pictures 0, 1, 2, ... under these names, which may have folders."""
    paths = [directory / name for name in names]
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(draw_picture(index, size)[0], path.suffix[1:].lower()))
    return paths


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """Files of a shard, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return path


def write_shard(
    path: Path,
    indices: Sequence[int],
    captions: Mapping[int, Any] | None = None,
    *,
    size: int = 16,
    suffix: str = "png",
) -> Path:
    """Pictures with these indices; `captions` replaces what the JSON of some of them has."""
    files: dict[str, bytes] = {}
    for index in indices:
        image, caption = draw_picture(index, size)
        texts = captions.get(index, [caption]) if captions is not None else [caption]
        files[f"{index:04d}.{suffix}"] = encode_picture(image, suffix)
        files[f"{index:04d}.json"] = json.dumps({"captions": texts}).encode()
    return write_tar(path, files)
