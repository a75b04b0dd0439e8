"""How sure a number is: 95% intervals by resampling pictures (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MEAN_RESAMPLES, COSTLY_RESAMPLES = 1000, 20
NORMAL_95 = 1.96  # standard deviations


class Interval(NamedTuple):
    """A 95% confidence interval and how it was come by."""

    low: float
    high: float
    rule: str


def mean_interval(values: Tensor, *, seed: int) -> Interval | None:
    """The interval of a mean over pictures.

    Args:
        values: (n,), one per picture.
        seed: of the resampling.

    Returns:
        Percentiles of the means of resampled pictures; None for fewer than two, or if a value is infinite, as
        the PSNR of equal pictures is.
    """
    if len(values) < 2 or not values.double().isfinite().all():
        return None
    numbers, rng = values.double().numpy(), np.random.default_rng(seed)
    means = [numbers[rng.integers(len(numbers), size=len(numbers))].mean() for _ in range(MEAN_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(
        float(low), float(high), f"percentiles of the mean, {MEAN_RESAMPLES} bootstrap resamples of pictures"
    )


def resampled_interval(
    measure: Callable[[Tensor], float], num_pictures: int, value: float, *, seed: int
) -> Interval:
    """The interval of a measure of a whole set, such as a Fréchet distance.

    Resamples hold some pictures twice, which moves such measures to one side; their spread is kept and put
    around the measured value. What the value itself is off by, having been measured on few pictures, no
    resampling shows.

    Args:
        measure: indices of pictures, int64 (n,) -> the measure on those.
        num_pictures: n.
        value: the measure on all pictures once.
        seed: of the resampling.

    Returns:
        The value and 1.96 standard deviations of the resamples to both sides.
    """
    rng = np.random.default_rng(seed)
    draws = [
        measure(torch.from_numpy(rng.integers(num_pictures, size=num_pictures)))
        for _ in range(COSTLY_RESAMPLES)
    ]
    margin = NORMAL_95 * float(np.std(draws, ddof=1))
    return Interval(
        value - margin,
        value + margin,
        f"{NORMAL_95} standard deviations of {COSTLY_RESAMPLES} bootstrap resamples of pictures",
    )
