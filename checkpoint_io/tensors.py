"""Tensors in files: read from torch pickles or safetensors without executing anything, write atomically."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_io.errors import CheckpointError
from checkpoint_io.pickles import read_pickle

WORTH_RELEASING = 1 << 18
"""Bytes of a tensor below which nobody asks the system whether it is mapped."""


_TEMPORARY = re.compile(r"\..+-[0-9a-f]{16}(\.[^.]+)?")  # what `atomic_path` calls a file until it is whole


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
        CheckpointError: if the file is truncated, not a checkpoint, or asks to run code, or if it
            holds a sparse, quantised, nested, complex or otherwise unusual tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a mapping of names to tensors: "
            "was a whole model pickled? Save its state_dict() instead"
        )
    check_tensors(content, path)
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


def check_tensors(content: Mapping[Any, Any], path: Path) -> None:
    """Refuse tensors that no parameter can be made of, wherever in a mapping they are.

    Args:
        content: of a file; mappings in it are looked into.
        path: of the file, for the message.

    Raises:
        CheckpointError: names the tensor and what is unusual about it.
    """
    levels, seen = [content], {id(content)}  # a mapping may hold itself
    while levels:
        for name, value in levels.pop().items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                levels.append(value)
            elif isinstance(value, Tensor) and (kind := _unusual(value)):
                raise CheckpointError(
                    f"{path}: {str(name)[:200]} is {kind}, expected a dense tensor of real numbers: "
                    "convert it before it is saved"
                )


def _unusual(tensor: Tensor) -> str:
    """What keeps a tensor from being the values of a parameter; "" if nothing does."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_meta:
        return "a tensor without values (of the meta device)"
    if tensor.is_complex():
        return "a tensor of complex numbers"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"a tensor of {tensor.nbytes} bytes repeated from fewer"
    return ""


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
