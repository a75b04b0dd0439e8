"""What a command did, and what is in the pictures it wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: list[str]  # lines
    err: list[str]  # without the lines that say which device was chosen: they depend on the machine
    device: list[str]  # those lines

    @property
    def paths(self) -> list[Path]:
        """The pictures it names, one a line: "PATH" or "PATH  score 0.123"."""
        return [Path(line.split("  ")[0]) for line in self.out if ".png" in line]


Command: TypeAlias = Callable[..., Result]


def brightness(image: Image.Image) -> float:
    """In [0, 1]."""
    return float(np.asarray(image).mean() / 255)


def pixels(path: Path) -> bytes:
    """What can be seen of a picture."""
    with Image.open(path) as image:
        return image.tobytes()


def texts(path: Path) -> dict[str, str]:
    """The PNG's text chunks."""
    with Image.open(path) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]
