"""Quantizers against loops over every entry, their gradients, and the soft codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vqgan import RQVAE, ResidualQuantizerConfig, VectorQuantizerConfig
from stage1_vqgan.quantize import Quantizer, QuantizerOutput, ResidualQuantizer, VectorQuantizer
from stage1_vqgan.quantize.interface import squared_distances

SIZES = {"shared": ((11, 11, 11), True), "separate": ((11, 11, 11), False), "unequal": ((11, 5, 8), False)}


def vector_quantizer(seed: int = 0, **settings: Any) -> VectorQuantizer:
    quantizer = VectorQuantizer(VectorQuantizerConfig(**{"codebook_size": 11, "width": 5, **settings}))
    return fill(quantizer, seed)


def residual_quantizer(kind: str = "shared", seed: int = 0, **settings: Any) -> ResidualQuantizer:
    sizes, is_shared = SIZES[kind]
    config = ResidualQuantizerConfig(codebook_sizes=sizes, is_shared=is_shared, width=5, **settings)
    return fill(ResidualQuantizer(config), seed)


def fill(quantizer: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for table in quantizer.parameters():
        torch.nn.init.normal_(table, generator=generator)
    return quantizer


def draw_latents(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 5, 3, 4, generator=torch.Generator().manual_seed(seed))


def nearest(vector: Tensor, table: Tensor) -> int:
    """The first entry that no other is nearer than, by a loop in float64."""
    best, best_distance = -1, float("inf")
    for entry, row in enumerate(table.double()):
        distance = float(((vector.double() - row) ** 2).sum())
        if distance < best_distance:
            best, best_distance = entry, distance
    return best


QUANTIZERS = [vector_quantizer, *(lambda kind=kind: residual_quantizer(kind) for kind in SIZES)]


@pytest.mark.parametrize("build", QUANTIZERS, ids=["vector", *SIZES])
class TestContract:
    def test_shapes(self, build: Any) -> None:
        quantizer: Quantizer = build()
        latents = draw_latents()
        output = quantizer(latents)
        assert isinstance(output, QuantizerOutput)
        assert output.latents.shape == latents.shape
        assert output.latents.dtype == torch.float32
        assert output.codes.shape[:3] == (2, 3, 4)
        assert output.codes.dtype == torch.int64
        assert output.commitment_loss.shape == output.codebook_loss.shape == ()
        assert torch.equal(quantizer.encode(latents), output.codes)
        torch.testing.assert_close(quantizer.decode(output.codes), output.latents)
        assert quantizer.all_codebooks().shape == (output.codes[0, 0, 0].numel(), 11, 5)

    def test_gradient_is_straight_through(self, build: Any) -> None:
        latents = draw_latents().requires_grad_()
        weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
        (build()(latents).latents * weights).sum().backward()
        assert torch.equal(latents.grad, weights)  # d quantised / d latent is one, exactly

    def test_the_picture_does_not_train_the_codebook(self, build: Any) -> None:
        quantizer = build()
        quantizer(draw_latents().requires_grad_()).latents.sum().backward()
        assert all(table.grad is None for table in quantizer.parameters())

    def test_codebook_is_frozen_during_a_forward(self, build: Any) -> None:
        """rq-vae-transformer updated and restarted its shared codebook between the depths of one forward.

        The later depths then matched this batch's own residuals, and the codes of a training batch were not
        those that the same pictures get alone or in evaluation.
        """
        quantizer, latents = build().train(), draw_latents(batch=4)
        before = [table.clone() for table in quantizer.state_dict().values()]
        codes = quantizer(latents).codes
        for table, old in zip(quantizer.state_dict().values(), before, strict=True):
            assert torch.equal(table, old)
        assert torch.equal(quantizer.eval()(latents).codes, codes)
        assert torch.equal(torch.cat([quantizer(one[None]).codes for one in latents]), codes)

    def test_half_precision_latents(self, build: Any) -> None:
        """Distances are computed in float32: in bfloat16 near entries would be told apart by chance."""
        latents = draw_latents().to(torch.bfloat16)
        assert torch.equal(build().encode(latents), build().encode(latents.float()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(build().encode(latents), build().encode(latents.float()))


class TestVector:
    def test_against_a_loop(self) -> None:
        quantizer, latents = vector_quantizer(), draw_latents()
        codes = quantizer.encode(latents)
        quantized = quantizer.decode(codes)
        for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
            code = nearest(latents[b, :, i, j], quantizer.codebook.detach())
            assert codes[b, i, j] == code
            assert torch.equal(quantized[b, :, i, j], quantizer.codebook[code])

    def test_of_equal_entries_the_first(self) -> None:
        quantizer = vector_quantizer()
        quantizer.codebook.data[7] = quantizer.codebook.data[2]
        latents = quantizer.codebook.data[7].view(1, 5, 1, 1)
        assert quantizer.encode(latents).item() == 2

    def test_loss(self) -> None:
        """beta weighs the encoder's term, as in the paper; taming-transformers has it on the codebook's."""
        quantizer, latents = vector_quantizer(commitment_weight=0.25), draw_latents().requires_grad_()
        output = quantizer(latents)
        difference = (quantizer.decode(output.codes) - latents).detach()
        torch.testing.assert_close(output.commitment_loss, 0.25 * difference.square().mean())
        torch.testing.assert_close(output.codebook_loss, difference.square().mean())
        (output.commitment_loss + output.codebook_loss).backward()
        slope = 2 * difference / difference.numel()
        torch.testing.assert_close(latents.grad, -0.25 * slope)
        by_entry = torch.zeros(11, 5).index_add(
            0, output.codes.flatten(), slope.permute(0, 2, 3, 1).reshape(-1, 5)
        )
        torch.testing.assert_close(quantizer.codebook.grad, by_entry)


@pytest.mark.parametrize("kind", SIZES)
class TestResidual:
    def test_against_a_loop(self, kind: str) -> None:
        quantizer, latents = residual_quantizer(kind), draw_latents()
        codes = quantizer.encode(latents)
        sums = quantizer.partial_sums(codes)  # (D, B, C, h, w)
        for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
            residual, total = latents[b, :, i, j], torch.zeros(5)
            for depth in range(3):
                table = quantizer.tables[0 if kind == "shared" else depth].detach()
                code = nearest(residual, table)
                assert codes[b, i, j, depth] == code
                residual, total = residual - table[code], total + table[code]
                torch.testing.assert_close(sums[depth, b, :, i, j], total)

    def test_loss(self, kind: str) -> None:
        quantizer, latents = residual_quantizer(kind, commitment_weight=0.5), draw_latents().requires_grad_()
        output = quantizer(latents)
        sums = quantizer.partial_sums(output.codes).detach()
        errors = [(latents.detach() - partial).square().mean() for partial in sums]
        torch.testing.assert_close(output.commitment_loss, 0.5 * sum(errors) / 3)
        torch.testing.assert_close(output.codebook_loss, sum(errors) / 3)
        output.commitment_loss.backward()
        slopes = [2 * (latents.detach() - partial) / 3 / latents.numel() for partial in sums]
        torch.testing.assert_close(latents.grad, 0.5 * sum(slopes))
        assert all(table.grad is None for table in quantizer.parameters())  # it trains the encoder only

    def test_codebook_loss(self, kind: str) -> None:
        """An entry of depth d is part of the sums of depth d and all after it."""
        quantizer, latents = residual_quantizer(kind), draw_latents().requires_grad_()
        output = quantizer(latents)
        sums = quantizer.partial_sums(output.codes).detach()
        output.codebook_loss.backward()
        assert latents.grad is None
        slopes = [2 * (partial - latents.detach()) / 3 / latents.numel() for partial in sums]
        expected = [torch.zeros_like(table) for table in quantizer.tables]
        for depth in range(3):
            slope = sum(slopes[depth:]).permute(0, 2, 3, 1).reshape(-1, 5)
            table = expected[0 if kind == "shared" else depth]
            table.index_add_(0, output.codes[..., depth].flatten(), slope)
        for table, gradient in zip(quantizer.tables, expected, strict=True):
            torch.testing.assert_close(table.grad, gradient)

    def test_partial_depth(self, kind: str) -> None:
        quantizer = residual_quantizer(kind)
        codes = quantizer.encode(draw_latents())
        for depth, partial in enumerate(quantizer.partial_sums(codes), start=1):
            torch.testing.assert_close(quantizer.decode(codes[..., :depth]), partial)

    def test_assignments(self, kind: str) -> None:
        """Every residual with its code, for the codebook that it was looked up in."""
        quantizer, latents = residual_quantizer(kind), draw_latents()
        codes = quantizer.encode(latents)
        assignments = quantizer.assignments(latents, codes)
        assert all(one.table is table for one, table in zip(assignments, quantizer.tables, strict=True))
        left_over = torch.cat([latents[None], latents - quantizer.partial_sums(codes)])[:3].detach()
        left_over = left_over.permute(1, 3, 4, 0, 2)  # (D, B, C, h, w) -> (B, h, w, D, C)
        if kind == "shared":
            torch.testing.assert_close(assignments[0].vectors, left_over.flatten(0, 3))
            assert torch.equal(assignments[0].codes, codes.flatten())
            return
        for depth, assignment in enumerate(assignments):
            torch.testing.assert_close(assignment.vectors, left_over[..., depth, :].flatten(0, 2))
            assert torch.equal(assignment.codes, codes[..., depth].flatten())

    def test_soft_codes_along_the_greedy_path(self, kind: str) -> None:
        quantizer, latents = residual_quantizer(kind), draw_latents()
        probabilities, codes = quantizer.soft_codes(latents, 0.5)
        assert probabilities.shape == (2, 3, 4, 3, 11)
        assert torch.equal(codes, quantizer.encode(latents))
        assert torch.equal(probabilities.argmax(dim=-1), codes)
        self.check(quantizer, latents, probabilities, codes, temperature=0.5)

    def test_soft_codes_along_a_drawn_path(self, kind: str) -> None:
        """The next residual follows the code that was drawn, not the nearest one."""
        quantizer, latents = residual_quantizer(kind), draw_latents()
        generator = torch.Generator().manual_seed(3)
        probabilities, codes = quantizer.soft_codes(latents, 2.0, sample=True, generator=generator)
        assert not torch.equal(codes, quantizer.encode(latents))
        self.check(quantizer, latents, probabilities, codes, temperature=2.0)

    def test_soft_codes_are_drawn_with_the_generator(self, kind: str) -> None:
        quantizer, latents = residual_quantizer(kind), draw_latents()
        drawn = [
            quantizer.soft_codes(latents, 2.0, sample=True, generator=torch.Generator().manual_seed(seed))[1]
            for seed in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    def check(
        self,
        quantizer: ResidualQuantizer,
        latents: Tensor,
        probabilities: Tensor,
        codes: Tensor,
        temperature: float,
    ) -> None:
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(codes.shape))
        residual = latents.permute(0, 2, 3, 1)
        for depth in range(3):
            table = quantizer.table(depth).detach()
            distances = (residual[..., None, :] - table).square().sum(dim=-1)  # (B, h, w, V)
            expected = (-distances / temperature).softmax(dim=-1)
            torch.testing.assert_close(
                probabilities[..., depth, : len(table)], expected, atol=1e-5, rtol=1e-4
            )
            assert (probabilities[..., depth, len(table) :] == 0).all()
            residual = residual - table[codes[..., depth]]

    def test_soft_codes_harden_as_it_gets_cold(self, kind: str) -> None:
        quantizer, latents = residual_quantizer(kind), draw_latents()
        hard = quantizer.encode(latents)
        probabilities, codes = quantizer.soft_codes(latents, 1e-6, sample=True)
        assert torch.equal(codes, hard)
        assert torch.equal(probabilities, torch.nn.functional.one_hot(hard, 11).float())

    def test_draws_are_the_generator_s(self, kind: str) -> None:
        quantizer, latents = residual_quantizer(kind), draw_latents()

        def draw(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            codes: Tensor = quantizer.soft_codes(latents, 1.0, sample=True, generator=generator)[1]
            return codes

        state = torch.random.get_rng_state()
        assert torch.equal(draw(5), draw(5))
        assert not torch.equal(draw(5), draw(6))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_errors(self, kind: str) -> None:
        quantizer, latents = residual_quantizer(kind), draw_latents()
        codes = quantizer.encode(latents)
        with pytest.raises(
            ValueError, match=r"temperature must be positive, got 0; encode\(\) gives the hard"
        ):
            quantizer.soft_codes(latents, 0)
        with pytest.raises(ValueError, match=r"codes must have 1 to 3 depths, got 4 in \(2, 3, 4, 4\)"):
            quantizer.decode(torch.cat([codes, codes[..., :1]], dim=-1))
        with pytest.raises(ValueError, match="codes must have 1 to 3 depths, got 0"):
            quantizer.decode(codes[..., :0])


def test_draws_follow_the_probabilities() -> None:
    quantizer, latents = residual_quantizer(), draw_latents(batch=1)[..., :1, :1].expand(4000, 5, 1, 1)
    probabilities, codes = quantizer.soft_codes(
        latents, 3.0, sample=True, generator=torch.Generator().manual_seed(0)
    )
    frequencies = codes[..., 0].flatten().bincount(minlength=11) / 4000
    torch.testing.assert_close(frequencies, probabilities[0, 0, 0, 0], atol=0.03, rtol=0)


def test_a_code_beyond_a_smaller_codebook() -> None:
    """It raised an IndexError from inside torch, since only the largest codebook was checked."""
    codes = torch.zeros(1, 1, 1, 3, dtype=torch.int64)
    codes[..., 1] = 5  # fine for depths 0 and 2
    with pytest.raises(ValueError, match=r"codes of depth 1 must be in \[0, 5\), got 5"):
        residual_quantizer("unequal").decode(codes)
    residual_quantizer("unequal").decode(codes.roll(1, dims=-1))


def test_smaller_codebooks_are_padded_with_zeros() -> None:
    quantizer = residual_quantizer("unequal")
    codebooks = quantizer.all_codebooks()
    assert quantizer.codebook_size == 11
    for depth, size in enumerate((11, 5, 8)):
        assert torch.equal(codebooks[depth, :size], quantizer.tables[depth])
        assert (codebooks[depth, size:] == 0).all()


def test_squared_distances() -> None:
    vectors, table = draw_latents().permute(0, 2, 3, 1), vector_quantizer().codebook
    distances = squared_distances(vectors, table)
    assert distances.shape == (2, 3, 4, 11)
    expected = (vectors[..., None, :] - table).square().sum(dim=-1)
    torch.testing.assert_close(distances, expected, atol=1e-5, rtol=1e-5)


class TestRQVAE:
    def test_partial_depth(self, tiny_rqvae: RQVAE) -> None:
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        codes = tiny_rqvae.encode(images)
        pictures = [tiny_rqvae.decode(codes[..., :depth]) for depth in (1, 2, 3)]
        assert all(picture.shape == images.shape for picture in pictures)
        assert not torch.equal(pictures[0], pictures[2])
        assert torch.equal(pictures[2], tiny_rqvae.decode(codes))
