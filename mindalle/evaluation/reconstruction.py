"""Reconstruction: what is left of a picture after an image tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from mindalle.image import psnr
from stage1_vqgan import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class ReconstructionQuality:
    """Means over pictures."""

    psnr: float  # dB, mean of the pictures' own
    ssim: float  # Wang et al. 2004, Gaussian window of 11 pixels, in [-1, 1]
    num_images: int


@torch.inference_mode()
def measure_reconstruction(tokenizer: ImageTokenizer, batches: Iterable[Tensor]) -> ReconstructionQuality:
    """Encode and decode pictures and compare.

    Args:
        tokenizer: in evaluation mode.
        batches: images (B, 3, H, W) in [-1, 1].

    Returns:
        The means over all pictures.

    Raises:
        ValueError: if there are none.
    """
    ratios, similarities = [], []
    for images in batches:
        reconstructions = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
        ratios.append(psnr(images, reconstructions))
        # of brightness from 0 to 1: about zero, the ratio of means says nothing
        unit = (reconstructions * 0.5 + 0.5, images * 0.5 + 0.5)
        similarities.append(torch.as_tensor(ssim(*unit, data_range=1.0, reduction="none")))
    if not ratios:
        raise ValueError("there are no pictures to measure a reconstruction on")
    return ReconstructionQuality(
        psnr=torch.cat(ratios).mean().item(),
        ssim=torch.cat(similarities).mean().item(),
        num_images=sum(map(len, ratios)),
    )
