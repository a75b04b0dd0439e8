"""The RQ-Transformer: a body over places and a head over the depths of each place.

`config` is the mapping in stage2/config.yaml, `codebooks` the tables of its RQ-VAE, as `rqvae.codebooks`
gives. `scaled_head_emb_vqvae`, `use_padding_emb`, `ema` and `ar_hierarchy` have no effect in the original,
nor here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .convnet import Config, State
from .gpt import block, layer_norm, linear

DEFAULTS = {
    "vocab_size_cond": 0,
    "block_size_cond": 0,
    "input_emb_vqvae": False,
    "head_emb_vqvae": False,
    "cumsum_depth_ctx": False,
    "shared_tok_emb": False,
    "shared_cls_emb": False,
}
BLOCK_DEFAULTS = {"attn_bias": True, "mlp_bias": True, "gelu": "v1"}


def text_logits_and_image_logits(
    state: State, config: Config, codebooks: Sequence[Tensor], codes: Tensor, cond: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Logits of the condition's own words and of the codes.

    Args:
        codebooks: D tables (V_d + 1, Cin); not looked at if no switch asks for the RQ-VAE's embeddings.
        codes: (B, rows, w, D); fewer rows than the grid has are allowed.
        cond: (B, N) text ids or (B,) labels; None is row 0 of their table, which an unconditional model uses.
    Returns:
        (B, N - 1, V_text), or None unless the condition is a text; and (B, rows, w, D, V), where V is the
        largest vocabulary and what exceeds a depth's own is -inf.
    """
    arch = _arch(config)
    cond_len = max(arch["block_size_cond"], 1)
    batch, rows, width, depths = codes.shape
    codes = codes.reshape(batch, rows * width, depths)  # (B, rows, w, D) -> (B, T, D)
    cond = codes.new_zeros(batch, cond_len) if cond is None else cond.reshape(batch, cond_len)  # (B, N)

    places = (
        _body_embeddings(state, arch, codebooks, codes) + state["pos_emb_hw"][:, : rows * width]
    )  # (B, T, E)
    words = state["cond_emb.weight"][cond] + state["pos_emb_cond"]  # (B, N, E)
    body = _stack(state, arch, "body", torch.cat([words, places[:, :-1]], dim=1))  # (B, N + T - 1, E)

    place_contexts = body[:, cond_len - 1 :].unsqueeze(2)  # (B, T, 1, E)
    earlier = _head_embeddings(state, arch, codebooks, codes)[:, :, :-1]  # (B, T, D - 1, E)
    head = torch.cat([place_contexts, earlier], dim=2) + state["pos_emb_d"]  # (B, T, D, E)
    head = _stack(state, arch, "head", head.flatten(0, 1))  # (B, T, D, E) -> (B T, D, E)
    image_logits = _classify(state, arch, head)  # (B T, D, V)

    text_logits = None
    if arch["block_size_cond"] > 1:
        normed = layer_norm(state, "cond_classifier.layer_norm", body[:, : cond_len - 1])
        text_logits = linear(state, "cond_classifier.linear", normed)
    return text_logits, image_logits.view(batch, rows, width, depths, -1)  # (B T, D, V) -> (B, rows, w, D, V)


def _body_embeddings(state: State, arch: Config, codebooks: Sequence[Tensor], codes: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, E): the sum over depths, so that the bias of `input_mlp` counts D times."""
    if arch["input_emb_vqvae"]:
        return linear(state, "input_mlp", _vqvae_embeddings(codebooks, codes)).sum(dim=2)
    return _own_embeddings(state, arch, codes).sum(dim=2)


def _head_embeddings(state: State, arch: Config, codebooks: Sequence[Tensor], codes: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D, E): what depth d + 1 is told of depth d, or of all up to d."""
    if not arch["head_emb_vqvae"]:
        return _own_embeddings(state, arch, codes)  # cumsum_depth_ctx does not apply to these
    vectors = _vqvae_embeddings(codebooks, codes)
    return linear(state, "head_mlp", vectors.cumsum(dim=2) if arch["cumsum_depth_ctx"] else vectors)


def _vqvae_embeddings(codebooks: Sequence[Tensor], codes: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D, Cin)."""
    return torch.stack([table[codes[..., d]] for d, table in enumerate(codebooks)], dim=2)


def _own_embeddings(state: State, arch: Config, codes: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D, E), from one table for all depths, or from D tables stored one after another."""
    if arch["shared_tok_emb"]:
        return state["tok_emb.weight"][codes]
    tables = torch.split(state["tok_emb.weight"], arch["vocab_size"])  # D times (V_d, E)
    return torch.stack([table[codes[..., d]] for d, table in enumerate(tables)], dim=2)


def _stack(state: State, arch: Config, part: str, x: Tensor) -> Tensor:
    """`part` is "body" or "head"; (B, T, E) -> (B, T, E), without a norm at the end."""
    settings = {**BLOCK_DEFAULTS, **arch[part]["block"]}
    for layer in range(arch[part]["n_layer"]):
        x = block(
            state,
            f"{part}_transformer.blocks.{layer}",
            x,
            heads=settings["n_head"],
            attn_bias=settings["attn_bias"],
            mlp_bias=settings["mlp_bias"],
            approx=settings["gelu"] == "v2",
        )
    return x


def _classify(state: State, arch: Config, x: Tensor) -> Tensor:
    """(n, D, E) -> (n, D, V)."""
    x = layer_norm(state, "classifier.layer_norm", x)
    if arch["shared_cls_emb"]:
        return linear(state, "classifier.linear", x)
    weight, bias = state["classifier.linear.weight"], state["classifier.linear.bias"]  # (D, E, V), (D, V)
    logits = torch.stack([x[:, d] @ weight[d] + bias[d] for d in range(len(weight))], dim=1)
    # The original's own mask for unequal vocabularies picks the wrong axes: it does nothing in a full forward
    # and crashes in cached sampling. This is what it is there for.
    for d, size in enumerate(arch["vocab_size"]):
        logits[:, d, size:] = float("-inf")
    return logits


def _arch(config: Config) -> dict[str, Any]:
    """The settings with the original's defaults, and `vocab_size` as a list of D sizes."""
    arch = {**DEFAULTS, **config["arch"]}
    sizes = arch["vocab_size"] if "vocab_size" in arch else config["dataset"]["vocab_size"]
    arch["vocab_size"] = [sizes] * arch["block_size"][2] if isinstance(sizes, int) else list(sizes)
    return arch
