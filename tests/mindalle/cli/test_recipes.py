"""Recipes by name: in a wheel there is no `configs/` beside the command."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mindalle.cli.recipes import UnknownRecipeError, recipe_names, recipe_path, with_recipe_paths

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name", ["emoji/finetune", "emoji/finetune.yaml", "configs/emoji/finetune.yaml", "configs/emoji/finetune"]
)
def test_outside_the_repository_a_name_is_enough(name: str) -> None:
    expected = (ROOT / "configs/emoji/finetune.yaml").read_text()
    for arguments in (["fit", "--config", name], ["fit", f"--config={name}"], ["fit", "-c", name]):
        path = with_recipe_paths(arguments)[-1].removeprefix("--config=")
        assert Path(path).read_text() == expected


def test_a_file_comes_before_a_recipe() -> None:
    Path("emoji").mkdir()
    Path("emoji/finetune").write_text("seed_everything: 1")
    assert recipe_path("emoji/finetune") == "emoji/finetune"


@pytest.mark.parametrize("config", ["{seed_everything: 1}", "seed_everything: 1", "null", ""])
def test_yaml_and_nothing_are_left_to_the_parser(config: str) -> None:
    assert recipe_path(config) == config


def test_only_values_of_config_are_names() -> None:
    arguments = ["fit", "--data.train", "emoji/finetune", "emoji/finetune"]
    assert with_recipe_paths(arguments) == arguments


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    names = ["emoji/finetune", "toy/gpt", "cc3m/mindalle_1.3b"]
    with pytest.raises(UnknownRecipeError, match="--config emoji/fine: no such file, and no recipe") as error:
        recipe_path("emoji/fine")
    assert all(name in str(error.value) for name in names)
    assert len(recipe_names()) == len(list((ROOT / "configs").rglob("*.yaml")))


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path: Path) -> None:
    """It had none: `mindalle train fit --config ...` found nothing outside the repository."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_wheel('.'))"]
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for package in ("mindalle", "stage1_vqgan", "stage2_transformer", "checkpoint_io", "configs"):
        (tmp_path / package).symlink_to(ROOT / package)
    built = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    wheel = zipfile.ZipFile(tmp_path / built.stdout.split()[-1])
    found = {name for name in wheel.namelist() if re.match(r"mindalle/configs/.*\.yaml$", name)}
    assert found == {f"mindalle/configs/{name}.yaml" for name in recipe_names()}
