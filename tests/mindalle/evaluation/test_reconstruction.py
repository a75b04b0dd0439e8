"""Reconstruction: a tokenizer that changes pictures by a known amount."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mindalle.evaluation import measure_reconstruction
from stage1_vqgan import VQGAN


class Offset:
    """Adds a constant."""

    codebook_size, code_shape, downsampling = 1, (1, 1), 1

    def __init__(self, offset: float) -> None:
        self.offset = offset

    def encode(self, images: Tensor) -> Tensor:
        self.images = images
        return torch.zeros(len(images), 1, 1, dtype=torch.int64)

    def decode(self, codes: Tensor) -> Tensor:
        return self.images + self.offset


def test_psnr_by_hand() -> None:
    images = torch.rand(5, 3, 16, 16) - 0.5
    quality = measure_reconstruction(Offset(0.1), images.split(2))
    assert quality.num_images == 5
    assert quality.psnr == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-3)
    assert 0.9 < quality.ssim < 1
    assert measure_reconstruction(Offset(0.0), [images]).ssim == pytest.approx(1, abs=1e-5)


def test_a_real_tokenizer(tiny_vqgan: VQGAN) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    together = measure_reconstruction(tiny_vqgan, [images])
    assert together.psnr == pytest.approx(measure_reconstruction(tiny_vqgan, images.split(1)).psnr, abs=1e-3)
    assert together.ssim < 0.9


def test_nothing() -> None:
    with pytest.raises(ValueError, match="no pictures to measure"):
        measure_reconstruction(Offset(0.0), [])
