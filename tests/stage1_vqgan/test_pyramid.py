"""The multi-scale residual quantizer against loops over scales and places, its training, and its mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vqgan import RQVAE, PyramidQuantizerConfig, PyramidVAE, PyramidVAEConfig
from stage1_vqgan.quantize import CodebookAverages, CodebookTrainingConfig, PyramidQuantizer

SCALES = [(1, 2, 4), (4,), (1, 3, 4, 4), (2, 4, 4)]


def build(scales: tuple[int, ...] = (1, 2, 4), seed: int = 0, **settings: Any) -> PyramidQuantizer:
    sizes = tuple(7 + 2 * s for s in range(len(scales)))
    quantizer = PyramidQuantizer(
        PyramidQuantizerConfig(scales=scales, **{"codebook_sizes": sizes, "width": 5, **settings})
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return quantizer


def draw_latents(batch: int = 2, side: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, 5, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slow_encode(quantizer: PyramidQuantizer, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (T,) and their sum (C, h, w) for latents (C, h, w), by loops in float64."""
    side = latents.shape[-1]
    residual, total, codes = latents.double(), torch.zeros_like(latents).double(), []
    for scale, size in enumerate(quantizer.config.scales):
        table = quantizer.tables[scale].double()
        grid = torch.zeros(len(latents), size, size, dtype=torch.float64)
        for i in range(size):
            for j in range(size):
                rows = slice(i * side // size, -(-(i + 1) * side // size))
                columns = slice(j * side // size, -(-(j + 1) * side // size))
                mean = residual[:, rows, columns].mean(dim=(1, 2))
                code = int(((table - mean) ** 2).sum(dim=1).argmin())
                codes.append(code)
                grid[:, i, j] = table[code]
        spread = F.interpolate(grid[None], size=(side, side), mode="bilinear")[0]
        spread = spread + F.conv2d(spread[None], quantizer.phi[scale].weight.double(), padding=1)[0]
        residual, total = residual - spread, total + spread
    return torch.tensor(codes), total


@pytest.mark.parametrize("scales", SCALES)
class TestContract:
    def test_against_loops(self, scales: tuple[int, ...]) -> None:
        quantizer, latents = build(scales), draw_latents(3)
        codes = quantizer.encode(latents)
        decoded = quantizer.decode(codes)
        for n, one in enumerate(latents):
            expected, total = slow_encode(quantizer, one)
            assert torch.equal(codes[n], expected)
            torch.testing.assert_close(decoded[n].double(), total, atol=1e-5, rtol=1e-5)

    def test_forward(self, scales: tuple[int, ...]) -> None:
        quantizer, latents = build(scales), draw_latents().requires_grad_()
        output = quantizer(latents)
        assert torch.equal(output.codes, quantizer.encode(latents))
        torch.testing.assert_close(output.latents, quantizer.decode(output.codes))
        weights = torch.randn(latents.shape)
        (output.latents * weights).sum().backward()
        assert torch.equal(latents.grad, weights)  # straight through
        assert all(parameter.grad is None for parameter in quantizer.parameters())

    def test_partial_decoding(self, scales: tuple[int, ...]) -> None:
        quantizer = build(scales)
        codes = quantizer.encode(draw_latents())
        sums = quantizer.partial_sums(codes)
        for scale, end in enumerate(quantizer.config.ends):
            torch.testing.assert_close(quantizer.decode(codes[:, :end]), sums[scale])

    def test_codebooks_are_frozen_during_a_forward(self, scales: tuple[int, ...]) -> None:
        quantizer, latents = build(scales).train(), draw_latents(4)
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        codes = quantizer(latents).codes
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
        assert torch.equal(torch.cat([quantizer(one[None]).codes for one in latents]), codes)

    def test_half_precision_latents(self, scales: tuple[int, ...]) -> None:
        latents = draw_latents().to(torch.bfloat16)
        assert torch.equal(build(scales).encode(latents), build(scales).encode(latents.float()))


class TestMistakes:
    def test_targets_repair_what_was_read(self) -> None:
        """Targets are the nearest codes to what the codes that are read, not the right ones, leave over."""
        quantizer, latents = build((1, 2, 4, 4)), draw_latents(6)
        read, targets = quantizer.corrupt(latents, share=0.5, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(read, targets)
        found = quantizer.assignments(latents, read)
        for assignment, target in zip(
            found, targets.split([n * n for n in quantizer.config.scales], dim=1), strict=True
        ):
            distances = torch.cdist(assignment.vectors, assignment.table.detach())
            assert torch.equal(distances.argmin(dim=1), target.flatten())

    def test_shares(self) -> None:
        quantizer, latents = build((1, 2, 4, 4)), draw_latents(300)
        share = torch.tensor([0.0, 0.5, 1.0]).repeat(100)
        read, targets = quantizer.corrupt(latents, share=share, num_neighbours=4)
        differs = (read != targets).float().mean(dim=1).view(100, 3).mean(dim=0)
        assert differs[0] == 0
        assert 0.15 < differs[1] < 0.5  # a draw may be the nearest itself
        assert 1.6 < differs[2] / differs[1] < 2.4

    def test_a_replacement_is_near(self) -> None:
        quantizer, latents = build((4,)), draw_latents(50)
        read, _ = quantizer.corrupt(latents, share=1.0, num_neighbours=2)
        (assignment,) = quantizer.assignments(latents, read)
        near = torch.cdist(assignment.vectors, assignment.table.detach()).topk(2, largest=False).indices
        assert bool((near == read.flatten()[:, None]).any(dim=1).all())

    def test_none(self) -> None:
        quantizer, latents = build(), draw_latents()
        read, targets = quantizer.corrupt(latents, share=0.0)
        assert torch.equal(read, targets)
        assert torch.equal(read, quantizer.encode(latents))

    def test_training_swaps_and_evaluation_does_not(self) -> None:
        quantizer, latents = build(), draw_latents(8)
        quantizer.swap_share = 0.5
        plain = quantizer.eval()(latents)
        torch.testing.assert_close(plain.latents, quantizer.decode(plain.codes))
        swapped = quantizer.train()(latents)
        assert torch.equal(swapped.codes, plain.codes)  # the averages follow the nearest codes
        assert not torch.allclose(swapped.latents, plain.latents)


class TestTraining:
    def test_averages_lower_the_error_and_leave_phi_to_gradients(self) -> None:
        quantizer, latents = build((1, 2, 4)), draw_latents(64)
        averages = CodebookAverages(quantizer, CodebookTrainingConfig(decay=0.8))
        assert not any(table.requires_grad for table in quantizer.codebooks())
        assert all(phi.weight.requires_grad for phi in quantizer.phi)  # type: ignore[union-attr]

        def error() -> float:
            return float(F.mse_loss(quantizer.decode(quantizer.encode(latents)), latents))

        averages.start(latents)
        started = error()
        optimizer = torch.optim.Adam([p for p in quantizer.parameters() if p.requires_grad], lr=0.01)
        for _ in range(30):
            output = quantizer(latents)
            optimizer.zero_grad()
            output.codebook_loss.backward()
            optimizer.step()
            averages.update(latents, output.codes)
        assert error() < 0.95 * started

    def test_dead_codes_come_back(self) -> None:
        quantizer, latents = build((1, 4)), draw_latents(32)
        with torch.no_grad():
            quantizer.tables[1] += 100  # nothing chooses these
        averages = CodebookAverages(quantizer, CodebookTrainingConfig(restart_after=2, decay=0.5))
        averages.num_updates += 1  # no k-means
        for _ in range(6):
            averages.update(latents, quantizer.encode(latents))
        assert len(quantizer.encode(latents)[:, 1:].unique()) > 3

    def test_an_existing_encoder_and_decoder(self, tiny_rqvae: RQVAE, tiny_pyramid: PyramidVAE) -> None:
        tiny_pyramid.start_from(tiny_rqvae)
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        assert torch.equal(tiny_pyramid.encode_latents(images), tiny_rqvae.encode_latents(images))
        latents = torch.randn(2, 8, 4, 4)
        assert torch.equal(tiny_pyramid.decode_latents(latents), tiny_rqvae.decode_latents(latents))
        quantizer = PyramidQuantizerConfig(scales=(4,), codebook_sizes=(8,), width=6)
        other = PyramidVAE(PyramidVAEConfig(convnet=tiny_rqvae.convnet, quantizer=quantizer))
        with pytest.raises(ValueError, match=r"must have the same convnet and width, got .* expected"):
            other.start_from(tiny_rqvae)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"scales": ()}, r"of one length in \[1, 64\], got \(\)"),
            ({"codebook_sizes": (8,)}, "name one codebook size per scale"),
            ({"scales": (4, 2, 1)}, r"not descend, got \(4, 2, 1\)"),
            ({"scales": (0, 2, 4)}, "scales must be at least 1 and not descend"),
            ({"scales": (1, 2, 300)}, "scales must be at most 256, got 300"),
            ({"width": 0}, "must be at least 1"),
            ({"commitment_weight": -1.0}, "must not be negative, got -1.0"),
            ({"codebook_sizes": (8, 8, 1 << 30)}, "codebook_sizes must be at most 16777216"),
        ],
    )
    def test_config(self, settings: dict[str, Any], message: str) -> None:
        defaults = {"scales": (1, 2, 4), "codebook_sizes": (8, 8, 8)}
        with pytest.raises(ValueError, match=message):
            PyramidQuantizerConfig(**{**defaults, **settings})

    def test_swaps(self) -> None:
        config = CodebookTrainingConfig(swap_share=0.2, swap_steps=10)
        assert [config.swap_share_at(step) for step in (0, 5, 10, 99)] == [0.2, 0.1, 0.0, 0.0]
        with pytest.raises(ValueError, match=r"swap_share must be in \[0, 1\] .* got 1.5 and 0"):
            CodebookTrainingConfig(swap_share=1.5)

    def test_codes(self, tiny_pyramid: PyramidVAE) -> None:
        with pytest.raises(ValueError, match=r"be one of 1, 5, 9, 25 an image for scales .*, got 7"):
            tiny_pyramid.decode(torch.zeros(1, 7, dtype=torch.int64))
        codes = torch.zeros(1, 25, dtype=torch.int64)
        codes[0, 0] = 20
        with pytest.raises(ValueError, match=r"codes of scale 0 must be in \[0, 9\), got 20"):
            tiny_pyramid.decode(codes)

    def test_size(self, tiny_pyramid: PyramidVAE) -> None:
        with pytest.raises(ValueError, match="image_size must be 16, got 32: a pyramid"):
            tiny_pyramid.code_shape_at(32)
        with pytest.raises(ValueError, match="finest scale must be the latent grid's 4, got scales"):
            PyramidVAEConfig(convnet=tiny_pyramid.convnet, quantizer=PyramidQuantizerConfig())
