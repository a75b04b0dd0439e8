"""Configs that ask for what no machine can build are refused at once, by the setting's name."""

from __future__ import annotations

import time
from typing import Any

import pytest

from checkpoint_io import CheckpointError, without_storage
from mindalle.clip import ClipConfig
from stage1_vqgan.checkpoint import rqvae_config, tokenizer_from_config
from stage2_transformer.checkpoint import model_config, rq_config

CLIP = {
    "embed_dim": 8,
    "image_size": 32,
    "vision_layers": 1,
    "vision_width": 64,
    "vision_patch_size": 16,
    "text_layers": 1,
    "text_width": 64,
    "text_heads": 1,
    "context_length": 8,
    "vocab_size": 10,
}
SIZES: list[Any] = [10**9, 10**30, 10**5000]


@pytest.mark.parametrize("size", SIZES, ids=["1e9", "1e30", "1e5000"])
@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("num_layers", lambda n: {"transformer": {"num_layers": n}}),
        ("width", lambda n: {"transformer": {"width": n, "num_heads": 1}}),
        ("vocab_size", lambda n: {"vocab_size": n}),
        ("code_shape", lambda n: {"code_shape": [n, n]}),
        ("length", lambda n: {"condition": {"length": n}}),
    ],
)
def test_of_a_gpt(name: str, section: Any, size: int) -> None:
    """A billion layers were built for ever, a width of 10**30 printed a C++ stack trace."""
    with pytest.raises(ValueError, match=rf"model of x: .*{name}") as error:
        model_config({"type": "gpt", **section(size)}, where="model of x")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "name", ["image_size", "channels", "channel_multipliers", "num_res_blocks", "latent_channels"]
)
def test_of_a_convnet(name: str) -> None:
    value = [1] * 10**6 if name == "channel_multipliers" else 32 * 10**9
    with pytest.raises(ValueError, match=rf"x: .*{name}"):
        tokenizer_from_config({"type": "vqgan", "convnet": {name: value}}, where="x")


@pytest.mark.parametrize("name", CLIP)
def test_of_a_clip(name: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=rf"{name} must be at most \d+, got 1000000000"):
        ClipConfig(**CLIP | {name: 10**9})  # type: ignore[arg-type]
    assert time.perf_counter() - begin < 1


def test_of_foreign_depths() -> None:
    """One size for each of a billion depths is a tuple of 8 GB."""
    block = {"n_layer": 1, "block": {"n_head": 1}}
    arch = {"vocab_size": 4, "block_size": [2, 2, 10**9], "embed_dim": 8, "body": block, "head": block}
    with pytest.raises(ValueError, match="depth must be a whole number of at most 64"):
        rq_config({"arch": arch})
    hparams = {"latent_shape": [2, 2, 4], "code_shape": [2, 2, 10**9], "shared_codebook": True}
    with pytest.raises(ValueError, match="depth must be a whole number of at most 64"):
        rqvae_config({"arch": {"hparams": hparams}})


@pytest.mark.parametrize("kind", [[1, 2], {"a": 1}, None, 3])
def test_a_type_that_is_no_name(kind: Any) -> None:
    """A list as type was a TypeError."""
    with pytest.raises(CheckpointError, match=r"unknown type .* in x"):
        model_config({"type": kind}, where="x")
    with pytest.raises(CheckpointError, match=r"unknown type .* in x"):
        tokenizer_from_config({"type": kind}, where="x")


@pytest.mark.parametrize(
    "error", [OverflowError("too big"), RuntimeError("bad\nframe #0: c10"), MemoryError()]
)
def test_whatever_building_raises_names_the_config(error: Exception) -> None:
    with (
        pytest.raises(CheckpointError, match=r"^x: no model can be built of its config: [^\n]+$"),
        without_storage("x"),
    ):
        raise error
