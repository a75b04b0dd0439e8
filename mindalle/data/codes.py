"""The data module of stage 2: cached codes with one crop and one caption each, drawn anew in every epoch."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mindalle.data.captions import Fields
from mindalle.data.code_cache import (
    HEADER,
    CachePlan,
    CodeCache,
    identified_tokenizer,
)
from mindalle.data.code_items import Codes, ConditionKind
from mindalle.data.encoding import encode_source
from mindalle.data.module import StreamData
from mindalle.data.part_encoder import EncodingJob
from mindalle.data.samples import open_source
from mindalle.data.stream import Batch, Stream, StreamLoader
from mindalle.data.transforms import TransformConfig
from mindalle.hub import resolve_text_tokenizer
from mindalle.parts import PLAN
from mindalle.run import load_image_tokenizer
from mindalle.text import TextTokenizer
from stage1_vqgan.quantize import PyramidQuantizer, ResidualQuantizer

logger = logging.getLogger(__name__)
NUM_READ = 10_000  # pictures whose captions are looked at before training
Split = Literal["train", "val"]


class CodeData(StreamData):
    """Codes for training a sequence model; what is not encoded yet is, before training starts.

    That is done on the CPU, by one process: for more than some thousand pictures run `tools/encode.py` first,
    with --device or --num-processes, and name its cache.

    Batches have `codes` int64 (B, *code_shape), `cond`: text ids int64 (B, N) or labels int64 (B,), absent
    without a condition, and `keys`, where each picture came from; with soft targets also `targets` float32
    (B, *code_shape, V). Crops, captions and all else that is drawn are a function of seed, epoch and picture.

    Args:
        train: captioned pictures, see `mindalle.data.open_source`, or a cache that `mindalle encode` wrote.
        val: the same, never trained on: crop 0 and the first caption of each; None = no validation.
        image_tokenizer: training run, bundled name, path or release.
        cache_dir: where codes go that are not encoded yet, `train` and `val` in it.
        transform: how pictures become square; None = the image tokenizer's size, cut from the centre.
        num_crops: K of each training picture: the centre, and random ones by `transform`.
        condition: what the model reads: captions, labels, or nothing.
        text_tokenizer: of the captions: `text_tokenizer.json`, BPE-16k directory, or a model that has one,
            see `resolve_text_tokenizer`; to fine-tune a model, its own.
        text_length: N, ids per caption.
        batch_size: images per step and device.
        num_workers: processes that read ahead.
        seed: of everything drawn.
        bpe_dropout: chance that a merge of the text tokenizer is left out in training, in [0, 1].
        soft_targets_temperature: of the distributions over codes that are to be predicted instead of the
            codes, in squared units of the latents, > 0 (RQ-VAE only); None = the codes.
        is_stochastic: draw the codes of training from these distributions, instead of taking the nearest.
        mistakes: largest share of a training picture's codes that the model reads as a near one, in [0, 1]
            (pyramids only); each picture's own share is uniform below it. What they leave over is quantised
            anew, so that later scales learn to repair them; see `PyramidQuantizer.corrupt`.
        allow_pipe: whether `pipe:` addresses may run their commands.
        caption_field: what captions are called in captions files and in the shards' JSON; None = known names.
        image_field: what the pictures' files are called in captions files.

    Raises:
        ValueError: if arguments contradict each other or are out of range.
    """

    def __init__(
        self,
        train: str | list[str],
        image_tokenizer: str,
        val: str | list[str] | None = None,
        cache_dir: str | None = None,
        transform: TransformConfig | None = None,
        num_crops: int = 1,
        condition: ConditionKind = "text",
        text_tokenizer: str | None = None,
        text_length: int = 64,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
        bpe_dropout: float = 0.0,
        soft_targets_temperature: float | None = None,
        is_stochastic: bool = False,
        mistakes: float = 0.0,
        allow_pipe: bool = False,
        caption_field: str | None = None,
        image_field: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if soft_targets_temperature is not None and soft_targets_temperature <= 0:
            raise ValueError(f"soft_targets_temperature must be positive, got {soft_targets_temperature}")
        if is_stochastic and soft_targets_temperature is None:
            raise ValueError("is_stochastic draws from soft targets: set soft_targets_temperature")
        if not 0 <= mistakes <= 1:
            raise ValueError(f"mistakes must be in [0, 1], got {mistakes}")
        if not 0 <= bpe_dropout <= 1:
            raise ValueError(f"bpe_dropout must be in [0, 1], got {bpe_dropout}")
        self.specs: dict[Split, str | list[str]] = {"train": train}
        if val is not None:
            self.specs["val"] = val
        self.image_tokenizer = image_tokenizer
        self.cache_dir = cache_dir
        self.transform = transform
        self.num_crops = num_crops
        self.condition = condition
        self.text_tokenizer_file = text_tokenizer
        self.text_length = text_length
        self.bpe_dropout = bpe_dropout
        self.temperature = soft_targets_temperature
        self.is_stochastic = is_stochastic
        self.mistakes = mistakes
        self.allow_pipe = allow_pipe
        self.fields = Fields(image=image_field, caption=caption_field)
        self.caches: dict[Split, CodeCache] = {}
        """Empty before `setup`."""

    def prepare_data(self) -> None:
        """Encode what is not encoded yet, on the CPU.

        Raises:
            FileNotFoundError: if pictures, image tokenizer or text tokenizer are not there.
            ValueError: if there is nowhere to put the codes, or they cannot be made.
        """
        self._read_text_tokenizer()  # before hours of encoding
        for split, spec in self.specs.items():
            if not _is_cache(spec):
                job = self._job(split, spec)
                if not (job.directory / HEADER).is_file():
                    logger.info(
                        "encoding %s on the CPU, in one process: tools/encode.py is quicker, with "
                        "--device cuda or --num-processes; then name its cache",
                        job.source.name,
                    )
                encode_source(job)

    def _job(self, split: Split, spec: str | list[str]) -> EncodingJob:
        size = load_image_tokenizer(self.image_tokenizer).convnet.image_size
        return EncodingJob(
            source=open_source(spec, self.fields, allow_pipe=self.allow_pipe),
            image_tokenizer=self.image_tokenizer,
            directory=self._directory(split),
            transform=self.transform or TransformConfig(image_size=size),
            num_crops=self.num_crops if split == "train" else 1,
            seed=self.seed,
            has_latents=self.needs_latents,
        )

    @property
    def needs_latents(self) -> bool:
        """Whether codes are computed from latents at each step, not read from the cache."""
        return self.temperature is not None or self.mistakes > 0

    def _directory(self, split: Split) -> Path:
        """Where the codes of a split are."""
        spec = self.specs[split]
        if _is_cache(spec):
            return Path(str(spec))
        if self.cache_dir is None:
            raise ValueError(
                f"{spec} is not encoded yet: set cache_dir, where its codes go, or encode it with "
                "tools/encode.py and name the cache"
            )
        return Path(self.cache_dir) / split

    def _read_text_tokenizer(self) -> TextTokenizer | None:
        """None if the model does not read text."""
        if self.condition != "text":
            return None
        named = self.text_tokenizer_file
        path = None if named is None else resolve_text_tokenizer(named)
        if path is None or not path.exists():
            raise FileNotFoundError(
                f"no text tokenizer at {named}: train one on the captions with "
                f"python tools/train_tokenizer.py {shlex.join(_as_list(self.specs['train']))} "
                f"--length {self.text_length} --out {named or 'text_tokenizer.json'}; to fine-tune a model, "
                "name it, such as minDALL-E/1.3B: it knows the words of its own tokenizer only"
            )
        return TextTokenizer.from_file(path, length=self.text_length)

    def setup(self, stage: str) -> None:
        """Open the caches and see that they have what is wanted, before a model is trained.

        Args:
            stage: of the Trainer.

        Raises:
            FileNotFoundError: if a cache or the text tokenizer is not there.
            CheckpointError: if a cache is damaged or of another image tokenizer.
            ValueError: if the caches lack captions, labels or latents, or do not go together.
        """
        if self.caches:
            return
        self.text_tokenizer = self._read_text_tokenizer()
        tokenizer, tokenizer_hash = identified_tokenizer(self.image_tokenizer)
        if self.temperature is not None and not isinstance(tokenizer.quantizer, ResidualQuantizer):
            raise ValueError(
                "soft targets are for residual codes (RQ-VAE), and this image tokenizer has one code per "
                "position: leave soft_targets_temperature out"
            )
        if self.mistakes and not isinstance(tokenizer.quantizer, PyramidQuantizer):
            raise ValueError(
                "mistakes are for pyramids of codes, whose later scales can repair them, and this is a "
                f"{type(tokenizer).__name__}: leave mistakes out"
            )
        self.tokenizer = tokenizer.requires_grad_(False)
        caches = {
            split: CodeCache(self._directory(split), tokenizer_hash=tokenizer_hash) for split in self.specs
        }
        for cache in caches.values():
            self._check(cache)
        if "val" in caches:
            _check_pair(caches["train"].plan, caches["val"].plan)
            if self.condition == "class":
                _check_classes(caches["train"], caches["val"])
        for split, cache in caches.items():
            _describe(split, cache)
            if self.text_tokenizer is not None:
                _warn_of_losses(split, cache, self.text_tokenizer)
        self.caches = caches

    def _check(self, cache: CodeCache) -> None:
        """Refuse a cache that lacks what is wanted."""
        without, count = cache.header.num_without_captions, cache.header.count
        if self.condition == "text" and without == count:
            raise ValueError(
                f"{count:,} of {count:,} pictures in {cache.directory} have no caption: set condition to "
                "class or none, or encode captioned pictures"
            )
        if self.condition == "text" and without:
            logger.warning(
                "%s of %s pictures in %s have no caption: they train the null condition",
                *(f"{without:,}", f"{count:,}", cache.directory),
            )
        if self.condition == "class" and not cache.header.num_classes:
            raise ValueError(
                f"not all pictures in {cache.directory} have a class: expected class folders, or .cls in tars"
            )
        if self.needs_latents and not cache.plan.has_latents:
            raise ValueError(
                f"soft targets and mistakes need latents, and {cache.directory} has none: "
                "encode again with --latents"
            )

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the codes of an image; after `setup`."""
        return self.caches["train"].plan.code_shape

    @property
    def num_classes(self) -> int | None:
        """Of the training pictures, where the condition is their class; after `setup`."""
        return self.caches["train"].header.num_classes if self.condition == "class" else None

    def codebook(self) -> Tensor:
        """All codebooks (D, V, C) of the image tokenizer, which an RQ-Transformer reads codes with."""
        return self.tokenizer.codebook().detach()

    def encode_prompts(self, prompts: Sequence[str] | Sequence[int]) -> Tensor:
        """Conditions to draw pictures for; after `setup`.

        Args:
            prompts: P texts, or labels where the condition is a class.

        Returns:
            int64 (P, N) or (P,).

        Raises:
            ValueError: if they are not what the model reads.
        """
        expected = {"text": str, "class": int}.get(self.condition)
        if expected is None or not all(isinstance(prompt, expected) for prompt in prompts):
            wanted = {"text": "texts", "class": "labels"}.get(self.condition, "no prompts")
            raise ValueError(f"a model with the condition {self.condition} reads {wanted}, got {prompts!r}")
        if self.text_tokenizer is None:
            return torch.tensor(prompts)
        return self.text_tokenizer.encode([str(prompt) for prompt in prompts])

    def train_dataloader(self) -> Any:
        """Shuffled batches, which go on where a killed run was."""
        return self.resumed(self._loader("train", is_train=not self.is_overfitting))

    def val_dataloader(self) -> Any:
        """Batches in order; none without `val`."""
        return self._loader("val", is_train=False) if "val" in self.caches else []

    def _loader(self, split: Split, *, is_train: bool) -> StreamLoader:
        codes = Codes(
            self.caches[split],
            self.condition,
            self.text_tokenizer,
            seed=self.seed,
            is_train=is_train,
            bpe_dropout=self.bpe_dropout,
            has_latents=self.needs_latents,
        )
        stream = Stream(codes, **self.stream_settings(is_train=is_train))
        return StreamLoader(stream, num_workers=self.num_workers)

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Compute codes from latents where the batch is: soft targets are too large for another process.

        Args:
            batch: with `latents`, it gets `codes` and the `targets` or the `past` that go with them.
            dataloader_idx: of no account.

        Returns:
            The batch.
        """
        if "latents" not in batch:
            return batch
        latents, seed = batch["latents"].float(), batch["seed"]
        quantizer = self.tokenizer.quantizer.to(latents.device)
        generator = None if seed is None else torch.Generator(latents.device).manual_seed(seed)
        kept = {name: value for name, value in batch.items() if name not in ("latents", "seed")}
        if isinstance(quantizer, PyramidQuantizer):
            if seed is None:
                return kept
            share = torch.rand(len(latents), generator=generator, device=latents.device) * self.mistakes
            read, codes = quantizer.corrupt(latents, share=share, generator=generator)
            return {**kept, "codes": codes, "past": read}
        assert isinstance(quantizer, ResidualQuantizer)
        assert self.temperature is not None
        targets, codes = quantizer.soft_codes(
            latents,
            self.temperature,
            sample=self.is_stochastic and seed is not None,
            generator=generator,
        )
        return {**kept, "codes": codes, "targets": targets}


def _is_cache(spec: str | list[str]) -> bool:
    return isinstance(spec, str) and any((Path(spec) / name).is_file() for name in (PLAN, HEADER))


def _as_list(spec: str | list[str]) -> list[str]:
    return [spec] if isinstance(spec, str) else spec


def _describe(split: Split, cache: CodeCache) -> None:
    """Say what a cache holds."""
    header = cache.header
    logger.info(
        "%s: codes of %s pictures in %s, %s with captions, %d classes, %s skipped as unreadable",
        *(split, f"{header.count:,}", cache.directory, f"{header.count - header.num_without_captions:,}"),
        *(header.num_classes, f"{header.num_unreadable:,}"),
    )


def _warn_of_losses(split: Split, cache: CodeCache, tokenizer: TextTokenizer) -> None:
    """Say how many captions the model cannot read as they are; of many pictures some are looked at."""
    pictures = map(cache.picture, range(0, len(cache), -(-len(cache) // NUM_READ)))
    captions = [caption for picture in pictures for caption in picture.captions]
    if not captions:
        return
    num_unknown, num_cut = tokenizer.count_losses(captions)
    if num_unknown or num_cut:
        logger.warning(
            "%s: %s of %s captions have unknown words, %s are cut at %d ids%s",
            *(split, f"{num_unknown:,}", f"{len(captions):,}", f"{num_cut:,}", tokenizer.length),
            ": train a text tokenizer on them if that is too many"
            if 10 * num_unknown > len(captions)
            else "",
        )


def _check_pair(train: CachePlan, val: CachePlan) -> None:
    """Codes and labels of both must mean the same."""
    if train.code_shape != val.code_shape:
        raise ValueError(
            f"train has codes of shape {train.code_shape}, val of {val.code_shape}: encode one of them again"
        )
    num_common = min(len(train.classes), len(val.classes))
    if train.classes[:num_common] != val.classes[:num_common]:
        names = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            "labels are numbers in the order of the classes, so train and val must have the same, got "
            f"{', '.join(names[:5])} in one of them only"
        )


def _check_classes(train: CodeCache, val: CodeCache) -> None:
    """The model has the classes of training alone."""
    expected, got = train.header.num_classes, val.header.num_classes
    if got > expected:
        names = ", ".join(val.plan.classes[expected : expected + 5])
        raise ValueError(
            f"train has {expected} classes, so val may have {expected} at most, got {got}"
            f"{f' ({names} in val only)' if names else ''}: leave their pictures out of val, or encode train "
            "again with these classes (an empty folder makes one)"
        )
