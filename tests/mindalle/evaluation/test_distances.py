"""Distances of feature sets: closed forms, brute force, and torchmetrics on the same features."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from mindalle.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distances,
    precision_recall,
    principal_components,
    project,
)
from mindalle.evaluation.moments import Moments, moments_of


class Given(nn.Module):
    """The feature network of torchmetrics when the features are there already."""

    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


def random_sets(n: int = 40, m: int = 50, c: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(c, c, generator=generator)
    return (
        torch.randn(n, c, generator=generator),
        torch.randn(m, c, generator=generator) @ mix + 0.5,
    )


def with_moments(mu: Tensor, sigma: Tensor, n: int = 60) -> Tensor:
    """n vectors whose mean and covariance are exactly these."""
    noise = torch.randn(n, len(mu), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    centred = noise - noise.mean(dim=0)
    covariance = centred.T @ centred / (n - 1)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), centred.T, upper=False).T
    return white @ torch.linalg.cholesky(sigma).T + mu


def test_frechet_of_known_gaussians() -> None:
    """Of covariances that do not commute: tr (AB)^1/2 of two by two is (tr AB + 2 (det AB)^1/2)^1/2."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]], dtype=torch.float64)
    mu, other = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, 0.5]).double()
    product = a @ b
    cross = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = 4 + 2.25 + float(a.trace() + b.trace()) - 2 * cross
    ours, theirs = moments_of(with_moments(mu, a, 60)), moments_of(with_moments(other, b, 80))
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(theirs, ours) == pytest.approx(expected, rel=1e-10)


def test_frechet_is_torchmetrics() -> None:
    features, reference = random_sets()
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(features.double(), real=False)
    metric.update(reference.double(), real=True)
    value = frechet_distance(moments_of(features), moments_of(reference))
    assert value == pytest.approx(float(metric.compute()), rel=1e-9)


def test_frechet_of_a_set_with_itself() -> None:
    """Also where there are fewer pictures than features, so that the covariance is singular."""
    for features in (random_sets()[0], torch.randn(4, 10, generator=torch.Generator().manual_seed(1))):
        assert frechet_distance(moments_of(features), moments_of(features)) == pytest.approx(0, abs=1e-6)


def test_statistics_of_different_networks() -> None:
    with pytest.raises(ValueError, match="6 and of 5 features do not compare"):
        frechet_distance(moments_of(random_sets()[0]), moments_of(torch.rand(9, 5)))
    with pytest.raises(ValueError, match=r"n >= 2, got \(1, 5\)"):
        moments_of(torch.rand(1, 5))


def test_principal_components() -> None:
    """Along the axes of a diagonal covariance only those of the largest variance count."""
    reference = Moments(mu=torch.zeros(3).double(), sigma=torch.diag(torch.tensor([4.0, 1.0, 9.0])).double())
    ours = Moments(mu=torch.tensor([1.0, 50.0, 2.0]).double(), sigma=torch.eye(3).double())
    components = principal_components(reference, 2)
    assert components.abs().sort(dim=0).values.tolist() == [[0, 0], [0, 0], [1, 1]]
    distance = frechet_distance(project(ours, components), project(reference, components))
    assert distance == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2)
    with pytest.raises(ValueError, match="must be 1 to 3, got 4"):
        principal_components(reference, 4)


def test_all_principal_components_are_the_whole() -> None:
    ours, theirs = (moments_of(features) for features in random_sets())
    components = principal_components(theirs, 6)
    value = frechet_distance(project(ours, components), project(theirs, components))
    assert value == pytest.approx(frechet_distance(ours, theirs), rel=1e-9)


def test_kernel_distance_by_hand_and_by_torchmetrics() -> None:
    features, reference = random_sets(20, 20)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 6 + 1) ** 3

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(kernel(x, y) for x, y in pairs) / len(pairs)

    within = [mean(list(itertools.permutations(some.double(), 2))) for some in (features, reference)]
    across = mean(list(itertools.product(features.double(), reference.double())))
    values = kernel_distances(features, reference, num_subsets=3, subset_size=20, seed=0)
    assert values.tolist() == pytest.approx([sum(within) - 2 * across] * 3, rel=1e-9)

    metric = KernelInceptionDistance(feature=Given(), subsets=3, subset_size=20)
    metric.update(features.double(), real=False)
    metric.update(reference.double(), real=True)
    assert values.mean().item() == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_kernel_subsets_are_drawn_by_the_seed() -> None:
    features, reference = random_sets()
    settings = {"num_subsets": 4, "subset_size": 10}
    first = kernel_distances(features, reference, seed=1, **settings)
    assert len(set(first.tolist())) == 4
    assert torch.equal(first, kernel_distances(features, reference, seed=1, **settings))
    assert not torch.equal(first, kernel_distances(features, reference, seed=2, **settings))
    with pytest.raises(ValueError, match="must be 2 to 40, the smaller set, got 41"):
        kernel_distances(features, reference, num_subsets=1, subset_size=41, seed=0)


def test_kernel_distance_is_unbiased() -> None:
    """Of halves of one set it is zero on average, unlike a Fréchet distance."""
    features = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    values = kernel_distances(features[:1000], features[1000:], num_subsets=100, subset_size=100, seed=0)
    assert abs(values.mean().item()) < 3 * values.std().item() / math.sqrt(100) + 0.05
    assert (values < 0).any()


def brute_force(inside: Tensor, centres: Tensor, k: int) -> list[bool]:
    radii = [sorted(math.dist(x, y) for y in centres.tolist())[k] for x in centres.tolist()]
    return [
        any(math.dist(x, y) <= r + 1e-5 for y, r in zip(centres.tolist(), radii, strict=True))
        for x in inside.tolist()
    ]


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindalle.evaluation.distances.CHUNK", 7)  # several chunks
    features, reference = (some[:, :2] for some in random_sets())
    reference = reference + 2
    found = precision_recall(features, reference, k=k)
    assert found.precision.tolist() == brute_force(features, reference, k)
    assert found.recall.tolist() == brute_force(reference, features, k)
    assert 0 < found.precision.double().mean() < 1
    assert 0 < found.recall.double().mean() < 1


def test_precision_and_recall_of_the_same_and_of_others() -> None:
    features, _ = random_sets()
    repeated = features[:1].repeat(40, 1)  # their balls have no size
    for some in (features, repeated):
        same = precision_recall(some, some)
        assert (same.precision.all(), same.recall.all()) == (True, True)
    apart = precision_recall(features, features + 100)
    assert (apart.precision.any(), apart.recall.any()) == (False, False)
    with pytest.raises(ValueError, match="more than k = 3 >= 1 pictures on both sides, got 3 and 40"):
        precision_recall(features[:3], features)


def test_inception_score_in_closed_form() -> None:
    """Sure of one of five classes, each as often: five. As unsure of all: one."""
    certain = torch.eye(5).repeat(40, 1) * 1e3
    shares = certain[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    mean, deviation = inception_score(shares, num_splits=1)
    assert mean == pytest.approx(5)
    assert math.isnan(deviation)  # of a single split
    assert inception_score(torch.zeros(100, 7)) == pytest.approx((1, 0))


def test_inception_score_by_its_definition() -> None:
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(dim=1)
    divergence = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean()
    assert inception_score(logits, num_splits=1)[0] == pytest.approx(divergence.exp().item())
    state = torch.get_rng_state()
    assert inception_score(logits, seed=1) == inception_score(logits, seed=1)
    assert inception_score(logits, seed=1) != inception_score(logits, seed=2)
    assert torch.equal(state, torch.get_rng_state())


def test_inception_score_is_torchmetrics_where_splits_are_equal() -> None:
    """Which shuffles by torch's own generator."""
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))
    metric = InceptionScore(feature=Given(), splits=10)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        expected = [float(value) for value in metric.compute()]
    assert inception_score(logits, num_splits=10, seed=4) == pytest.approx(expected, rel=1e-9)


def test_splits_of_the_inception_score_are_equal() -> None:
    """torchmetrics makes nine splits of 11 and one of 2 of 101 pictures, ours are one of 11 and nine of 10.

    Pictures that are surely of a class each have as their score how many they are.
    """
    sizes = [11] + [10] * 9
    expected = (sum(sizes) / 10, statistics.stdev(sizes))
    assert inception_score(torch.eye(101) * 1e4, num_splits=10) == pytest.approx(expected)
