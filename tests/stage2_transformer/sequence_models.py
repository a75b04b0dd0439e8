"""A tiny sequence model of every kind, with weights so large that any mistake shows in the logits."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stage2_transformer import (
    GPT,
    ConditionConfig,
    GPTConfig,
    PyramidGPTConfig,
    RQTransformer,
    RQTransformerConfig,
    TransformerConfig,
)
from stage2_transformer.checkpoint import model_class

Config: TypeAlias = GPTConfig | PyramidGPTConfig | RQTransformerConfig
Model: TypeAlias = GPT | RQTransformer

CONDITIONS = {
    "text": ConditionConfig(kind="text", vocab_size=30, length=5),
    "class": ConditionConfig(kind="class", vocab_size=7, length=1),
    "class_null": ConditionConfig(kind="class", vocab_size=7, length=1, has_null_class=True),
    "none": ConditionConfig(kind="none", vocab_size=1, length=1),
}


def blocks(**overrides: Any) -> TransformerConfig:
    return TransformerConfig(**{"width": 16, "num_layers": 2, "num_heads": 2, **overrides})


def gpt(condition: str = "text", **overrides: Any) -> GPTConfig:
    defaults = {"transformer": blocks(), "vocab_size": 20, "code_shape": (2, 3)}
    return GPTConfig(condition=CONDITIONS[condition], **{**defaults, **overrides})


def pyramid(condition: str = "text", **overrides: Any) -> PyramidGPTConfig:
    defaults = {
        "transformer": blocks(),
        "scales": (1, 2, 2),
        "codebook_sizes": (20, 20, 20),
        "codebook_width": 6,
    }
    return PyramidGPTConfig(condition=CONDITIONS[condition], **{**defaults, **overrides})


def rq(condition: str = "class", **overrides: Any) -> RQTransformerConfig:
    shape = overrides.get("code_shape", (2, 3, 3))
    defaults = {
        "body": blocks(),
        "head": blocks(num_heads=4),
        "code_shape": shape,
        "codebook_sizes": (20,) * shape[2],
        "codebook_width": 6,
    }
    return RQTransformerConfig(condition=CONDITIONS[condition], **{**defaults, **overrides})


PLAIN = {"activation": "quick_gelu", "has_attention_bias": False, "has_mlp_bias": False}
TABLES = {"has_codebook_body": False, "has_codebook_head": False}

MODELS: dict[str, Config] = {
    "gpt_text": gpt("text"),
    "gpt_class": gpt("class"),
    "gpt_class_null": gpt("class_null"),
    "gpt_none": gpt("none"),
    "gpt_residual_codes": gpt("text", code_shape=(2, 2, 3)),
    "gpt_plain_blocks": gpt("class", transformer=blocks(**PLAIN)),
    "pyramid_text": pyramid("text"),
    "pyramid_class": pyramid("class", scales=(1, 3), codebook_sizes=(20, 20)),
    "pyramid_sizes": pyramid("text", codebook_sizes=(7, 20, 13)),
    "pyramid_no_canvas": pyramid("none", reads_canvas=False),
    "rq_text": rq("text"),
    "rq_class": rq("class"),
    "rq_class_null": rq("class_null"),
    "rq_none": rq("none"),
    "rq_not_cumulative": rq(has_cumulative_head=False),
    "rq_table_body": rq(has_codebook_body=False),
    "rq_table_head": rq("text", has_codebook_head=False),
    "rq_tables": rq(**TABLES),
    "rq_table_per_depth": rq(**TABLES, has_shared_embedding=False),
    "rq_classifier_per_depth": rq(has_shared_classifier=False),
    "rq_sizes_per_depth": rq(
        "text",
        codebook_sizes=(20, 7, 13),
        has_codebook_body=False,
        has_shared_embedding=False,
        has_shared_classifier=False,
    ),
    "rq_other_head": rq(body=blocks(**PLAIN), head=blocks(num_layers=1, num_heads=1, has_mlp_bias=False)),
    "rq_depth_1": rq("text", code_shape=(2, 3, 1), has_shared_classifier=False),
    "rq_one_position": rq(code_shape=(1, 1, 4)),
}
CONDITIONAL = [name for name, config in MODELS.items() if config.condition.kind != "none"]
SOME = [
    "pyramid_text",
    "pyramid_sizes",
    "gpt_text",
    "gpt_class",
    "gpt_residual_codes",
    "rq_text",
    "rq_class",
    "rq_sizes_per_depth",
]
"""Enough where a property does not depend on the model's inside."""


def build(config: Config | str, seed: int = 0) -> Model:
    config = MODELS[config] if isinstance(config, str) else config
    generator = torch.Generator().manual_seed(seed)
    model: Model = model_class(config)(config, draw_codebook(config))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.eval()


def draw_codebook(config: Config, seed: int = 0) -> Tensor | None:
    if isinstance(config, GPTConfig) or (isinstance(config, RQTransformerConfig) and not config.has_codebook):
        return None
    shape = (len(config.codebook_sizes), config.vocab_size, config.codebook_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code_sizes(config: Config) -> Tensor:
    """How many values the code at each place can take, (T,)."""
    if isinstance(config, GPTConfig):
        return torch.full((config.num_codes,), config.vocab_size)
    if isinstance(config, PyramidGPTConfig):
        return torch.tensor(config.codebook_sizes)[list(config.code_depths)]
    return torch.tensor(config.codebook_sizes).repeat(config.num_positions)


def num_depths(config: Config) -> int:
    """Depths of the codes, or scales."""
    if isinstance(config, PyramidGPTConfig):
        return len(config.scales)
    return config.code_shape[2] if len(config.code_shape) == 3 else 1


def draw_codes(config: Config, batch: int, seed: int = 0) -> Tensor:
    """(B, *code_shape)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(batch, math.prod(config.code_shape), generator=generator)
    return (uniform * code_sizes(config)).long().view(batch, *config.code_shape)


def draw_cond(config: Config, batch: int, seed: int = 0) -> Tensor | None:
    """Text ids (B, N), labels (B,), or None."""
    condition, generator = config.condition, torch.Generator().manual_seed(seed)
    if condition.kind == "none":
        return None
    shape = (batch, condition.length) if condition.kind == "text" else (batch,)
    return torch.randint(condition.vocab_size, shape, generator=generator)


def flat_logits(model: Model, codes: Tensor, cond: Tensor | None) -> Tensor:
    """The logits of a full forward pass, (B, *code_shape, V) -> (B, T, V)."""
    return model(codes.view(-1, *model.code_shape), cond).logits.flatten(1, -2)
