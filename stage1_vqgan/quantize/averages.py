"""Codebooks trained by moving averages, with a k-means start and restarts of entries that nothing chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stage1_vqgan.quantize.interface import Assignment, Quantizer, squared_distances

NOISE = 0.01
"""Standard deviation, as a share of the vectors' own, that tells copies of a vector apart."""


@dataclass(frozen=True, kw_only=True)
class CodebookTrainingConfig:
    """How the codebooks of a quantizer learn."""

    decay: float = 0.99  # of the moving averages per batch, in (0, 1)
    restart_after: int = 100  # batches an entry goes unchosen before it moves to a random vector; 0 = never
    kmeans_iterations: int = 10  # of Lloyd's algorithm on the first batch, >= 0; 0 = random vectors of it
    swap_share: float = 0.0  # pyramids: of the codes, read as near ones at the first step, in [0, 1] ...
    swap_steps: int = 0  # ... and fewer and fewer until this step, from which on none is, >= 0

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")
        if self.restart_after < 0 or self.kmeans_iterations < 0:
            raise ValueError(
                "restart_after and kmeans_iterations must be at least 0, "
                f"got {self.restart_after} and {self.kmeans_iterations}"
            )
        if not 0 <= self.swap_share <= 1 or self.swap_steps < 0:
            raise ValueError(
                "swap_share must be in [0, 1] and swap_steps at least 0, "
                f"got {self.swap_share} and {self.swap_steps}"
            )

    def swap_share_at(self, step: int) -> float:
        """The share of codes that are swapped at a step."""
        return self.swap_share * max(0.0, 1 - step / self.swap_steps) if self.swap_steps else 0.0


class CodebookAverages(nn.Module):
    """The statistics behind codebooks that follow the mean of the vectors assigned to each entry.

    A codebook stays as it is during a forward pass and moves once per batch, in `update`. (Were a shared
    codebook updated between the depths of one forward, later depths would match this very batch: good in
    training, bad afterwards.) On several devices all of them see the joint batch's statistics.

    Source: van den Oord et al. 2017, appendix A.1; Lee et al. 2022; restarts after Dhariwal et al. 2020.

    Args:
        quantizer: whose codebooks are trained; gradients no longer reach them.
        config: of the averages.
    """

    def __init__(self, quantizer: Quantizer, config: CodebookTrainingConfig) -> None:
        super().__init__()
        self.config = config
        self._quantizer = (quantizer,)  # in a tuple: its parameters are not this module's
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.num_updates: Tensor
        for i, table in enumerate(quantizer.codebooks()):
            table.requires_grad_(False)
            self.register_buffer(f"counts_{i}", torch.ones(len(table)))  # (V,) vectors per batch
            self.register_buffer(f"sums_{i}", table.detach().clone())  # (V, C)
            # (V,) batches since an entry was chosen
            self.register_buffer(f"ages_{i}", torch.zeros(len(table), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodebookAverages:
        """Move to a device, but stay in float32: in half precision, steps of 1% would round away."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """Set the codebooks to k-means centres of a first batch; after that or an update it does nothing.

        Args:
            latents: (B, C, h, w).
        """
        if self.num_updates:
            return
        (quantizer,) = self._quantizer
        quantizer.fit(_join(latents.float()), self._cluster)
        for i, table in enumerate(quantizer.codebooks()):
            if _is_distributed():
                dist.broadcast(table, src=0)  # sums on GPUs differ in their last bits from run to run
            self.get_buffer(f"sums_{i}").copy_(table)
        self.num_updates += 1

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor) -> None:
        """Move the codebooks towards a batch, and entries that nothing chose for long into it.

        Args:
            latents: (B, C, h, w), before quantisation.
            codes: their codes.
        """
        (quantizer,) = self._quantizer
        self.num_updates += 1
        for i, assignment in enumerate(quantizer.assignments(latents, codes)):
            counts, sums, ages = (self.get_buffer(f"{name}_{i}") for name in ("counts", "sums", "ages"))
            chosen = _average(assignment, counts, sums, decay=self.config.decay)
            ages.add_(1)[chosen] = 0
            if self.config.restart_after > 0:
                stale = (ages > 0) & (ages % self.config.restart_after == 0)
                if bool(stale.any()):
                    sums[stale] = self._pick(_join(assignment.vectors), int(stale.sum()))
                    counts[stale] = 1.0
            assignment.table.copy_(sums / _smoothed(counts).unsqueeze(1))

    def usage(self) -> Tensor:
        """Share of the entries of all codebooks chosen in the last `restart_after` (or 100) batches.

        An entry that was moved counts once something chooses it.
        """
        ages = torch.cat([buffer for name, buffer in self.named_buffers() if name.startswith("ages")])
        return (ages < (self.config.restart_after or 100)).float().mean()

    def _cluster(self, vectors: Tensor, num_centres: int) -> Tensor:
        """Lloyd's algorithm from random vectors: (M, C) -> (num_centres, C)."""
        centres = self._pick(vectors, num_centres)
        for _ in range(self.config.kmeans_iterations if num_centres < len(vectors) else 0):
            nearest = squared_distances(vectors, centres).argmin(dim=-1)
            counts = torch.bincount(nearest, minlength=num_centres).unsqueeze(1)  # (k, 1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        return centres

    def _pick(self, vectors: Tensor, number: int) -> Tensor:
        """Random vectors (number, C) of (M, C), copies with noise where M is smaller.

        The draw follows from the number of updates alone, so that all devices draw the same.
        """
        generator = torch.Generator().manual_seed(int(self.num_updates))
        order = torch.randperm(len(vectors), generator=generator)
        picked = vectors[order.repeat(-(-number // len(order)))[:number].to(vectors.device)]
        if number > len(vectors):
            noise = torch.randn(picked.shape, generator=generator).to(picked)
            picked = picked + NOISE * vectors.std(dim=0, correction=0) * noise
        return picked


def _average(assignment: Assignment, counts: Tensor, sums: Tensor, *, decay: float) -> Tensor:
    """Take a batch into the moving averages, in place; returns which entries (V,) it chose."""
    new_counts = torch.bincount(assignment.codes, minlength=len(counts)).to(counts)
    new_sums = torch.zeros_like(sums).index_add_(0, assignment.codes, assignment.vectors.to(sums))
    if _is_distributed():
        dist.all_reduce(new_counts)
        dist.all_reduce(new_sums)
    counts.lerp_(new_counts, 1 - decay)
    sums.lerp_(new_sums, 1 - decay)
    return new_counts > 0


def _smoothed(counts: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Laplace smoothing that keeps the total: no entry is divided by zero."""
    total = counts.sum()
    return (counts + epsilon) * total / (total + len(counts) * epsilon)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _join(tensor: Tensor) -> Tensor:
    """Concatenate a tensor (n, ...) of every device, in the order of their ranks."""
    if not _is_distributed():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
