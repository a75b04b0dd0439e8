"""Reconstruction: tokenizers that change pictures by a known amount, a real one, and codes by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from mindalle.evaluation.codebook import codebook_measures
from mindalle.evaluation.distances import frechet_distance
from mindalle.evaluation.features import FeatureNetwork, Features
from mindalle.evaluation.moments import moments_of
from mindalle.evaluation.reconstruction import (
    PerceptualDistance,
    load_perceptual,
    measure_reconstruction,
    quality_measures,
)
from mindalle.evaluation.refusal import RefusedError
from mindalle.image import to_pil, to_tensor
from stage1_vqgan import RQVAE, VQGAN
from stage1_vqgan.quantize.usage import code_counts, perplexity


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

    def by_depth(self, codes: Tensor) -> list[Tensor]:
        return [codes.flatten(1)]

    def coarse_to_fine(self, codes: Tensor) -> list[Tensor]:
        return [codes]


def mean_colours(pictures: Sequence[Image.Image]) -> Features:
    return Features(torch.stack([to_tensor(picture).mean(dim=(1, 2)) for picture in pictures]), None)


COLOURS = FeatureNetwork(
    name="Colour", weights_hash="0" * 64, resize="none", num_features=3, extract=mean_colours
)


def random_images(number: int = 5, size: int = 16) -> Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0)) - 0.5


def test_psnr_by_hand() -> None:
    images = random_images()
    found = measure_reconstruction(Offset(0.1), images.split(2))
    (quality,) = found.by_depth
    assert quality.psnr.tolist() == pytest.approx([10 * math.log10(4 / 0.01)] * 5, abs=1e-3)
    assert 0.9 < quality.ssim.mean() < 1
    assert (quality.perceptual, quality.vectors, found.vectors) == (None, None, None)
    psnr, ssim = quality_measures(found)
    assert (psnr.metric, psnr.unit, psnr.num_images) == ("PSNR", "dB", 5)
    assert psnr.value == pytest.approx(26.0206, abs=1e-3)
    assert ssim.metric == "SSIM"
    (same,) = measure_reconstruction(Offset(0.0), [images]).by_depth
    assert same.ssim.tolist() == pytest.approx([1] * 5, abs=1e-5)
    assert same.psnr.min() == math.inf


def test_psnr_of_noise() -> None:
    """Noise of a known variance: 10 log10 (4 / variance)."""

    class Noise(Offset):
        def decode(self, codes: Tensor) -> Tensor:
            noise = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(1))
            return self.images * 0 + 0.05 * noise

    found = measure_reconstruction(Noise(0.0), [torch.zeros(20, 3, 32, 32)])
    assert found.by_depth[0].psnr.mean().item() == pytest.approx(10 * math.log10(4 / 0.0025), abs=0.05)


def test_a_real_tokenizer_in_any_batches(tiny_vqgan: VQGAN) -> None:
    images = random_images(3) * 2
    together = measure_reconstruction(tiny_vqgan, [images])
    apart = measure_reconstruction(tiny_vqgan, images.split(1))
    assert torch.allclose(together.by_depth[0].psnr, apart.by_depth[0].psnr, atol=1e-3)
    (codes,) = together.codes
    assert torch.equal(codes.view(3, 4, 4), tiny_vqgan.encode(images).int())
    assert together.by_depth[0].ssim.mean() < 0.9


def test_depths(tiny_rqvae: RQVAE) -> None:
    images = random_images(4) * 2
    found = measure_reconstruction(tiny_rqvae, [images], network=COLOURS, has_all_depths=True)
    assert (len(found.by_depth), [part.shape for part in found.codes]) == (3, [(4, 16)] * 3)
    codes = tiny_rqvae.encode(images)
    for depth, quality in enumerate(found.by_depth, start=1):
        with torch.no_grad():
            decoded = tiny_rqvae.decode(codes[..., :depth]).clamp(-1, 1)
        error = (decoded - images).square().flatten(1).mean(dim=1)
        assert torch.allclose(quality.psnr, 10 * (4 / error).log10(), atol=1e-3)
        assert quality.vectors is not None
        assert torch.allclose(quality.vectors, mean_colours(to_pil(decoded)).vectors)
    names = [measure.metric for measure in quality_measures(found, network=COLOURS)]
    assert names[:3] == ["PSNR, 1 of 3 depths", "SSIM, 1 of 3 depths", "Colour-rFD, 1 of 3 depths"]
    last = measure_reconstruction(tiny_rqvae, [images]).by_depth
    assert len(last) == 1
    assert torch.equal(last[0].psnr, found.by_depth[-1].psnr)


def test_distance_of_reconstructions() -> None:
    """A shift of all colours by 0.1 and nothing else: three channels of 0.1 squared, but for bytes."""
    images = random_images(30)
    found = measure_reconstruction(Offset(0.1), images.split(8), network=COLOURS)
    *_, measure = quality_measures(found, network=COLOURS)
    assert (measure.metric, measure.num_images, measure.num_reference) == ("Colour-rFD", 30, 30)
    assert measure.value == pytest.approx(0.03, abs=1e-3)
    assert found.vectors is not None
    reference = moments_of(mean_colours(to_pil(images)).vectors)
    vectors = found.by_depth[0].vectors
    assert vectors is not None
    assert measure.value == pytest.approx(frechet_distance(moments_of(vectors), reference))
    assert measure.network == {"name": "Colour", "sha256": "0" * 64, "resize": "none"}
    assert "biased upwards" in measure.warnings[0]


def test_too_few_for_a_distance() -> None:
    found = measure_reconstruction(Offset(0.1), [random_images(3)], network=COLOURS)
    with pytest.raises(RefusedError, match="at least 4 pictures on each side, more than features, got 3"):
        quality_measures(found, network=COLOURS)
    assert len(quality_measures(found, network=COLOURS, may_refuse=True)) == 2
    (reduced,) = quality_measures(found, has_pixels=False, network=COLOURS, num_components=2)
    assert reduced.metric == "Colour-rFD-2"


def test_perceptual_distance_of_each_picture() -> None:
    distance = PerceptualDistance(
        name="L1",
        weights_hash="1" * 64,
        min_size=1,
        distance=lambda images, others: (images - others).abs().mean(),
    )
    found = measure_reconstruction(Offset(0.2), random_images().split(2), perceptual=distance)
    *_, measure = quality_measures(found, perceptual=distance)
    assert (measure.metric, measure.num_images) == ("L1", 5)
    assert measure.value == pytest.approx(0.2, abs=1e-6)


def test_efflite_is_never_called_lpips() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    distance = load_perceptual("efflite")
    images = random_images(2, size=32)
    assert distance.name == "EffLite-perceptual"
    with pytest.raises(ValueError, match="EffLite-perceptual takes pictures of at least 32 pixels, got 16"):
        measure_reconstruction(Offset(0.1), [random_images()], perceptual=distance)
    found = measure_reconstruction(Offset(0.1), [images], perceptual=distance)
    values = found.by_depth[0].perceptual
    assert values is not None
    together = distance.distance(images, (images + 0.1).clamp(-1, 1))
    assert values.mean().item() == pytest.approx(together.item(), rel=1e-4)


def test_nothing() -> None:
    with pytest.raises(ValueError, match="no pictures to measure"):
        measure_reconstruction(Offset(0.0), [])


def test_use_of_a_codebook_by_hand() -> None:
    codes = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[5, 5], [5, 5]])]  # of each depth (2, 2)
    assert code_counts(codes, 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 4, 0, 0]]
    assert perplexity(code_counts(codes, 8)).tolist() == pytest.approx([4, 1])
    assert perplexity(torch.tensor([[3, 1]])).item() == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    values = {measure.metric: measure.value for measure in codebook_measures(codes, (8, 6), seed=0)}
    assert values == pytest.approx(
        {
            "codebook usage, depth 1": 0.5,
            "codebook perplexity, depth 1": 4,
            "codebook usage, depth 2": 1 / 6,
            "codebook perplexity, depth 2": 1,
        }
    )
    (usage, _) = codebook_measures(codes[:1], (4,), seed=0)
    assert (usage.metric, usage.value) == ("codebook usage", 1)
