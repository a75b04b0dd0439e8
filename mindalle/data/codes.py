"""The data module of stage 2: cached codes with one caption each, drawn anew every time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mindalle.data.code_cache import CodeCache, file_hash, write_code_cache
from mindalle.data.shards import find_shards, shard_dataset
from mindalle.text import TextTokenizer
from stage1_vqgan import load_tokenizer


class CachedCodes(pl.LightningDataModule):
    """Codes and captions for training a text-conditional model.

    What is missing of the cache and the text tokenizer is made before training starts.

    Args:
        image_tokenizer: native checkpoint directory of the tokenizer.
        train_shards: WebDataset files or patterns.
        val_shards: the same, never trained on.
        cache_dir: where the codes go, one directory each for train and val.
        text_tokenizer: `text_tokenizer.json`; trained on the training captions if there is none.
        text_vocab_size: of a text tokenizer that is trained.
        text_length: N, ids per caption.
        batch_size: images per step and device.
    """

    def __init__(
        self,
        image_tokenizer: str,
        train_shards: list[str],
        val_shards: list[str],
        cache_dir: str,
        text_tokenizer: str,
        text_vocab_size: int = 2048,
        text_length: int = 16,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.image_tokenizer = Path(image_tokenizer)
        self.shards = {"train": train_shards, "val": val_shards}
        self.cache_dir = Path(cache_dir)
        self.text_tokenizer_path = Path(text_tokenizer)
        self.text_vocab_size = text_vocab_size
        self.text_length = text_length
        self.batch_size = batch_size

    def prepare_data(self) -> None:
        """Encode the images and train the text tokenizer, whichever is not there yet."""
        tokenizer, tokenizer_hash = load_tokenizer(self.image_tokenizer), self._tokenizer_hash()
        for split, patterns in self.shards.items():
            if not (self.cache_dir / split).exists():
                samples = shard_dataset(find_shards(patterns), tokenizer.convnet.image_size, shuffle=0)
                write_code_cache(self.cache_dir / split, samples, tokenizer, tokenizer_hash=tokenizer_hash)
        if not self.text_tokenizer_path.exists():
            captions = (caption for captions in self._cache("train").captions for caption in captions)
            TextTokenizer.train(captions, vocab_size=self.text_vocab_size, length=self.text_length).save(
                self.text_tokenizer_path
            )

    def _tokenizer_hash(self) -> str:
        file = self.image_tokenizer / "image_tokenizer.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: export or convert the image tokenizer to a native directory")
        return file_hash(file)

    def _cache(self, split: str) -> CodeCache:
        return CodeCache(self.cache_dir / split, tokenizer_hash=self._tokenizer_hash())

    def train_dataloader(self) -> Any:
        """Shuffled batches with `codes` (B, *code_shape) and `cond` (B, N)."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Batches in order, each image with its first caption."""
        return self._loader("val")

    def _loader(self, split: str) -> Any:
        cache = self._cache(split)
        if not any(cache.captions):
            raise ValueError(
                f"the images of {self.cache_dir / split} have no captions: nothing to learn text from"
            )
        text_tokenizer = TextTokenizer.from_file(self.text_tokenizer_path, length=self.text_length)
        is_train = split == "train"
        collate = partial(collate_captioned, text_tokenizer=text_tokenizer, is_train=is_train)
        return DataLoader(cache, batch_size=self.batch_size, shuffle=is_train, collate_fn=collate)


def collate_captioned(
    samples: Sequence[dict[str, Any]], *, text_tokenizer: TextTokenizer, is_train: bool
) -> dict[str, Tensor]:
    """Stack codes and encode one caption of each image, "" where it has none.

    Args:
        samples: B mappings with `codes` and `captions`.
        text_tokenizer: long captions are cut without a word.
        is_train: draw the caption at random, by torch's generator; otherwise take the first.

    Returns:
        `codes` (B, *code_shape) and `cond` (B, N).
    """
    texts = []
    for sample in samples:
        captions = sample["captions"] or [""]
        texts.append(captions[int(torch.randint(len(captions), ()))] if is_train else captions[0])
    return {
        "codes": torch.stack([sample["codes"] for sample in samples]),
        "cond": text_tokenizer.encode(texts, warns_of_loss=False),
    }
