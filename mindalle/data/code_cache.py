"""The code cache: a captioned data set encoded once, as uint16 arrays beside a header and its captions."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from checkpoint_io import CheckpointError
from stage1_vqgan import ImageTokenizer

FORMAT = "mindalle-codes-1"
ROWS_PER_FILE = 8192


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_code_cache(
    directory: str | Path,
    samples: Iterable[Mapping[str, Any]],
    tokenizer: ImageTokenizer,
    *,
    tokenizer_hash: str,
    batch_size: int = 64,
) -> None:
    """Encode images and write them to a new cache; the directory appears only when it is whole.

    Args:
        directory: to create.
        samples: mappings with `images` (3, H, W) in [-1, 1] and `captions`, a list of strings.
        tokenizer: V at most 65536, since codes are stored as uint16.
        tokenizer_hash: identifies the tokenizer in the header.
        batch_size: images encoded at once, >= 1.

    Raises:
        FileExistsError: if the directory exists.
        ValueError: if V is too large or there are no samples.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: remove it to encode again")
    if tokenizer.codebook_size > 1 << 16:
        raise ValueError(
            f"codes are stored as uint16, so V must be at most 65536, got {tokenizer.codebook_size}"
        )
    building = directory.with_name(directory.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
    building.mkdir(parents=True)
    try:
        count = _encode(building, samples, tokenizer, batch_size)
        if not count:
            raise ValueError(f"no samples to encode into {directory}: are the shards readable?")
        header = {
            "format": FORMAT,
            "tokenizer": tokenizer_hash,
            "codebook_size": tokenizer.codebook_size,
            "code_shape": list(tokenizer.code_shape),
            "count": count,
        }
        (building / "header.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _encode(
    directory: Path, samples: Iterable[Mapping[str, Any]], tokenizer: ImageTokenizer, batch_size: int
) -> int:
    """Write the files of codes and the captions; returns how many samples there were."""
    count = 0
    pending: list[Tensor] = []
    with (directory / "captions.jsonl").open("w", encoding="utf-8") as captions:
        for batch in tqdm(_batches(samples, batch_size), desc="encoding", unit="batch"):
            with torch.inference_mode():
                pending.append(tokenizer.encode(torch.stack([sample["images"] for sample in batch])).cpu())
            captions.writelines(json.dumps(sample["captions"]) + "\n" for sample in batch)
            count += len(batch)
            if sum(map(len, pending)) >= ROWS_PER_FILE:
                _write_rows(directory, pending)
    if pending:
        _write_rows(directory, pending)
    return count


def _batches(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def _write_rows(directory: Path, pending: list[Tensor]) -> None:
    number = len(list(directory.glob("codes-*.npy")))
    np.save(directory / f"codes-{number:05d}.npy", torch.cat(pending).numpy().astype(np.uint16))
    pending.clear()


class CodeCache(Dataset[dict[str, Any]]):
    """A cache as a data set of `codes` int64 (*code_shape) and `captions`.

    Args:
        directory: that `write_code_cache` made.
        tokenizer_hash: of the tokenizer the codes must come from.

    Raises:
        FileNotFoundError: if there is no cache.
        CheckpointError: if the cache is damaged or from another tokenizer.
    """

    def __init__(self, directory: str | Path, *, tokenizer_hash: str) -> None:
        directory = Path(directory)
        if not (directory / "header.json").is_file():
            raise FileNotFoundError(f"no code cache at {directory}: it has no header.json")
        try:
            header = json.loads((directory / "header.json").read_text(encoding="utf-8"))
            _check_header(header, tokenizer_hash)
            self.codes = _read_rows(directory, header)
            self.captions = _read_captions(directory)
            if not header["count"] == len(self.codes) == len(self.captions):
                raise ValueError(
                    f"{header['count']} images in the header, {len(self.codes)} rows of codes, "
                    f"{len(self.captions)} of captions"
                )
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"the code cache {directory} is not usable: {reason}; remove it to encode again"
            ) from error

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`codes` int64 (*code_shape) and `captions` of one image."""
        return {
            "codes": torch.from_numpy(self.codes[index].astype(np.int64)),
            "captions": self.captions[index],
        }


def _check_header(header: Mapping[str, Any], tokenizer_hash: str) -> None:
    if header["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {header['format']!r}")
    if header["tokenizer"] != tokenizer_hash:
        raise ValueError(
            f"it was encoded by another image tokenizer (SHA-256 {str(header['tokenizer'])[:12]}..., "
            f"expected {tokenizer_hash[:12]}...)"
        )


def _read_rows(directory: Path, header: Mapping[str, Any]) -> NDArray[np.uint16]:
    """All codes (count, *code_shape)."""
    files = sorted(directory.glob("codes-*.npy"))
    if not files:
        raise ValueError("it has no codes-*.npy")
    codes: NDArray[np.uint16] = np.concatenate([np.load(file, allow_pickle=False) for file in files])
    if list(codes.shape[1:]) != header["code_shape"] or codes.dtype != np.uint16:
        raise ValueError(
            f"expected uint16 codes of shape {header['code_shape']}, "
            f"got {codes.dtype} {list(codes.shape[1:])}"
        )
    if int(codes.max()) >= header["codebook_size"]:
        raise ValueError(f"codes must be in [0, {header['codebook_size']}), got {codes.max()}")
    return codes


def _read_captions(directory: Path) -> list[list[str]]:
    # not splitlines(), which also splits at separators that may stand inside a caption, such as U+2028
    lines = (directory / "captions.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
