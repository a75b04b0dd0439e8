"""Sequence models from checkpoints: the native layout and those of minDALL-E and rq-vae-transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from checkpoint_io import (
    CheckpointError,
    CheckpointPart,
    KeyTable,
    config_from_mapping,
    load_strict,
    repeated,
    without_storage,
)
from stage2_transformer.conditioning import ConditionConfig
from stage2_transformer.gpt import GPT, GPTConfig
from stage2_transformer.int8 import Int8Loader
from stage2_transformer.layers import TransformerConfig
from stage2_transformer.precision import DTYPES, choose_precision
from stage2_transformer.pyramid_gpt import PyramidGPT, PyramidGPTConfig
from stage2_transformer.rq_transformer import RQTransformer, RQTransformerConfig

ModelConfig: TypeAlias = GPTConfig | PyramidGPTConfig | RQTransformerConfig
Model: TypeAlias = GPT | RQTransformer

STAGE2: dict[str, tuple[type[Any], type[Any]]] = {
    "gpt": (GPT, GPTConfig),
    "pyramid_gpt": (PyramidGPT, PyramidGPTConfig),
    "rq_transformer": (RQTransformer, RQTransformerConfig),
}
"""Type in a native config.yaml -> class and config."""


def _block_keys(theirs: str, ours: str) -> dict[str, str | None]:
    """The keys of a stack of blocks, which all originals name alike."""
    return {
        f"{theirs}blocks.{{}}.ln1.*": f"{ours}.blocks.{{}}.norm1.*",
        f"{theirs}blocks.{{}}.ln2.*": f"{ours}.blocks.{{}}.norm2.*",
        f"{theirs}blocks.{{}}.attn.query.*": f"{ours}.blocks.{{}}.attention.qkv.*[0/3]",
        f"{theirs}blocks.{{}}.attn.key.*": f"{ours}.blocks.{{}}.attention.qkv.*[1/3]",
        f"{theirs}blocks.{{}}.attn.value.*": f"{ours}.blocks.{{}}.attention.qkv.*[2/3]",
        f"{theirs}blocks.{{}}.attn.proj.*": f"{ours}.blocks.{{}}.attention.proj.*",
        f"{theirs}blocks.{{}}.mlp.0.*": f"{ours}.blocks.{{}}.mlp.0.*",
        f"{theirs}blocks.{{}}.mlp.2.*": f"{ours}.blocks.{{}}.mlp.2.*",
    }


MINDALLE_KEYS: KeyTable = _block_keys("", "transformer") | {
    "tok_emb_img.weight": "code_embedding.weight",
    "pos_emb_img.weight": "code_positions",
    "tok_emb_txt.weight": "condition.embedding.weight",
    "pos_emb_txt.weight": "condition.positions",
    "ln_f.*": "norm.*",
    "head_img.weight": "head.weight",
    "head_txt.weight": "text_head.weight",
    # the fine-tuned iGPT: classes, or one start vector
    "sos.weight": "condition.embedding.weight",
    "sos": "condition.embedding.weight",
    "head.weight": "head.weight",
}

RQ_KEYS: KeyTable = (
    _block_keys("body_transformer.", "body")
    | _block_keys("head_transformer.", "head")
    | {
        "cond_emb.weight": "condition.embedding.weight",
        "pos_emb_cond": "condition.positions",
        "pos_emb_hw": "position_embedding",
        "pos_emb_d": "depth_embedding",
        "input_mlp.*": "body_input.linear.*",
        "head_mlp.*": "head_input.linear.*",
        "tok_emb.weight": "table.weight",
        "tok_emb.offsets": None,  # follows from the codebook sizes
        "classifier.layer_norm.*": "classifier_norm.*",
        "classifier.linear.*": "classifier.*",
        "cond_classifier.layer_norm.*": "text_norm.*",
        "cond_classifier.linear.*": "text_head.*",
    }
)

WITH_LEADING_ONE = {"pos_emb_cond", "pos_emb_hw", "pos_emb_d", "sos"}
"""Parameters that the originals keep as (1, n, C)."""

ACTIVATIONS: dict[Any, Literal["gelu", "quick_gelu"]] = {
    "v1": "gelu",
    "v2": "quick_gelu",
    False: "gelu",
    True: "quick_gelu",  # minDALL-E's gelu_use_approx is x * sigmoid(1.702 x), not the tanh form
}


def model_from_part(
    part: CheckpointPart,
    *,
    code_shape: tuple[int, ...],
    codebook: Tensor,
    use_ema: bool = False,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> Model:
    """Build and fill the sequence model of a checkpoint whose layout is known.

    Args:
        part: from `checkpoint_io.find_parts`.
        code_shape: of the image tokenizer beside it, to check that both fit.
        codebook: (D, V, C) of the image tokenizer, which an RQ-Transformer reads codes with.
        use_ema: take the averaged weights, where the file has them.
        precision: see `choose_precision`; weights are converted one by one while they are read.
        device: where the model will compute; a precision has to fit it.

    Returns:
        The model, in evaluation mode, still on the CPU.

    Raises:
        CheckpointError: if weights and config are at odds, the model does not fit the tokenizer, or the file
            is damaged.
        ValueError: if the precision is unknown or not for that device.
    """
    tensors: dict[str, Tensor]
    table: KeyTable | None = None
    if part.layout == "native":
        config = model_config(part.config["model"], where=f"model of {part.file.parent}")
        tensors = part.read()
    elif part.layout == "rq-vae":
        config, table, tensors = part.translate_config(rq_config), RQ_KEYS, part.read(use_ema=use_ema)
    else:
        config = part.translate_config(partial(mindalle_config, code_shape=code_shape))
        table, tensors = MINDALLE_KEYS, part.read(use_ema=use_ema)
    check_fit(config, code_shape, codebook, source=part.source)
    model = build_model(config, codebook, source=part.source)
    for name in WITH_LEADING_ONE & set(tensors):
        if tensors[name].ndim == 3:  # of others `load_strict` says what was expected
            tensors[name] = tensors[name].flatten(0, 1)  # (1, n, C) -> (n, C)
    return fill_model(model, tensors, source=part.source, table=table, precision=precision, device=device)


def fill_model(
    model: GPT | RQTransformer,
    tensors: dict[str, Tensor],
    *,
    source: str,
    table: KeyTable | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> GPT | RQTransformer:
    """Fill a model without storage, each weight converted when its tensor arrives.

    Args:
        model: of `build_model`.
        tensors: name -> tensor; emptied on the way.
        source: where they come from, for messages.
        table: foreign names -> ours; None when the names are ours already.
        precision: see `choose_precision`.
        device: where the model will compute; a precision has to fit it.

    Returns:
        The model, in evaluation mode, still on the CPU.

    Raises:
        CheckpointError: if weights and model are at odds.
        ValueError: if the precision is unknown or not for that device.
    """
    precision = choose_precision(precision, device, sum(weight.numel() for weight in model.parameters()))
    model.to(dtype=DTYPES.get(precision))
    take = Int8Loader(model).take if precision == "int8" else None
    load_strict(model, tensors, source=source, table=table, take=take)
    return model.eval()


def check_fit(config: ModelConfig, code_shape: tuple[int, ...], codebook: Tensor, *, source: str) -> None:
    """Refuse a sequence model whose codes are not those of the image tokenizer.

    Args:
        config: of the model.
        code_shape: of the tokenizer.
        codebook: (D, V, C) of the tokenizer.
        source: of the model, for the message.

    Raises:
        CheckpointError: says which of shape and vocabulary differ.
    """
    if config.vocab_size != codebook.shape[1]:
        raise CheckpointError(
            f"{source}: the sequence model has a vocabulary of {config.vocab_size} codes, its image "
            f"tokenizer {codebook.shape[1]}: both must come from one release"
        )
    if tuple(config.code_shape) != tuple(code_shape):
        raise CheckpointError(
            f"{source}: the sequence model draws codes of shape {tuple(config.code_shape)}, its image "
            f"tokenizer makes {tuple(code_shape)}: both must come from one release"
        )


def model_config(section: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The typed config of a sequence model from its section of a native config.yaml.

    Args:
        section: `type` (a key of STAGE2) and the fields of its config.
        where: what the section is, for messages.

    Returns:
        The config.

    Raises:
        CheckpointError: if the section is empty or the type unknown.
        ValueError: if a field is unknown or out of range.
    """
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where} must be a mapping with a type, got {section!r}")
    fields = dict(section)
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in STAGE2:
        raise CheckpointError(f"unknown type {kind!r} in {where}: known are {', '.join(STAGE2)}")
    config: ModelConfig = config_from_mapping(STAGE2[kind][1], fields, where=where)
    return config


def build_model(config: ModelConfig, codebook: Tensor, *, source: str = "the model") -> Model:
    """A model without storage: `load_strict` makes each parameter real when its tensor arrives.

    Args:
        config: of the model.
        codebook: (D, V, C) of the image tokenizer.
        source: where the config is from, for messages.

    Returns:
        The model, its parameters on the meta device.

    Raises:
        CheckpointError: if no model can be built of it.
    """
    with without_storage(source):
        return model_class(config)(config, codebook)  # type: ignore[no-any-return]


def model_class(config: object) -> type[Any]:
    """The class in STAGE2 that a config describes."""
    return next(cls for cls, config_cls in STAGE2.values() if type(config) is config_cls)


def mindalle_config(yaml: Mapping[str, Any], code_shape: tuple[int, ...]) -> GPTConfig:
    """The config of minDALL-E's stage 2 from its config.yaml; missing fields have the original's defaults.

    Args:
        yaml: the file.
        code_shape: of the image tokenizer; minDALL-E's config has only the number of codes.

    Returns:
        The config of a text-, class- or unconditional GPT.

    Raises:
        CheckpointError: if the number of codes is not that of the tokenizer.
    """
    stage2 = yaml["stage2"]
    hparams = stage2.get("hparams") or {}
    num_codes = hparams.get("ctx_len_img", 256)
    if num_codes != math.prod(code_shape):
        raise CheckpointError(
            f"the sequence model draws {num_codes} codes, its image tokenizer makes {code_shape}: "
            "both must come from one release"
        )
    if stage2.get("type", "transformer1d") == "transformer1d":
        length = hparams.get("ctx_len_txt", 64)
        size = stage2.get("vocab_size_txt", 16384)
        condition = ConditionConfig(kind="text", vocab_size=size, length=length)
    elif stage2.get("use_cls_cond"):
        condition = ConditionConfig(kind="class", vocab_size=hparams["n_classes"], length=1)
    else:
        condition = ConditionConfig(kind="none", vocab_size=1, length=1)
    return GPTConfig(
        transformer=TransformerConfig(
            width=hparams.get("embed_dim", 1536),
            num_layers=hparams.get("n_layers", 42),
            num_heads=hparams.get("n_heads", 24),
            activation=ACTIVATIONS[bool(hparams.get("gelu_use_approx", False))],
            has_attention_bias=hparams.get("attn_bias", True),
            has_mlp_bias=hparams.get("mlp_bias", True),
            residual_dropout=hparams.get("resid_pdrop", 0.0),
            attention_dropout=hparams.get("attn_pdrop", 0.0),
        ),
        condition=condition,
        vocab_size=stage2.get("vocab_size_img", 16384),
        code_shape=code_shape,
        embedding_dropout=hparams.get("embd_pdrop", 0.0),
    )


def rq_config(yaml: Mapping[str, Any]) -> RQTransformerConfig:
    """The config of an RQ-Transformer from its release's config.yaml; missing fields as in the original.

    Args:
        yaml: the file.

    Returns:
        The config; `block_size_cond` > 1 means text, `vocab_size_cond` > 1 classes, otherwise unconditional.

    Raises:
        CheckpointError: if the config lacks the vocabulary.
    """
    arch = yaml["arch"]
    sizes = arch.get("vocab_size", (yaml.get("dataset") or {}).get("vocab_size"))
    if sizes is None:
        raise CheckpointError(
            "the RQ-Transformer's config has no arch.vocab_size: take the config.yaml of the release"
        )
    depth = arch["block_size"][2]
    length, vocab_size = max(arch.get("block_size_cond", 0), 1), max(arch.get("vocab_size_cond", 0), 1)
    kind: Literal["text", "class", "none"] = "text" if length > 1 else "class" if vocab_size > 1 else "none"
    return RQTransformerConfig(
        body=_rq_stack(arch, "body"),
        head=_rq_stack(arch, "head"),
        condition=ConditionConfig(kind=kind, vocab_size=vocab_size, length=length),
        codebook_sizes=repeated(sizes, depth),
        code_shape=tuple(arch["block_size"]),
        codebook_width=arch.get("input_embed_dim") or 1,
        has_codebook_body=arch.get("input_emb_vqvae", False),
        has_codebook_head=arch.get("head_emb_vqvae", False),
        has_cumulative_head=arch.get("cumsum_depth_ctx", False),
        has_shared_embedding=arch.get("shared_tok_emb", False),
        has_shared_classifier=arch.get("shared_cls_emb", False),
        embedding_dropout=arch.get("embd_pdrop", 0.0),
    )


def _rq_stack(arch: Mapping[str, Any], name: str) -> TransformerConfig:
    block = arch[name]["block"]
    gelu = block.get("gelu", "v1")
    return TransformerConfig(
        width=block.get("embed_dim", arch["embed_dim"]),
        num_layers=arch[name]["n_layer"],
        num_heads=block["n_head"],
        activation=ACTIVATIONS.get(gelu, gelu),
        has_attention_bias=block.get("attn_bias", True),
        has_mlp_bias=block.get("mlp_bias", True),
        residual_dropout=block.get("resid_pdrop", 0.1),
        attention_dropout=block.get("attn_pdrop", 0.0),
    )
