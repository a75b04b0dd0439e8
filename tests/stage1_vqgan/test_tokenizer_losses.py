"""The loss of a tokenizer: its terms by hand, and two players who leave each other's weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vqgan.diff_augment import DiffAugmentConfig
from stage1_vqgan.discriminator import DiscriminatorConfig
from stage1_vqgan.losses import (
    TokenizerLoss,
    TokenizerLossConfig,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from stage1_vqgan.quantize import QuantizerOutput

ADVERSARY = DiscriminatorConfig(width=4, num_layers=1)


class Model(nn.Module):
    """The smallest that has a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        reconstructions = self.layers(images)
        codes = torch.zeros(len(images), 2, 2, dtype=torch.int64)
        latents = reconstructions[:, :, :2, :2]
        return reconstructions, QuantizerOutput(
            latents, codes, 0.25 * latents.square().mean(), 0.5 * latents.mean()
        )

    @property
    def last_layer(self) -> Tensor:
        return self.layers[2].weight


def build(**settings: Any) -> tuple[Model, TokenizerLoss, Tensor]:
    """Model, loss and pictures; the same whatever the settings."""
    defaults: dict[str, Any] = {"perceptual": "none", "discriminator": ADVERSARY, "adversarial_warmup": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = Model(), torch.rand(2, 3, 8, 8) * 2 - 1
        return model, TokenizerLoss(TokenizerLossConfig(**{**defaults, **settings})), images


def compute(model: Model, loss: TokenizerLoss, images: Tensor, step: int = 0, **options: Any) -> Any:
    reconstructions, quantized = model(images)
    options = {"last_layer": model.last_layer, **options}
    return loss(images, reconstructions, quantized, step=step, **options)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


class TestTerms:
    def test_hinge(self) -> None:
        real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
        assert float(hinge_loss(real, fake)) == pytest.approx(
            0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2 + 0.5) / 4)
        )
        assert float(hinge_loss(torch.zeros(5), torch.zeros(3))) == 1
        assert float(hinge_loss(torch.ones(5), -torch.ones(3))) == 0

    def test_generator(self) -> None:
        assert float(generator_loss(torch.tensor([1.0, 2.0, -6.0]))) == 1

    @pytest.mark.parametrize("pixel", ["l1", "l2"])
    def test_pixels(self, pixel: Any) -> None:
        model, loss, images = build(pixel=pixel, adversarial_weight=0)
        terms = compute(model, loss, images)
        difference = model(images)[0] - images
        expected = difference.abs().mean() if pixel == "l1" else difference.square().mean()
        quantized = model(images)[1]
        torch.testing.assert_close(terms.parts[pixel], expected)
        torch.testing.assert_close(
            terms.total, expected + quantized.commitment_loss + quantized.codebook_loss
        )
        assert set(terms.parts) == {pixel, "commitment", "codebook"}

    @pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
    def test_perception(self, weight: float) -> None:
        """Here the network is the squared distance of red; of weight 0 it is not even run."""
        model, loss, images = build(perceptual_weight=weight, adversarial_weight=0)
        without = compute(model, loss, images)
        loss._perceptual = (RedDistance(),)
        terms = compute(model, loss, images)
        red = F.mse_loss(model(images)[0][:, 0], images[:, 0])
        torch.testing.assert_close(terms.total, without.total + weight * red)
        assert ("perceptual" in terms.parts) == (weight > 0)
        if weight > 0:
            torch.testing.assert_close(terms.parts["perceptual"], red)  # the log has it unweighted

    def test_all_together(self) -> None:
        model, loss, images = build(adversarial_weight=0.8)
        parts = (terms := compute(model, loss, images)).parts
        assert set(parts) == {"l1", "commitment", "codebook", "generator", "discriminator", "adaptive_weight"}
        others = parts["l1"] + parts["commitment"] + parts["codebook"] + parts["discriminator"]
        torch.testing.assert_close(terms.total, others + 0.8 * parts["adaptive_weight"] * parts["generator"])
        assert not any(part.requires_grad for part in parts.values())


class RedDistance(nn.Module):
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return F.mse_loss(others[:, 0], images[:, 0])


class TestAdaptiveWeight:
    def test_by_differences(self) -> None:
        """The gradients' lengths from central differences of each entry of the last layer, in float64."""
        torch.manual_seed(0)
        layer = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        x = torch.randn(5, 4, dtype=torch.float64)

        def similarity(weight: Tensor) -> Tensor:
            return (x @ weight.T - 1).abs().mean()

        def generator(weight: Tensor) -> Tensor:
            return -(x @ weight.T).tanh().mean()

        lengths = []
        for function in (similarity, generator):
            slopes = []
            for i in range(layer.numel()):
                shift = torch.zeros(12, dtype=torch.float64)
                shift[i] = 1e-6
                ends = [function(layer.detach() + sign * shift.view(3, 4)) for sign in (1, -1)]
                slopes.append((ends[0] - ends[1]) / 2e-6)
            lengths.append(torch.stack(slopes).square().sum().sqrt())
        weight = adaptive_weight(similarity(layer), generator(layer), layer)
        torch.testing.assert_close(weight, lengths[0] / (lengths[1] + 1e-4), rtol=1e-5, atol=0)
        assert not weight.requires_grad
        assert layer.grad is None

    @pytest.mark.parametrize("scale", [0.1, 30.0])
    def test_it_takes_out_the_adversary_s_scale(self, scale: float) -> None:
        layer = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def pull(factor: float) -> Tensor:
            generator = factor * layer.tanh().sum()
            return adaptive_weight(layer.square().sum(), generator, layer) * generator

        torch.testing.assert_close(pull(scale), pull(1.0), rtol=1e-3, atol=0)

    def test_an_adversary_without_an_opinion(self) -> None:
        """Its gradient is zero: the weight is large, and finite."""
        layer = torch.ones(2, 2, requires_grad=True)
        assert float(adaptive_weight(1e6 * layer.sum(), 0 * layer.sum(), layer)) == 1e4

    def test_not_adaptive(self) -> None:
        model, loss, images = build(is_adaptive=False, adversarial_weight=0.8)
        parts = (terms := compute(model, loss, images)).parts
        assert float(parts["adaptive_weight"]) == 1
        others = parts["l1"] + parts["commitment"] + parts["codebook"] + parts["discriminator"]
        torch.testing.assert_close(terms.total, others + 0.8 * parts["generator"])


class TestPlayers:
    def test_one_backward_pass_is_the_two_of_two_optimisers(self) -> None:
        """The generator's term does not move the discriminator, nor the discriminator's the tokenizer."""
        model, loss, images = build(adversarial_weight=0.8)
        terms = compute(model, loss, images)
        terms.total.backward()
        joint = gradients(model), gradients(loss)

        model, loss, images = build(adversarial_weight=0.8)
        reconstructions, quantized = model(images)
        similarity = (reconstructions - images).abs().mean()
        generator = -loss.discriminator(reconstructions).mean()
        weight = adaptive_weight(similarity, generator, model.last_layer)
        total = similarity + quantized.commitment_loss + quantized.codebook_loss + 0.8 * weight * generator
        total.backward()
        alone = gradients(model)
        loss.zero_grad()
        real, fake = loss.discriminator(images), loss.discriminator(model(images)[0].detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        assert float(weight) > 1e-3
        assert all(any(g is not None and g.any() for g in player) for player in joint)
        for ours, expected in zip(joint, (alone, gradients(loss)), strict=True):
            for gradient, other in zip(ours, expected, strict=True):
                assert other is not None
                torch.testing.assert_close(gradient, other)

    @pytest.mark.parametrize("is_adaptive", [True, False])
    def test_before_its_start(self, is_adaptive: bool) -> None:
        """The tokenizer does not hear of it; its gradients, which distributed training needs, are zero."""
        model, loss, images = build(adversarial_start=3, is_adaptive=is_adaptive)
        terms = compute(model, loss, images, step=2)
        assert set(terms.parts) == {"l1", "commitment", "codebook"}
        terms.total.backward()
        before = gradients(model)
        assert all(gradient is not None and not gradient.any() for gradient in gradients(loss))
        model, loss, images = build(adversarial_weight=0)
        without = compute(model, loss, images)
        torch.testing.assert_close(without.total, terms.total)
        without.total.backward()
        for gradient, other in zip(before, gradients(model), strict=True):
            torch.testing.assert_close(gradient, other)

    def test_from_its_start(self) -> None:
        model, loss, images = build(adversarial_start=3)
        terms = compute(model, loss, images, step=3)
        assert "discriminator" in terms.parts
        terms.total.backward()
        first, *_ = gradients(loss)
        assert first is not None
        assert first.any()

    def test_it_learns_before_it_is_heard(self) -> None:
        """A fresh adversary's gradient is noise, which the adaptive weight made as strong as the pixels'."""
        model, loss, images = build(adversarial_start=3, adversarial_warmup=2)
        terms = compute(model, loss, images, step=4)
        assert set(terms.parts) == {"l1", "commitment", "codebook", "discriminator"}
        terms.total.backward()
        first, *_ = gradients(loss)
        assert first is not None
        assert first.any()
        heard = gradients(model)
        model, without, images = build(adversarial_weight=0)
        compute(model, without, images).total.backward()
        for gradient, other in zip(heard, gradients(model), strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=0)
        assert "generator" in compute(model, loss, images, step=5).parts

    def test_warm_up_by_default(self) -> None:
        loss = TokenizerLoss(TokenizerLossConfig(perceptual="none", adversarial_start=7))
        assert [loss.is_adversarial(step) for step in (6, 7)] == [False, True]
        assert [loss.is_heard(step) for step in (7, 306, 307)] == [False, False, True]

    def test_it_sees_augmented_pictures_alone(self) -> None:
        """Real and reconstructed ones, in both players' terms; the pixels' term sees what was made."""
        model, loss, images = build(augmentation=DiffAugmentConfig(color=0, translation=0, cutout=0.99))
        seen: list[Tensor] = []
        loss.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        terms = compute(model, loss, images)
        assert len(seen) == 3
        for pictures in seen:
            zeros = (pictures == 0).all(dim=1).flatten(1).sum(dim=1)
            assert bool((zeros >= 16).all())  # a hole of 8 x 8 with its middle in the picture
        torch.testing.assert_close(terms.parts["l1"], (model(images)[0] - images).abs().mean())
        terms.total.backward()
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients(model))

    def test_augmentation_is_off_by_default(self) -> None:
        assert TokenizerLossConfig().augmentation is None

    def test_evaluation_has_no_adversary(self) -> None:
        model, loss, images = build()
        with torch.no_grad():
            terms = compute(model, loss.eval(), images, step=9, last_layer=None)
        assert set(terms.parts) == {"l1", "commitment", "codebook"}
        torch.testing.assert_close(terms.total, sum(terms.parts.values()))

    def test_no_adversary_has_no_parameters(self) -> None:
        _, loss, _ = build(adversarial_weight=0)
        assert loss.discriminator is None
        assert not list(loss.parameters())
        assert not loss.is_adversarial(10**9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel": "l3"}, "pixel must be one of l1, l2, got 'l3'"),
        ({"perceptual": "vgg"}, "perceptual must be one of none, lpips, efflite, got 'vgg'"),
        ({"perceptual_weight": -1}, "perceptual_weight must be at least 0, got -1"),
        ({"adversarial_weight": -0.5}, "adversarial_weight must be at least 0, got -0.5"),
        ({"adversarial_start": -1}, "adversarial_start must be at least 0, got -1"),
        ({"adversarial_warmup": -1}, "adversarial_warmup must be at least 0, got -1"),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerLossConfig(**settings)
