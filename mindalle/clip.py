"""CLIP models: what one is, how it is built, and how it sees pictures and reads text.

Legend: n pictures, B prompts, C features, N ids of a prompt, V ids of the text tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from checkpoint_io import CheckpointError, check_bounds
from mindalle.clip_model import RESNET_EXPANSION, RESNET_STRIDE, Clip
from mindalle.image import to_tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ClipModel(Protocol):
    """What the reranker needs of a model: features of any scale and float dtype."""

    def encode_image(self, image: Tensor, /) -> Tensor:
        """Pixels (n, 3, H, W) -> (n, C)."""

    def encode_text(self, text: Tensor, /) -> Tensor:
        """Ids (B, N) -> (B, C)."""


Preprocess: TypeAlias = Callable[[Image.Image], Tensor]  # picture -> pixels (3, H, W)
Tokenize: TypeAlias = Callable[[list[str]], Tensor]  # B prompts -> ids (B, N)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A CLIP's architecture: a vision transformer, or OpenAI's ResNet, and a causal text transformer."""

    embed_dim: int  # features C, > 0
    image_size: int  # pixels of a side, a multiple of vision_patch_size
    vision_layers: int  # blocks, > 0
    vision_width: int  # channels (ResNet: after its stem), a multiple of vision_head_width
    vision_patch_size: int  # pixels of a side, > 0 (ResNet: 32, its stride)
    vision_head_width: int = 64  # channels of an attention head, > 0
    resnet_stages: tuple[int, ...] | None = None  # blocks of the 4 stages, vision_layers in all; None = a ViT
    text_layers: int  # blocks, > 0
    text_width: int  # channels, a multiple of text_heads
    text_heads: int  # > 0
    context_length: int  # ids of a prompt N, > 2: start and end are two of them
    vocab_size: int  # V + 2: start and end have ids of their own
    quick_gelu: bool = True  # x * sigmoid(1.702 x), as OpenAI trained; False = the exact GELU
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # pixels are in [0, 1]
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # > 0

    def __post_init__(self) -> None:
        if self.resnet_stages is not None:
            check_bounds(self, resnet_stages=1 << 10)
        check_bounds(
            self,
            **dict.fromkeys(("vision_layers", "text_layers"), 1 << 10),
            **dict.fromkeys(("image_size", "vision_patch_size", "vision_head_width", "text_heads"), 1 << 12),
            **dict.fromkeys(("embed_dim", "vision_width", "text_width", "context_length"), 1 << 16),
            vocab_size=1 << 24,
        )
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.context_length < 3:
            raise ValueError(f"context_length must be > 2 (start, text, end), got {self.context_length}")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std}")
        if self.resnet_stages is not None:
            if len(self.resnet_stages) != 4 or sum(self.resnet_stages) != self.vision_layers:
                expected = f"4 numbers with the sum {self.vision_layers} (vision_layers)"
                raise ValueError(f"resnet_stages must be {expected}, got {self.resnet_stages}")
            if self.vision_patch_size != RESNET_STRIDE:
                raise ValueError(f"vision_patch_size must be {RESNET_STRIDE}, got {self.vision_patch_size}")
        features = self.vision_width * (1 if self.resnet_stages is None else RESNET_EXPANSION)
        for rule, whole, part in (
            ("image_size must be a multiple of vision_patch_size", self.image_size, self.vision_patch_size),
            ("vision_width must be a multiple of vision_head_width", features, self.vision_head_width),
            ("text_width must be a multiple of text_heads", self.text_width, self.text_heads),
        ):
            if whole % part:
                raise ValueError(f"{rule}, got {whole} and {part}")

    def build(self) -> Clip:
        """Build the model with random weights, in train mode, on the CPU."""
        return Clip(self)

    def preprocess(self) -> Preprocess:
        """CLIP's transform of a picture: bicubic resize of the shorter side, centre crop, RGB, normalisation.

        Returns:
            PIL image -> pixels (3, H, W), float32, with H = W = image_size.
        """
        return self._to_pixels

    def _to_pixels(self, image: Image.Image) -> Tensor:
        size, shorter = self.image_size, min(image.size)
        # rounded as torchvision does, which OpenAI's models were trained with: down here, to even there
        width, height = (size * side // shorter for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return self.normalise(to_tensor(resized.crop((left, top, left + size, top + size))))

    def normalise(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) in [-1, 1] -> pixels of the same shape, as the model reads them."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (images * 0.5 + 0.5 - mean) / std


def unit(features: Tensor) -> Tensor:
    """Features (n, C) of any float dtype -> unit vectors (n, C), float32: their products are similarities."""
    return F.normalize(features.float(), dim=-1)


class ClipTokenizer:
    """Prompts to the ids of a native CLIP: start = V, the text, end = V + 1, zeros.

    The end has the largest id, which is how the model's argmax pooling finds it.

    Args:
        tokenizer: gives V ids; copied. Its special tokens, padding and truncation are not used.
        context_length: ids of a prompt N.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.context_length = context_length
        self.start_id = self._tokenizer.get_vocab_size()
        self.end_id = self.start_id + 1
        self.vocab_size = self.start_id + 2

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode B prompts to int64 (B, N); a long one is cut before its end id."""
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            words = self._tokenizer.encode(text, add_special_tokens=False).ids[: self.context_length - 2]
            if max(words, default=0) >= self.start_id:
                raise ValueError(
                    f"the text tokenizer gives the id {max(words)}, expected ids below {self.start_id}, "
                    "the number of its words: its file has gaps; train it again (tools/train_tokenizer.py)"
                )
            row[: len(words) + 2] = torch.tensor([self.start_id, *words, self.end_id])
        return ids

    def to_str(self) -> str:
        """The tokenizer as JSON, the content of `text_tokenizer.json`."""
        return str(self._tokenizer.to_str(pretty=True))


@dataclass(frozen=True, kw_only=True)
class NativeClip:
    """A CLIP of the native layout: what is trained, exported and loaded again."""

    model: Clip  # what `config.build` gave
    config: ClipConfig
    tokenize: ClipTokenizer


def read_clip_tokenizer(path: str | Path, config: ClipConfig, *, where: str) -> ClipTokenizer:
    """Read a text tokenizer for a CLIP from its file.

    Args:
        path: a Hugging Face tokenizer, `text_tokenizer.json`.
        config: see `make_clip_tokenizer`.
        where: see `make_clip_tokenizer`.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no tokenizer, or of another size than the CLIP's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: a native CLIP reads text with it (tools/train_tokenizer.py makes one)"
        )
    return make_clip_tokenizer(path.read_bytes(), config, source=str(path), where=where)


def make_clip_tokenizer(content: bytes, config: ClipConfig, *, source: str, where: str) -> ClipTokenizer:
    """Make a text tokenizer for a CLIP.

    Args:
        content: of a Hugging Face tokenizer's file.
        config: of the CLIP, whose vocabulary must be the tokenizer's and two ids.
        source: where the content is from, for messages.
        where: the config is, for messages.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the content is no tokenizer, or one of another size than the CLIP's.
    """
    from tokenizers import Tokenizer

    try:
        tokenize = ClipTokenizer(Tokenizer.from_buffer(content), config.context_length)
    except BaseException as error:  # the library raises bare Exceptions, and panics that are not even those
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"{source} is not a Hugging Face tokenizer: {error}") from error
    if config.vocab_size != tokenize.vocab_size:
        raise ValueError(
            f"{where}: vocab_size must be {tokenize.vocab_size} (ids of {source} + 2), "
            f"got {config.vocab_size}: was this CLIP trained with another tokenizer?"
        )
    return tokenize
