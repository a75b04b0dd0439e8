"""Tensors in files: read from torch pickles or safetensors without executing anything, write atomically."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that is truncated, hostile, of an unknown layout, or at odds with its own config."""


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file; large files are mapped into memory, not copied.

    Args:
        path: a `.safetensors` file or anything `torch.save` wrote.

    Returns:
        The mapping in the file, on the CPU. Values are tensors, or nested mappings of them in a training
        checkpoint (`["state_dict"]`). Pickled objects beside the tensors (Lightning callbacks, ...) are inert
        stand-ins: their classes are neither imported nor run.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, not a checkpoint, or asks to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a mapping of names to tensors: "
            "was a whole model pickled? Save its state_dict() instead"
        )
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a readable safetensors file: {error}. "
            "Was the download cut short?"
        ) from error


def _read_pickle(path: Path) -> Any:
    """torch.load with `weights_only=True`; each class it does not know is replaced by an inert stand-in."""
    is_zip = zipfile.is_zipfile(path)  # the format since torch 1.6; only it can be mapped
    stand_ins: dict[str, type] = {}
    while True:
        allowed = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            name = _unsupported_global(str(error))
            if name is None or name in stand_ins:
                raise CheckpointError(f"{path} is refused, it may run code: {_first_line(error)}") from error
            stand_ins[name] = _stand_in(name)
        except Exception as error:  # a damaged file fails in any of a dozen ways
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is not a readable torch checkpoint: "
                f"{_first_line(error)}. Was the download cut short?"
            ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _unsupported_global(message: str) -> str | None:
    """The `module.Class` that torch's restricted unpickler names when it refuses a file."""
    for marker in ("Unsupported global: GLOBAL ", "Unsupported class "):
        if marker in message:
            return message.split(marker, 1)[1].split()[0].rstrip(".,")
    return None


def _stand_in(name: str) -> type:
    """A class that can be built and filled like the one called `name`, and does nothing."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def ignore(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    module, _, qualname = name.rpartition(".")
    return type(
        qualname,
        (),
        {
            "__new__": new,
            "__init__": ignore,
            "__setstate__": ignore,
            "__module__": module,
            "__hash__": object.__hash__,
        },
    )


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on a clean exit it becomes `path`, otherwise it is removed.

    Args:
        path: the file to write.

    Yields:
        Where to write. The suffix is kept, since writers choose a format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, atomically.

    Args:
        path: the file to write; an existing one is replaced only once the new one is whole.
        tensors: name -> tensor.
        dtype: stored type of floating-point tensors (None = as they are).
        metadata: strings for the file's header.
    """
    from safetensors.torch import save_file

    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata=dict(metadata or {}))
