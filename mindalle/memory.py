"""How much is computed at once: as much as is quick, but no more than a small machine has memory for."""

from __future__ import annotations

import torch
from torch import Tensor

from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage2_transformer import GPT, RQTransformer, SamplingParams

CACHE_BYTES = 1_500_000_000
"""For keys and values of all pictures that are drawn at once: about as much as 1.3 billion weights in int8,
so that 16 candidates of such a model can be drawn within 4 GB."""

MOST_CANDIDATES = 16
"""Drawn at once: more gain little, and take longer to show the first."""

PIXELS = 256 * 256
"""Of all pictures that are decoded at once: each takes up to 3 KB. A CPU is no slower with one picture of
this size than with several."""


def candidates_at_once(model: GPT | RQTransformer, num_candidates: int, params: SamplingParams) -> int:
    """How many candidates to draw in a batch.

    Args:
        model: that draws them.
        num_candidates: in all, >= 1.
        params: with guidance each candidate has two rows.

    Returns:
        The largest batch that is in bounds, or a smaller one that makes all batches about equal: 16, of which
        9 would fit, are drawn by 8.
    """
    rows = 2 if params.is_guided else 1
    fitting = max(1, min(MOST_CANDIDATES, CACHE_BYTES // (rows * model.cache_bytes)))
    num_batches = -(-num_candidates // fitting)
    return -(-num_candidates // num_batches)


def decode_in_parts(image_tokenizer: QuantizedAutoencoder, codes: Tensor) -> Tensor:
    """Codes to pictures, as many at once as there is memory for.

    Args:
        image_tokenizer: that decodes them.
        codes: int64 (B, *code_shape).

    Returns:
        (B, 3, H, W), see `QuantizedAutoencoder.decode`.
    """
    size = max(1, PIXELS // image_tokenizer.convnet.image_size**2)
    return torch.cat([image_tokenizer.decode(part) for part in torch.split(codes, size)])
