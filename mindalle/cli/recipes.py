"""The recipes of `configs/`, which come with the package and are found by name wherever a command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "configs"
OPTIONS = ("--config", "-c")


class UnknownRecipeError(ValueError):
    """Neither a file nor a recipe has this name."""


def with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line in which each recipe's name has become the path of its file.

    Args:
        arguments: such as `fit --config emoji/finetune`.

    Returns:
        As many; what names a file, or is YAML itself, stays as it is.

    Raises:
        UnknownRecipeError: if there is neither a file nor a recipe of a name.
    """
    found = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in OPTIONS and equals:
            found[place] = f"{option}={recipe_path(value)}"
        elif place and arguments[place - 1] in OPTIONS:
            found[place] = recipe_path(argument)
    return found


def recipe_path(config: str) -> str:
    """The file that `--config` means.

    Args:
        config: a path; or a recipe's name, with or without `configs/` before it and `.yaml` behind it.

    Returns:
        Its path, or `config` itself if it is one, or YAML.

    Raises:
        UnknownRecipeError: if there is no such file or recipe.
    """
    if not config or config == "null" or any(sign in config for sign in "{:\n") or Path(config).exists():
        return config
    name = config.removeprefix("configs/").removesuffix(".yaml")
    if name in (names := recipe_names()):
        return str(RECIPES / f"{name}.yaml")
    raise UnknownRecipeError(
        f"--config {config}: no such file, and no recipe of this name; known are {', '.join(names)}"
    )


def recipe_names() -> list[str]:
    """All of them, such as "emoji/finetune", sorted."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.glob("*/*.yaml"))
