"""Tensors of a TorchScript archive, read without running or even parsing the code in it."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from checkpoint_io.errors import CheckpointError
from checkpoint_io.pickles import check_archive
from checkpoint_io.tensors import check_tensors


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as opposed to anything else that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no archive at all, or a damaged one: `read_tensors` tells them apart
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """State dict of a TorchScript archive: a pickled tree of modules, and their code, which stays unread.

    `torch.jit.load` would compile that code and run its `__setstate__`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, path)
            tensors = dict(_named_tensors(_TreeUnpickler(archive).load()))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise CheckpointError(
            f"{path} is not a readable TorchScript archive: {error}. Was the download cut short?"
        ) from error
    check_tensors(tensors, path)
    return tensors


class _ScriptModule:
    """A module of the archive: its attributes, without its code."""


def _named_tensors(root: _ScriptModule) -> Iterator[tuple[str, Tensor]]:
    """Each module once: one may hold itself, or be held a million times."""
    levels, seen = [("", root)], {id(root)}
    while levels:
        prefix, module = levels.pop()
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _ScriptModule) and id(value) not in seen:
                seen.add(id(value))
                levels.append((f"{prefix}{name}.", value))


def _rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # which checks the bounds


def _value(value: Any, *_type: Any) -> Any:
    return value


class _TreeUnpickler(pickle.Unpickler):
    """Unpickles a module tree; all that it can name is in here."""

    ALLOWED: ClassVar[dict[str, Any]] = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch.jit._pickle.build_boollist": _value,
        "torch.jit._pickle.build_doublelist": _value,
        "torch.jit._pickle.build_intlist": _value,
        "torch.jit._pickle.build_tensorlist": _value,
        "torch.jit._pickle.restore_type_tag": _value,
        "torch.BFloat16Storage": torch.bfloat16,
        "torch.BoolStorage": torch.bool,
        "torch.DoubleStorage": torch.float64,
        "torch.FloatStorage": torch.float32,
        "torch.HalfStorage": torch.float16,
        "torch.IntStorage": torch.int32,
        "torch.LongStorage": torch.int64,
    }

    def __init__(self, archive: zipfile.ZipFile) -> None:
        tree = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(tree))
        self._archive = archive
        self._folder = tree.removesuffix(".pkl")  # one file per storage
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}  # each is read once

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return type(name, (_ScriptModule,), {})
        if (full_name := f"{module}.{name}") not in self.ALLOWED:
            raise CheckpointError(f"it asks for {full_name}, which may run code")
        return self.ALLOWED[full_name]

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid  # "storage", dtype, file, device, length
        if (key, dtype) not in self._storages:
            content = bytearray(self._archive.read(f"{self._folder}/{key}"))
            self._storages[key, dtype] = torch.frombuffer(content, dtype=dtype)
        return self._storages[key, dtype]
