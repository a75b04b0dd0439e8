"""A Fréchet distance as it is reported: named by its network, in full or in principal components."""

from __future__ import annotations

import torch
from torch import Tensor

from mindalle.evaluation.distances import frechet_distance, matrix_root, principal_components, project
from mindalle.evaluation.features import FeatureNetwork
from mindalle.evaluation.intervals import resampled_interval
from mindalle.evaluation.moments import Moments, moments_of
from mindalle.evaluation.refusal import check_count
from mindalle.evaluation.results import Measure

FEW_FOR_FD = 10_000  # below, a Fréchet distance is known to be too large by much


def check_components(num_components: int | None, network: FeatureNetwork) -> None:
    """Refuse, before a network runs, more principal components than it has features; None = all features.

    Raises:
        ValueError: says how many there are.
    """
    if num_components is not None and num_components > network.num_features:
        raise ValueError(
            f"--feature-dims must be at most {network.num_features:,}, the features of {network.name}, "
            f"got {num_components:,}"
        )


def frechet_measure(
    vectors: Tensor,
    reference: Moments,
    network: FeatureNetwork,
    *,
    metric: str = "fd",
    num_components: int | None = None,
    seed: int = 0,
    suffix: str = "",
) -> Measure:
    """A Fréchet distance with its interval over the measured pictures; the reference stands as it is.

    Args:
        vectors: (n, C).
        reference: moments of the same network's features.
        network: of the features.
        metric: "fd", or "rfd" of reconstructions.
        num_components: see `Comparison`.
        seed: of the interval.
        suffix: of the name.

    Returns:
        The measure.

    Raises:
        RefusedError: if either side has no more pictures than features.
    """
    num_features = vectors.shape[1] if num_components is None else num_components
    check_count(metric, len(vectors), reference.num_images, num_features)
    name = network.metric_name(metric)
    if num_components is not None:  # another metric, and so never FID
        components = principal_components(reference, num_components)
        vectors, reference = vectors.double() @ components, project(reference, components)
        name = f"{network.name}-{'rFD' if metric == 'rfd' else 'FD'}-{num_components}"
    root = matrix_root(reference.sigma)

    def distance(indices: Tensor) -> float:
        return frechet_distance(moments_of(vectors[indices]), reference, root=root)

    value = distance(torch.arange(len(vectors)))
    known = [n for n in (len(vectors), reference.num_images) if n is not None]
    is_few = min(known) < FEW_FOR_FD
    warning = f"{name} of fewer than {FEW_FOR_FD:,} pictures is biased upwards: compare equal counts only"
    return Measure(
        metric=name + suffix,
        value=value,
        interval=resampled_interval(distance, len(vectors), value, seed=seed),
        num_images=len(vectors),
        num_reference=reference.num_images,
        network=network.about(),
        details={"features": num_features, "interval": "reference held fixed; the bias is not in it"},
        warnings=(warning,) if is_few else (),
    )
