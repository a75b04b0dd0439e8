"""Which files of a checkpoint hold what: the native layout and those of the original systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from checkpoint_io.config import config_from_mapping, config_to_mapping, read_yaml
from checkpoint_io.errors import CheckpointError
from checkpoint_io.tensors import read_tensors

T = TypeVar("T")
Layout: TypeAlias = Literal["native", "minDALL-E", "minDALL-E fine-tuned", "rq-vae", "taming"]
PartName: TypeAlias = Literal["image_tokenizer", "model"]


@dataclass(frozen=True, kw_only=True)
class CheckpointPart:
    """One model inside a checkpoint."""

    layout: Layout
    config: dict[str, Any]  # the YAML file that describes it, whole
    file: Path  # where its tensors are
    prefix: str = ""  # of its tensors' names in that file

    def translate_config(self, translate: Callable[[Mapping[str, Any]], T]) -> T:
        """Read the config with a function for its layout.

        Args:
            translate: from the mapping in the YAML file to a dataclass.

        Returns:
            What `translate` returns, its types checked as `config_from_mapping` does.

        Raises:
            CheckpointError: if a setting is missing, of another type or out of range.
        """
        try:
            config = translate(self.config)
            return config_from_mapping(type(config), config_to_mapping(config), where=type(config).__name__)
        except KeyError as error:
            raise CheckpointError(
                f"the config of {self.file} lacks the setting {error}: "
                f"is it the config.yaml of a {self.layout} release?"
            ) from error
        except (TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"the config of {self.file} is not usable: {error}") from error

    def read(self, *, use_ema: bool = False) -> dict[str, Tensor]:
        """Read the part's tensors; their storage is mapped from the file, not copied.

        Args:
            use_ema: take the exponential moving average of the weights, where the file has one.

        Returns:
            name -> tensor, without prefixes, names as in the file.

        Raises:
            CheckpointError: if the file is damaged or holds no such tensors.
            FileNotFoundError: if there is no such file.
        """
        content = read_tensors(self.file)
        section = "state_dict_ema" if use_ema else "state_dict"
        if section in content:
            content = content[section]
        elif use_ema:
            raise CheckpointError(f"{self.file} has no EMA weights (keys: {_first_keys(content)})")
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{section} of {self.file} is a {type(content).__name__}, "
                "expected a mapping of names to tensors"
            )
        tensors = {
            name.removeprefix("module.").removeprefix(self.prefix): value
            for name, value in content.items()
            if isinstance(name, str)
            and isinstance(value, Tensor)
            and name.removeprefix("module.").startswith(self.prefix)
        }
        if not tensors:
            wanted = f"tensors named {self.prefix}*" if self.prefix else "tensors"
            raise CheckpointError(f"{self.file} holds no {wanted} (keys: {_first_keys(content)})")
        return tensors


def find_parts(path: str | Path) -> dict[PartName, CheckpointPart]:
    """Find the models of a checkpoint by its layout.

    Args:
        path: a directory, or a taming or minDALL-E `.ckpt` file with its YAML file beside it.

    Returns:
        The parts that are there; at least one.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: if the layout is none of the known ones.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    root = path if path.is_dir() else path.parent
    for find in (_find_native, _find_rq, _find_mindalle, _find_taming):
        parts = find(root, path)
        if parts:
            return parts
    found = ", ".join(sorted(entry.name for entry in root.iterdir())[:12]) or "nothing"
    raise CheckpointError(
        f"{path} is no checkpoint of a known layout: it holds {found}. Expected one of: native (config.yaml, "
        "*.safetensors), minDALL-E (config.yaml, stage1_last.ckpt, stage2_last.ckpt, tokenizer/), minDALL-E "
        "fine-tuned (config.yaml, a .ckpt), rq-vae (stage1/ and stage2/ with model.pt and config.yaml), "
        "taming (a .ckpt and a .yaml)"
    )


def _find_native(root: Path, path: Path) -> dict[PartName, CheckpointPart]:
    if not any(root.glob("*.safetensors")) or not (root / "config.yaml").is_file():
        return {}
    config = read_yaml(root / "config.yaml")
    names: tuple[PartName, ...] = ("image_tokenizer", "model")
    return {
        name: CheckpointPart(layout="native", config=config, file=root / f"{name}.safetensors")
        for name in names
        if name in config
    }


def _find_rq(root: Path, path: Path) -> dict[PartName, CheckpointPart]:
    """`stage1/` and `stage2/` below the directory, or the directory is one of them."""
    parts: dict[PartName, CheckpointPart] = {}
    for folder in (root, root / "stage1", root / "stage2"):
        if not (folder / "config.yaml").is_file() or not (folder / "model.pt").exists():
            continue
        config = read_yaml(folder / "config.yaml")
        kind = str(_dig(config, "arch", "type"))
        if kind in ("rq-vae", "rq-transformer"):
            name: PartName = "image_tokenizer" if kind == "rq-vae" else "model"
            parts[name] = CheckpointPart(layout="rq-vae", config=config, file=folder / "model.pt")
    return parts


def _find_mindalle(root: Path, path: Path) -> dict[PartName, CheckpointPart]:
    """A release directory, or a Lightning checkpoint of the fine-tuned model, both parts in one file."""
    if not (root / "config.yaml").is_file():
        return {}
    config = read_yaml(root / "config.yaml")
    if not isinstance(_dig(config, "stage1", "hparams"), Mapping):
        return {}
    if (root / "stage1_last.ckpt").exists() or (root / "stage2_last.ckpt").exists():
        return {
            "image_tokenizer": CheckpointPart(
                layout="minDALL-E", config=config, file=root / "stage1_last.ckpt"
            ),
            "model": CheckpointPart(layout="minDALL-E", config=config, file=root / "stage2_last.ckpt"),
        }
    file = _checkpoint_file(root, path)
    if file is None:
        return {}
    return {
        "image_tokenizer": CheckpointPart(
            layout="minDALL-E fine-tuned", config=config, file=file, prefix="stage1."
        ),
        "model": CheckpointPart(layout="minDALL-E fine-tuned", config=config, file=file, prefix="stage2."),
    }


def _find_taming(root: Path, path: Path) -> dict[PartName, CheckpointPart]:
    """A `.ckpt` and a YAML file, in one directory or in `ckpts/` or `checkpoints/` beside `configs/`."""
    top = root.parent if root.name in ("ckpts", "checkpoints") else root
    file = _checkpoint_file(root, path) or next(
        (found for name in ("ckpts", "checkpoints") if (found := _checkpoint_file(top / name, path))), None
    )
    if file is None:
        return {}
    for yaml in sorted((*root.glob("*.yaml"), *top.glob("*.yaml"), *top.glob("configs/*.yaml"))):
        config = read_yaml(yaml)
        params = _dig(config, "model", "params")
        if not isinstance(params, Mapping):
            continue
        prefix = (
            "first_stage_model." if "first_stage_config" in params else ""
        )  # a Net2Net transformer's tokenizer
        return {"image_tokenizer": CheckpointPart(layout="taming", config=config, file=file, prefix=prefix)}
    return {}


def _checkpoint_file(folder: Path, path: Path) -> Path | None:
    """The `.ckpt` the user named, else `last.ckpt`, else the only one there is."""
    if path.is_file() and path.parent == folder and path.suffix == ".ckpt":
        return path
    found = sorted(folder.glob("*.ckpt"))
    if (folder / "last.ckpt") in found:
        return folder / "last.ckpt"
    return found[0] if len(found) == 1 else None


def _first_keys(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(mapping)[:8])) or "none"


def _dig(mapping: Any, *keys: str) -> Any:
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping
