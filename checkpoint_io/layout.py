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
Parts: TypeAlias = "dict[PartName, CheckpointPart]"

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
FOLDERS = ("checkpoints", "ckpts", "ckpt")
"""Where the originals' trainings put checkpoints, below the folder of the config."""
MEANT = ("last.ckpt", "model.pt", "model.ckpt")
"""Of several checkpoints in a directory the one that stands for it."""
RELEASED: dict[str, PartName] = {"stage1_last.ckpt": "image_tokenizer", "stage2_last.ckpt": "model"}
"""minDALL-E's files."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPart:
    """One model inside a checkpoint."""

    layout: Layout
    config: dict[str, Any]  # the YAML file that describes it, whole
    file: Path  # where its tensors are
    prefix: str = ""  # of its tensors' names in that file
    yaml: Path | None = None  # where the config was read

    @property
    def source(self) -> str:
        """Which file was read, and with which config, for messages."""
        return f"{self.file} (with {self.yaml})" if self.yaml else str(self.file)

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
                f"is it the config.yaml of a {self.layout} release?{self._origin}"
            ) from error
        except (TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
            raise CheckpointError(
                f"the config of {self.file} is not usable: {error}.{self._origin}"
            ) from error

    @property
    def _origin(self) -> str:
        return f" It was read from {self.yaml}" if self.yaml else ""

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
        section = "state_dict_ema" if use_ema and "state_dict_ema" in content else "state_dict"
        if section not in content and isinstance(content.get("model"), Mapping):
            section = "model"
        whole, content = content, content.get(section, content)
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{section} of {self.file} is a {type(content).__name__}, "
                "expected a mapping of names to tensors"
            )
        tensors = {
            name.removeprefix(self.prefix): value
            for name, value in (
                (_plain_name(name), value) for name, value in content.items() if isinstance(name, str)
            )
            if name.startswith(self.prefix) and isinstance(value, Tensor)
        }
        averages = {name: tensors.pop(name) for name in list(tensors) if name.startswith("model_ema.")}
        if use_ema and averages:
            tensors = {name: averages.get(_average_name(name), value) for name, value in tensors.items()}
        elif use_ema and section != "state_dict_ema":
            raise CheckpointError(f"{self.file} has no EMA weights (keys: {_first_keys(whole)})")
        if not tensors:
            wanted = f"tensors named {self.prefix}*" if self.prefix else "tensors"
            raise CheckpointError(f"{self.file} holds no {wanted} (keys: {_first_keys(content)})")
        return tensors


def find_parts(path: str | Path) -> Parts:
    """Find the models of a checkpoint by its layout.

    Args:
        path: a directory, or a file of weights, which is then the only one that is read. Its config is the
            YAML file of the same name, else the only one that describes such weights, beside it or in the
            folder of the run it belongs to; of a run that was resumed the newest.

    Returns:
        The parts that are there; at least one.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: if the layout is none of the known ones, or it is not clear which file is meant.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    parts = _parts_of_directory(path) if path.is_dir() else _parts_of_named(path)
    if parts:
        return parts
    known = (
        "native (config.yaml, *.safetensors), minDALL-E (config.yaml, stage1_last.ckpt, stage2_last.ckpt, "
        "tokenizer/), minDALL-E fine-tuned (config.yaml, a .ckpt), rq-vae (stage1/ and stage2/ with model.pt "
        "and config.yaml), taming (a .ckpt and a .yaml)"
    )
    root = path if path.is_dir() else path.parent
    found = ", ".join(sorted(entry.name for entry in root.iterdir())[:12]) or "nothing"
    where = "it holds" if path.is_dir() else "no config there belongs to it; its directory holds"
    raise CheckpointError(
        f"{path} is no checkpoint of a known layout: {where} {found}. Expected one of: {known}"
    )


def _parts_of_named(file: Path) -> Parts:
    """Those in this one file."""
    if file.suffix.lower() not in SUFFIXES:
        raise CheckpointError(
            f"{file} is no file of weights ({', '.join(SUFFIXES)}): name one, or the directory"
        )
    native = _find_native(file.parent)
    if native and file.suffix == ".safetensors":
        parts: Parts = {name: part for name, part in native.items() if part.file == file}
        if not parts:
            names = ", ".join(part.file.name for part in native.values())
            raise CheckpointError(f"{file} is no part of the checkpoint in its directory, which has {names}")
        return parts
    return _parts_of_file(file)


def _parts_of_directory(root: Path) -> Parts:
    """Native ones, or those of a release, or those in the file that stands for the directory."""
    if native := _find_native(root):
        return native
    if any((root / name).exists() for name in RELEASED):
        parts = _parts_of_file(root / "stage1_last.ckpt") | _parts_of_file(root / "stage2_last.ckpt")
        if parts:
            return parts
    parts = {}
    for folder in (root, root / "stage1", root / "stage2"):
        found = _parts_of_folder(folder)
        if {part.layout for part in found.values()} == {"rq-vae"}:
            parts |= found
    folders = [root, *(root / name for name in FOLDERS)]
    # a .ckpt before a stray .pt beside the folder of checkpoints
    for folder in sorted(folders, key=lambda folder: not any(folder.glob("*.ckpt"))):
        parts = parts or _parts_of_folder(folder)
    return parts


def _find_native(root: Path) -> Parts:
    if not any(root.glob("*.safetensors")) or not (root / "config.yaml").is_file():
        return {}
    config = read_yaml(root / "config.yaml")
    if _layout_of(config) is not None:  # somebody else's, whose weights are kept in safetensors
        return {}
    names: tuple[PartName, ...] = ("image_tokenizer", "model")
    return {
        name: CheckpointPart(
            layout="native", config=config, file=root / f"{name}.safetensors", yaml=root / "config.yaml"
        )
        for name in names
        if name in config
    }


def _parts_of_folder(folder: Path) -> Parts:
    """Those in the checkpoint that stands for the others of a folder."""
    found = sorted(
        file
        for file in (folder.iterdir() if folder.is_dir() else ())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    lightning = [file for file in found if file.suffix == ".ckpt"]
    meant = [folder / name for name in MEANT if folder / name in found] or lightning or found
    if not meant:
        return {}
    parts = _parts_of_file(meant[0])
    if parts and len(meant) > 1 and meant[0].name not in MEANT:
        names = ", ".join(file.name for file in meant[:12])
        raise CheckpointError(f"{folder} holds several checkpoints and no last.ckpt: name one of {names}")
    return parts


def _parts_of_file(file: Path) -> Parts:
    """What a checkpoint of the originals holds by its config; nothing if none describes it."""
    yaml, config = _config_of(file)
    layout = _layout_of(config)
    if layout is None:
        return {}

    def part(layout: Layout, prefix: str = "") -> CheckpointPart:
        return CheckpointPart(layout=layout, config=config, file=file, prefix=prefix, yaml=yaml)

    if layout == "rq-vae":
        return {"image_tokenizer" if config["arch"]["type"] == "rq-vae" else "model": part(layout)}
    if layout == "taming":  # with a Net2Net transformer, its tokenizer
        is_inside = "first_stage_config" in config["model"]["params"]
        return {"image_tokenizer": part(layout, "first_stage_model." if is_inside else "")}
    if file.name in RELEASED:
        return {RELEASED[file.name]: part(layout)}
    return {
        "image_tokenizer": part("minDALL-E fine-tuned", "stage1."),
        "model": part("minDALL-E fine-tuned", "stage2."),
    }


def _layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The original system that a config is of."""
    if _dig(config, "arch", "type") in ("rq-vae", "rq-transformer"):
        return "rq-vae"
    if isinstance(_dig(config, "stage1", "hparams"), Mapping):
        return "minDALL-E"
    return "taming" if isinstance(_dig(config, "model", "params"), Mapping) else None


def _config_of(file: Path) -> tuple[Path | None, dict[str, Any]]:
    """The YAML file that describes a checkpoint, and what it says; nothing if there is none."""
    for own in (file.with_suffix(".yaml"), file.with_suffix(".yml")):
        if own.is_file():
            return own, read_yaml(own)
    folder = file.parent
    top = folder.parent if folder.name in FOLDERS else folder
    broken: ValueError | None = None
    for place in dict.fromkeys((folder, top, top / "configs")):
        found: dict[Path, dict[str, Any]] = {}
        for yaml in sorted((*place.glob("*.yaml"), *place.glob("*.yml"))):
            try:
                config = read_yaml(yaml)
            except ValueError as error:
                broken = broken or error
                continue
            if _layout_of(config):
                found[yaml] = config
        if len(found) > 1 and not all(yaml.stem.endswith("-project") for yaml in found):
            raise CheckpointError(
                f"which config {file} belongs to is not clear: {', '.join(yaml.name for yaml in found)} in "
                f"{place}. Call its own {file.stem}.yaml"
            )
        if found:
            return max(found.items())  # of the projects, whose names begin with a date, the newest
    if broken is not None:
        raise broken
    return None, {}


def _plain_name(name: str) -> str:
    """A tensor's name without what compiling and parallel training put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _average_name(name: str) -> str:
    """How latent-diffusion calls the average of a tensor: a buffer's name has no dots."""
    return f"model_ema.{name.replace('.', '')}"


def _first_keys(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(mapping)[:8])) or "none"


def _dig(mapping: Any, *keys: str) -> Any:
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping
