"""One part of a code cache: crops of its pictures, through the image tokenizer, to its files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from checkpoint_io import atomic_path
from mindalle.data.code_cache import part_path
from mindalle.data.samples import Source, Unreadable, seed_of
from mindalle.data.transforms import TransformConfig, transform
from mindalle.parts import Count
from stage1_vqgan.autoencoder import QuantizedAutoencoder


@dataclass(frozen=True, kw_only=True)
class EncodingJob:
    """What to encode and how: all that a process needs to encode a part."""

    source: Source
    image_tokenizer: str  # training run, bundled name, path or release
    directory: Path  # the cache
    transform: TransformConfig
    num_crops: int = 1  # K, >= 1: crop 0 is the evaluation's, the others are random
    seed: int = 0  # of the random crops
    has_latents: bool = False  # keep the latents too, which soft targets are computed from
    batch_size: int = 64  # crops encoded at once, >= 1
    device: str = "cpu"  # cpu, cuda, cuda:N

    def __post_init__(self) -> None:
        if self.num_crops < 1 or self.batch_size < 1:
            raise ValueError(
                f"num_crops and batch_size must be at least 1, got {self.num_crops} and {self.batch_size}"
            )
        if self.num_crops > 1 and self.transform.crop == "center" and not self.transform.flip_probability:
            raise ValueError(
                f"num_crops is {self.num_crops}, but all of them would be the same: set crop or "
                "flip_probability of the transform"
            )


class PartEncoder:
    """Encodes parts of a source; each process has one.

    Args:
        job: what to encode.
        tokenizer: the image tokenizer that the job names.
        count: told of each picture that was read, or could not be.
    """

    def __init__(self, job: EncodingJob, tokenizer: QuantizedAutoencoder, count: Count) -> None:
        self.job = job
        self.tokenizer = tokenizer.to(job.device)
        self.count = count

    def encode(self, number: int) -> None:
        """Write a part, its codes last: a part with codes is whole.

        One that was out of reach gets no codes, so that it is encoded when the encoding is begun again.

        Args:
            number: of the part.
        """
        pictures: list[dict[str, Any]] = []
        unreadable: list[Unreadable] = []
        codes, latents = ([batch] for batch in self._nothing())
        crops = self._crops(number, pictures, unreadable)
        while batch := list(islice(crops, self.job.batch_size)):
            batch_codes, batch_latents = self._encode_batch(torch.stack(batch))
            codes.append(batch_codes)
            if self.job.has_latents:
                latents.append(batch_latents)
        if unreadable:
            lines = ({"key": sample.key, "reason": sample.reason} for sample in unreadable)
            self._write_lines(number, ".unreadable", lines)
        else:  # there may be some of another time
            part_path(self.job.directory, number, ".unreadable").unlink(missing_ok=True)
        if any(sample.is_out_of_reach for sample in unreadable):
            return
        self._write_lines(number, ".jsonl", pictures)
        if self.job.has_latents:
            self._write_array(number, ".latents.npy", latents)
        self._write_array(number, ".npy", codes)

    def _crops(
        self, number: int, pictures: list[dict[str, Any]], unreadable: list[Unreadable]
    ) -> Iterator[Tensor]:
        """The crops (3, H, W) of all pictures of a part, which are noted on the way."""
        job = self.job
        for sample in job.source.read(number):
            if isinstance(sample, Unreadable):
                unreadable.append(sample)
            else:
                pictures.append({"key": sample.key, "captions": sample.captions, "label": sample.label})
                yield transform(sample.image, job.transform, None)
                for k in range(1, job.num_crops):
                    rng = random.Random(seed_of(job.seed, sample.key, k))
                    yield transform(sample.image, job.transform, rng)
            self.count(1)

    @torch.inference_mode()
    def _encode_batch(self, images: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
        latents = self.tokenizer.encode_latents(images.to(self.job.device))
        codes = self.tokenizer.quantizer.encode(latents)
        return codes.cpu().numpy().astype(np.uint16), latents.cpu().numpy().astype(np.float16)

    def _nothing(self) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
        """Codes and latents of no pictures: a part may have none that can be read."""
        size = self.job.transform.image_size
        side = size // self.tokenizer.downsampling
        codes = np.empty((0, *self.tokenizer.code_shape_at(size)), np.uint16)
        return codes, np.empty((0, self.tokenizer.codebook().shape[-1], side, side), np.float16)

    def _write_lines(self, number: int, suffix: str, lines: Iterable[Mapping[str, Any]]) -> None:
        with atomic_path(part_path(self.job.directory, number, suffix)) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _write_array(self, number: int, suffix: str, batches: list[NDArray[Any]]) -> None:
        array = rearrange(np.concatenate(batches), "(n k) ... -> n k ...", k=self.job.num_crops)
        with (
            atomic_path(part_path(self.job.directory, number, suffix)) as temporary,
            temporary.open("wb") as file,
        ):
            np.save(file, array)
