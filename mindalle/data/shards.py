"""Captioned images in WebDataset tar shards: `<key>.png` (or .jpg, .webp) beside `<key>.json` with `captions`."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from typing import Any

import pytorch_lightning as pl
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from mindalle.image import fit, on_white, to_tensor

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


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
                f"no shards match {pattern}: point data.train_shards at WebDataset .tar files"
            )
        shards += found
    return shards


def decode_sample(sample: dict[str, Any], image_size: int) -> dict[str, Any]:
    """One tar entry to a training sample.

    Args:
        sample: bytes by suffix, as WebDataset groups them.
        image_size: side in pixels that the image is resized and cropped to.

    Returns:
        `images` (3, H, W) in [-1, 1] and `captions`, a list of strings.

    Raises:
        ValueError: if there is no image.
    """
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None:
        raise ValueError(
            f"sample {sample['__key__']} of {sample['__url__']} has no image ({', '.join(IMAGE_SUFFIXES)})"
        )
    image = on_white(Image.open(io.BytesIO(sample[suffix])))
    captions = json.loads(sample["json"])["captions"] if "json" in sample else []
    return {"images": to_tensor(fit(image, (image_size, image_size))), "captions": captions}


def _skip_and_warn(error: BaseException) -> bool:
    logger.warning("skipped a sample: %s", error)
    return True


def shard_dataset(shards: Sequence[str], image_size: int, *, shuffle: int) -> Any:
    """An iterable dataset over shards.

    Args:
        shards: tar files.
        image_size: side in pixels.
        shuffle: size of the shuffle buffer; 0 = in order.

    Returns:
        Yields samples as `decode_sample` makes them; broken ones are skipped with a warning.
    """

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        return decode_sample(sample, image_size)

    dataset = wds.WebDataset(
        list(shards),
        shardshuffle=len(shards) if shuffle else False,
        empty_check=False,
        handler=_skip_and_warn,
    )
    if shuffle:
        dataset = dataset.shuffle(shuffle)
    return dataset.map(decode, handler=_skip_and_warn)


class ImageShards(pl.LightningDataModule):
    """Images of WebDataset shards, for training a tokenizer.

    Args:
        train_shards: files or patterns.
        val_shards: files or patterns, never trained on.
        image_size: side in pixels.
        batch_size: images per step and device.
        num_workers: processes that read ahead.
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
        self.train_shards = train_shards
        self.val_shards = val_shards
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        """Shuffled batches with `images` (B, 3, H, W)."""
        return self._loader(self.train_shards, shuffle=2000)

    def val_dataloader(self) -> Any:
        """Batches in order."""
        return self._loader(self.val_shards, shuffle=0)

    def _loader(self, patterns: list[str], *, shuffle: int) -> Any:
        dataset = shard_dataset(find_shards(patterns), self.image_size, shuffle=shuffle).map(_only_images)
        return DataLoader(
            dataset, batch_size=self.batch_size, num_workers=self.num_workers, drop_last=bool(shuffle)
        )


def _only_images(sample: dict[str, Any]) -> dict[str, Any]:
    return {"images": sample["images"]}
