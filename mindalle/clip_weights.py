"""Where CLIPs come from: OpenAI's weights by name or file, a native checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import checkpoint_io
from checkpoint_io import CheckpointError
from checkpoint_io.torchscript import is_torchscript, read_torchscript
from mindalle.clip import ClipConfig, NativeClip, Preprocess, Tokenize, read_clip_tokenizer
from mindalle.clip_model import RESNET_STRIDE

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
# in OpenAI's archives beside the weights; attn_mask is the causal mask, which a model makes itself.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")

ClipParts: TypeAlias = tuple[Any, Preprocess, Tokenize]  # the model is Any: open_clip's have no types


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
        ImportError: if the model is OpenAI's, and open_clip, which has the tokenizer, is not installed.
    """
    if (name := str(name_or_path)) in OPENAI_MODELS:
        model, preprocess, tokenize = _load_named(name)
    elif (path := Path(os.path.expanduser(name))).is_dir():
        native = load_native_clip(path)
        model, preprocess, tokenize = native.model, native.config.preprocess(), native.tokenize
    elif path.is_file():
        model, preprocess, tokenize = _load_openai_file(path)
    else:
        expected = f"a local file, a checkpoint directory or one of {', '.join(OPENAI_MODELS)}"
        raise FileNotFoundError(f"no CLIP {name!r}: expected {expected}")
    return model.eval(), preprocess, tokenize


def load_native_clip(directory: str | Path) -> NativeClip:
    """Load the CLIP of a native checkpoint, in evaluation mode, float32, on the CPU.

    Args:
        directory: with `config.yaml`, `clip.safetensors` and `text_tokenizer.json`.

    Returns:
        Its parts.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged or does not fit its config.
    """
    directory = Path(directory)
    where = f"clip section of {directory / 'config.yaml'}"
    section = checkpoint_io.read_yaml(directory / "config.yaml").get("clip")
    if not isinstance(section, dict):
        raise ValueError(f"{where} must be a mapping, got {section!r}: name another CLIP to rerank with")
    config = checkpoint_io.config_from_mapping(ClipConfig, section, where=where)
    tokenize = read_clip_tokenizer(directory / "text_tokenizer.json", config, where=where)
    weights = directory / "clip.safetensors"
    with checkpoint_io.without_storage(where):
        model = config.build()
    checkpoint_io.load_strict(model, checkpoint_io.read_tensors(weights), source=str(weights))
    checkpoint_io.check_finite(model, source=str(weights))
    return NativeClip(model=model.eval(), config=config, tokenize=tokenize)


def _import_open_clip() -> Any:
    """Takes seconds."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("OpenAI's CLIP models need open_clip: pip install open-clip-torch") from error
    return open_clip


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
    others = [
        name for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise CheckpointError(
            f"{path} is no CLIP of OpenAI's format: expected nothing but tensors by name, found "
            f"{', '.join(map(str, others[:5]))}: is it a training checkpoint? Save its state_dict alone"
        )
    config = infer_config(tensors, source=str(path))
    if config.vocab_size != OPENAI_VOCAB_SIZE:
        raise CheckpointError(
            f"{path} has {config.vocab_size} text ids, expected {OPENAI_VOCAB_SIZE} for OpenAI's tokenizer: "
            "pass the model and its own tokenizer to ClipReranker(model, preprocess, tokenize)"
        )
    with checkpoint_io.without_storage(str(path)):
        model = config.build()
    checkpoint_io.load_strict(model, tensors, source=str(path))
    checkpoint_io.check_finite(model, source=str(path))
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
        if name not in tensors:
            found = ", ".join(list(tensors)[:5]) or "nothing"
            raise CheckpointError(
                f"{source} is no CLIP of OpenAI's format: expected a tensor {name}, found {found}"
            )
        return tensors[name].shape

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
    except (
        ValueError,
        TypeError,
        IndexError,
        ArithmeticError,
    ) as error:  # a shape of too few dimensions, a width of no whole heads
        raise CheckpointError(f"{source} is no CLIP of OpenAI's format: {error}") from error
