"""PatchGAN (Isola et al. 2017): tells real patches of a picture from reconstructed ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

MAX_WIDENING = 8  # of the first layer's channels


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of a PatchGAN."""

    width: int = 64  # channels of the first layer, >= 1
    num_layers: int = 3  # layers that halve the sides, >= 1; taming-transformers has 3, rq-vae-transformer 2

    def __post_init__(self) -> None:
        if self.width < 1 or self.num_layers < 1:
            raise ValueError(f"width and num_layers must be at least 1, got {self.width}, {self.num_layers}")


class Discriminator(nn.Module):
    """Convolutions of 4x4 pixels with batch norm, one logit for each patch of the picture."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.min_size = 3 << config.num_layers  # pixels of a side that leave one patch
        widths = [config.width * min(1 << i, MAX_WIDENING) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (narrow, wide) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < config.num_layers else 1
            layers += [
                nn.Conv2d(narrow, wide, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w), positive where a patch looks real.

        H and W must be at least `min_size`, 3 x 2^num_layers pixels.
        """
        return self.layers(images)  # type: ignore[no-any-return]


def _init_weights(module: nn.Module) -> None:
    """DCGAN's: convolutions N(0, 0.02), scales of batch norm N(1, 0.02)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
