"""Objects that torch.save wrote: read without importing or running anything, in bounded time and memory."""

from __future__ import annotations

import builtins
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from checkpoint_io.errors import CheckpointError

MAX_PICKLE_BYTES = 1 << 25
"""Of names and shapes, without the weights; a training checkpoint of a billion parameters has some 1e6."""
MAX_CLASSES = 256
"""That a file may name; each slows the reading of all others, and a training checkpoint has some 20."""
MAX_READINGS = 16
"""Of a file: one more for each class that turns out to be a kind of dict or list."""
LEGACY_PICKLES = 5
"""At the start of the format before torch 1.6: magic number, version, system, object, storages."""

# what torch's restricted unpickler says of a class it does not know, of a function in a module that it never
# allows, and of a stand-in that the file goes on to fill like a dict or a list
_UNKNOWN = re.compile(r"Unsupported global: GLOBAL ([\w.]+) was not an allowed global")
_BLOCKED = re.compile(r"unsupported GLOBAL ([\w.]+) whose module [\w.]+ is blocked")
_FILLED = re.compile(r"Can only (SETITEM|append).*but got <class '([\w.]+)'>")


def read_pickle(path: Path) -> Any:
    """torch.load with `weights_only=True`; each class it does not know is replaced by an inert stand-in.

    Args:
        path: of the file.

    Returns:
        The object; tensors of a zip file, the format since torch 1.6, are mapped into memory.

    Raises:
        CheckpointError: if the file is damaged, asks to run code, or would take too long or too much memory.
    """
    is_zip = zipfile.is_zipfile(path)
    bases: dict[str, type] = dict.fromkeys(
        _class_names(path, is_zip), object
    )  # what a stand-in is filled like
    for _ in range(MAX_READINGS):
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
    raise CheckpointError(
        f"{path} is refused: it fills objects of more than {MAX_READINGS - 1} classes; "
        "save its state_dict() alone"
    )


def _class_names(path: Path, is_zip: bool) -> set[str]:
    """All classes that a file names, so that it need not be read anew for each; what is damaged has none."""
    names: set[str] = set()
    try:
        for stream in _pickle_streams(path, is_zip):
            for opcode, argument, position in pickletools.genops(stream):
                if (position or 0) > MAX_PICKLE_BYTES:
                    raise CheckpointError(
                        f"{path} is refused: over {MAX_PICKLE_BYTES >> 20} MiB of it are not weights; "
                        "save its state_dict() alone"
                    )
                if opcode.name == "GLOBAL" and re.fullmatch(r"[\w.]+ [\w.]+", str(argument)):
                    names.add(str(argument).replace(" ", "."))
                if len(names) > MAX_CLASSES:
                    raise CheckpointError(
                        f"{path} is refused: it names more than {MAX_CLASSES} classes; "
                        "save its state_dict() alone"
                    )
    except CheckpointError:
        raise
    except Exception:  # torch says what is wrong
        return set()
    return {name for name in names if _is_class_or_unknown(name)}


def _pickle_streams(path: Path, is_zip: bool) -> Iterator[IO[bytes]]:
    """Where each pickle of a file begins."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, path)
            for entry in archive.infolist():
                if entry.filename.endswith("/data.pkl"):
                    with archive.open(entry) as file:
                        yield file
    else:
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                yield file


def check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive whose content is larger than its file: torch compresses no tensors.

    Args:
        archive: a checkpoint, or a TorchScript archive, whose code is compressed.
        path: of its file, for the message.

    Raises:
        CheckpointError: names the first entry that would be unpacked to more than it takes.
    """
    for entry in archive.infolist():
        is_code = re.search(r"/code/|\.debug_pkl$", entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED and not is_code:
            raise CheckpointError(
                f"{path} is refused: its {entry.filename} is compressed, to {entry.compress_size} of "
                f"{entry.file_size} bytes, which torch never does; write it again with torch.save"
            )


def _is_class_or_unknown(name: str) -> bool:
    """Whether a stand-in may take the place of a name: of no function among the builtins."""
    module, _, function = name.rpartition(".")
    return module != "builtins" or isinstance(getattr(builtins, function, None), type)


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
    if unknown and "." not in unknown[1] and not _is_class_or_unknown(f"builtins.{unknown[1]}"):
        return unknown[1]
    return None


def _missing_stand_in(message: str, bases: Mapping[str, type]) -> dict[str, type] | None:
    """The class that kept torch from reading on, and what its stand-in must be like; None = none helps."""
    unknown, filled = _UNKNOWN.search(message), _FILLED.search(message)
    if unknown:  # named in the words of Python 2, or by a pickle that is not the first
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
