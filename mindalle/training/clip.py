"""Training a CLIP: pictures and their captions are drawn together, all others of the batch pushed apart.

Legend: n pairs of a batch over all processes, B of one process, C features, N ids of a caption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mindalle.clip import ClipConfig, read_clip_tokenizer, unit
from mindalle.evaluation.retrieval import ranks_of_own
from mindalle.hub import resolve_text_tokenizer
from mindalle.run import RUN_KEY, load_own_clip
from mindalle.training.base import OptimizerConfig, Training

RECALLS = (1, 5)  # of how many captions one must be the picture's own


class ClipTraining(Training):
    """Fits a CLIP to captioned pictures.

    Batches have `images` (B, 3, H, W) in [-1, 1], H = W = image_size, and `captions`, a list of B strings; a
    picture with an empty caption is left out.

    Args:
        config: of the model.
        text_tokenizer: file of the captions' tokenizer, `text_tokenizer.json`, or a model that has one.
        optimizer: settings; None = the defaults.
        max_logit_scale: 1 / temperature is kept in [1, max_logit_scale]; >= 1, the paper's is 100.
        pretrained: the CLIP to start from, a training run or a native checkpoint, see `load_own_clip`; its
            config and its text tokenizer are taken, and must not be passed.

    Raises:
        ValueError: if a number is out of range, or not exactly one of `pretrained` and `config` with
            `text_tokenizer` is passed.
        FileNotFoundError: if there is no such pretrained model.
    """

    kind = "clip"
    needs_captions = True  # `ImageData` leaves out pictures without

    def __init__(
        self,
        config: ClipConfig | None = None,
        text_tokenizer: str | None = None,
        optimizer: OptimizerConfig | None = None,
        max_logit_scale: float = 100.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(optimizer)
        if max_logit_scale < 1:
            raise ValueError(f"max_logit_scale must be at least 1, got {max_logit_scale}")
        self.text_tokenizer = text_tokenizer
        self.max_logit_scale = max_logit_scale
        if pretrained is not None and config is None and text_tokenizer is None:
            clip = load_own_clip(pretrained)
            self.model, self.config, self.tokenize = clip.model.train(), clip.config, clip.tokenize
        elif pretrained is None and config is not None and text_tokenizer is not None:
            self.model, self.config = config.build(), config
        else:
            raise ValueError(
                "pass either pretrained, or config and text_tokenizer: a pretrained CLIP brings both; got "
                f"pretrained {pretrained!r}, text_tokenizer {text_tokenizer!r} and "
                f"{'no config' if config is None else 'a config'}"
            )
        self.retrieval = CaptionRetrieval()

    def model_config(self) -> ClipConfig:
        """The config of the model, which does not keep it."""
        return self.config

    def setup(self, stage: str) -> None:
        """Read the text tokenizer.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the model's vocabulary is not that of the tokenizer.
        """
        if self.text_tokenizer is not None:
            where = "model.init_args.config"
            file = resolve_text_tokenizer(self.text_tokenizer)
            self.tokenize = read_clip_tokenizer(file, self.config, where=where)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss over the pairs of all processes.

        Raises:
            ValueError: if no picture has a caption, or the pictures are of another size than the model's.
        """
        images, texts, ids = self._encode(batch)
        if self.trainer.world_size > 1:
            images, texts, ids = (self._gather(part) for part in (images, texts, ids))
        images, texts, ids = self._with_caption(images, texts, ids)
        if not len(ids):
            raise ValueError(
                f"none of the {len(batch['captions'])} pictures of batch {batch_idx} has a caption: "
                "a CLIP learns from pictures with captions"
            )
        loss = self._log_loss(images, texts, ids, "train")
        self.log("train/temperature", 1 / self.model.logit_scale.detach().exp(), batch_size=len(ids))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss on held-out pairs, and keep their features for the retrieval."""
        # of this process alone: the last batches may differ in size
        images, texts, ids = self._with_caption(*self._encode(batch))
        if len(ids):
            self._log_loss(images, texts, ids, "val")
        self.retrieval.update(images, texts, ids)  # even of nothing, or other processes would wait for it

    def on_validation_epoch_end(self) -> None:
        """Log how often a picture finds its caption among all of the validation set.

        Raises:
            ValueError: if no picture has a caption.
        """
        recalls = {f"val/{name}": value for name, value in self.retrieval.compute().items()}
        self.log_dict(recalls, prog_bar=True, sync_dist=True)
        self.retrieval.reset()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then keep the temperature in its range (Radford et al. 2021, section 2.5)."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(self.max_logit_scale))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the weights are of, and the words that the text ids stand for."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[RUN_KEY]["text_tokenizer"] = self.tokenize.to_str()

    def _encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features of pictures and captions, float32 (B, C) each, and the captions' ids (B, N)."""
        images, size = batch["images"], self.config.image_size
        if tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images must be (B, 3, {size}, {size}) for this CLIP, got {tuple(images.shape)}: "
                f"set the data's transform.image_size to {size}"
            )
        pixels = self.config.normalise(images)
        ids = self.tokenize(batch["captions"]).to(images.device)
        return unit(self.model.encode_image(pixels)), unit(self.model.encode_text(ids)), ids

    def _gather(self, part: Tensor) -> Tensor:
        """The part of all processes, with gradients: one's features are in the others' losses too."""
        gathered = self.all_gather(part, sync_grads=True)
        assert isinstance(gathered, Tensor)
        return rearrange(gathered, "process b c -> (process b) c")

    def _with_caption(self, images: Tensor, texts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        has_caption = ids[:, 1] != self.tokenize.end_id  # else the end follows the start
        return images[has_caption], texts[has_caption], ids[has_caption]

    def _log_loss(self, images: Tensor, texts: Tensor, ids: Tensor, stage: str) -> Tensor:
        logits = pair_logits(images, texts, ids, self.model.logit_scale.exp())
        loss, accuracy = contrastive_loss(logits)
        metrics = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(metrics, batch_size=len(ids), prog_bar=True, sync_dist=stage == "val")
        return loss


def pair_logits(images: Tensor, texts: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Scaled similarities of all pictures and captions of a batch.

    The caption of another picture that says the same as one's own is no mistake: it is left out, as are the
    other pictures of one's own caption.

    Args:
        images: (n, C), unit features; picture i belongs to caption i.
        texts: (n, C), unit features.
        ids: (n, N), of the captions.
        scale: 1 / temperature, a scalar.

    Returns:
        float32 (n, n), pictures by captions, -inf where a pair is left out.
    """
    is_same = (ids[:, None] == ids[None]).all(dim=-1)  # (n, n)
    is_twin = is_same & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 cannot tell logits near 100 apart
        logits = scale.float() * images.float() @ texts.float().T
    return logits.masked_fill(is_twin, -torch.inf)


def contrastive_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE: each picture is to find its caption, and each caption its picture.

    Args:
        logits: float32 (n, n), pictures by captions, see `pair_logits`.

    Returns:
        The loss, and the share of pictures and captions whose likeliest partner is their own.

    Source: Radford et al. 2021, figure 3.
    """
    own = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    is_found = torch.stack([logits.argmax(dim=1) == own, logits.argmax(dim=0) == own])  # (2, n)
    return loss, is_found.float().mean()


class CaptionRetrieval(Metric):
    """How often a picture finds its caption among all distinct ones, of all processes together."""

    full_state_update = False
    images: list[Tensor]
    texts: list[Tensor]
    ids: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("images", "texts", "ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Add pairs.

        Args:
            images: (n, C), unit features.
            texts: (n, C), unit features of their captions.
            ids: (n, N), of the captions: equal ids are one caption.
        """
        self.images.append(images)
        self.texts.append(texts)
        self.ids.append(ids)

    def compute(self) -> dict[str, Tensor]:
        """The share of pictures whose own caption is among the 1 and the 5 most similar.

        Returns:
            "recall_at_1" and "recall_at_5", in [0, 1]; a caption just as similar as one's own comes first.

        Raises:
            ValueError: if there are no pairs.
        """
        images, texts, ids = (dim_zero_cat(part) for part in (self.images, self.texts, self.ids))
        if not len(ids):
            raise ValueError("no picture of the validation data has a caption: there is nothing to retrieve")
        distinct, caption = torch.unique(ids, dim=0, return_inverse=True)  # (m, N), (n,)
        rows = torch.arange(len(ids), device=ids.device)
        first = rows.new_empty(len(distinct)).scatter_(0, caption, rows)  # (m,): a row of each caption
        # in parts, which bounds the memory
        parts = zip(torch.split(images, 1024), torch.split(caption, 1024), strict=True)
        ranks = torch.cat([ranks_of_own(part, texts[first], own) for part, own in parts])
        return {f"recall_at_{k}": (ranks < k).float().mean() for k in RECALLS}
