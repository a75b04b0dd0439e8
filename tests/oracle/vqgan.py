"""The VQGAN of minDALL-E and of taming-transformers: pixels <-> codes."""

from typing import Any

from torch import Tensor

from .convnet import Config, State, conv1x1, decoder, encoder

# the conv net's settings where a yaml leaves them out; taming's default for double_z does not fit a VQ model
MINDALLE_DEFAULTS = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
}
TAMING_DEFAULTS = {"double_z": True, "ch_mult": [1, 2, 4, 8], "resamp_with_conv": True}


def encode(state: State, config: Config, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> codes (B, h, w)."""
    latents = conv1x1(
        state, "quant_conv", encoder(state, "encoder.", ddconfig(config), images)
    )  # (B, C, h, w)
    codebook = state["quantize.embedding.weight"]
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])  # (B, C, h, w) -> (B h w, C)
    codes = squared_distances(vectors, codebook).argmin(dim=1)  # the first of equals
    return codes.view(len(latents), *latents.shape[2:])  # (B h w) -> (B, h, w)


def decode(state: State, config: Config, codes: Tensor) -> Tensor:
    """Codes (B, h, w) -> images (B, 3, H, W), unclamped."""
    latents = state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
    return decoder(state, "decoder.", ddconfig(config), conv1x1(state, "post_quant_conv", latents))


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(n, C), (V, C) -> (n, V), summed in the originals' order so that near ties fall the same way."""
    norms = (vectors**2).sum(dim=1, keepdim=True) + (codebook**2).sum(dim=1)  # (n, 1) + (V,) -> (n, V)
    return norms - 2 * (vectors @ codebook.T)


def ddconfig(config: Config) -> dict[str, Any]:
    """The conv net's settings, from either family's yaml."""
    if "stage1" in config:
        return {**MINDALLE_DEFAULTS, **config["stage1"].get("hparams", {})}
    return {**TAMING_DEFAULTS, **config["model"]["params"]["ddconfig"]}
