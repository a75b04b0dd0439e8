"""The convolutional encoder and decoder that minDALL-E, rq-vae-transformer and taming-transformers share.

`prefix` is where the network's keys start, "encoder." or "decoder."; `ddconfig` is its settings as the yaml
has them, with nothing missing (each caller fills in the defaults of its own family).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
Config = Mapping[str, Any]


def encoder(state: State, prefix: str, ddconfig: Config, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, z, H / 2^(levels - 1), W / 2^(levels - 1))."""
    levels = len(ddconfig["ch_mult"])
    x = conv3x3(state, f"{prefix}conv_in", x)
    for level in range(levels):
        for block in range(ddconfig["num_res_blocks"]):
            x = residual(state, f"{prefix}down.{level}.block.{block}", x)
            if _has_attention(ddconfig, level):
                x = attention(state, f"{prefix}down.{level}.attn.{block}", x)
        if level < levels - 1:
            x = _downsample(state, f"{prefix}down.{level}.downsample", ddconfig, x)
    x = _middle(state, f"{prefix}mid", x)
    return conv3x3(state, f"{prefix}conv_out", swish(group_norm(state, f"{prefix}norm_out", x)))


def decoder(state: State, prefix: str, ddconfig: Config, x: Tensor) -> Tensor:
    """(B, z, h, w) -> (B, 3, h * 2^(levels - 1), w * 2^(levels - 1)), unclamped."""
    x = conv3x3(state, f"{prefix}conv_in", x)
    x = _middle(state, f"{prefix}mid", x)
    for level in reversed(range(len(ddconfig["ch_mult"]))):  # level 0 is the full resolution in both networks
        for block in range(ddconfig["num_res_blocks"] + 1):
            x = residual(state, f"{prefix}up.{level}.block.{block}", x)
            if _has_attention(ddconfig, level):
                x = attention(state, f"{prefix}up.{level}.attn.{block}", x)
        if level > 0:
            x = _upsample(state, f"{prefix}up.{level}.upsample", ddconfig, x)
    return conv3x3(state, f"{prefix}conv_out", swish(group_norm(state, f"{prefix}norm_out", x)))


def residual(state: State, prefix: str, x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C', h, w); the 1x1 shortcut exists where C and C' differ."""
    h = conv3x3(state, f"{prefix}.conv1", swish(group_norm(state, f"{prefix}.norm1", x)))
    h = conv3x3(state, f"{prefix}.conv2", swish(group_norm(state, f"{prefix}.norm2", h)))
    if x.shape[1] != h.shape[1]:
        x = conv1x1(state, f"{prefix}.nin_shortcut", x)
    return x + h


def attention(state: State, prefix: str, x: Tensor) -> Tensor:
    """One head over all h * w places, (B, C, h, w) -> (B, C, h, w)."""
    normed = group_norm(state, f"{prefix}.norm", x)
    q, k, v = (conv1x1(state, f"{prefix}.{name}", normed).flatten(2) for name in "qkv")  # (B, C, hw) each
    scores = q.transpose(1, 2) @ k / x.shape[1] ** 0.5  # (B, hw of q, hw of k)
    mixed = v @ scores.softmax(dim=-1).transpose(1, 2)  # (B, C, hw)
    return x + conv1x1(state, f"{prefix}.proj_out", mixed.reshape(x.shape))  # (B, C, hw) -> (B, C, h, w)


def group_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def conv3x3(state: State, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)


def conv1x1(state: State, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _middle(state: State, prefix: str, x: Tensor) -> Tensor:
    x = residual(state, f"{prefix}.block_1", x)
    x = attention(state, f"{prefix}.attn_1", x)
    return residual(state, f"{prefix}.block_2", x)


def _has_attention(ddconfig: Config, level: int) -> bool:
    # by the resolution in the settings, not by the size of the picture at hand
    return ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"]


def _downsample(state: State, prefix: str, ddconfig: Config, x: Tensor) -> Tensor:
    if not ddconfig.get("resamp_with_conv", True):
        return F.avg_pool2d(x, 2)
    padded = F.pad(x, (0, 1, 0, 1))  # right and bottom only
    return F.conv2d(padded, state[f"{prefix}.conv.weight"], state[f"{prefix}.conv.bias"], stride=2)


def _upsample(state: State, prefix: str, ddconfig: Config, x: Tensor) -> Tensor:
    x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # (B, C, h, w) -> (B, C, 2h, 2w)
    return conv3x3(state, f"{prefix}.conv", x) if ddconfig.get("resamp_with_conv", True) else x
