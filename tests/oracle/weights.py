"""Random weights under the originals' keys, scaled so that activations, codes and logits are varied."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .convnet import conv1x1, encoder
from .rqvae import to_code_shape

Settings = dict[str, Any]


class Weights:
    """A state dict in the making."""

    def __init__(self, seed: int) -> None:
        self.state: OrderedDict[str, Tensor] = OrderedDict()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std + mean

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"] = self.normal(width, std=0.1, mean=1.0)
        self.state[f"{name}.bias"] = self.normal(width, std=0.1)

    def conv(self, name: str, in_channels: int, out_channels: int, size: int) -> None:
        std = (in_channels * size**2) ** -0.5
        self.state[f"{name}.weight"] = self.normal(out_channels, in_channels, size, size, std=std)
        self.state[f"{name}.bias"] = self.normal(out_channels, std=0.1)

    def linear(self, name: str, in_features: int, out_features: int, bias: bool = True) -> None:
        self.state[f"{name}.weight"] = self.normal(out_features, in_features, std=in_features**-0.5)
        if bias:
            self.state[f"{name}.bias"] = self.normal(out_features, std=0.1)

    def table(self, name: str, rows: int, width: int) -> None:
        self.state[f"{name}.weight"] = self.normal(rows, width)


def add_vqgan(weights: Weights, ddconfig: Settings, embed_dim: int, n_embed: int) -> None:
    _add_convnet(weights, ddconfig)
    weights.conv("quant_conv", ddconfig["z_channels"], embed_dim, 1)
    weights.conv("post_quant_conv", embed_dim, ddconfig["z_channels"], 1)
    vectors = _latents(weights, ddconfig).flatten(0, 2)  # (B, h, w, C) -> (B h w, C)
    weights.state["quantize.embedding.weight"] = _draw(weights, vectors, n_embed)


def add_rqvae(weights: Weights, arch: Settings) -> None:
    hparams, ddconfig = arch["hparams"], arch["ddconfig"]
    _add_convnet(weights, ddconfig)
    weights.conv("quant_conv", ddconfig["z_channels"], hparams["embed_dim"], 1)
    weights.conv("post_quant_conv", hparams["embed_dim"], ddconfig["z_channels"], 1)
    vectors = to_code_shape(_latents(weights, ddconfig), hparams).flatten(0, 2)  # (B, h, w, C) -> (B h w, C)

    depths = hparams["code_shape"][2]
    sizes = hparams["n_embed"] if isinstance(hparams["n_embed"], list) else [hparams["n_embed"]] * depths
    if len(sizes) != depths or (hparams["shared_codebook"] and isinstance(hparams["n_embed"], list)):
        raise ValueError(f"n_embed {hparams['n_embed']} does not fit {depths} depths, or a shared codebook")
    for d, size in enumerate(sizes):
        prefix = f"quantizer.codebooks.{d}"
        if hparams["shared_codebook"] and d > 0:  # the same tensors under every depth's name
            for name in ("weight", "cluster_size_ema", "embed_ema"):
                weights.state[f"{prefix}.{name}"] = weights.state[f"quantizer.codebooks.0.{name}"]
            continue
        # what is left after a depth looks like the difference of two vectors; a shared table needs both kinds
        differences = vectors - vectors[torch.randperm(len(vectors), generator=weights.generator)]
        first = size // 2 if hparams["shared_codebook"] else size * (d == 0)
        rows = [_draw(weights, vectors, first), 0.5 * 0.7**d * _draw(weights, differences, size - first)]
        padding = torch.zeros(1, vectors.shape[1])
        weights.state[f"{prefix}.weight"] = torch.cat([*rows, padding])  # (V + 1, C)
        weights.state[f"{prefix}.cluster_size_ema"] = weights.normal(size).abs() + 1
        weights.state[f"{prefix}.embed_ema"] = weights.normal(size, vectors.shape[1])


def add_gpt(weights: Weights, stage2: Settings) -> None:
    hparams, width = stage2["hparams"], stage2["hparams"]["embed_dim"]
    weights.table("tok_emb_img", stage2["vocab_size_img"], width)
    weights.table("tok_emb_txt", stage2["vocab_size_txt"], width)
    weights.table("pos_emb_img", hparams["ctx_len_img"], width)
    weights.table("pos_emb_txt", hparams["ctx_len_txt"], width)
    _add_blocks(weights, "blocks", hparams["n_layers"], width, hparams)
    weights.norm("ln_f", width)
    weights.linear("head_img", width, stage2["vocab_size_img"], bias=False)
    weights.linear("head_txt", width, stage2["vocab_size_txt"], bias=False)


def add_igpt(weights: Weights, stage2: Settings) -> None:
    hparams, width = stage2["hparams"], stage2["hparams"]["embed_dim"]
    if stage2["use_cls_cond"]:
        weights.table("sos", hparams["n_classes"], width)
    else:
        weights.state["sos"] = weights.normal(1, 1, width)
    weights.table("tok_emb_img", stage2["vocab_size_img"], width)
    weights.table("pos_emb_img", hparams["ctx_len_img"], width)
    _add_blocks(weights, "blocks", hparams["n_layers"], width, hparams)
    weights.norm("ln_f", width)
    weights.linear("head", width, stage2["vocab_size_img"], bias=False)


def add_rq_transformer(weights: Weights, arch: Settings) -> None:
    width, (h, w, depths) = arch["embed_dim"], arch["block_size"]
    sizes = arch["vocab_size"] if isinstance(arch["vocab_size"], list) else [arch["vocab_size"]] * depths
    if (arch["shared_tok_emb"] or arch["shared_cls_emb"]) and len(set(sizes)) > 1:
        raise ValueError(f"vocabularies {sizes} need shared_tok_emb=False and shared_cls_emb=False")
    weights.state["pos_emb_cond"] = weights.normal(1, max(arch["block_size_cond"], 1), width)
    weights.state["pos_emb_hw"] = weights.normal(1, h * w, width)
    weights.state["pos_emb_d"] = weights.normal(1, depths, width)
    weights.table("cond_emb", max(arch["vocab_size_cond"], 1), width)
    if arch["input_emb_vqvae"]:
        weights.linear("input_mlp", arch["input_embed_dim"], width)
    if arch["head_emb_vqvae"]:
        weights.linear("head_mlp", arch["input_embed_dim"], width)
    if not (arch["input_emb_vqvae"] and arch["head_emb_vqvae"]):
        weights.table("tok_emb", sizes[0] if arch["shared_tok_emb"] else sum(sizes), width)
        if not arch["shared_tok_emb"]:
            weights.state["tok_emb.offsets"] = torch.tensor([sum(sizes[:d]) for d in range(depths)])
    for part in ("body", "head"):
        _add_blocks(weights, f"{part}_transformer.blocks", arch[part]["n_layer"], width, arch[part]["block"])
    weights.norm("classifier.layer_norm", width)
    if arch["shared_cls_emb"]:
        weights.linear("classifier.linear", width, sizes[0])
    else:
        weights.state["classifier.linear.weight"] = weights.normal(depths, width, max(sizes), std=width**-0.5)
        weights.state["classifier.linear.bias"] = weights.normal(depths, max(sizes), std=0.1)
    if arch["block_size_cond"] > 1:
        weights.norm("cond_classifier.layer_norm", width)
        weights.linear("cond_classifier.linear", width, arch["vocab_size_cond"])


def add_loss(weights: Weights) -> None:
    """A few of the keys that taming's loss leaves in the state dict of a VQGAN."""
    weights.state["loss.perceptual_loss.scaling_layer.shift"] = weights.normal(1, 3, 1, 1)
    weights.state["loss.perceptual_loss.scaling_layer.scale"] = weights.normal(1, 3, 1, 1)
    weights.conv("loss.perceptual_loss.net.slice1.0", 3, 4, 3)
    weights.state["loss.perceptual_loss.lin0.model.1.weight"] = weights.normal(1, 4, 1, 1)
    weights.conv("loss.discriminator.main.0", 3, 4, 4)
    weights.norm("loss.discriminator.main.3", 4)
    weights.state["loss.discriminator.main.3.running_mean"] = weights.normal(4)
    weights.state["loss.discriminator.main.3.running_var"] = weights.normal(4).abs()
    weights.state["loss.discriminator.main.3.num_batches_tracked"] = torch.tensor(2)


def _add_blocks(weights: Weights, prefix: str, layers: int, width: int, settings: Settings) -> None:
    for layer in range(layers):
        name = f"{prefix}.{layer}"
        weights.norm(f"{name}.ln1", width)
        weights.norm(f"{name}.ln2", width)
        for projection in ("key", "query", "value", "proj"):
            weights.linear(f"{name}.attn.{projection}", width, width, settings["attn_bias"])
        weights.linear(f"{name}.mlp.0", width, 4 * width, settings["mlp_bias"])
        weights.linear(f"{name}.mlp.2", 4 * width, width, settings["mlp_bias"])


def _add_convnet(weights: Weights, ddconfig: Settings) -> None:
    widths = [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]]
    attended = [ddconfig["resolution"] // 2**n in ddconfig["attn_resolutions"] for n in range(len(widths))]
    weights.conv("encoder.conv_in", ddconfig["in_channels"], ddconfig["ch"], 3)
    width = ddconfig["ch"]
    for level, level_width in enumerate(widths):
        prefix = f"encoder.down.{level}"
        _add_level(weights, prefix, width, level_width, ddconfig["num_res_blocks"], attended[level])
        width = level_width
        if level < len(widths) - 1:
            weights.conv(f"{prefix}.downsample.conv", width, width, 3)
    _add_middle(weights, "encoder.mid", width)
    weights.norm("encoder.norm_out", width)
    weights.conv("encoder.conv_out", width, ddconfig["z_channels"] * (1 + ddconfig["double_z"]), 3)

    weights.conv("decoder.conv_in", ddconfig["z_channels"], width, 3)
    _add_middle(weights, "decoder.mid", width)
    inputs = [*widths[1:], width]  # what reaches each level, from the one below
    for level, level_width in enumerate(widths):
        prefix = f"decoder.up.{level}"
        blocks = ddconfig["num_res_blocks"] + 1
        _add_level(weights, prefix, inputs[level], level_width, blocks, attended[level])
        if level > 0:
            weights.conv(f"{prefix}.upsample.conv", level_width, level_width, 3)
    weights.norm("decoder.norm_out", widths[0])
    weights.conv("decoder.conv_out", widths[0], ddconfig["out_ch"], 3)


def _add_level(weights: Weights, prefix: str, in_width: int, width: int, blocks: int, attended: bool) -> None:
    for block in range(blocks):
        _add_residual(weights, f"{prefix}.block.{block}", in_width if block == 0 else width, width)
    for block in range(blocks if attended else 0):
        _add_attention(weights, f"{prefix}.attn.{block}", width)


def _add_middle(weights: Weights, prefix: str, width: int) -> None:
    _add_residual(weights, f"{prefix}.block_1", width, width)
    _add_attention(weights, f"{prefix}.attn_1", width)
    _add_residual(weights, f"{prefix}.block_2", width, width)


def _add_residual(weights: Weights, prefix: str, in_width: int, width: int) -> None:
    weights.norm(f"{prefix}.norm1", in_width)
    weights.conv(f"{prefix}.conv1", in_width, width, 3)
    weights.norm(f"{prefix}.norm2", width)
    weights.conv(f"{prefix}.conv2", width, width, 3)
    if in_width != width:
        weights.conv(f"{prefix}.nin_shortcut", in_width, width, 1)


def _add_attention(weights: Weights, prefix: str, width: int) -> None:
    weights.norm(f"{prefix}.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        weights.conv(f"{prefix}.{name}", width, width, 1)


def _latents(weights: Weights, ddconfig: Settings) -> Tensor:
    """The latents (B, h, w, C) of random pictures, half of them coarse: what a codebook has to cover."""
    size = ddconfig["resolution"]
    fine = weights.normal(8, ddconfig["in_channels"], size, size)
    coarse = fine[:4, :, : size // 4, : size // 4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = torch.cat([fine[4:], coarse]).clamp(-1, 1)
    return conv1x1(weights.state, "quant_conv", encoder(weights.state, "encoder.", ddconfig, images)).permute(
        0, 2, 3, 1
    )


def _draw(weights: Weights, vectors: Tensor, count: int) -> Tensor:
    """`count` rows of `vectors`, a little moved."""
    rows = torch.randint(len(vectors), (count,), generator=weights.generator)
    return vectors[rows] + weights.normal(count, vectors.shape[1], std=0.1 * vectors.std().item())
