"""The data module of captioned pictures: what tokenizers and CLIP are trained on."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mindalle.data.captions import Fields
from mindalle.data.folders import Folder
from mindalle.data.module import StreamData
from mindalle.data.samples import Sample, Source, Unreadable, open_source, seed_of
from mindalle.data.shard_stream import ShardStream
from mindalle.data.shards import Shards
from mindalle.data.stream import MAX_MISSES, Batch, Stream, StreamLoader
from mindalle.data.transforms import TransformConfig, transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Picture:
    """A sample as it goes into a batch."""

    key: str
    image: Tensor  # (3, H, W) in [-1, 1]
    caption: str  # "" without
    label: int | None


class Pictures:
    """The samples of a source, transformed and each with one caption, for a stream.

    Args:
        source: of the samples.
        config: of the transform.
        seed: of crops, flips and captions in training.
        num_samples: of an epoch.
        is_train: draws crop, flip and caption, rather than the centre and the first caption.
    """

    def __init__(
        self, source: Any, config: TransformConfig, *, seed: int, num_samples: int, is_train: bool
    ) -> None:
        self.source = source
        self.config = config
        self.seed = seed
        self.num_samples = num_samples
        self.is_train = is_train

    def __len__(self) -> int:
        return self.num_samples

    def load(self, index: int, epoch: int) -> _Picture | Unreadable:
        """Read the sample of an index and draw; see `Items.load`."""
        return self.draw(self.source[index], epoch)

    def draw(self, sample: Sample | Unreadable, epoch: int) -> _Picture | Unreadable:
        """Transform a sample and choose its caption."""
        if isinstance(sample, Unreadable):
            return sample
        captions = sample.captions or ("",)
        if self.is_train:
            rng = random.Random(seed_of(self.seed, epoch, sample.key))
            caption, image = rng.choice(captions), transform(sample.image, self.config, rng)
        else:
            caption, image = captions[0], transform(sample.image, self.config, None)
        return _Picture(sample.key, image, caption, sample.label)

    def collate(self, loaded: Sequence[_Picture], epoch: int, batch: int) -> Batch:
        """`images` (B, 3, H, W), `captions`, `keys`, and `labels` (B,) if the source has classes."""
        tensors: Batch = {"images": torch.stack([picture.image for picture in loaded])}
        if self.source.classes:
            tensors["labels"] = torch.tensor([picture.label for picture in loaded])
        return {
            **tensors,
            "captions": [picture.caption for picture in loaded],
            "keys": [picture.key for picture in loaded],
        }


class ImageData(StreamData):
    """Captioned pictures from folders or shards, in batches.

    A batch has `images` (B, 3, H, W) float32 in [-1, 1], `captions` (B strings, "" where a picture has none;
    in training one of several is drawn in each epoch), `keys` (where each came from), `num_skipped` (pictures
    that could not be read and were replaced) and, if the source has classes, `labels` (B,) int64.

    Args:
        train: what `open_source` opens, or a list of shards.
        val: the same, never trained on; None = no validation.
        transform: resizing, cropping and flipping.
        batch_size: B, pictures per step and device, >= 1.
        num_workers: processes that read ahead, >= 0.
        seed: of the order, crops, flips and captions.
        epoch_size: pictures of a training epoch, over all devices; only for shards, and needed where they are
            not local. None = as many as there are.
        val_size: the same of a validation.
        allow_pipe: whether `pipe:` addresses may run their commands.
        caption_field: what captions are called in captions files and in the shards' JSON; None = known names.
        image_field: what the pictures' files are called in captions files.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        transform: TransformConfig | None = None,
        batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        epoch_size: int | None = None,
        val_size: int | None = None,
        allow_pipe: bool = False,
        caption_field: str | None = None,
        image_field: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.train = train
        self.val = val
        self.transform = transform or TransformConfig()
        self.epoch_size = epoch_size
        self.val_size = val_size
        self.allow_pipe = allow_pipe
        self.fields = Fields(image=image_field, caption=caption_field)
        self.train_source: Source | None = None
        """None before `setup`."""
        self.val_source: Source | None = None

    def setup(self, stage: str) -> None:
        """Open the sources and make sure that there is something to read, before a model is trained.

        Args:
            stage: of the Trainer.

        Raises:
            FileNotFoundError: if a source is not there.
            ValueError: if a source cannot be understood or holds no readable picture, or none with a caption
                where the model needs one, if it is not known how long an epoch is, or if the classes of the
                two sources differ.
        """
        if self.train_source is None:
            self.train_source = self._open(self.train, self.epoch_size, "epoch_size")
        if self.val_source is None and self.val is not None:
            self.val_source = self._open(self.val, self.val_size, "val_size")
            _check_classes(self.train_source, self.val_source)

    def _open(self, spec: str | list[str], size: int | None, name: str) -> Source:
        """A source that has readable pictures; a CLIP's have captions."""
        source = open_source(spec, self.fields, allow_pipe=self.allow_pipe)
        _check_size(source, size, name)
        if self.trainer and getattr(self.trainer.lightning_module, "needs_captions", False):
            source = _captioned(source)
        _check_pictures(source)
        if isinstance(source, Shards) and source.is_local:
            logger.info("%s: %s pictures", source.name, f"{len(source):,}")
        return source

    def train_dataloader(self) -> Any:
        """Shuffled batches, which go on where a killed run was."""
        assert self.train_source is not None
        is_train = not self.is_overfitting
        return self.resumed(self._loader(self.train_source, self.epoch_size, is_train=is_train))

    def val_dataloader(self) -> Any:
        """Batches in order; none without `val`."""
        if self.val_source is None:
            return []
        return self._loader(self.val_source, self.val_size, is_train=False)

    def _loader(self, source: Source, size: int | None, *, is_train: bool) -> StreamLoader:
        num_samples = size or len(source)
        pictures = Pictures(
            source, self.transform, seed=self.seed, num_samples=num_samples, is_train=is_train
        )
        kind = ShardStream if isinstance(source, Shards) else Stream
        stream = kind(pictures, **self.stream_settings(is_train=is_train))
        return StreamLoader(stream, num_workers=self.num_workers)


def _captioned(source: Source) -> Source:
    """The pictures of a source that have a caption."""
    captioned = source.captioned()
    if isinstance(source, Shards) and not source.is_local:  # nobody knows how many there are
        return captioned
    count, num_left = len(source), len(captioned)
    if not num_left:
        raise ValueError(
            f"no picture of {source.name} has a caption, none of {count:,}: this model learns from "
            "pictures with captions"
        )
    if num_left < count:
        logger.warning(
            "%s: %s of %s pictures have no caption and are left out",
            *(source.name, f"{count - num_left:,}", f"{count:,}"),
        )
    return captioned


def _check_size(source: Source, size: int | None, name: str) -> None:
    """Whether it is known how long an epoch is; `name` is the argument that gives its `size`."""
    if size is not None and size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    if size is not None and isinstance(source, Folder):
        raise ValueError(
            f"{name} is for shards, but {source.name} is a folder: for shorter epochs set "
            "trainer.limit_train_batches or limit_val_batches"
        )
    if size is None and isinstance(source, Shards) and not source.is_local:
        raise ValueError(
            f"how many pictures {source.name} holds is not known before they are read: "
            f"set data.{name}, the number that makes an epoch"
        )


def _check_pictures(source: Source) -> None:
    """There must be a picture that can be read."""
    samples = (sample for part in range(source.num_parts) for sample in source.read(part))
    reason = "there are none"
    for sample in islice(samples, MAX_MISSES):
        if isinstance(sample, Sample):
            return
        reason = f"{sample.key}: {sample.reason}"
    raise ValueError(f"no readable picture in {source.name}: {reason}")


def _check_classes(train: Source, val: Source) -> None:
    """Labels of the two must mean the same, if both have any."""
    are_numbers = isinstance(train, Shards) and isinstance(val, Shards)
    if train.classes == val.classes or are_numbers or not (train.classes and val.classes):
        return
    difference = sorted(set(train.classes) ^ set(val.classes))
    raise ValueError(
        f"{val.name} must have the classes of {train.name}, since labels are numbers in that order; only "
        f"one of them has {', '.join(difference[:5])}: make that folder in the other, empty if need be"
    )
