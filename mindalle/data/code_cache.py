"""The code cache: a data set encoded once. What its files are, what they belong to, and how they are read.

    plan.json                 what the parts belong to, written first
    part-00000.npy            codes uint16 (n, K, *code_shape) of the n pictures of a part, K crops of each
    part-00000.latents.npy    if asked for: latents float16 (n, K, C, h, w), before quantisation
    part-00000.jsonl          a line for each picture: {"key", "captions", "label"}
    part-00000.unreadable     if there are any: a line for each picture that was skipped, {"key", "reason"}
    header.json               the plan and the counts, written last

`mindalle.data.encoding` writes it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from checkpoint_io import CheckpointError, config_from_mapping, file_hash, tensors_hash
from mindalle.hub import resolve_model
from mindalle.parts import PLAN, Plan, short
from mindalle.run import load_image_tokenizer
from stage1_vqgan.autoencoder import QuantizedAutoencoder

T = TypeVar("T")
FORMAT = "mindalle-codes-2"
HEADER = "header.json"


@dataclass(frozen=True, kw_only=True)
class CachePlan(Plan):
    """What all parts of a cache have in common."""

    contents: ClassVar[str] = "codes"
    verb: ClassVar[str] = "encode"

    format: str = FORMAT
    tokenizer: str  # SHA-256 that identifies the image tokenizer
    codebook_size: int  # V, at most 65536
    code_shape: tuple[int, ...]  # of one crop
    num_crops: int  # K; crop 0 is the evaluation's
    has_latents: bool
    transform: dict[str, Any]  # fields of the TransformConfig
    seed: int  # of the crops
    source: str  # fingerprint of the pictures and captions
    num_parts: int
    classes: tuple[str, ...]  # names of the labels

    def __post_init__(self) -> None:
        object.__setattr__(self, "code_shape", tuple(self.code_shape))
        object.__setattr__(self, "classes", tuple(self.classes))


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """A plan that was carried out."""

    plan: CachePlan
    count: int  # pictures
    num_unreadable: int  # pictures that were skipped, not in `count`
    num_without_captions: int  # pictures of `count`
    num_classes: int  # largest label + 1, at least the plan's; 0 if some picture has no label


def identified_tokenizer(name: str, *, use_ema: bool = False) -> tuple[QuantizedAutoencoder, str]:
    """Load an image tokenizer and tell what identifies it.

    Args:
        name: see `mindalle.run.load_image_tokenizer`.
        use_ema: see there.

    Returns:
        The tokenizer, and in hex the SHA-256 of its weights: of the file of a native checkpoint, of names and
        values for all others, whose files hold other things besides.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        CheckpointError: if it is no image tokenizer.
    """
    tokenizer = load_image_tokenizer(name, use_ema=use_ema)
    native = resolve_model(name) / "image_tokenizer.safetensors"
    if native.is_file():
        return tokenizer, file_hash(native)
    return tokenizer, tensors_hash(tokenizer.state_dict())


def read_plan(directory: Path) -> CachePlan:
    """The plan of a cache, finished or not; raises CheckpointError if it is damaged."""
    return _read_json(directory / PLAN, CachePlan)


def read_header(directory: Path) -> CacheHeader:
    """The header of a finished cache; raises CheckpointError if it is damaged."""
    return _read_json(directory / HEADER, CacheHeader)


@dataclass(frozen=True)
class CachedPicture:
    """What a cache knows of a picture besides its codes."""

    key: str
    captions: tuple[str, ...]
    label: int | None


class CodeCache:
    """A finished cache; a picture is read when it is asked for, so that it may be larger than the memory.

    Args:
        directory: that `encode_source` made.
        tokenizer_hash: of the tokenizer that the codes must come from.

    Raises:
        FileNotFoundError: if there is no finished cache.
        CheckpointError: if it is damaged or from another tokenizer.
        OSError: if its files cannot be read for another reason.
    """

    def __init__(self, directory: str | Path, *, tokenizer_hash: str) -> None:
        self.directory = Path(directory)
        self.tokenizer_hash = tokenizer_hash
        if not (self.directory / HEADER).is_file():
            is_begun = (self.directory / PLAN).is_file()
            raise FileNotFoundError(
                f"no code cache at {directory}: it has no {HEADER}"
                + ("; its encoding did not finish: encode again to go on" if is_begun else "")
            )
        self.header = read_header(self.directory)
        self.plan = self.header.plan
        if self.plan.tokenizer != tokenizer_hash:
            raise unusable(
                self.directory,
                f"it was encoded by another image tokenizer (SHA-256 {short(self.plan.tokenizer)}, "
                f"expected {short(tokenizer_hash)})",
            )
        parts = [_Part(self.directory, number, self.plan) for number in range(self.plan.num_parts)]
        self.parts = [part for part in parts if part.count]
        self._starts = np.cumsum([0, *(part.count for part in self.parts)])
        if len(self) != self.header.count:
            raise unusable(
                self.directory, f"{self.header.count} pictures in the header, {len(self)} in the parts"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> Any:
        """Processes get the name, not what was found in it."""
        return partial(CodeCache, tokenizer_hash=self.tokenizer_hash), (self.directory,)

    def picture(self, index: int) -> CachedPicture:
        """Key, captions and label of a picture; raises CheckpointError if they are damaged."""
        part, row = self._find(index)
        return part.picture(row)

    def codes(self, index: int, crop: int) -> Tensor:
        """Codes int64 (*code_shape) of a crop of a picture; raises CheckpointError if they are damaged."""
        part, row = self._find(index)
        codes = part.read(part.codes, row, crop).astype(np.int64)
        if int(codes.max()) >= self.plan.codebook_size:
            raise unusable(
                self.directory,
                f"codes must be in [0, {self.plan.codebook_size}), got {codes.max()}",
                part.name,
            )
        return torch.from_numpy(codes)

    def latents(self, index: int, crop: int) -> Tensor:
        """Latents float16 (C, h, w) of a crop of a picture; raises CheckpointError if they are damaged."""
        part, row = self._find(index)
        assert part.latents is not None, "has_latents was not looked at"
        return torch.from_numpy(part.read(part.latents, row, crop))

    def _find(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])


def part_path(directory: Path, number: int, suffix: str = ".npy") -> Path:
    """A file of a part; the one of the codes is written last."""
    return directory / f"part-{number:05d}{suffix}"


@dataclass(frozen=True)
class _Array:
    """Where the rows of a .npy file are."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # (n, K, ...)
    start: int  # of the first row, in bytes


class _Part:
    """The files of a part: looked at once, then opened for each row that is read.

    They are not mapped: a map keeps its file open, and a cache has more files than a process may have open.
    """

    def __init__(self, directory: Path, number: int, plan: CachePlan) -> None:
        self.directory, self.name = directory, part_path(directory, number).stem
        self.codes = self._find(part_path(directory, number), np.uint16)
        self.count = self.codes.shape[0]
        self._check(self.codes, (self.count, plan.num_crops, *plan.code_shape))
        self.latents = None
        if plan.has_latents:
            self.latents = self._find(part_path(directory, number, ".latents.npy"), np.float16)
            grid = plan.code_shape[:2] if len(plan.code_shape) > 1 else self.latents.shape[3:5]
            self._check(self.latents, (self.count, plan.num_crops, *self.latents.shape[2:3], *grid))
        self.lines = part_path(directory, number, ".jsonl")
        # where each line begins, and the end
        self.places = self._find_lines()

    def _find(self, path: Path, dtype: type[np.generic]) -> _Array:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # only here: it compares header and size
            if array.dtype != dtype or not array.ndim or not array.flags.c_contiguous:
                raise ValueError(f"expected {dtype.__name__}, got {array.dtype} {list(array.shape)}")
        except (FileNotFoundError, EOFError, ValueError) as error:
            raise unusable(self.directory, f"{path.name}: {error}", self.name) from error
        return _Array(path, array.dtype, array.shape, array.offset)

    def _check(self, array: _Array, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise unusable(
                self.directory, f"expected shape {list(shape)}, got {list(array.shape)}", self.name
            )

    def _find_lines(self) -> NDArray[np.int64]:
        try:
            content = np.fromfile(self.lines, np.uint8)
        except FileNotFoundError as error:
            raise unusable(self.directory, str(error), self.name) from error
        places = np.concatenate([[0], np.flatnonzero(content == ord("\n")) + 1])
        if len(places) - 1 != self.count or places[-1] != len(content):
            raise unusable(
                self.directory,
                f"{self.count} rows of codes, {len(places) - 1} whole lines of captions",
                self.name,
            )
        return places

    def read(self, array: _Array, row: int, crop: int) -> NDArray[Any]:
        """Codes or latents of one crop of a picture."""
        assert 0 <= crop < array.shape[1]
        shape = array.shape[2:]
        size = math.prod(shape) * array.dtype.itemsize
        content = self._read(array.path, array.start + (row * array.shape[1] + crop) * size, size)
        return np.frombuffer(content, array.dtype).reshape(shape)

    def picture(self, row: int) -> CachedPicture:
        """What the line of a picture says."""
        start, end = map(int, self.places[row : row + 2])
        line = self._read(self.lines, start, end - start)
        try:
            found = json.loads(line)
            return CachedPicture(found["key"], tuple(found["captions"]), found["label"])
        except (ValueError, KeyError, TypeError) as error:
            raise unusable(self.directory, f"line {row + 1} of its captions: {error!r}", self.name) from error

    def _read(self, path: Path, start: int, size: int) -> bytearray:
        """Bytes of a file."""
        content = bytearray(size)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            if file.readinto(content) != size:
                raise unusable(self.directory, f"{path.name} was cut while in use", self.name)
        return content


def unusable(directory: Path, reason: str, part: str | None = None) -> CheckpointError:
    """The error of a damaged or foreign cache, with what to do about it."""
    if part is None:
        return CheckpointError(
            f"the code cache {directory} is not usable: {reason}; remove it to encode again"
        )
    return CheckpointError(
        f"the code cache {directory} is not usable, {part} is damaged: {reason}; "
        f"remove {part}.npy and {HEADER} to encode this part again"
    )


def _read_json(path: Path, cls: type[T]) -> T:
    """A dataclass from its JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
        found = content.get("plan", content)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {found!r:.80}")
        return config_from_mapping(cls, content, where=path.name)
    except (ValueError, RecursionError) as error:
        raise unusable(path.parent, str(error)) from error
