"""What evaluations are tested on: a tiny CLIP, a judge that sees colours, folders of coloured pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_models import clip_config, write_tokenizer
from PIL import Image
from shard_files import write_tar
from torch import Tensor

from checkpoint_io import config_to_mapping, write_safetensors
from mindalle.rerank import ClipReranker

COLOURS = {"red": (255, 0, 0), "yellow": (255, 255, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_clip(directory: Path, seed: int = 0) -> Path:
    """A native CLIP of 16x16 pixels with random weights."""
    directory.mkdir(parents=True)
    config = clip_config(write_tokenizer(directory))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_safetensors(directory / "clip.safetensors", config.build().state_dict())
    # YAML reads JSON
    (directory / "config.yaml").write_text(
        json.dumps({"format": "mindalle-1", "clip": config_to_mapping(config)})
    )
    return directory


class ColourModel:
    """Pictures and texts as shares of the colours in `COLOURS`: a text has those it names."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        table = torch.tensor(list(COLOURS.values())).float()  # (4, 3)
        distances = (pixels[:, None] * 255 - table[None, :, :, None, None]).abs().sum(dim=2)  # (n, 4, H, W)
        return torch.nn.functional.one_hot(distances.argmin(dim=1), 4).float().mean(dim=(1, 2))

    def encode_text(self, text: Tensor) -> Tensor:
        return text.float()


def colour_judge() -> ClipReranker:
    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1) / 255

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([[colour in text.split() for colour in COLOURS] for text in texts]).int()

    return ClipReranker(ColourModel(), preprocess, tokenize)


def plain(colour: str, size: int = 16) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (size, size), COLOURS[colour])


def noisy_colours(number: int, size: int = 16, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Pictures of one colour with noise, and its name."""
    rng = np.random.default_rng(seed)
    pictures = []
    for index in range(number):
        name = list(COLOURS)[index % 4]
        noise = rng.integers(-100, 100, (size, size, 3)) + np.array(COLOURS[name])
        pictures.append((Image.fromarray(noise.clip(0, 255).astype(np.uint8)), f"a {name} car"))
    return pictures


def write_set(directory: Path, number: int, *, size: int = 16, seed: int = 0) -> Path:
    """A folder of `noisy_colours` with captions.jsonl."""
    directory.mkdir(parents=True)
    lines = []
    for index, (picture, caption) in enumerate(noisy_colours(number, size, seed)):
        picture.save(directory / f"{index:04d}.png")
        lines.append(json.dumps({"file": f"{index:04d}.png", "captions": [caption]}) + "\n")
    (directory / "captions.jsonl").write_text("".join(lines))
    return directory


def write_emoji_shard(path: Path, pictures: Sequence[tuple[Image.Image, dict[str, Any]]]) -> Path:
    """A shard as tools/build_emoji.py makes it, as far as it is read."""
    from shard_files import encode_picture

    files = {}
    for index, (picture, about) in enumerate(pictures):
        files[f"{index:04d}.png"] = encode_picture(picture)
        files[f"{index:04d}.json"] = json.dumps(about).encode()
    return write_tar(path, files)
