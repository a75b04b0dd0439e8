"""The settings of the originals' convolutional encoder and decoder, their `ddconfig`, in our words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint_io import CheckpointError
from stage1_vqgan.convnet import ConvNetConfig

_DDCONFIG = {
    "double_z": "true or false",
    "z_channels": "a whole number",
    "resolution": "a whole number",
    "in_channels": "a whole number",
    "out_ch": "a whole number",
    "ch": "a whole number",
    "ch_mult": "a list of whole numbers",
    "num_res_blocks": "a whole number",
    "attn_resolutions": "a list of whole numbers",
    "dropout": "a number",
    "resamp_with_conv": "true or false",
    "give_pre_end": "true or false",
    "tanh_out": "true or false",
    "use_linear_attn": "true or false",
    "attn_type": "text",
}
"""Every setting of the originals' encoders and decoders, and what it is."""

_NEUTRAL: dict[str, Any] = {
    "double_z": True,
    "in_channels": 3,
    "out_ch": 3,
    "ch_mult": (1, 2, 4, 8),
    "dropout": 0.0,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}
"""What the originals take where a ddconfig says nothing."""


def convnet_config(ddconfig: Mapping[str, Any], *, is_ldm: bool = False) -> ConvNetConfig:
    """The originals' `ddconfig` in our words.

    Args:
        ddconfig: the section.
        is_ldm: whether latent-diffusion reads it, whose encoder and decoder know more settings: taming and
            its other heirs ignore them.
    """
    given = {**_NEUTRAL, **ddconfig}
    unknown = sorted(set(given) - set(_DDCONFIG))
    if unknown:
        raise CheckpointError(
            f"unknown keys in the ddconfig: {', '.join(unknown)}; they may change what is computed. Known: "
            f"{', '.join(_DDCONFIG)}"
        )
    for key, value in given.items():
        check_type(f"{key} of the ddconfig", value, _DDCONFIG[key])
    attention = given["attn_type"] if is_ldm else "vanilla"
    has_odd_end = is_ldm and (given["use_linear_attn"] or given["give_pre_end"])
    if attention not in ("vanilla", "none") or has_odd_end:
        raise CheckpointError(
            "of the ddconfig only attn_type vanilla or none without use_linear_attn and give_pre_end are "
            f"supported, got {attention}, {given['use_linear_attn']} and {given['give_pre_end']}"
        )
    if given["double_z"] or given["in_channels"] != 3 or given["out_ch"] != 3:
        raise CheckpointError(
            "only RGB tokenizers without double_z are supported, got "
            f"in_channels {given['in_channels']}, out_ch {given['out_ch']}, double_z {given['double_z']}"
        )
    size, steps = given["resolution"], max(len(given["ch_mult"]) - 1, 0)
    whole = size >> steps << steps  # the encoder halves and rounds down, the decoder doubles what is left
    levels = range(steps + 1) if attention == "vanilla" else ()
    attended = [level for level in levels if whole >> level in given["attn_resolutions"]]
    if attended != [level for level in levels if size >> level in given["attn_resolutions"]]:
        raise CheckpointError(
            f"with a resolution of {size}, which is no multiple of {1 << steps}, attn_resolutions "
            f"{given['attn_resolutions']} are other levels in the encoder than in the decoder: not supported"
        )
    return ConvNetConfig(
        image_size=whole,
        channels=given["ch"],
        channel_multipliers=tuple(given["ch_mult"]),
        num_res_blocks=given["num_res_blocks"],
        attention_resolutions=tuple(whole >> level for level in attended),
        latent_channels=given["z_channels"],
        dropout=given["dropout"],
        has_middle_attention=attention == "vanilla",
        has_resampling_conv=given["resamp_with_conv"],
        has_tanh_output=is_ldm and given["tanh_out"],
    )


def check_type(name: str, value: Any, kind: str) -> None:
    """Refuse a setting of another type than the originals' code takes."""
    number = int if "whole" in kind else (int, float)
    listed = value if "list" in kind and isinstance(value, (list, tuple)) else [value]
    if kind in ("true or false", "text"):
        is_right = isinstance(value, bool if kind == "true or false" else str)
    else:
        is_right = isinstance(value, (list, tuple)) == ("list" in kind) and all(
            isinstance(one, number) and not isinstance(one, bool) for one in listed
        )
    if not is_right:
        raise CheckpointError(f"{name} must be {kind}, got {value!r:.80}")
