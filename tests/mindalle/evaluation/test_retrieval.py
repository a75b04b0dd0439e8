"""Retrieval: closed cases."""

from __future__ import annotations

import itertools

import pytest
import torch

from mindalle.evaluation import r_precision, ranks_of_own, recall


def test_perfect_and_shuffled() -> None:
    features = torch.eye(5)
    own = torch.arange(5)
    assert ranks_of_own(features, features, own).tolist() == [0] * 5
    ranks = ranks_of_own(features, features, own.roll(1))
    assert recall(ranks, 1) == 0
    assert recall(ranks, 5) == 1


def test_by_hand() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert ranks_of_own(images, texts, torch.tensor([1, 2])).tolist() == [1, 2]
    assert recall(torch.tensor([1, 2]), 2) == 0.5


def test_what_says_the_same_of_all_has_found_nothing() -> None:
    texts = torch.ones(4, 2)
    for value in (1.0, float("nan")):
        ranks = ranks_of_own(torch.full((3, 2), value), texts, torch.zeros(3, dtype=torch.int64))
        assert ranks.tolist() == [3, 3, 3]


def test_r_precision_is_the_mean_over_draws() -> None:
    """Of all ways to draw 3 of 6 other texts, those in which none is better than one's own."""
    ranks = torch.tensor([0, 1, 2, 3, 4, 6])
    found = r_precision(ranks, 7, 4)
    for rank, value in zip(ranks.tolist(), found.tolist(), strict=True):
        draws = list(itertools.combinations(range(6), 3))
        wins = sum(all(other >= rank for other in draw) for draw in draws)
        assert value == pytest.approx(wins / len(draws))
    assert found[0] == 1
    assert found[-1] == 0


def test_r_precision_of_perfect_and_random_retrieval() -> None:
    features = torch.eye(200)
    own = torch.arange(200)
    perfect = r_precision(ranks_of_own(features, features, own), 200, 100)
    assert perfect.mean() == 1
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert r_precision(shuffled, 200, 100).mean().item() == pytest.approx(1 / 100)  # each rank once
    with pytest.raises(ValueError, match="needs 2 to 200 candidates, all texts, got 201"):
        r_precision(shuffled, 200, 201)


@pytest.mark.parametrize(
    ("images", "own", "message"),
    [
        (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), r"expected images \(n, C\)"),
        (torch.ones(2, 2), torch.zeros(1, dtype=torch.int64), r"own \(n,\)"),
        (torch.ones(2, 2), torch.tensor([0, 4]), r"own must be in \[0, 4\), got 0 to 4"),
    ],
)
def test_errors(images: torch.Tensor, own: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks_of_own(images, torch.ones(4, 2), own)
