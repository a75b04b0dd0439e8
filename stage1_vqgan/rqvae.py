"""RQ-VAE (Lee et al. 2022): convolutional encoder, D residual codes per position, convolutional decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from einops import rearrange
from torch import Tensor

from checkpoint_io import check_bounds
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.convnet import ConvNetConfig
from stage1_vqgan.quantize import ResidualQuantizer, ResidualQuantizerConfig


@dataclass(frozen=True, kw_only=True)
class RQVAEConfig:
    """The boxes of an RQ-VAE and how the latent grid maps to the code grid."""

    convnet: ConvNetConfig = field(default_factory=ConvNetConfig)  # encoder and decoder
    # width: latent_width x patch
    quantizer: ResidualQuantizerConfig = field(default_factory=ResidualQuantizerConfig)
    latent_width: int = 256  # channels of a latent between the convolutions and the quantizer, >= 1
    patch: tuple[int, int] = (1, 1)  # latents (rows, columns) that share one position of the code grid, >= 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        check_bounds(self, latent_width=1 << 16, patch=1 << 12)
        if (
            len(self.patch) != 2
            or min(self.patch) < 1
            or any(self.convnet.latent_size % p for p in self.patch)
        ):
            raise ValueError(
                f"patch must divide the latent grid of {self.convnet.latent_size}, got {self.patch}"
            )
        expected = self.latent_width * self.patch[0] * self.patch[1]
        if self.quantizer.width != expected:
            raise ValueError(
                f"the quantizer's width must be latent_width x patch = {expected}, got {self.quantizer.width}"
            )


class RQVAE(QuantizedAutoencoder):
    """An `ImageTokenizer` with codes (B, h, w, D), as in rq-vae-transformer."""

    quantizer: ResidualQuantizer

    def __init__(self, config: RQVAEConfig) -> None:
        super().__init__(
            config.convnet, ResidualQuantizer(config.quantizer), latent_width=config.latent_width
        )
        self.config = config

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """V of each depth."""
        return self.config.quantizer.codebook_sizes

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, D) at the training resolution."""
        size, (rows, columns) = self.convnet.latent_size, self.config.patch
        return (size // rows, size // columns, self.config.quantizer.depth)

    @property
    def downsampling(self) -> int:
        """What the sides of an image are multiples of: pixels per code, where a patch is square."""
        return self.convnet.downsampling * math.lcm(*self.config.patch)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents before quantisation, on the code grid (B, C, h, w)."""
        rows, columns = self.config.patch
        # (B, C, h*rows, w*columns) -> (B, rows*columns*C, h, w): the latents of a patch, channels fastest
        return rearrange(
            super().encode_latents(images),
            "b c (h rows) (w columns) -> b (rows columns c) h w",
            rows=rows,
            columns=columns,
        )

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantised latents on the code grid (B, C, h, w) -> images (B, 3, H, W), not clamped."""
        rows, columns = self.config.patch
        # (B, rows*columns*C, h, w) -> (B, C, h*rows, w*columns)
        return super().decode_latents(
            rearrange(
                latents, "b (rows columns c) h w -> b c (h rows) (w columns)", rows=rows, columns=columns
            )
        )
