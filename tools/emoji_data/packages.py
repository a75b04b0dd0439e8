"""The npm packages that drawings and names come from, at the versions of package-lock.json beside this."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

LOCK_DIRECTORY = Path(__file__).parent
NPM_OPTIONS = ("--ignore-scripts", "--no-audit", "--no-fund")  # what is installed is data: nothing of it runs


def pinned_versions() -> dict[str, str]:
    """The packages that are read, and the version of each."""
    manifest = json.loads((LOCK_DIRECTORY / "package.json").read_text(encoding="utf-8"))
    return dict(manifest["dependencies"])


def install_command(directory: Path) -> str:
    """The command line that brings the pinned packages to a directory."""
    packages = " ".join(f"{name}@{version}" for name, version in pinned_versions().items())
    return f"npm install --prefix {directory} {' '.join(NPM_OPTIONS)} {packages}"


def install(directory: Path) -> None:
    """Let npm install the packages; it refuses those whose SHA-512 is not that of the lock.

    Args:
        directory: gets `node_modules` and copies of package.json and package-lock.json.

    Raises:
        FileNotFoundError: if there is no npm.
        OSError: if npm fails.
    """
    if (npm := shutil.which("npm")) is None:
        raise FileNotFoundError(
            "npm is not installed: apt-get install npm, or give --npm a directory where somebody ran: "
            f"{install_command(Path('DIR'))}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(LOCK_DIRECTORY / name, directory / name)
    done = subprocess.run(
        [npm, "ci", *NPM_OPTIONS], cwd=directory, capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        raise OSError(f"npm ci in {directory} failed: {' '.join(errors)[:500] or done.stderr[:500]}")


@dataclass(frozen=True)
class Packages:
    """Installed packages, all at their pinned versions.

    Args:
        directory: the one that holds `node_modules`.

    Raises:
        FileNotFoundError: if a package is missing.
        ValueError: if a package has another version.
    """

    directory: Path

    def __post_init__(self) -> None:
        for name, version in pinned_versions().items():
            manifest = self.path(name, "package.json")
            if not manifest.is_file():
                raise FileNotFoundError(
                    f"no {name} in {self.directory}/node_modules: run {install_command(self.directory)}"
                )
            if (found := self.json(name, "package.json").get("version")) != version:
                raise ValueError(
                    f"{name} in {self.directory} is {found}, expected {version} (another version gives other "
                    f"pictures): run {install_command(self.directory)}"
                )

    def path(self, package: str, name: str) -> Path:
        """Where a file of a package is."""
        return self.directory / "node_modules" / package / name

    def json(self, package: str, name: str) -> Any:
        """The content of a JSON file of a package."""
        path = self.path(package, name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{path} is not there or damaged ({error}): remove {self.directory}/node_modules and run "
                f"{install_command(self.directory)}"
            ) from error

    def icons(self, package: str) -> IconSet:
        """The drawings of a package in Iconify's format."""
        has_characters = self.path(package, "chars.json").is_file()
        characters = self.json(package, "chars.json") if has_characters else {}
        return IconSet(content=self.json(package, "icons.json"), characters=characters)


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """SVG drawings by name."""

    content: dict[str, Any]  # of icons.json
    characters: dict[str, str]  # code points in hex -> name of its drawing

    @property
    def aliases(self) -> dict[str, Any]:
        """Other names: `parent` is the drawing; rotations and flips are noted beside it."""
        return dict(self.content.get("aliases", {}))

    @property
    def names(self) -> list[str]:
        """Of the drawings that the set still shows."""
        icons = self.content["icons"]
        return [name for name, icon in icons.items() if not icon.get("hidden", False)]

    @cached_property
    def code_points(self) -> dict[str, list[str]]:
        """Name of a drawing -> the characters it stands for, normalised."""
        found: dict[str, list[str]] = {}
        for characters, name in self.characters.items():
            found.setdefault(name, []).append(normalize_code_points(characters))
        return found

    def svg(self, name: str) -> str:
        """A drawing as an SVG document."""
        icon = self.content["icons"][name]
        left, top, width, height = (
            icon.get(side, self.content.get(side, default))
            for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )


def normalize_code_points(characters: str) -> str:
    """`1f3d6-fe0f` -> `1F3D6`: upper case, without the selector that asks for the coloured form."""
    return "-".join(part for part in characters.upper().split("-") if part != "FE0F")
