"""Which number format an image tokenizer decodes in; it encodes in float32, since codes must not change."""

from __future__ import annotations

import torch

from checkpoint_io.tensors import release_pages
from stage1_vqgan.autoencoder import QuantizedAutoencoder

CPU_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""Of torch.cpu: what tells that a CPU multiplies in bfloat16."""


def pixel_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """The type that pictures are decoded in beside a sequence model that is not exact.

    Args:
        precision: of the sequence model: "fp32", "bf16", "fp16" or "int8".
        device: where both compute.

    Returns:
        bfloat16 with "bf16" and "int8", where the processor has instructions for it: twice as fast on a CPU.
        Otherwise float32; float16 has too little range for these activations.
    """
    return torch.bfloat16 if precision in ("bf16", "int8") and has_bfloat16(device) else torch.float32


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether a device multiplies in bfloat16 as such, and does not only imitate it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = (getattr(torch.cpu, name, None) for name in CPU_PROBES)  # private: another torch may lack them
    return kind == "cpu" and any(probe() for probe in probes if probe is not None)


def decode_in_(tokenizer: QuantizedAutoencoder, dtype: torch.dtype) -> None:
    """Have a tokenizer decode in another type.

    Args:
        tokenizer: changed in place: the decoder's weights are rounded. What it encodes stays the same.
        dtype: bfloat16 gives pixels that are off by about a third of one of 255 levels (56 dB).
    """
    for part in (tokenizer.post_quant_conv, tokenizer.decoder):
        for parameter in part.parameters():
            if parameter.dtype != dtype:
                rounded = parameter.detach().to(dtype)
                release_pages(parameter.detach())  # of the file: it stays mapped as long as the encoder is
                parameter.data = rounded
