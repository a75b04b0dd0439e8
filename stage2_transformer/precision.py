"""Which number format a sequence model computes in."""

from __future__ import annotations

import torch
from torch import nn

from stage2_transformer.int8 import Int8Linear, has_int8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions in which all of a model has one type."""

PRECISIONS = ("auto", *DTYPES, "int8")

INT8_WEIGHTS = 100_000_000
"""From this size on "auto" takes int8 on a CPU: 400 MB in fp32, more than any cache holds."""


def check_precision(precision: str, device: str | torch.device) -> None:
    """Refuse a precision that is unknown, or that the device does not have.

    Args:
        precision: one of PRECISIONS.
        device: where the model computes.

    Raises:
        ValueError: says which are known, or what to take instead.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    kind = torch.device(device).type
    if precision == "int8" and kind != "cpu":
        raise ValueError(f"precision int8 is for CPUs, got device {kind}: take bf16 or fp16")
    if precision == "int8" and not has_int8():
        raise ValueError("precision int8 needs an x86 CPU and torch's FBGEMM, not found: take fp32 or bf16")


def choose_precision(precision: str, device: str | torch.device, num_weights: int) -> str:
    """What "auto" stands for.

    Args:
        precision: one of PRECISIONS; all but "auto" stand for themselves.
        device: where the model computes.
        num_weights: of the model.

    Returns:
        "fp32", "bf16", "fp16" or "int8". On CUDA bf16, or fp16 where the GPU is too old for it; on a CPU fp32
        up to INT8_WEIGHTS and int8 from there; on other devices fp32.

    Raises:
        ValueError: see `check_precision`.
    """
    check_precision(precision, device)
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "int8" if kind == "cpu" and num_weights >= INT8_WEIGHTS and has_int8() else "fp32"


def precision_of(model: nn.Module) -> str:
    """The precision a model computes in.

    Args:
        model: a GPT or an RQTransformer.

    Returns:
        "fp32", "bf16", "fp16" or "int8".
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        return "int8"
    dtype = next(model.parameters()).dtype
    return next(name for name, known in DTYPES.items() if known == dtype)
