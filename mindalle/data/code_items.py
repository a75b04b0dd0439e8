"""Cached codes as samples for the stream: which crop and which caption, and what the model reads of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mindalle.data.code_cache import CachedPicture, CodeCache
from mindalle.data.samples import seed_of
from mindalle.data.stream import Batch
from mindalle.text import TextTokenizer

ConditionKind: TypeAlias = Literal["text", "class", "none"]


@dataclass(frozen=True)
class _Loaded:
    """A picture as it goes into a batch."""

    key: str
    codes: Tensor  # int64 (*code_shape)
    cond: Tensor | None  # int64 (N,) or ()
    latents: Tensor | None  # float16 (C, h, w)


class Codes:
    """The pictures of a cache, each with one crop and one caption, for a stream.

    Args:
        cache: of the codes.
        condition: what of the pictures is read.
        text_tokenizer: of captions; None where they are not read.
        seed: of crops, captions and BPE dropout in training.
        is_train: draws these, rather than crop 0 and the first caption.
        bpe_dropout: in [0, 1], in training.
        has_latents: for soft targets.
    """

    def __init__(
        self,
        cache: CodeCache,
        condition: ConditionKind,
        text_tokenizer: TextTokenizer | None,
        *,
        seed: int,
        is_train: bool,
        bpe_dropout: float,
        has_latents: bool,
    ) -> None:
        self.cache = cache
        self.condition = condition
        self.text_tokenizer = text_tokenizer
        self.seed = seed
        self.is_train = is_train
        self.bpe_dropout = bpe_dropout if is_train else 0.0
        self.has_latents = has_latents

    def __len__(self) -> int:
        return len(self.cache)

    def load(self, index: int, epoch: int) -> _Loaded:
        """Read a picture's codes and draw; see `Items.load`."""
        picture = self.cache.picture(index)
        rng = random.Random(seed_of(self.seed, epoch, picture.key))
        crop = rng.randrange(self.cache.plan.num_crops) if self.is_train else 0
        latents = self.cache.latents(index, crop) if self.has_latents else None
        return _Loaded(picture.key, self.cache.codes(index, crop), self._cond(picture, rng), latents)

    def _cond(self, picture: CachedPicture, rng: random.Random) -> Tensor | None:
        if self.condition == "class":
            return torch.tensor(picture.label)
        if self.text_tokenizer is None:
            return None
        captions = picture.captions or ("",)
        caption = rng.choice(captions) if self.is_train else captions[0]
        ids = self.text_tokenizer.encode([caption], warns_of_loss=False, dropout=self.bpe_dropout, rng=rng)
        return ids[0]

    def collate(self, loaded: Sequence[_Loaded], epoch: int, batch: int) -> Batch:
        """`codes`, `cond`, `keys`; for soft targets `latents` (B, C, h, w) and the `seed` of draws."""
        collated: Batch = {
            "codes": torch.stack([one.codes for one in loaded]),
            "keys": [one.key for one in loaded],
        }
        if self.condition != "none":
            collated["cond"] = torch.stack([one.cond for one in loaded if one.cond is not None])
        if self.has_latents:
            collated["latents"] = torch.stack([one.latents for one in loaded if one.latents is not None])
            # the key tells the ranks apart
            collated["seed"] = seed_of(self.seed, epoch, batch, loaded[0].key) if self.is_train else None
        return collated
