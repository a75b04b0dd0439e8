"""The settings of foreign encoders and decoders: each is read, or refused if it changes what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from checkpoint_io import CheckpointError
from stage1_vqgan import VQGAN
from stage1_vqgan.checkpoint import taming_config

DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}


def translate(target: str = "ldm.models.autoencoder.VQModel", n_embed: Any = 8, **changes: Any) -> Any:
    params = {"embed_dim": 4, "n_embed": n_embed, "ddconfig": DDCONFIG | changes}
    return taming_config({"model": {"target": target, "params": params}})


def test_tanh_of_latent_diffusion() -> None:
    """It was dropped without a word, and pixels were off by up to 1.7; taming does not know the setting."""
    assert not translate("taming.models.vqgan.VQModel", tanh_out=True).convnet.has_tanh_output
    model = VQGAN(translate(tanh_out=True)).eval()
    plain = VQGAN(translate()).eval()
    plain.load_state_dict(model.state_dict())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 9
    torch.testing.assert_close(model.decoder(latents), plain.decoder(latents).tanh())


def test_without_attention_and_resampling_convolutions() -> None:
    names = VQGAN(translate(attn_type="none", resamp_with_conv=False)).state_dict()
    assert not [name for name in names if "attention" in name or "resample" in name]
    model = VQGAN(translate(attn_type="none", resamp_with_conv=False)).eval()
    images = torch.zeros(1, 3, 16, 16)
    assert model.decode(model.encode(images)).shape == images.shape
    kept = VQGAN(translate("taming.models.vqgan.VQModel", attn_type="none")).state_dict()
    assert [name for name in kept if "middle.attention" in name]  # taming does not know the setting


def test_a_resolution_that_is_no_multiple() -> None:
    convnet = translate(resolution=17).convnet
    assert (convnet.image_size, convnet.attention_resolutions) == (16, (8,))
    with pytest.raises(CheckpointError, match=r"resolution of 17, .*other levels in the encoder than in the"):
        translate(resolution=17, attn_resolutions=[17])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embed": "96"}, "n_embed must be a whole number, got '96'"),
        ({"resolution": [64, 64]}, r"resolution of the ddconfig must be a whole number, got \[64, 64\]"),
        ({"ch": True}, "ch of the ddconfig must be a whole number, got True"),
        ({"ch_mult": "1,2"}, "ch_mult of the ddconfig must be a list of whole numbers, got '1,2'"),
        ({"attn_resolutions": ["8"]}, "attn_resolutions of the ddconfig must be a list of whole numbers"),
        ({"dropout": None}, "dropout of the ddconfig must be a number, got None"),
        ({"attn_type": "linear"}, "attn_type vanilla or none .*got linear"),
        ({"give_pre_end": True}, "give_pre_end are supported"),
        ({"pad_mode": "reflect"}, "unknown keys in the ddconfig: pad_mode"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        translate(**changes)
