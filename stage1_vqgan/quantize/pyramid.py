"""Multi-scale residual quantisation (Tian et al. 2024): grids of codes, each for what is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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

MAX_SIDE = 256
"""Codes along the side of the finest scale, at most."""

MAX_SCALES = 64
"""Scales of a pyramid, at most."""

NUM_SWAPPED = 16
"""A swapped code becomes one of so many nearest."""


@dataclass(frozen=True, kw_only=True)
class PyramidQuantizerConfig:
    """Scales and codebooks."""

    scales: tuple[int, ...] = (1, 2, 4, 8, 8)  # codes along a side, coarse to fine, each in [1, 256]
    codebook_sizes: tuple[int, ...] = (2048, 2048, 2048, 2048, 2048)  # V of each scale, in [1, 2**24]
    width: int = 64  # channels of an entry, in [1, 65536]
    commitment_weight: float = 0.25  # weight of the commitment loss, >= 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        check_bounds(self, scales=MAX_SIDE, codebook_sizes=1 << 24, width=1 << 16)
        if not 1 <= len(self.scales) <= MAX_SCALES or len(self.scales) != len(self.codebook_sizes):
            raise ValueError(
                f"scales and codebook_sizes must be of one length in [1, {MAX_SCALES}], "
                f"got {self.scales} and {self.codebook_sizes}: name one codebook size per scale"
            )
        if min(self.scales) < 1 or list(self.scales) != sorted(self.scales):
            raise ValueError(f"scales must be at least 1 and not descend, got {self.scales}")
        if min(self.codebook_sizes) < 1 or self.width < 1:
            raise ValueError(
                f"codebook_sizes and width must be at least 1, got {self.codebook_sizes} and {self.width}"
            )
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight must not be negative, got {self.commitment_weight}")

    @property
    def grid(self) -> int:
        """Latents along a side: the finest scale."""
        return self.scales[-1]

    @property
    def ends(self) -> tuple[int, ...]:
        """Codes of an image up to the end of each scale; the last is T."""
        squares = [side * side for side in self.scales]
        return tuple(sum(squares[: s + 1]) for s in range(len(squares)))


class CorruptedCodes(NamedTuple):
    """Codes with mistakes, and what would repair them."""

    read: Tensor  # int64 (B, T), some codes replaced by near ones
    targets: Tensor  # int64 (B, T): at each place the nearest code to what `read` has left over so far


class PyramidQuantizer(Quantizer):
    """A codebook per scale. Scale s quantises the average-pooled residual of the scales before it.

    The vectors of a scale are up-sampled to the full grid and pass through a 3x3 convolution, phi, which adds
    to them; it starts at zero. Codes are flat, (B, T), coarse scales first and in raster order within one.
    The codebooks stay fixed during a forward pass.

    Attributes:
        swap_share: of the codes that a forward pass in training reads as near ones, so that the decoder bears
            mistakes, in [0, 1]; whoever trains sets it.

    Source: Tian et al. 2024 (arXiv 2404.02905), algorithms 1 and 2.
    """

    def __init__(self, config: PyramidQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = max(config.codebook_sizes)
        self.swap_share = 0.0
        self.tables = nn.ParameterList(
            nn.Parameter(nn.init.normal_(torch.empty(size, config.width))) for size in config.codebook_sizes
        )
        self.phi = nn.ModuleList(
            nn.Conv2d(config.width, config.width, 3, padding=1, bias=False) for _ in config.scales
        )
        for convolution in self.phi:
            nn.init.zeros_(convolution.weight)  # type: ignore[arg-type]

    def codebooks(self) -> list[nn.Parameter]:
        """The codebook (V, C) of each scale."""
        return list(self.tables)

    def all_codebooks(self) -> Tensor:
        """All codebooks (S, V, C); smaller ones are padded with zero rows to the largest V."""
        return torch.stack([F.pad(t, (0, 0, 0, self.codebook_size - len(t))) for t in self.tables])

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantise latents, with a straight-through gradient; training swaps `swap_share` of the codes.

        Args:
            latents: (B, C, h, w), h = w = the finest scale.

        Returns:
            QuantizerOutput with codes (B, T), the nearest ones whatever was swapped. Its losses are means
            over scales of the squared distance between the latents and the sum of the scales so far. The
            codebook loss trains phi, and the codebooks unless averages do.

        Raises:
            ValueError: if the grid is another.
        """
        codes = read = self.encode(latents)
        if self.training and self.swap_share:
            read = self.corrupt(latents, share=self.swap_share, num_neighbours=NUM_SWAPPED).read
        partial_sums = self.partial_sums(read)  # (S, B, C, h, w)
        same = latents.expand_as(partial_sums)
        return QuantizerOutput(
            straight_through(latents, partial_sums[-1]),
            codes,
            commitment_loss=self.config.commitment_weight * F.mse_loss(same, partial_sums.detach()),
            codebook_loss=F.mse_loss(partial_sums, same.detach()),
        )

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> codes int64 (B, T), greedily: at each scale the nearest entries."""
        return self.corrupt(latents, share=0.0).targets

    @torch.no_grad()
    def corrupt(
        self,
        latents: Tensor,
        *,
        share: Tensor | float,
        num_neighbours: int = 32,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> CorruptedCodes:
        """Encode with mistakes, and quantise at each scale what these leave over.

        A sequence model that reads `read` and predicts `targets` learns to repair its own mistakes: later
        scales make up for what earlier ones got wrong.

        Args:
            latents: (B, C, h, w).
            share: chance that a code is replaced, in [0, 1], for all or per image (B,).
            num_neighbours: a replacement is one of so many codes nearest to the target's vector.
            temperature: of the draw, softmax(-d / (temperature * mean d)) over the neighbours' squared
                distances d; > 0.
            generator: of the draws, on the latents' device; None = torch's default.

        Returns:
            CorruptedCodes; without mistakes both are the codes of `encode`.

        Source: Han et al. 2024 (arXiv 2412.04431), bitwise self-correction, here with whole codes.
        """
        self._check(latents)
        chance = torch.as_tensor(share, device=latents.device).view(-1, 1, 1)
        is_exact = not bool((chance > 0).any())
        residual = latents.float()
        read, targets = [], []
        for scale, side in enumerate(self.config.scales):
            table = self.tables[scale]
            pooled = rearrange(F.adaptive_avg_pool2d(residual, side), "b c h w -> b h w c")
            distances = squared_distances(pooled, table)  # (B, s, s, V)
            target = code = distances.argmin(dim=-1)
            if not is_exact:
                drawn = _draw_near(distances, num_neighbours, temperature, generator)
                chosen = torch.rand(code.shape, generator=generator, device=code.device) < chance
                code = torch.where(chosen, drawn, target)
            residual = residual - self._spread(code, scale).float()
            read.append(code.flatten(1))
            targets.append(target.flatten(1))
        return CorruptedCodes(torch.cat(read, dim=1), torch.cat(targets, dim=1))

    def assignments(self, latents: Tensor, codes: Tensor) -> list[Assignment]:
        """What each scale quantised, with its codes.

        Args:
            latents: (B, C, h, w).
            codes: their codes (B, T).

        Returns:
            One assignment per scale.
        """
        residual, found = latents.detach().float(), []
        for scale, code in enumerate(self._grids(codes)):
            pooled = F.adaptive_avg_pool2d(residual, self.config.scales[scale])
            vectors = rearrange(pooled, "b c h w -> (b h w) c")
            found.append(Assignment(self.tables[scale], vectors, code.flatten()))
            residual = residual - self._spread(code, scale).detach().float()
        return found

    @torch.no_grad()
    def fit(self, latents: Tensor, cluster: Cluster) -> None:
        """Set the codebooks to centres, scale by scale.

        Args:
            latents: (B, C, h, w).
            cluster: finds the centres.
        """
        self._check(latents)
        residual = latents.float()
        for scale, (side, size) in enumerate(
            zip(self.config.scales, self.config.codebook_sizes, strict=True)
        ):
            pooled = rearrange(F.adaptive_avg_pool2d(residual, side), "b c h w -> b h w c")
            self.tables[scale].copy_(cluster(pooled.flatten(0, 2), size))
            code = squared_distances(pooled, self.tables[scale]).argmin(dim=-1)
            residual = residual - self._spread(code, scale).float()

    def partial_sums(self, codes: Tensor) -> Tensor:
        """Codes (B, T') up to the end of a scale -> (S', B, C, h, w): entry i is the sum of scales 0 to i."""
        spread = [self._spread(grid, scale) for scale, grid in enumerate(self._grids(codes))]
        return torch.stack(spread).cumsum(dim=0)

    def decode(self, codes: Tensor) -> Tensor:
        """Add up the scales of codes.

        Args:
            codes: (B, T'), all codes, or those up to the end of any scale.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: if they do not end with a scale, or a code is beyond the codebook of its scale.
        """
        grids = list(self._grids(codes))
        for scale, (grid, size) in enumerate(zip(grids, self.config.codebook_sizes, strict=False)):
            if size < self.codebook_size and int(grid.max()) >= size:
                raise ValueError(f"codes of scale {scale} must be in [0, {size}), got {int(grid.max())}")
        return torch.stack([self._spread(grid, scale) for scale, grid in enumerate(grids)]).sum(dim=0)

    def _spread(self, codes: Tensor, scale: int) -> Tensor:
        """The codes (B, s, s) of a scale -> their vectors over the whole grid (B, C, h, w), after phi."""
        vectors = rearrange(F.embedding(codes, self.tables[scale]), "b h w c -> b c h w")
        if codes.shape[-1] != self.config.grid:
            vectors = F.interpolate(vectors, size=self.config.grid, mode="bilinear", align_corners=False)
        return vectors + self.phi[scale](vectors)  # type: ignore[no-any-return]

    def _grids(self, codes: Tensor) -> Iterator[Tensor]:
        """Codes (B, T') -> those of each scale (B, s, s)."""
        if codes.shape[1] not in self.config.ends:
            raise ValueError(
                f"codes must end with a scale, so be one of {', '.join(map(str, self.config.ends))} "
                f"an image for scales {self.config.scales}, got {codes.shape[1]}"
            )
        start = 0
        for side, end in zip(self.config.scales, self.config.ends, strict=True):
            if start < codes.shape[1]:
                yield codes[:, start:end].reshape(len(codes), side, side)  # (B, s s) -> (B, s, s)
            start = end

    def _check(self, latents: Tensor) -> None:
        grid = self.config.grid
        if latents.shape[1:] != (self.config.width, grid, grid):
            raise ValueError(
                f"latents must be (B, {self.config.width}, {grid}, {grid}), got {tuple(latents.shape)}: "
                "a pyramid of codes is made for pictures of one size"
            )


def _draw_near(
    distances: Tensor, num_neighbours: int, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """A code for each row of squared distances (B, s, s, V), one of the nearest: int64 (B, s, s)."""
    near, codes = distances.topk(min(num_neighbours, distances.shape[-1]), largest=False)  # (B, s, s, k)
    spread = (near - near[..., :1]).mean(dim=-1, keepdim=True).clamp_min(1e-12)
    weights = torch.softmax(-(near - near[..., :1]) / (temperature * spread), dim=-1)
    picked = torch.multinomial(weights.flatten(0, 2), 1, generator=generator)  # (B s s, 1)
    return codes.flatten(0, 2).gather(1, picked).view(distances.shape[:-1])
