"""Tensors in files: read from torch pickles or safetensors without executing anything, write atomically."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import mmap
import os
import re
import secrets
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORTH_RELEASING = 1 << 18
"""Bytes of a tensor below which nobody asks the system whether it is mapped."""


_TEMPORARY = re.compile(r"\..+-[0-9a-f]{16}(\.[^.]+)?")  # what `atomic_path` calls a file until it is whole


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


def release_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that `read_tensors` mapped; if read again, it comes from its file.

    Args:
        tensor: not written to since it was mapped. A small one, or one that is not mapped, is left alone, and
            so is any on systems other than Linux.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    # whole pages only: at both ends may be those of its neighbours
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end - begin >= WORTH_RELEASING and _is_mapped(begin, end):
        # advice: that it may fail is no harm
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_DONTNEED)
        )


def _is_mapped(begin: int, end: int) -> bool:
    """Whether these addresses belong to a mapped file; advised so, memory without a file would be zeroed."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:  # "first-last rights offset device inode path"
            addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
            first, _, last = addresses.partition("-")
            if int(first, 16) <= begin and end <= int(last, 16):
                return inode != "0"
    return False


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


# what torch's restricted unpickler says of a class it does not know, of a function in a module that it never
# allows, and of a stand-in that the file goes on to fill like a dict or a list
_UNKNOWN = re.compile(r"Unsupported global: GLOBAL ([\w.]+) was not an allowed global")
_BLOCKED = re.compile(r"unsupported GLOBAL ([\w.]+) whose module [\w.]+ is blocked")
_FILLED = re.compile(r"Can only (SETITEM|append).*but got <class '([\w.]+)'>")


def _read_pickle(path: Path) -> Any:
    """torch.load with `weights_only=True`; each class it does not know is replaced by an inert stand-in."""
    is_zip = zipfile.is_zipfile(path)  # the format since torch 1.6; only it can be mapped
    bases: dict[str, type] = {}  # class in the file -> what its stand-in is filled like
    while True:
        try:
            with torch.serialization.safe_globals([_stand_in(name, base) for name, base in bases.items()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:  # noqa: PERF203  (a damaged file fails in any of a dozen ways)
            function = _forbidden_function(str(error))
            if function:
                raise CheckpointError(f"{path} is refused, it asks to run {function}") from error
            missing = _missing_stand_in(str(error), bases)
            if missing is None:
                raise CheckpointError(
                    f"{path} ({path.stat().st_size} bytes) is not a readable torch checkpoint: "
                    f"{_reason(error)}. Was the download cut short?"
                ) from error
            bases.update(missing)


def _reason(error: Exception) -> str:
    """The first sentence of an error, without torch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")


def _forbidden_function(message: str) -> str | None:
    """What no honest checkpoint names: a function among the builtins, or anything of a blocked module."""
    blocked, unknown = _BLOCKED.search(message), _UNKNOWN.search(message)
    if blocked:
        return blocked[1]
    # torch leaves the module of builtins out
    if unknown and "." not in unknown[1] and not isinstance(getattr(builtins, unknown[1], None), type):
        return unknown[1]
    return None


def _missing_stand_in(message: str, bases: Mapping[str, type]) -> dict[str, type] | None:
    """The class that kept torch from reading on, and what its stand-in must be like; None = none helps."""
    unknown, filled = _UNKNOWN.search(message), _FILLED.search(message)
    if unknown:
        name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
        return {name: object} if name not in bases else None
    if filled and bases.get(filled[2]) is object:
        return {filled[2]: OrderedDict if filled[1] == "SETITEM" else list}
    return None


def _stand_in(name: str, base: type) -> type:
    """A class that can be built and filled like the one called `name`, and does nothing.

    torch fills plain containers only: instances of a stand-in for a dict or a list are its `base` itself.
    """

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls) if base is object else base()

    def ignore(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    module, _, qualname = name.rpartition(".")
    members = {"__new__": new, "__init__": ignore, "__setstate__": ignore, "__module__": module}
    return type(qualname, (), members | {"__hash__": object.__hash__})


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
    # not mkstemp: an interruption between its making the file and our `try` would leave it behind
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftover_files(directory: Path) -> Iterator[Path]:
    """Find what `atomic_path` of killed processes left, which nothing else is named like.

    Args:
        directory: that no other process writes in; those below it are searched, too.

    Yields:
        The temporary files.
    """
    for path in directory.rglob(".*-*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            yield path


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors to a safetensors file, atomically.

    Args:
        path: the file to write; an existing one is replaced only once the new one is whole.
        tensors: name -> tensor.
        dtype: stored type of floating-point tensors (None = as they are).
    """
    from safetensors.torch import save_file

    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        temporary.touch()  # with the mode of any new file; save_file's is private to its owner
        mode = temporary.stat().st_mode
        save_file(stored, temporary)
        temporary.chmod(mode)
