"""Distances between two sets of pictures, on features that were computed before.

Legend: n generated, m reference pictures, C features. All is computed in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mindalle.evaluation.moments import Moments

CHUNK = 1024  # rows of a distance matrix at once


def matrix_root(sigma: Tensor) -> Tensor:
    """The symmetric root of a covariance (C, C); eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(sigma)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


def frechet_distance(moments: Moments, reference: Moments, *, root: Tensor | None = None) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; as a metric Heusel et al. 2017).

    The trace of the root of the product is taken over the eigenvalues of the symmetric
    `root sigma root`, which are those of the product: unlike the product itself, several times faster and
    never complex.

    Args:
        moments: of the generated pictures.
        reference: of the others.
        root: `matrix_root` of the reference's sigma, if it is at hand.

    Returns:
        |mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^1/2), at least 0 but for rounding.

    Raises:
        ValueError: if the numbers of features differ.
    """
    if moments.mu.shape != reference.mu.shape:
        raise ValueError(
            f"statistics of {len(moments.mu)} and of {len(reference.mu)} features do not compare: "
            "are they of the same feature network?"
        )
    root = matrix_root(reference.sigma) if root is None else root
    product = root @ moments.sigma @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    difference = (moments.mu - reference.mu).square().sum()
    return float(difference + moments.sigma.trace() + reference.sigma.trace() - 2 * cross)


def principal_components(reference: Moments, count: int) -> Tensor:
    """The directions in which the reference varies most.

    Args:
        reference: of C features.
        count: of the directions, in [1, C].

    Returns:
        (C, count), orthonormal.

    Raises:
        ValueError: if `count` is out of range.
    """
    if not 1 <= count <= len(reference.mu):
        raise ValueError(f"principal components must be 1 to {len(reference.mu)}, got {count}")
    vectors: Tensor = torch.linalg.eigh(reference.sigma)[1]  # their values ascend
    return vectors[:, -count:]


def project(moments: Moments, components: Tensor) -> Moments:
    """The Gaussian (C features) seen along orthonormal directions (C, c)."""
    return Moments(
        mu=moments.mu @ components,
        sigma=components.T @ moments.sigma @ components,
        num_images=moments.num_images,
        features_hash=moments.features_hash,
        resize=moments.resize,
    )


def kernel_distances(
    features: Tensor, reference: Tensor, *, num_subsets: int, subset_size: int, seed: int
) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / C + 1)^3 over random subsets (Bińkowski et al. 2018).

    Args:
        features: (n, C).
        reference: (m, C).
        num_subsets: S.
        subset_size: pictures of each side in a subset, in [2, min(n, m)].
        seed: of the subsets.

    Returns:
        (S,), whose mean is the KID; may be negative.

    Raises:
        ValueError: if there are fewer pictures than in a subset.
    """
    from torchmetrics.image.kid import poly_mmd  # lazy: it comes with its plots

    least = min(len(features), len(reference))
    if not 2 <= subset_size <= least:
        raise ValueError(f"subset_size must be 2 to {least}, the smaller set, got {subset_size}")
    generator = torch.Generator().manual_seed(seed)

    def subset(vectors: Tensor) -> Tensor:
        return vectors[torch.randperm(len(vectors), generator=generator)[:subset_size]].double()

    return torch.stack([poly_mmd(subset(reference), subset(features)) for _ in range(num_subsets)])


class PrecisionRecall(NamedTuple):
    """Which pictures lie in the other set; the means are precision and recall."""

    precision: Tensor  # bool (n,): a generated picture lies among the reference
    recall: Tensor  # bool (m,): a reference picture lies among the generated


def precision_recall(features: Tensor, reference: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019): balls out to the k-th nearest neighbour.

    Args:
        features: (n, C), n > k.
        reference: (m, C), m > k.
        k: neighbours, >= 1.

    Returns:
        Whether each picture lies in some ball of the other set.

    Raises:
        ValueError: if there are too few pictures.
    """
    if k < 1 or min(len(features), len(reference)) <= k:
        raise ValueError(
            f"precision and recall need more than k = {k} >= 1 pictures on both sides, "
            f"got {len(features)} and {len(reference)}"
        )
    ours, theirs = features.double(), reference.double()
    return PrecisionRecall(
        precision=_is_covered(ours, theirs, _radii(theirs, k)),
        recall=_is_covered(theirs, ours, _radii(ours, k)),
    )


def _radii(vectors: Tensor, k: int) -> Tensor:
    """(m, C) -> (m,): the distance of each to its k-th nearest other."""
    # k + 1: the nearest of all is itself
    nearest = [
        torch.cdist(rows, vectors).kthvalue(k + 1, dim=1).values for rows in torch.split(vectors, CHUNK)
    ]
    return torch.cat(nearest)


def _is_covered(vectors: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """(n, C) in any of m balls -> bool (n,)."""
    return torch.cat(
        [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in torch.split(vectors, CHUNK)]
    )


def inception_score(logits: Tensor, *, num_splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """How certain and how varied classes are: exp E KL(p(class | picture), p(class)) (Salimans et al. 2016).

    Args:
        logits: (n, classes), n >= num_splits.
        num_splits: parts of the shuffled pictures, as equal as can be, each of which gets a score.
        seed: of the shuffling.

    Returns:
        Mean and standard deviation over the splits.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in torch.tensor_split(logits[order].double().log_softmax(dim=1), num_splits):  # (n', classes)
        marginal = part.logsumexp(dim=0) - math.log(len(part))  # log of the mean, also where that is tiny
        scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp())
    found = torch.stack(scores)
    return found.mean().item(), found.std().item()
