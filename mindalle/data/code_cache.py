"""The code cache: a captioned data set encoded once, as uint16 arrays beside a header and its captions."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoint_io import CheckpointError, atomic_path
from stage1_vqgan import ImageTokenizer

logger = logging.getLogger(__name__)
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
        batch_size: images encoded at once.

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
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    count = 0
    pending: list[Tensor] = []
    with (building / "captions.jsonl").open("w", encoding="utf-8") as captions:
        loader = DataLoader(samples, batch_size=batch_size, collate_fn=list)  # type: ignore[arg-type]
        for batch in tqdm(loader, desc="encoding", unit="batch"):
            with torch.inference_mode():
                pending.append(tokenizer.encode(torch.stack([sample["images"] for sample in batch])))
            captions.writelines(json.dumps(sample["captions"], ensure_ascii=False) + "\n" for sample in batch)
            count += len(batch)
            if sum(map(len, pending)) >= ROWS_PER_FILE:
                _write_rows(building, pending)
    if pending:
        _write_rows(building, pending)
    if not count:
        raise ValueError(f"no samples to encode into {directory}")
    header = {
        "format": "mindalle-codes-1",
        "tokenizer": tokenizer_hash,
        "codebook_size": tokenizer.codebook_size,
        "code_shape": list(tokenizer.code_shape),
        "count": count,
    }
    with atomic_path(building / "header.json") as temporary:
        temporary.write_text(json.dumps(header, indent=1), encoding="utf-8")
    building.rename(directory)


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
            raise FileNotFoundError(f"no code cache at {directory}")
        header = json.loads((directory / "header.json").read_text(encoding="utf-8"))
        if header.get("tokenizer") != tokenizer_hash:
            raise CheckpointError(
                f"{directory} was encoded by another image tokenizer (SHA-256 {str(header.get('tokenizer'))[:12]}..., "
                f"expected {tokenizer_hash[:12]}...): remove it to encode again"
            )
        files = sorted(directory.glob("codes-*.npy"))
        self.codes = np.concatenate([np.load(file, allow_pickle=False) for file in files])
        lines = (directory / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        self.captions: list[list[str]] = [json.loads(line) for line in lines]
        if len(self.codes) != header["count"] or len(lines) != header["count"]:
            raise CheckpointError(
                f"{directory} is damaged: {header['count']} images in the header, {len(self.codes)} rows of codes, "
                f"{len(lines)} of captions; remove it to encode again"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`codes` int64 (*code_shape) and `captions` of one image."""
        return {
            "codes": torch.from_numpy(self.codes[index].astype(np.int64)),
            "captions": self.captions[index],
        }
