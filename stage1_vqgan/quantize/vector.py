"""Vector quantisation (van den Oord et al. 2017): each latent becomes its nearest codebook entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint_io import check_bounds
from stage1_vqgan.quantize.interface import (
    Assignment,
    Cluster,
    Quantizer,
    QuantizerOutput,
    squared_distances,
    straight_through,
)


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig:
    """Size of the codebook and weight of the loss that trains it."""

    codebook_size: int = 16384  # V, number of entries, in [1, 2**24]
    width: int = 256  # C, channels of an entry, in [1, 65536]
    commitment_weight: float = 0.25  # beta: weight of the encoder's term against the codebook's, >= 0

    def __post_init__(self) -> None:
        check_bounds(self, codebook_size=1 << 24, width=1 << 16)
        if self.codebook_size < 1 or self.width < 1:
            raise ValueError(
                f"codebook_size and width must be at least 1, got {self.codebook_size} and {self.width}"
            )
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight must not be negative, got {self.commitment_weight}")


class VectorQuantizer(Quantizer):
    """One codebook, one code per latent."""

    def __init__(self, config: VectorQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.width))  # (V, C)
        nn.init.uniform_(self.codebook, -1.0 / config.codebook_size, 1.0 / config.codebook_size)

    def codebooks(self) -> list[nn.Parameter]:
        """The codebook (V, C)."""
        return [self.codebook]

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantise latents, with gradients.

        Args:
            latents: (B, C, h, w), any float dtype; distances are computed in float32.

        Returns:
            QuantizerOutput with codes (B, h, w).

        Source: van den Oord et al. 2017, eq. 3; beta on the encoder's term, as in the paper.
        """
        codes = self.encode(latents)
        quantized = self.decode(codes)
        return QuantizerOutput(
            straight_through(latents, quantized),
            codes,
            commitment_loss=self.config.commitment_weight * F.mse_loss(latents, quantized.detach()),
            codebook_loss=(
                F.mse_loss(quantized, latents.detach())
                if self.codebook.requires_grad
                else latents.new_zeros(())
            ),
        )

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> codes int64 (B, h, w); of equally near entries the first."""
        vectors = rearrange(latents, "b c h w -> b h w c")
        return squared_distances(vectors, self.codebook).argmin(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> their vectors (B, C, h, w)."""
        return rearrange(F.embedding(codes, self.codebook), "b h w c -> b c h w")

    def assignments(self, latents: Tensor, codes: Tensor) -> list[Assignment]:
        """Every latent (B, C, h, w) with its code (B, h, w)."""
        return [Assignment(self.codebook, _vectors(latents), codes.flatten())]

    @torch.no_grad()
    def fit(self, latents: Tensor, cluster: Cluster) -> None:
        """Set the codebook to centres of latents (B, C, h, w)."""
        self.codebook.copy_(cluster(_vectors(latents), self.codebook_size))

    def all_codebooks(self) -> Tensor:
        """The codebook as (1, V, C)."""
        return self.codebook.unsqueeze(0)


def _vectors(latents: Tensor) -> Tensor:
    return rearrange(latents.detach(), "b c h w -> (b h w) c").float()
