"""Captioned images in WebDataset shards: `KEY.png` (or .jpg, .webp) beside `KEY.json` with `captions`."""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Iterator, Sequence
from functools import partial
from glob import glob
from typing import Any

import pytorch_lightning as pl
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from mindalle.image import fit, on_white, to_tensor

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
SHUFFLE_BUFFER = 2000  # samples held in memory, as compressed bytes


def find_shards(patterns: Sequence[str]) -> list[str]:
    """Expand file patterns to shard files.

    Args:
        patterns: paths, `*` allowed.

    Returns:
        The files, sorted.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
    """
    shards: list[str] = []
    for pattern in patterns:
        found = sorted(glob(pattern))
        if not found:
            raise FileNotFoundError(
                f"no shards match {pattern}: "
                "point data.train_shards and data.val_shards at WebDataset .tar files"
            )
        shards += found
    return shards


def decode_sample(sample: dict[str, Any], image_size: int) -> dict[str, Any]:
    """One tar entry to a training sample.

    Args:
        sample: bytes by suffix, as WebDataset groups them.
        image_size: side in pixels that the image is resized and cropped to.

    Returns:
        `images` (3, H, W) in [-1, 1] and `captions`, a list of strings, empty where the entry has none.

    Raises:
        ValueError: if there is no image, or the entry is damaged.
    """
    where = f"sample {sample['__key__']} of {sample['__url__']}"
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None:
        raise ValueError(f"{where} has no image ({', '.join(IMAGE_SUFFIXES)})")
    try:
        image = on_white(Image.open(io.BytesIO(sample[suffix])))
        captions = json.loads(sample.get("json", "{}")).get("captions", [])
        "".join(captions).encode()  # text that no tokenizer reads: halves of surrogate pairs
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(captions, list):
        raise ValueError(f"{where}: captions must be a list of strings, got {captions!r}")
    return {"images": to_tensor(fit(image, (image_size, image_size))), "captions": captions}


def shard_dataset(shards: Sequence[str], image_size: int, *, shuffle: int) -> Any:
    """An iterable dataset over shards.

    Args:
        shards: tar files; the workers of a DataLoader share them out.
        image_size: side in pixels.
        shuffle: size of the shuffle buffer; 0 = in order. torch's generator decides the order.

    Returns:
        Yields samples as `decode_sample` makes them; broken ones are skipped with a warning.
    """
    return wds.DataPipeline(
        wds.SimpleShardList(list(shards)),
        wds.split_by_worker,
        partial(_shuffled, buffer_size=len(shards) if shuffle else 0),
        wds.tarfile_to_samples(handler=_skip_and_warn),
        partial(_shuffled, buffer_size=shuffle),
        wds.map(partial(decode_sample, image_size=image_size), handler=_skip_and_warn),
    )


def _shuffled(samples: Iterator[Any], buffer_size: int) -> Iterator[Any]:
    """WebDataset's shuffle, in another order in each epoch and worker, all of which follow from one seed."""
    if buffer_size == 0:
        return samples
    rng = random.Random(int(torch.randint(1 << 62, ())))
    return wds.shuffle(buffer_size, rng=rng)(samples)  # type: ignore[no-any-return]


def _skip_and_warn(error: Exception) -> bool:
    """A WebDataset handler: True = go on."""
    # of its arguments some are WebDataset's: the stream and the name of the shard
    reason = ": ".join(part for part in error.args if isinstance(part, str))
    logger.warning("skipped what cannot be read: %s", reason or repr(error))
    return True


class ImageShards(pl.LightningDataModule):
    """Images of WebDataset shards, for training a tokenizer.

    Args:
        train_shards: files or patterns.
        val_shards: files or patterns, never trained on.
        image_size: side in pixels, >= 1.
        batch_size: images per step, >= 1.
        num_workers: processes that read ahead, >= 0; no more than there are shards.
    """

    def __init__(
        self,
        train_shards: list[str],
        val_shards: list[str],
        image_size: int = 64,
        batch_size: int = 32,
        num_workers: int = 1,
    ) -> None:
        super().__init__()
        if image_size < 1 or batch_size < 1 or num_workers < 0:
            raise ValueError(
                "image_size and batch_size must be at least 1 and num_workers at least 0, "
                f"got {image_size}, {batch_size} and {num_workers}"
            )
        self.train_shards = train_shards
        self.val_shards = val_shards
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Make sure that there is something to read: training on nothing would go on for ever.

        Args:
            stage: of the Trainer.

        Raises:
            FileNotFoundError: if a pattern matches nothing.
            ValueError: if the shards hold no readable image, or there are several devices.
        """
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"shards are not shared out among devices yet, got {self.trainer.world_size}: "
                "set trainer.devices to 1"
            )
        for patterns in (self.train_shards, self.val_shards):
            dataset = shard_dataset(find_shards(patterns), self.image_size, shuffle=0)
            if next(iter(dataset), None) is None:
                raise ValueError(
                    f"no readable image in {', '.join(patterns)}: expected WebDataset .tar files with "
                    f"KEY.{' or KEY.'.join(IMAGE_SUFFIXES)}"
                )

    def train_dataloader(self) -> Any:
        """Shuffled batches with `images` (B, 3, H, W)."""
        return self._loader(self.train_shards, shuffle=SHUFFLE_BUFFER)

    def val_dataloader(self) -> Any:
        """Batches in order."""
        return self._loader(self.val_shards, shuffle=0)

    def _loader(self, patterns: list[str], *, shuffle: int) -> Any:
        shards = find_shards(patterns)
        dataset = shard_dataset(shards, self.image_size, shuffle=shuffle).compose(wds.map(_only_images))
        workers = min(self.num_workers, len(shards))
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=workers)


def _only_images(sample: dict[str, Any]) -> dict[str, Any]:
    return {"images": sample["images"]}
