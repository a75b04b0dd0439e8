"""Image tokenizers from checkpoints: native, and those of taming, minDALL-E and rq-vae-transformer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_io import (
    CheckpointError,
    CheckpointPart,
    KeyTable,
    check_finite,
    config_from_mapping,
    find_parts,
    load_strict,
    repeated,
    without_storage,
)
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.convnet import ConvNetConfig
from stage1_vqgan.ddconfig import check_type, convnet_config
from stage1_vqgan.pyramid import PyramidVAE, PyramidVAEConfig
from stage1_vqgan.quantize import ResidualQuantizerConfig, VectorQuantizerConfig
from stage1_vqgan.rqvae import RQVAE, RQVAEConfig
from stage1_vqgan.vqgan import VQGAN, VQGANConfig

STAGE1: dict[str, tuple[type[Any], type[Any]]] = {
    "vqgan": (VQGAN, VQGANConfig),
    "rqvae": (RQVAE, RQVAEConfig),
    "pyramid": (PyramidVAE, PyramidVAEConfig),
}
"""Type in a native config.yaml -> class and config."""

_ENCODER_DECODER: KeyTable = {
    "encoder.conv_in.*": "encoder.conv_in.*",
    "encoder.down.{}.block.{}.norm1.*": "encoder.levels.{}.blocks.{}.norm1.*",
    "encoder.down.{}.block.{}.conv1.*": "encoder.levels.{}.blocks.{}.conv1.*",
    "encoder.down.{}.block.{}.norm2.*": "encoder.levels.{}.blocks.{}.norm2.*",
    "encoder.down.{}.block.{}.conv2.*": "encoder.levels.{}.blocks.{}.conv2.*",
    "encoder.down.{}.block.{}.nin_shortcut.*": "encoder.levels.{}.blocks.{}.shortcut.*",
    "encoder.down.{}.attn.{}.norm.*": "encoder.levels.{}.attentions.{}.norm.*",
    "encoder.down.{}.attn.{}.q.*": "encoder.levels.{}.attentions.{}.qkv.*[0/3]",
    "encoder.down.{}.attn.{}.k.*": "encoder.levels.{}.attentions.{}.qkv.*[1/3]",
    "encoder.down.{}.attn.{}.v.*": "encoder.levels.{}.attentions.{}.qkv.*[2/3]",
    "encoder.down.{}.attn.{}.proj_out.*": "encoder.levels.{}.attentions.{}.proj.*",
    "encoder.down.{}.downsample.conv.*": "encoder.levels.{}.resample.conv.*",
    "encoder.norm_out.*": "encoder.norm_out.*",
    "encoder.conv_out.*": "encoder.conv_out.*",
    "quant_conv.*": "quant_conv.*",
    "post_quant_conv.*": "post_quant_conv.*",
    "decoder.conv_in.*": "decoder.conv_in.*",
    "decoder.up.{}.block.{}.norm1.*": "decoder.levels.{}.blocks.{}.norm1.*",
    "decoder.up.{}.block.{}.conv1.*": "decoder.levels.{}.blocks.{}.conv1.*",
    "decoder.up.{}.block.{}.norm2.*": "decoder.levels.{}.blocks.{}.norm2.*",
    "decoder.up.{}.block.{}.conv2.*": "decoder.levels.{}.blocks.{}.conv2.*",
    "decoder.up.{}.block.{}.nin_shortcut.*": "decoder.levels.{}.blocks.{}.shortcut.*",
    "decoder.up.{}.attn.{}.norm.*": "decoder.levels.{}.attentions.{}.norm.*",
    "decoder.up.{}.attn.{}.q.*": "decoder.levels.{}.attentions.{}.qkv.*[0/3]",
    "decoder.up.{}.attn.{}.k.*": "decoder.levels.{}.attentions.{}.qkv.*[1/3]",
    "decoder.up.{}.attn.{}.v.*": "decoder.levels.{}.attentions.{}.qkv.*[2/3]",
    "decoder.up.{}.attn.{}.proj_out.*": "decoder.levels.{}.attentions.{}.proj.*",
    "decoder.up.{}.upsample.conv.*": "decoder.levels.{}.resample.conv.*",
    "decoder.norm_out.*": "decoder.norm_out.*",
    "decoder.conv_out.*": "decoder.conv_out.*",
} | {
    f"{half}.mid.{theirs}.*": f"{half}.middle.{ours}"
    for half in ("encoder", "decoder")
    for theirs, ours in {
        "block_1.norm1": "block1.norm1.*",
        "block_1.conv1": "block1.conv1.*",
        "block_1.norm2": "block1.norm2.*",
        "block_1.conv2": "block1.conv2.*",
        "attn_1.norm": "attention.norm.*",
        "attn_1.q": "attention.qkv.*[0/3]",
        "attn_1.k": "attention.qkv.*[1/3]",
        "attn_1.v": "attention.qkv.*[2/3]",
        "attn_1.proj_out": "attention.proj.*",
        "block_2.norm1": "block2.norm1.*",
        "block_2.conv1": "block2.conv1.*",
        "block_2.norm2": "block2.norm2.*",
        "block_2.conv2": "block2.conv2.*",
    }.items()
}

VQGAN_KEYS: KeyTable = {
    **_ENCODER_DECODER,
    "quantize.embedding.weight": "quantizer.codebook",
    "quantize.embedding.cluster_size": None,  # taming's EMAVQ: state of the codebook's training
    "quantize.embedding.embed_avg": None,
    "colorize": None,  # random colours to show more than three channels in, of no use for pictures
    "loss.**": None,  # taming: LPIPS and the discriminator
}

RQVAE_KEYS: KeyTable = {
    **_ENCODER_DECODER,
    "quantizer.codebooks.{}.weight": "quantizer.tables.{}",
    "quantizer.codebooks.{}.cluster_size_ema": None,  # state of the codebook's training
    "quantizer.codebooks.{}.embed_ema": None,
}


def load_tokenizer(path: str | Path, *, use_ema: bool = False) -> QuantizedAutoencoder:
    """Load an image tokenizer, in evaluation mode, float32, on the CPU.

    Args:
        path: a native directory; a minDALL-E release directory or fine-tuned `.ckpt`; an rq-vae-transformer
            release or its `stage1` directory; a taming VQGAN directory or `.ckpt` with its YAML file beside
            it.
        use_ema: take the averaged weights, where the file has them (rq-vae-transformer's training
            checkpoints).

    Returns:
        A VQGAN or an RQVAE.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: if the checkpoint is damaged, of an unknown layout, without an image tokenizer, or
            at odds with its config.
    """
    part = find_parts(path).get("image_tokenizer")
    if part is None:
        raise CheckpointError(
            f"{path} holds no image tokenizer, only a sequence model: pass the other part's path"
        )
    return tokenizer_from_part(part, use_ema=use_ema)


def tokenizer_from_part(part: CheckpointPart, *, use_ema: bool = False) -> QuantizedAutoencoder:
    """Build and fill the tokenizer of a checkpoint whose layout is known.

    Args:
        part: from `checkpoint_io.find_parts`.
        use_ema: see `load_tokenizer`.

    Returns:
        A VQGAN or an RQVAE, in evaluation mode.

    Raises:
        CheckpointError: if weights and config are at odds, or the file is damaged.
    """
    if part.layout == "native":
        model = tokenizer_from_config(
            part.config["image_tokenizer"], where=f"image_tokenizer of {part.file.parent}"
        )
        tensors, table = part.read(use_ema=use_ema), None
    elif part.layout == "rq-vae":
        model = _empty(RQVAE, part.translate_config(rqvae_config), where=str(part.file))
        tensors, table = part.read(use_ema=use_ema), RQVAE_KEYS
        _untie_codebooks(tensors, model.config.quantizer, source=str(part.file))
    else:
        translate = taming_config if part.layout == "taming" else mindalle_config
        model = _empty(VQGAN, part.translate_config(translate), where=str(part.file))
        tensors, table = part.read(use_ema=use_ema), VQGAN_KEYS
    load_strict(model, tensors, source=part.source, table=table)
    check_finite(model, source=part.source)
    return model.eval()  # type: ignore[no-any-return]


def tokenizer_from_config(section: Mapping[str, Any], *, where: str) -> Any:
    """Build an image tokenizer on the meta device from its section of a native config.

    Args:
        section: `type` (a key of STAGE1) and the fields of its config.
        where: what the section is, for messages.

    Returns:
        The tokenizer, its parameters without storage.

    Raises:
        CheckpointError: if the section is empty or the type unknown.
        ValueError: if a field is unknown or out of range.
    """
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where} must be a mapping with a type, got {section!r}")
    fields = dict(section)
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in STAGE1:
        raise CheckpointError(f"unknown type {kind!r} in {where}: known are {', '.join(STAGE1)}")
    cls, config_cls = STAGE1[kind]
    return _empty(cls, config_from_mapping(config_cls, fields, where=where), where=where)


def _empty(cls: type[Any], config: Any, *, where: str) -> Any:
    """A model without storage: `load_strict` makes each parameter real when its tensor arrives."""
    with without_storage(where):
        return cls(config)


def mindalle_config(yaml: Mapping[str, Any]) -> VQGANConfig:
    """The config of minDALL-E's stage 1 from its config.yaml; missing fields have the original's defaults."""
    stage1 = yaml["stage1"]
    hparams = dict(stage1["hparams"])
    hparams["dropout"] = hparams.pop("pdrop", 0.0)
    defaults = {
        "resolution": 256,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "double_z": False,
    }
    defaults |= {"attn_resolutions": [16], "z_channels": 256}
    convnet = convnet_config(defaults | hparams)
    return _vqgan_config(
        convnet, width=stage1.get("embed_dim", 256), codebook_size=stage1.get("n_embed", 16384)
    )


def taming_config(yaml: Mapping[str, Any]) -> VQGANConfig:
    """The config of a taming VQModel, alone or inside a Net2Net transformer's project file."""
    model = yaml["model"]
    model = model["params"].get("first_stage_config", model)
    params = model["params"]
    if (
        str(model.get("target", "")).endswith("GumbelVQ")
        or params.get("remap")
        or params.get("colorize_nlabels")
    ):
        raise CheckpointError(
            f"this is a {model.get('target')} with remap {params.get('remap')} and colorize_nlabels "
            f"{params.get('colorize_nlabels')}: only plain VQModels for RGB images are supported"
        )
    is_ldm = str(model.get("target", "")).startswith("ldm.")
    convnet = convnet_config(_section(params, "ddconfig", "taming VQModel"), is_ldm=is_ldm)
    return _vqgan_config(convnet, width=params["embed_dim"], codebook_size=params["n_embed"])


def rqvae_config(yaml: Mapping[str, Any]) -> RQVAEConfig:
    """The config of an rq-vae-transformer stage 1 from its config.yaml."""
    arch = yaml["arch"]
    hparams = _section(arch, "hparams", "rq-vae arch")
    latent, code = hparams["latent_shape"], hparams["code_shape"]
    patch = (latent[0] // code[0], latent[1] // code[1])
    sizes = hparams.get("n_embed", 512)
    width = hparams.get("embed_dim", 64)
    quantizer = ResidualQuantizerConfig(
        codebook_sizes=repeated(sizes, code[2]),
        width=width * patch[0] * patch[1],
        is_shared=hparams["shared_codebook"],
        commitment_weight=hparams.get("latent_loss_weight", 0.25),
    )
    convnet = convnet_config(_section(arch, "ddconfig", "rq-vae arch"))
    return RQVAEConfig(convnet=convnet, quantizer=quantizer, latent_width=width, patch=patch)


def _section(mapping: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    section = mapping.get(key)
    if not isinstance(section, Mapping):
        raise CheckpointError(
            f"the config of this {where} has no section {key!r} (keys: {', '.join(mapping)})"
        )
    return dict(section)


def _vqgan_config(convnet: ConvNetConfig, *, width: int, codebook_size: int) -> VQGANConfig:
    check_type("embed_dim", width, "a whole number")
    check_type("n_embed", codebook_size, "a whole number")
    return VQGANConfig(
        convnet=convnet, quantizer=VectorQuantizerConfig(codebook_size=codebook_size, width=width)
    )


def _untie_codebooks(
    tensors: MutableMapping[str, Tensor], config: ResidualQuantizerConfig, *, source: str
) -> None:
    """Drop each codebook's padding row, and of a shared codebook all copies but one; they must be equal."""
    name = "quantizer.codebooks.{}.weight"
    first: Tensor | None = None
    for depth in range(config.depth):
        table = tensors.get(name.format(depth))
        if table is None or table.shape[:1] != (config.codebook_sizes[depth] + 1,):
            raise CheckpointError(
                f"{source}: {name.format(depth)} should have {config.codebook_sizes[depth]} rows and one of "
                f"padding, got {'no such tensor' if table is None else f'shape {tuple(table.shape)}'}"
            )
        if config.is_shared and first is not None:
            if not torch.equal(table, first):
                raise CheckpointError(
                    f"{source}: {name.format(depth)} differs from depth 0 but the config shares them"
                )
            del tensors[name.format(depth)]
        else:
            first = table
            tensors[name.format(depth)] = table[:-1]
