"""CLIP models: what one is, how it is built, and where it is loaded from.

The models are open_clip's; its import takes seconds, so it happens in the functions that build one.
Legend: n pictures, C features, N ids of a prompt, V ids of the text tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

import checkpoint_io
from checkpoint_io import CheckpointError
from checkpoint_io.torchscript import is_torchscript, read_torchscript

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# OpenAI's names -> open_clip's; "quickgelu" is the activation OpenAI trained with.
OPENAI_MODELS = {
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
    "RN50x4": "RN50x4-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
    "RN50x64": "RN50x64-quickgelu",
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
OPENAI_VOCAB_SIZE = 49408
OPENAI_HEAD_WIDTH = 64  # channels of an attention head in all of OpenAI's models
RESNET_STRIDE = 32  # pixels of the picture per position of the ResNet's last feature map
RESNET_EXPANSION = 32  # channels of that map per vision_width; the ResNet's one attention is over it
# In OpenAI's archives beside the weights; attn_mask is the causal mask, which a model makes itself.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


class ClipModel(Protocol):
    """What the reranker needs of a model: features of any scale and float dtype."""

    def encode_image(self, image: Tensor, /) -> Tensor:
        """Pixels (n, 3, H, W) -> (n, C)."""

    def encode_text(self, text: Tensor, /) -> Tensor:
        """Ids (1, N) -> (1, C)."""


Preprocess: TypeAlias = Callable[[Image.Image], Tensor]  # picture -> pixels (3, H, W)
Tokenize: TypeAlias = Callable[[list[str]], Tensor]  # B prompts -> ids (B, N)
ClipParts: TypeAlias = tuple[Any, Preprocess, Tokenize]  # the model is Any: open_clip has no types


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

    def build(self) -> nn.Module:
        """Build an `open_clip.CLIP` with random weights, in train mode, on the CPU.

        Raises:
            ImportError: if open_clip is not installed.
        """
        open_clip = _import_open_clip()
        vision = open_clip.CLIPVisionCfg(
            layers=self.vision_layers if self.resnet_stages is None else tuple(self.resnet_stages),
            width=self.vision_width,
            head_width=self.vision_head_width,
            patch_size=self.vision_patch_size,
            image_size=self.image_size,
        )
        text = open_clip.CLIPTextCfg(
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            width=self.text_width,
            heads=self.text_heads,
            layers=self.text_layers,
        )
        model: nn.Module = open_clip.CLIP(self.embed_dim, vision, text, quick_gelu=self.quick_gelu)
        return model

    def preprocess(self) -> Preprocess:
        """Make CLIP's transform of a picture: bicubic resize, centre crop, RGB, normalisation.

        Returns:
            PIL image -> pixels (3, H, W), float32, with H = W = image_size.

        Raises:
            ImportError: if open_clip is not installed.
        """
        transform: Preprocess = _import_open_clip().image_transform(
            self.image_size, is_train=False, mean=tuple(self.image_mean), std=tuple(self.image_std)
        )
        return transform


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
            row[: len(words) + 2] = torch.tensor([self.start_id, *words, self.end_id])
        return ids

    def to_str(self) -> str:
        """The tokenizer as JSON, the content of `text_tokenizer.json`."""
        return str(self._tokenizer.to_str(pretty=True))


@dataclass(frozen=True, kw_only=True)
class NativeClip:
    """A CLIP of the native layout: what is trained, exported and loaded again."""

    model: nn.Module  # what `config.build` gave
    config: ClipConfig
    tokenize: ClipTokenizer


def load_clip(name_or_path: str | Path) -> ClipParts:
    """Load a CLIP in float32, executing nothing from its files.

    Args:
        name_or_path: one of `OPENAI_MODELS` (downloaded once), a file of OpenAI's format (TorchScript
            archive or state dict, of any size), or a native checkpoint directory.

    Returns:
        The model in eval mode, its preprocessing and its tokenizer.

    Raises:
        FileNotFoundError: if the name is unknown, the download fails or a file is missing.
        ValueError: if a file is damaged, asks to run code, or does not fit its config.
        ImportError: if open_clip is not installed.
    """
    if (name := str(name_or_path)) in OPENAI_MODELS:
        model, preprocess, tokenize = _load_named(name)
    elif (path := Path(name_or_path)).is_dir():
        native = load_native_clip(path)
        model, preprocess, tokenize = native.model, native.config.preprocess(), native.tokenize
    elif path.is_file():
        model, preprocess, tokenize = _load_openai_file(path)
    else:
        expected = f"a local file, a checkpoint directory or one of {', '.join(OPENAI_MODELS)}"
        raise FileNotFoundError(f"no CLIP {name!r}: expected {expected}")
    return model.eval(), preprocess, tokenize


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("CLIP models need open_clip: pip install open-clip-torch") from error
    return open_clip


def load_native_clip(directory: str | Path) -> NativeClip:
    """Load the CLIP of a native checkpoint, in evaluation mode, float32, on the CPU.

    Args:
        directory: with `config.yaml`, `clip.safetensors` and `text_tokenizer.json`.

    Returns:
        Its parts.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged or does not fit its config.
        ImportError: if open_clip is not installed.
    """
    directory = Path(directory)
    where = f"clip section of {directory / 'config.yaml'}"
    section = checkpoint_io.read_yaml(directory / "config.yaml").get("clip")
    if not isinstance(section, dict):
        raise ValueError(f"{where} must be a mapping, got {section!r}: name another CLIP to rerank with")
    config = checkpoint_io.config_from_mapping(ClipConfig, section, where=where)
    tokenize = read_clip_tokenizer(directory / "text_tokenizer.json", config, where=where)
    model, weights = config.build(), directory / "clip.safetensors"
    checkpoint_io.load_strict(model, checkpoint_io.read_tensors(weights), source=str(weights))
    return NativeClip(model=model.eval(), config=config, tokenize=tokenize)


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
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{source} is not a Hugging Face tokenizer: {error}") from error
    if config.vocab_size != tokenize.vocab_size:
        raise ValueError(
            f"{where}: vocab_size must be {tokenize.vocab_size} (ids of {source} + 2), "
            f"got {config.vocab_size}: was this CLIP trained with another tokenizer?"
        )
    return tokenize


def _load_named(name: str) -> ClipParts:
    open_clip = _import_open_clip()
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(OPENAI_MODELS[name], pretrained="openai")
    except (OSError, RuntimeError) as error:  # open_clip wraps what the network raised
        raise FileNotFoundError(
            f"could not get the weights of {name}: {error}. Without a network, bring OpenAI's .pt file and "
            "load it by its path: ClipReranker.from_pretrained('ViT-B-32.pt')"
        ) from error
    return model, preprocess, open_clip.SimpleTokenizer(context_length=model.context_length)


def _load_openai_file(path: Path) -> ClipParts:
    tensors = read_torchscript(path) if is_torchscript(path) else checkpoint_io.read_tensors(path)
    for name in NOT_WEIGHTS:
        tensors.pop(name, None)
    config = infer_config(tensors, source=str(path))
    if config.vocab_size != OPENAI_VOCAB_SIZE:
        raise CheckpointError(
            f"{path} has {config.vocab_size} text ids, expected {OPENAI_VOCAB_SIZE} for OpenAI's tokenizer: "
            "pass the model and its own tokenizer to ClipReranker(model, preprocess, tokenize)"
        )
    model = config.build()
    checkpoint_io.load_strict(model, tensors, source=str(path))
    tokenize = _import_open_clip().SimpleTokenizer(context_length=config.context_length)
    return model, config.preprocess(), tokenize


def infer_config(tensors: Mapping[str, Tensor], *, source: str) -> ClipConfig:
    """Read the architecture off the shapes of OpenAI-format weights.

    Args:
        tensors: OpenAI's names -> weights.
        source: where they come from, for messages.

    Raises:
        ValueError: if a tensor is missing or the shapes are no CLIP's.
    """

    def shape(name: str) -> torch.Size:
        if not isinstance(tensor := tensors.get(name), Tensor):
            found = ", ".join(list(tensors)[:5]) or "nothing"
            raise CheckpointError(
                f"{source} is no CLIP of OpenAI's format: expected a tensor {name}, found {found}: "
                "is it a training checkpoint? Save its state_dict alone"
            )
        return tensor.shape

    def count_blocks(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})

    stages = tuple(count_blocks(f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
    try:
        if any(stages):
            width, patch_size, layers = shape("visual.layer1.0.conv1.weight")[0], RESNET_STRIDE, sum(stages)
            positions = shape("visual.attnpool.positional_embedding")[0] - 1  # one is the mean of all
        else:
            width, _, _, patch_size = shape("visual.conv1.weight")
            layers = count_blocks("visual.transformer.resblocks.")
            positions = shape("visual.positional_embedding")[0] - 1  # one is the class token's
        text_width, embed_dim = shape("text_projection")
        return ClipConfig(
            embed_dim=embed_dim,
            image_size=math.isqrt(positions) * patch_size,
            vision_layers=layers,
            vision_width=width,
            vision_patch_size=patch_size,
            vision_head_width=OPENAI_HEAD_WIDTH,
            resnet_stages=stages if any(stages) else None,
            text_layers=count_blocks("transformer.resblocks."),
            text_width=text_width,
            text_heads=text_width // OPENAI_HEAD_WIDTH,
            context_length=shape("positional_embedding")[0],
            vocab_size=shape("token_embedding.weight")[0],
        )
    except CheckpointError:
        raise
    except (ValueError, IndexError) as error:  # a shape of too few dimensions, a width of no whole heads
        raise CheckpointError(f"{source} is no CLIP of OpenAI's format: {error}") from error
