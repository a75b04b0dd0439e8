"""minDALL-E's transformers: text-to-image, and its fine-tuned class-conditional and unconditional image GPT.

`config` is the mapping in config.yaml; keys are those of `stage2_last.ckpt` (of a fine-tuned checkpoint:
without the leading "stage2.").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .convnet import Config, State

DEFAULTS = {
    "embed_dim": 1536,
    "n_layers": 42,
    "n_heads": 24,
    "ctx_len_img": 256,
    "ctx_len_txt": 64,
    "mlp_bias": True,
    "attn_bias": True,
    "gelu_use_approx": False,
}


def text_logits_and_image_logits(
    state: State, config: Config, codes: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes (B, T) and text ids (B, N), padding included -> (B, N - 1, V_text) and (B, T, V).

    Text logits at n predict word n + 1; image logits at n predict code n, the first one from the last word.
    """
    words = state["tok_emb_txt.weight"][text] + state["pos_emb_txt.weight"][: text.shape[1]]  # (B, N, C)
    places = state["tok_emb_img.weight"][codes] + state["pos_emb_img.weight"][: codes.shape[1]]  # (B, T, C)
    out = _stack(state, config, torch.cat([words, places[:, :-1]], dim=1))  # (B, N + T - 1, C)
    last_word = text.shape[1] - 1
    return out[:, :last_word] @ state["head_txt.weight"].T, out[:, last_word:] @ state["head_img.weight"].T


def igpt_logits(state: State, config: Config, codes: Tensor, labels: Tensor | None) -> Tensor:
    """Codes (B, T) and labels (B,), or None for the unconditional model -> (B, T, V)."""
    if config["stage2"].get("use_cls_cond"):
        if labels is None:
            raise ValueError("a class-conditional model needs labels")
        start = state["sos.weight"][labels][:, None]  # (B, C) -> (B, 1, C)
    else:
        start = state["sos"].expand(len(codes), -1, -1)  # (1, 1, C) -> (B, 1, C)
    places = state["tok_emb_img.weight"][codes] + state["pos_emb_img.weight"][: codes.shape[1]]  # (B, T, C)
    out = _stack(
        state, config, torch.cat([start, places[:, :-1]], dim=1)
    )  # (B, T, C); the start has no position
    return out @ state["head.weight"].T


def block(
    state: State, prefix: str, x: Tensor, *, heads: int, attn_bias: bool, mlp_bias: bool, approx: bool
) -> Tensor:
    """One pre-norm transformer block with a causal mask, (B, T, C) -> (B, T, C)."""
    normed = layer_norm(state, f"{prefix}.ln1", x)
    q, k, v = (
        _split_heads(linear(state, f"{prefix}.attn.{name}", normed, attn_bias), heads)
        for name in ("query", "key", "value")
    )  # (B, heads, T, hd) each
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, heads, T, T)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v  # (B, heads, T, hd)
    mixed = mixed.transpose(1, 2).flatten(2)  # (B, T, heads, hd) -> (B, T, C)
    x = x + linear(state, f"{prefix}.attn.proj", mixed, attn_bias)

    hidden = linear(state, f"{prefix}.mlp.0", layer_norm(state, f"{prefix}.ln2", x), mlp_bias)  # (B, T, 4C)
    hidden = hidden * torch.sigmoid(1.702 * hidden) if approx else F.gelu(hidden)
    return x + linear(state, f"{prefix}.mlp.2", hidden, mlp_bias)


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def linear(state: State, name: str, x: Tensor, bias: bool = True) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if bias else y


def _stack(state: State, config: Config, x: Tensor) -> Tensor:
    hparams = {**DEFAULTS, **config["stage2"].get("hparams", {})}
    for layer in range(hparams["n_layers"]):
        x = block(
            state,
            f"blocks.{layer}",
            x,
            heads=hparams["n_heads"],
            attn_bias=hparams["attn_bias"],
            mlp_bias=hparams["mlp_bias"],
            approx=hparams["gelu_use_approx"],
        )
    return layer_norm(state, "ln_f", x)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(
        1, 2
    )  # (B, T, C) -> (B, T, heads, hd) -> (B, heads, T, hd)
