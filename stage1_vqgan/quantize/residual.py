"""Residual quantisation (Lee et al. 2022): D codes per latent, each for what the ones before it left over."""

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
class ResidualQuantizerConfig:
    """Depth and codebooks."""

    codebook_sizes: tuple[int, ...] = (
        16384,
        16384,
        16384,
        16384,
    )  # V of each of D depths, in [1, 2**24]
    width: int = 256  # channels of an entry, in [1, 65536]
    is_shared: bool = True  # one codebook for all depths (then all sizes are equal), or one each
    commitment_weight: float = 0.25  # weight of the commitment loss, >= 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        check_bounds(self, codebook_sizes=1 << 24, width=1 << 16)
        if not self.codebook_sizes or min(self.codebook_sizes) < 1 or self.width < 1:
            raise ValueError(
                f"codebook_sizes and width must be at least 1, got {self.codebook_sizes} and {self.width}"
            )
        if self.is_shared and len(set(self.codebook_sizes)) > 1:
            raise ValueError(
                f"a shared codebook has one size, got {self.codebook_sizes}: "
                "make them equal or set is_shared to false"
            )
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight must not be negative, got {self.commitment_weight}")

    @property
    def depth(self) -> int:
        """D, codes per position."""
        return len(self.codebook_sizes)


class ResidualQuantizer(Quantizer):
    """D codebooks (or one for all depths) that refine a vector coarse to fine.

    The codebooks stay fixed during a forward pass; whoever trains them changes them between steps.
    """

    def __init__(self, config: ResidualQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = max(config.codebook_sizes)
        sizes = config.codebook_sizes[:1] if config.is_shared else config.codebook_sizes
        self.tables = nn.ParameterList(
            nn.Parameter(nn.init.normal_(torch.empty(size, config.width))) for size in sizes
        )

    def table(self, depth: int) -> Tensor:
        """The codebook (V, C) of a depth."""
        table: Tensor = self.tables[0 if self.config.is_shared else depth]
        return table

    def codebooks(self) -> list[nn.Parameter]:
        """The codebook (V, C) of each depth, or the shared one."""
        return list(self.tables)

    def all_codebooks(self) -> Tensor:
        """All codebooks (D, V, C); smaller ones are padded with zero rows to the largest V."""
        tables = [self.table(d) for d in range(self.config.depth)]
        return torch.stack([F.pad(table, (0, 0, 0, self.codebook_size - len(table))) for table in tables])

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantise latents, with a straight-through gradient and the commitment loss.

        Args:
            latents: (B, C, h, w).

        Returns:
            QuantizerOutput with codes (B, h, w, D). Its losses are means over depths of the squared distance
            between the latents and the sum of the first codes' vectors.

        Source: Lee et al. 2022, eq. 6.
        """
        codes = self.encode(latents)
        partial_sums = self.partial_sums(codes)  # (D, B, C, h, w)
        same = latents.expand_as(partial_sums)
        return QuantizerOutput(
            straight_through(latents, partial_sums[-1]),
            codes,
            commitment_loss=self.config.commitment_weight * F.mse_loss(same, partial_sums.detach()),
            codebook_loss=(
                F.mse_loss(partial_sums, same.detach())
                if self.table(0).requires_grad
                else latents.new_zeros(())
            ),
        )

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> codes int64 (B, h, w, D), greedily: the nearest entry to each residual."""
        residual = rearrange(latents, "b c h w -> b h w c").float()
        codes = []
        for depth in range(self.config.depth):
            code = squared_distances(residual, self.table(depth)).argmin(dim=-1)
            residual = residual - F.embedding(code, self.table(depth)).float()
            codes.append(code)
        return torch.stack(codes, dim=-1)

    def assignments(self, latents: Tensor, codes: Tensor) -> list[Assignment]:
        """What each depth quantised, with its codes; together where the depths share a codebook.

        Args:
            latents: (B, C, h, w).
            codes: their codes (B, h, w, D).

        Returns:
            One assignment per codebook.
        """
        residual = rearrange(latents.detach(), "b c h w -> (b h w) c").float()
        by_depth = []
        for depth, code in enumerate(codes.flatten(0, 2).unbind(dim=-1)):  # (B, h, w, D) -> D times (M,)
            table = self.table(depth)
            by_depth.append(Assignment(table, residual, code))
            residual = residual - F.embedding(code, table.detach()).float()
        if not self.config.is_shared:
            return by_depth
        # depth fastest: the latents of several devices then join in the order of one large batch
        vectors = torch.stack([assignment.vectors for assignment in by_depth], dim=1)  # (M, D, C)
        return [Assignment(self.table(0), vectors.flatten(0, 1), codes.flatten())]

    @torch.no_grad()
    def fit(self, latents: Tensor, cluster: Cluster) -> None:
        """Set the codebooks to centres, depth by depth; in a shared one each depth gets its part of entries.

        Args:
            latents: (B, C, h, w).
            cluster: finds the centres.
        """
        residual = rearrange(latents, "b c h w -> (b h w) c").float()
        depth, centres = self.config.depth, []
        for d, size in enumerate(self.config.codebook_sizes):
            # V entries in D nearly equal parts
            share = size * (d + 1) // depth - size * d // depth if self.config.is_shared else size
            centres.append(cluster(residual, share))
            if share:
                nearest = squared_distances(residual, centres[-1]).argmin(dim=-1)
                residual = residual - centres[-1][nearest]
        if self.config.is_shared:
            centres = [torch.cat(centres)]
        for table, found in zip(self.tables, centres, strict=True):
            table.copy_(found)

    def soft_codes(
        self,
        latents: Tensor,
        temperature: float,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Distributions over codes by distance: the soft targets of an RQ-Transformer.

        Args:
            latents: (B, C, h, w).
            temperature: in squared units of the latents, > 0; towards 0 the distribution hardens to `encode`.
            sample: draw each code from its distribution instead of taking the nearest; the next residual
                follows the drawn one.
            generator: randomness of the draws; None = torch's default.

        Returns:
            probabilities (B, h, w, D, V), zero where a depth's codebook is smaller, and codes int64
            (B, h, w, D).

        Raises:
            ValueError: if the temperature is not positive.

        Source: Lee et al. 2022, section 3.2.3: softmax of minus the squared distance over the temperature.
        """
        if temperature <= 0:
            raise ValueError(
                f"temperature must be positive, got {temperature}; encode() gives the hard codes"
            )
        residual = rearrange(latents, "b c h w -> b h w c").float()
        codes, probabilities = [], []
        for depth in range(self.config.depth):
            distances = squared_distances(residual, self.table(depth))  # (B, h, w, V)
            probs = torch.softmax(-distances / temperature, dim=-1)
            if sample:
                flat = torch.multinomial(probs.flatten(0, 2), 1, generator=generator)  # (B h w, 1)
                code = flat.view(distances.shape[:-1])
            else:
                code = distances.argmin(dim=-1)
            residual = residual - F.embedding(code, self.table(depth)).float()
            codes.append(code)
            probabilities.append(F.pad(probs, (0, self.codebook_size - probs.shape[-1])))
        return torch.stack(probabilities, dim=-2), torch.stack(codes, dim=-1)

    def partial_sums(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w, D') -> (D', B, C, h, w): entry d is the sum of the first d + 1 codes' vectors."""
        vectors = [F.embedding(codes[..., d], self.table(d)) for d in range(codes.shape[-1])]
        return rearrange(torch.stack(vectors).cumsum(dim=0), "d b h w c -> d b c h w")

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the vectors of codes.

        Args:
            codes: (B, h, w, D') with 1 <= D' <= D: the first D' depths.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: if there are more codes per position than depths, or none, or a code is beyond the
                codebook of its depth.
        """
        if not 1 <= codes.shape[-1] <= self.config.depth:
            raise ValueError(
                f"codes must have 1 to {self.config.depth} depths, "
                f"got {codes.shape[-1]} in {tuple(codes.shape)}"
            )
        for d, size in enumerate(self.config.codebook_sizes[: codes.shape[-1]]):
            if size < self.codebook_size and int(codes[..., d].max()) >= size:
                raise ValueError(f"codes of depth {d} must be in [0, {size}), got {int(codes[..., d].max())}")
        vectors = [F.embedding(codes[..., d], self.table(d)) for d in range(codes.shape[-1])]
        return rearrange(torch.stack(vectors, dim=-2).sum(dim=-2), "b h w c -> b c h w")
