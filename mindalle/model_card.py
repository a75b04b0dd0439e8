"""The card of an exported model: what it is, how it was trained and how it is used, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from mindalle.clip import ClipConfig, NativeClip
from mindalle.run import Run
from mindalle.text import TextTokenizer
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage2_transformer import GPT, GPTConfig, RQTransformer

DATA_SETTINGS = ("train", "val", "image_tokenizer", "text_tokenizer")


def model_card(
    name: str,
    run: Run,
    *,
    image_tokenizer: QuantizedAutoencoder | None = None,
    model: GPT | RQTransformer | None = None,
    clip: NativeClip | None = None,
    text_tokenizer: TextTokenizer | None = None,
    is_raw: bool = False,
) -> str:
    """Write the card of a run's export; of paths it says the last name only.

    Args:
        name: of the exported directory.
        run: that was exported.
        image_tokenizer: the checkpoint's.
        model: the checkpoint's.
        clip: the checkpoint's.
        text_tokenizer: the checkpoint's.
        is_raw: whether the weights are the last step's although there were averages.

    Returns:
        The text of a README.md.
    """
    parts = []
    if image_tokenizer is not None:
        parts.append(("image tokenizer", _tokenizer_summary(image_tokenizer), _size(image_tokenizer)))
    if model is not None:
        parts.append(("model", _model_summary(model), _size(model)))
    if clip is not None:
        parts.append(("CLIP", _clip_summary(clip.config), _size(clip.model)))
    if text_tokenizer is not None:
        parts.append(("text tokenizer", f"{text_tokenizer.tokenizer.get_vocab_size():,} words", ""))
    rows = [f"| {part} | {summary} | {size} |" for part, summary, size in parts]
    lines = [
        f"# {name}",
        "",
        f"{_purpose(model, clip)}, trained and exported with mindalle.",
        "",
        "| part | what | parameters |",
        "|---|---|---|",
        *rows,
        "",
        "All settings are in `config.yaml`.",
        "",
        "## Training",
        "",
        *(f"- {line}" for line in _training(run, is_raw=is_raw)),
        "",
        "## Use",
        "",
        "```",
        _command(name, model, clip),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _purpose(model: GPT | RQTransformer | None, clip: NativeClip | None) -> str:
    if model is None:
        return "A CLIP that ranks pictures by a text" if clip is not None else "An image tokenizer"
    return {
        "text": "A text-to-image model",
        "class": "A class-to-image model",
        "none": "An image model without condition",
    }[model.config.condition.kind]


def _tokenizer_summary(tokenizer: QuantizedAutoencoder) -> str:
    size = tokenizer.convnet.image_size
    codes = "x".join(map(str, tokenizer.code_shape))
    return f"{type(tokenizer).__name__}, {size}x{size} pixels to {codes} codes of {tokenizer.codebook_size:,}"


def _model_summary(model: GPT | RQTransformer) -> str:
    config = model.config
    if isinstance(config, GPTConfig):
        size = f"{config.transformer.num_layers} layers, width {config.transformer.width}"
    else:
        size = f"{config.body.num_layers} + {config.head.num_layers} layers, width {config.body.width}"
    condition = config.condition
    reads = {
        "text": f", texts of {condition.length} ids of {condition.vocab_size:,}",
        "class": f", {condition.vocab_size:,} classes",
        "none": "",
    }[condition.kind]
    return f"{type(model).__name__}, {size}{reads}"


def _clip_summary(config: ClipConfig) -> str:
    vision = "vision transformer" if config.resnet_stages is None else "ResNet"
    return (
        f"{vision} of {config.vision_layers} layers, width {config.vision_width}, for "
        f"{config.image_size}x{config.image_size} pixels; text transformer of {config.text_layers} layers, "
        f"width {config.text_width}; {config.embed_dim} features"
    )


def _size(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def _training(run: Run, *, is_raw: bool) -> Iterator[str]:
    yield f"{run.num_steps:,} optimiser steps, up to the checkpoint `{_shown(run.file)}`"
    if run.is_averaged:
        yield "weights of the last step" if is_raw else "weights averaged over the steps"
    for setting in DATA_SETTINGS:
        value = run.data_setting(setting)
        names = [_shown(path) for path in (value if isinstance(value, list) else [value]) if path]
        if names:
            yield f"{setting.replace('_', ' ')}: " + ", ".join(f"`{name}`" for name in names)


def _shown(path: Any) -> str:
    """The last name of a path or URL, without what might be private or break the line."""
    name = PurePosixPath(urlsplit(str(path)).path).name if "://" in str(path) else PurePosixPath(path).name
    return " ".join(name.replace("`", "").split())


def _command(name: str, model: GPT | RQTransformer | None, clip: NativeClip | None) -> str:
    if model is None:
        if clip is not None:
            return f'python tools/generate.py --clip {name} --num-candidates 16 --prompt "a red apple"'
        return f"python tools/reconstruct.py picture.png --model {name}"
    condition = {"text": ' --prompt "a red apple"', "class": " --class-label 0", "none": ""}
    return f"python tools/generate.py --model {name}{condition[model.config.condition.kind]}"
