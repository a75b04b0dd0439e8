"""The RQ-VAE of rq-vae-transformer: pixels <-> codes of several depths per place.

`config` is the mapping in stage1/config.yaml. The latent grid (lh, lw) may be k times the code grid (h, w):
then k x k neighbouring latents make one vector. `use_padding_idx`, `restart_unused_codes`, `decay` and the
losses do not matter here: every codebook has a padding row, which is never searched.
"""

from typing import Any

import torch
from torch import Tensor

from .convnet import Config, State, conv1x1, decoder, encoder
from .vqgan import TAMING_DEFAULTS, squared_distances


def encode(state: State, config: Config, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> codes (B, h, w, D)."""
    return _quantize(state, config, images)[0]


def soft_codes(state: State, config: Config, images: Tensor, temp: float) -> Tensor | list[Tensor]:
    """Probabilities softmax(-squared distance / temp) of every code along the greedy path.

    Returns:
        (B, h, w, D, V), or a list of D tensors (B, h, w, V_d) where the codebooks differ in size.
    """
    probs = [(-distances / temp).softmax(dim=-1) for distances in _quantize(state, config, images)[1]]
    return torch.stack(probs, dim=3) if len({p.shape for p in probs}) == 1 else probs


def decode(state: State, config: Config, codes: Tensor) -> Tensor:
    """Codes (B, h, w, D) -> images (B, 3, H, W), unclamped."""
    return partial(state, config, codes, codes.shape[-1] - 1)


def partial(state: State, config: Config, codes: Tensor, depth: int) -> Tensor:
    """The images (B, 3, H, W) that the codes of depths 0..depth give."""
    vectors = embed(state, config, codes)[..., : depth + 1, :].sum(dim=-2)  # (B, h, w, C)
    latents = to_latent_shape(vectors, _hparams(config)).permute(
        0, 3, 1, 2
    )  # (B, lh, lw, c) -> (B, c, lh, lw)
    return decoder(state, "decoder.", _ddconfig(config), conv1x1(state, "post_quant_conv", latents))


def embed(state: State, config: Config, codes: Tensor) -> Tensor:
    """Codes (B, h, w, D) -> each one's vector (B, h, w, D, C), neither summed nor put on the latent grid."""
    tables = codebooks(state, config)
    return torch.stack([table[codes[..., d]] for d, table in enumerate(tables)], dim=-2)


def codebooks(state: State, config: Config) -> list[Tensor]:
    """The D tables (V_d + 1, C); the last row of each is the padding row."""
    depths = range(_hparams(config)["code_shape"][2])
    shared = _hparams(config)["shared_codebook"]
    return [state[f"quantizer.codebooks.{0 if shared else d}.weight"] for d in depths]


def to_code_shape(latents: Tensor, hparams: Config) -> Tensor:
    """(B, lh, lw, c) -> (B, h, w, kh * kw * c): each cell row by row, channels fastest."""
    kh, kw = _cell(hparams)
    rows = [latents[:, i::kh, j::kw] for i in range(kh) for j in range(kw)]  # kh * kw times (B, h, w, c)
    return torch.cat(rows, dim=-1)


def to_latent_shape(vectors: Tensor, hparams: Config) -> Tensor:
    """(B, h, w, kh * kw * c) -> (B, lh, lw, c), the inverse of `to_code_shape`."""
    kh, kw = _cell(hparams)
    batch, h, w, width = vectors.shape
    latents = vectors.new_empty(batch, h * kh, w * kw, width // (kh * kw))
    for place, part in enumerate(vectors.chunk(kh * kw, dim=-1)):  # (B, h, w, c)
        latents[:, place // kw :: kh, place % kw :: kw] = part
    return latents


def _quantize(state: State, config: Config, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes (B, h, w, D) and, for each depth, the distances (B, h, w, V_d) they were chosen by."""
    latents = conv1x1(state, "quant_conv", encoder(state, "encoder.", _ddconfig(config), images))
    residual = to_code_shape(latents.permute(0, 2, 3, 1), _hparams(config))  # (B, c, lh, lw) -> (B, h, w, C)
    codes, distances = [], []
    for table in codebooks(state, config):
        flat = squared_distances(residual.reshape(-1, residual.shape[-1]), table[:-1])  # (B h w, V_d)
        distances.append(flat.view(*residual.shape[:3], -1))  # (B, h, w, V_d)
        codes.append(distances[-1].argmin(dim=-1))
        residual = residual - table[codes[-1]]
    return torch.stack(codes, dim=-1), distances


def _cell(hparams: Config) -> tuple[int, int]:
    """How many latents (down, across) make one place of the code grid."""
    (lh, lw, _), (h, w, _) = hparams["latent_shape"], hparams["code_shape"]
    return lh // h, lw // w


def _hparams(config: Config) -> Config:
    hparams: Config = config["arch"]["hparams"]
    return hparams


def _ddconfig(config: Config) -> dict[str, Any]:
    return {**TAMING_DEFAULTS, **config["arch"]["ddconfig"]}
