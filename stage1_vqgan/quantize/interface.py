"""What a quantizer is, and the nearest-neighbour search that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn


class QuantizerOutput(NamedTuple):
    """Result of quantising latents."""

    latents: Tensor  # (B, C, h, w), what the decoder gets: the codes' vectors, gradient straight through
    codes: Tensor  # int64 (B, h, w), (B, h, w, D), or (B, T) of a pyramid
    commitment_loss: Tensor  # scalar, weighted: draws the latents to their codes' vectors
    codebook_loss: Tensor  # scalar: draws the codebook to the latents; 0 where gradients do not train it


class Assignment(NamedTuple):
    """One codebook and everything that a batch assigned to its entries."""

    table: Tensor  # (V, C), the codebook itself
    vectors: Tensor  # (M, C) float32: latents, or what earlier depths left over of them
    codes: Tensor  # int64 (M,): the entry of each


Cluster: TypeAlias = Callable[[Tensor, int], Tensor]
"""Vectors (M, C) and a number of centres k -> centres (k, C)."""


class Quantizer(nn.Module, ABC):
    """Latents <-> codes."""

    codebook_size: int
    """V, of the largest codebook."""

    @abstractmethod
    def codebooks(self) -> list[nn.Parameter]:
        """The codebooks (V, C) of all depths or scales; one where all depths share it."""

    @abstractmethod
    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantise latents (B, C, h, w) of any float dtype, with gradients."""

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> codes int64 (B, h, w), (B, h, w, D), or (B, T) of a pyramid."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> their vectors (B, C, h, w)."""

    @abstractmethod
    def assignments(self, latents: Tensor, codes: Tensor) -> list[Assignment]:
        """What latents (B, C, h, w) and their codes assign to each codebook, for training it."""

    @abstractmethod
    def fit(self, latents: Tensor, cluster: Cluster) -> None:
        """Set the codebooks to centres of latents (B, C, h, w) and, by depth, of what centres leave over."""

    @abstractmethod
    def all_codebooks(self) -> Tensor:
        """The codebooks of all depths (D, V, C), smaller ones padded with zero rows."""


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Squared Euclidean distances, in float32.

    Args:
        vectors: (..., C).
        codebook: (V, C).

    Returns:
        (..., V) float32, expanded as |x|^2 + |e|^2 - 2 x.e: the order of the sums decides ties as in the
        originals.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        flat = vectors.float().reshape(-1, vectors.shape[-1])  # (..., C) -> (M, C)
        table = codebook.float()
        norms = flat.square().sum(dim=1, keepdim=True) + table.square().sum(dim=1)  # (M, V)
        return torch.addmm(norms, flat, table.t(), alpha=-2.0).view(*vectors.shape[:-1], -1)


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The quantised values with the gradient of the latents (Bengio et al. 2013).

    Args:
        latents: any shape.
        quantized: same shape.

    Returns:
        `quantized` in value; its gradient passes to `latents` unchanged.
    """
    return latents + (quantized - latents).detach()
