"""The pre-norm transformer stack that GPT and both halves of the RQ-Transformer are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint_io import check_bounds
from stage2_transformer.cache import DecodeStep, KVCache, PromptStep
from stage2_transformer.linear import Linear


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a transformer stack."""

    width: int = 1536  # C, channels of the residual stream; a multiple of num_heads, <= 65536
    num_layers: int = 42  # L, in [1, 1024]
    num_heads: int = 24  # nh, in [1, 4096]
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # of the MLP: exact, or x * sigmoid(1.702 x)
    has_attention_bias: bool = True  # in query, key, value and projection
    has_mlp_bias: bool = True  # in both layers of the MLP
    residual_dropout: float = 0.0  # after attention and MLP while training, in [0, 1)
    attention_dropout: float = 0.0  # of attention weights while training, in [0, 1)

    def __post_init__(self) -> None:
        check_bounds(self, width=1 << 16, num_layers=1 << 10, num_heads=1 << 12)
        if self.num_layers < 1 or self.num_heads < 1 or self.width < 1 or self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads and all at least 1, got width {self.width}, "
                f"num_heads {self.num_heads}, num_layers {self.num_layers}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not 0 <= self.residual_dropout < 1 or not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"dropout must be in [0, 1), got {self.residual_dropout} (residual) and "
                f"{self.attention_dropout} (attention)"
            )

    @property
    def head_width(self) -> int:
        """hd, channels of an attention head."""
        return self.width // self.num_heads


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of Hendrycks & Gimpel 2016."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


SHORT_SEQUENCE = 128
"""Entries up to which two matrix products are faster on a CPU than PyTorch's fused attention: there and back
2.6 times for 88 entries of batch 64 in bfloat16, 1 to 1.6 times in float32."""

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = Linear(config.width, 3 * config.width, bias=config.has_attention_bias)
        self.proj = Linear(config.width, config.width, bias=config.has_attention_bias)

    def forward(self, x: Tensor, layer: int, step: PromptStep | DecodeStep | None) -> Tensor:
        """(B, n, C) -> (B, n, C); with a step, past keys and values come from its cache and new ones join."""
        batch_size, length, width = x.shape
        # (B, n, 3 C) -> three (B, nh, n, hd); not einops, which takes a tenth of a small model's step
        heads = self.qkv(x).view(batch_size, length, 3, self.num_heads, -1)
        query, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()
        mask, is_causal = None, x.shape[1] > 1
        if step is not None:
            keys, values = step.extend(layer, keys, values)
            mask, is_causal = step.mask, step.is_causal
        if step is None and x.device.type == "cpu" and x.shape[1] <= SHORT_SEQUENCE:
            attended = self._attend_short(query, keys, values)
        else:
            attended = F.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask,
                is_causal=is_causal,
                dropout_p=self.dropout if self.training else 0.0,
            )
        # (B, nh, n, hd) -> (B, n, C)
        return self.proj(attended.transpose(1, 2).reshape(batch_size, length, width))  # type: ignore[no-any-return]

    def _attend_short(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention written out: three (B, nh, n, hd) -> (B, nh, n, hd)."""
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, nh, n, n)
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.to(exact).masked_fill(is_later, -math.inf).softmax(dim=-1).to(values.dtype)
        return F.dropout(weights, self.dropout, self.training) @ values


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and added to the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            Linear(config.width, 4 * config.width, bias=config.has_mlp_bias),
            ACTIVATIONS[config.activation](),
            Linear(4 * config.width, config.width, bias=config.has_mlp_bias),
        )
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, layer: int, step: PromptStep | DecodeStep | None) -> Tensor:
        """(B, n, C) -> (B, n, C)."""
        x = x + self.dropout(self.attention(self.norm1(x), layer, step))
        return x + self.dropout(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A stack of blocks, without embeddings and without a final norm."""

    recomputes_blocks: bool
    """Gradient checkpointing (Chen et al. 2016): while training, only the inputs of blocks are kept for the
    backward pass, which computes the rest again; less memory, a third more work and the same gradients."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputes_blocks = False
        self.compiled_step: Callable[[Tensor, DecodeStep], Tensor] | None = None  # see `compile_steps`
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def cache_bytes(self, capacity: int) -> int:
        """The size of a row of a cache of so many entries, in bytes."""
        numbers = 2 * self.config.num_layers * capacity * self.config.width
        return numbers * next(self.parameters()).element_size()

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for this stack: `batch_size` rows of up to `capacity` entries."""
        return KVCache(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            num_heads=self.config.num_heads,
            capacity=capacity,
            head_width=self.config.head_width,
            like=next(self.parameters()),
            is_static=self.compiled_step is not None,
        )

    def forward(self, x: Tensor, step: PromptStep | DecodeStep | None = None) -> Tensor:
        """Run the stack.

        Args:
            x: (B, n, C) embeddings.
            step: where the new entries stand in a cache; None = x is the whole sequence.

        Returns:
            (B, n, C); causal, entry i depends on entries up to i only.
        """
        if self.compiled_step is not None and isinstance(step, DecodeStep):
            return self.compiled_step(x, step).clone()  # the next replay of a CUDA graph writes to its place
        return self.run_blocks(x, step)

    def run_blocks(self, x: Tensor, step: PromptStep | DecodeStep | None) -> Tensor:
        """`forward` as it is written, compiled or not."""
        recomputes = self.recomputes_blocks and self.training and step is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            if recomputes:  # with the random numbers of the first time, so that dropout is the same
                x = checkpoint(block, x, layer, None, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, layer, step)
        return x


def successive_rows(table: Tensor, starts: Sequence[int], num_rows: int) -> Tensor:
    """The n rows of a table that follow each start.

    Args:
        table: (S, C).
        starts: R indices, at least one.
        num_rows: n.

    Returns:
        (R, n, C), or a view (n, C) where all starts are equal: nothing is copied or sent to the device.
    """
    if len(set(starts)) == 1:
        return table[starts[0] : starts[0] + num_rows]
    indices = [list(range(start, start + num_rows)) for start in starts]
    return table[torch.tensor(indices, device=table.device)]


INIT_STD = 0.02
"""Of GPT-2's initialisation, as in the originals."""


def normal_parameter(*shape: int, std: float = INIT_STD) -> nn.Parameter:
    """A parameter of this shape, drawn from N(0, std^2)."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialisation: weights from N(0, INIT_STD), biases zero. For `nn.Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
