"""The numbers of one set of pictures: against another set, against its captions, and by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mindalle.evaluation.distances import inception_score, kernel_distances, precision_recall
from mindalle.evaluation.features import CLIP_RESIZE, FeatureNetwork
from mindalle.evaluation.frechet import frechet_measure
from mindalle.evaluation.intervals import Interval, mean_interval, resampled_interval
from mindalle.evaluation.moments import Moments, moments_of
from mindalle.evaluation.pictures import PictureSet
from mindalle.evaluation.refusal import FEWEST, RefusedError, check_count
from mindalle.evaluation.results import Measure, mean_measure
from mindalle.evaluation.retrieval import r_precision, ranks_of_own
from mindalle.rerank import ClipReranker

logger = logging.getLogger(__name__)
NUM_SPLITS = 10  # of the Inception Score
NUM_SUBSETS, MAX_SUBSET = 100, 1000  # of the kernel distance, as its authors have them
NUM_NEIGHBOURS = 3  # of precision and recall
NUM_CANDIDATES = 100  # of R-precision
CHUNK = 1024  # pictures that are compared with all captions at once


@dataclass(kw_only=True)
class Comparison:
    """What is measured and how."""

    pictures: PictureSet
    reference: PictureSet | Moments | None = None
    network: FeatureNetwork | None = None
    judge: ClipReranker | None = None
    judge_hash: str | None = None  # SHA-256 of the judge's weights
    num_components: int | None = None  # Fréchet distances in so many principal components; None = in full
    seed: int = 0

    @property
    def reference_pictures(self) -> PictureSet | None:
        """None where there are only moments, or nothing."""
        return self.reference if isinstance(self.reference, PictureSet) else None

    @cached_property
    def captions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features of captioned pictures (n, C) and of distinct captions (m, C), and whose is which (n,)."""
        assert self.judge is not None
        assert self.pictures.clip is not None
        with_one = [i for i, captions in enumerate(self.pictures.captions) if captions]
        if not with_one:
            raise RefusedError(f"{self.pictures.name} has no captions, which CLIP scores are of")
        texts = [self.pictures.captions[i][0] for i in with_one]
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        own = torch.tensor([places[text] for text in texts])
        return self.pictures.clip[with_one], self.judge.encode_texts(list(places)), own


def _frechet(comparison: Comparison) -> list[Measure]:
    network, vectors = _features(comparison)
    reference = comparison.reference
    if isinstance(reference, PictureSet):
        assert reference.vectors is not None
        reference = moments_of(reference.vectors)
    assert reference is not None
    return [
        frechet_measure(
            vectors, reference, network, num_components=comparison.num_components, seed=comparison.seed
        )
    ]


def _kernel(comparison: Comparison) -> list[Measure]:
    network, vectors, reference = _both(comparison, "kd")
    # at most half of a set: subsets that are the set itself would all give the same
    subset_size = min(MAX_SUBSET, min(len(vectors), len(reference)) // 2)
    values = kernel_distances(
        vectors, reference, num_subsets=NUM_SUBSETS, subset_size=subset_size, seed=comparison.seed
    )
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [
        Measure(
            metric=network.metric_name("kd"),
            value=values.mean().item(),
            interval=Interval(low, high, f"percentiles of {NUM_SUBSETS} subsets of {subset_size} pictures"),
            num_images=len(vectors),
            num_reference=len(reference),
            network=network.about(),
            details={"subsets": NUM_SUBSETS, "subset_size": subset_size, "std": values.std().item()},
        )
    ]


def _score(comparison: Comparison) -> list[Measure]:
    network, _ = _features(comparison)
    logits = comparison.pictures.logits
    assert logits is not None
    check_count("is", len(logits), None)

    def score(indices: Tensor) -> float:
        return inception_score(logits[indices], num_splits=NUM_SPLITS, seed=comparison.seed)[0]

    value, deviation = inception_score(logits, num_splits=NUM_SPLITS, seed=comparison.seed)
    return [
        Measure(
            metric=network.metric_name("is"),
            value=value,
            interval=resampled_interval(score, len(logits), value, seed=comparison.seed),
            num_images=len(logits),
            network=network.about(),
            details={"splits": NUM_SPLITS, "std": deviation},
        )
    ]


def _precision_recall(comparison: Comparison) -> list[Measure]:
    network, vectors, reference = _both(comparison, "pr")
    found = precision_recall(vectors, reference, k=NUM_NEIGHBOURS)
    return [
        Measure(
            metric=network.metric_name(name),
            value=inside.double().mean().item(),
            interval=mean_interval(inside, seed=comparison.seed),
            num_images=len(vectors),
            num_reference=len(reference),
            network=network.about(),
            details={"k": NUM_NEIGHBOURS, "interval": "balls held fixed"},
        )
        for name, inside in (("precision", found.precision), ("recall", found.recall))
    ]


def _clip_score(comparison: Comparison) -> list[Measure]:
    images, texts, own = comparison.captions
    check_count("clip_score", len(images), None)
    similarity = (images * texts[own]).sum(dim=1)
    return [
        mean_measure(
            "CLIP score", similarity, unit="cosine", seed=comparison.seed, **_judge_about(comparison)
        )
    ]


def _r_precision(comparison: Comparison) -> list[Measure]:
    images, texts, own = comparison.captions
    if len(texts) < FEWEST["r_precision"]:
        raise RefusedError(f"r_precision takes at least 2 different captions, got {len(texts)}")
    candidates = min(NUM_CANDIDATES, len(texts))
    ranks = torch.cat(
        [
            ranks_of_own(some, texts, whose)
            for some, whose in zip(torch.split(images, CHUNK), torch.split(own, CHUNK), strict=True)
        ]
    )
    hits = r_precision(ranks, len(texts), candidates)
    details = {"candidates": candidates, "distinct_captions": len(texts)}
    name = f"R-precision of {candidates}"
    about = _judge_about(comparison)
    return [mean_measure(name, hits, seed=comparison.seed, details=details, **about)]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is computed, and from what."""

    measure: Callable[[Comparison], list[Measure]]
    needs_features: bool = True
    needs_reference: bool = True
    needs_pictures: bool = True  # of the reference: moments do not do
    needs_classes: bool = False  # of the feature network
    needs_clip: bool = False


METRICS: dict[str, Metric] = {
    "fd": Metric(measure=_frechet, needs_pictures=False),
    "kd": Metric(measure=_kernel),
    "is": Metric(measure=_score, needs_reference=False, needs_classes=True),
    "pr": Metric(measure=_precision_recall),
    "clip_score": Metric(measure=_clip_score, needs_features=False, needs_reference=False, needs_clip=True),
    "r_precision": Metric(measure=_r_precision, needs_features=False, needs_reference=False, needs_clip=True),
}
"""Of a set of pictures, by the name a user chooses: with Inception these are FID, KID, IS, ..."""


def measure_all(comparison: Comparison, metrics: Sequence[str], *, may_refuse: bool) -> list[Measure]:
    """Compute metrics.

    Args:
        comparison: of what.
        metrics: keys of `METRICS`, whose needs are met.
        may_refuse: whether a metric that these pictures do not give is named and left out.

    Returns:
        The measures.

    Raises:
        RefusedError: if a metric cannot be had and `may_refuse` is false.
    """
    measures = []
    for name in metrics:
        logger.info("measuring %s", name)
        try:
            measures += METRICS[name].measure(comparison)
        except RefusedError as error:
            if not may_refuse:
                raise
            logger.warning("left out: %s", error)
    return measures


def _features(comparison: Comparison) -> tuple[FeatureNetwork, Tensor]:
    assert comparison.network is not None
    assert comparison.pictures.vectors is not None
    return comparison.network, comparison.pictures.vectors


def _both(comparison: Comparison, metric: str) -> tuple[FeatureNetwork, Tensor, Tensor]:
    """The features of both sides, of which there are enough."""
    network, vectors = _features(comparison)
    reference = comparison.reference_pictures
    assert reference is not None
    assert reference.vectors is not None
    check_count(metric, len(vectors), len(reference.vectors))
    return network, vectors, reference.vectors


def _judge_about(comparison: Comparison) -> dict[str, Any]:
    """The CLIP of a measure, and a warning where it judges its own choice."""
    sha256 = comparison.judge_hash
    assert sha256 is not None
    warning = "these pictures were chosen by the CLIP that judges them: its numbers are too high by that"
    return {
        "network": {"name": "CLIP", "sha256": sha256, "resize": CLIP_RESIZE},
        "warnings": (warning,) if sha256 in comparison.pictures.judges else (),
    }
