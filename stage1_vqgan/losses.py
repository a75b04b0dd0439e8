"""The loss of an image tokenizer: pixels, perception, quantizer and, from some step on, an adversary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stage1_vqgan.diff_augment import DiffAugmentConfig, diff_augment
from stage1_vqgan.discriminator import Discriminator, DiscriminatorConfig
from stage1_vqgan.perceptual import PERCEPTUAL, build_perceptual
from stage1_vqgan.quantize.interface import QuantizerOutput

PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
MAX_ADAPTIVE_WEIGHT = 1e4


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Terms and weights."""

    pixel: Literal["l1", "l2"] = "l1"  # of reconstruction against picture; its weight is 1
    perceptual: str = "lpips"  # network that compares the two, one of `PERCEPTUAL`; none = no such term
    perceptual_weight: float = 1.0  # >= 0
    adversarial_weight: float = 0.75  # of the generator's term, times the adaptive weight; 0 = no adversary
    adversarial_start: int = 0  # optimiser step from which the adversary learns, >= 0
    adversarial_warmup: int = 300  # steps that it then learns before the tokenizer hears of it, >= 0
    is_adaptive: bool = True  # balance the adversary's gradient with that of pixels and perception
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    augmentation: DiffAugmentConfig | None = None  # of all that the adversary sees, for small sets; {} = on

    def __post_init__(self) -> None:
        if self.pixel not in PIXEL_LOSSES:
            raise ValueError(f"pixel must be one of {', '.join(PIXEL_LOSSES)}, got {self.pixel!r}")
        if self.perceptual not in PERCEPTUAL:
            raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL)}, got {self.perceptual!r}")
        for name in ("perceptual_weight", "adversarial_weight", "adversarial_start", "adversarial_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class LossTerms(NamedTuple):
    """What is minimised, and its parts for the log."""

    total: Tensor  # scalar
    parts: dict[str, Tensor]  # name -> scalar without gradient, unweighted


class TokenizerLoss(nn.Module):
    """The terms of VQGAN (Esser et al. 2021, eq. 4-7) and RQ-VAE (Lee et al. 2022, eq. 5-7).

    Its parameters are the discriminator's. They are trained by the same total: the generator's term does
    not reach them, and theirs does not reach the reconstructions, so that one backward pass serves both.
    """

    def __init__(self, config: TokenizerLossConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator = Discriminator(config.discriminator) if config.adversarial_weight > 0 else None
        # in a tuple: frozen weights that are neither trained, nor saved, nor switched to training mode
        self._perceptual = (build_perceptual(config.perceptual),)

    def forward(
        self,
        images: Tensor,
        reconstructions: Tensor,
        quantized: QuantizerOutput,
        *,
        step: int,
        last_layer: Tensor | None = None,
    ) -> LossTerms:
        """Compare reconstructions with images.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstructions: same shape, with gradients while training.
            quantized: the quantizer's output, for its losses.
            step: of the optimiser, counted from 0.
            last_layer: the decoder's last weight; None = evaluation, without the adversary.

        Returns:
            The total and its parts.
        """
        pixel = PIXEL_LOSSES[self.config.pixel](reconstructions, images)
        parts: dict[str, Tensor] = {self.config.pixel: pixel}
        similarity = pixel
        (network,) = self._perceptual
        if network is not None and self.config.perceptual_weight > 0:
            # of float32 weights, whatever the precision of the training
            parts["perceptual"] = network.to(images.device)(images.float(), reconstructions.float())
            similarity = similarity + self.config.perceptual_weight * parts["perceptual"]
        total = similarity + quantized.commitment_loss + quantized.codebook_loss
        parts |= {"commitment": quantized.commitment_loss, "codebook": quantized.codebook_loss}
        if self.discriminator is not None and last_layer is not None:
            if self.is_adversarial(step):
                adversary = hinge_loss(
                    self.discriminator(self._augment(images)),
                    self.discriminator(self._augment(reconstructions.detach())),
                )
                total, parts["discriminator"] = total + adversary, adversary
            else:
                # distributed training waits for a gradient of every parameter, be it zero
                total = total + 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
            if self.is_heard(step):
                generator = generator_loss(_frozen(self.discriminator, self._augment(reconstructions)))
                weight = (
                    adaptive_weight(similarity, generator, last_layer)
                    if self.config.is_adaptive
                    else torch.ones_like(generator)
                )
                total = total + self.config.adversarial_weight * weight * generator
                parts |= {"generator": generator, "adaptive_weight": weight}
        return LossTerms(total, {name: part.detach() for name, part in parts.items()})

    def is_adversarial(self, step: int) -> bool:
        """Whether the adversary learns at a step of the optimiser."""
        return self.discriminator is not None and step >= self.config.adversarial_start

    def is_heard(self, step: int) -> bool:
        """Whether the tokenizer follows the adversary at a step of the optimiser."""
        return self.is_adversarial(step - self.config.adversarial_warmup)

    def _augment(self, images: Tensor) -> Tensor:
        """What the adversary sees of pictures (B, 3, H, W)."""
        return diff_augment(images, self.config.augmentation) if self.config.augmentation else images


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's (Lim & Ye 2017): real patches above 1, reconstructed ones below -1.

    Args:
        real_logits: of pictures, any shape.
        fake_logits: of reconstructions, any shape.

    Returns:
        A scalar >= 0; 1 where the discriminator knows nothing.
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The generator's side of the hinge: reconstructions should look real."""
    return -fake_logits.mean()


def adaptive_weight(similarity: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the gradients' lengths at the decoder's last layer (Esser et al. 2021, eq. 7).

    Args:
        similarity: scalar, the loss of pixels and perception.
        generator: scalar, the generator's loss.
        last_layer: the weight that both gradients are taken at.

    Returns:
        A scalar in [0, 10000] without gradient.
    """
    (towards_similar,) = torch.autograd.grad(similarity, last_layer, retain_graph=True)
    (towards_real,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
    ratio = towards_similar.norm() / (towards_real.norm() + 1e-4)
    return ratio.clamp(0, MAX_ADAPTIVE_WEIGHT).detach()  # type: ignore[no-any-return]


def _frozen(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module whose parameters get no gradient from here."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, parameters, (x,))  # type: ignore[no-any-return]
