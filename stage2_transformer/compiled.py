"""Decoding steps through torch.compile: for GPUs, where a step is many small kernels that wait for Python.

What changes is the stack of blocks, with caches whose steps all have one shape, so that it is compiled once
and replayed as a CUDA graph. Prompts, embeddings, output layers and sampling stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from stage2_transformer.layers import Transformer
from stage2_transformer.precision import precision_of


def compile_steps(model: nn.Module) -> None:
    """Have a model compile the steps it decodes with; the first one takes up to minutes.

    Args:
        model: a GPT or an RQTransformer, where it computes and as precise; changed in place, its weights and
            what it computes are not. Caches must be made afterwards.

    Raises:
        ValueError: if the model is in int8, whose kernel is none that can be compiled.
    """
    if precision_of(model) == "int8":
        raise ValueError("a model in int8 cannot be compiled: take fp32 or bf16, or leave out compile")
    for stack in model.modules():
        if isinstance(stack, Transformer):
            stack.compiled_step = torch.compile(
                stack.run_blocks, mode="reduce-overhead", dynamic=False, fullgraph=True
            )
