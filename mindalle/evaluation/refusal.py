"""Which metrics too few pictures do not give, and how many it takes."""

from __future__ import annotations

FEWEST = {"kd": 100, "is": 100, "pr": 100, "clip_score": 2, "r_precision": 2}
"""Pictures that a metric needs on each side; a Fréchet distance needs more than it has features."""


class RefusedError(ValueError):
    """A metric cannot be had from these pictures; the message says why and what is missing."""


def refusal(
    metric: str, num_images: int, num_reference: int | None, num_features: int | None = None
) -> str | None:
    """Why a metric cannot be had from so few pictures; None if it can.

    Args:
        metric: a key of `METRICS`.
        num_images: pictures that are measured.
        num_reference: pictures they are compared with; None = unknown, or none.
        num_features: of a Fréchet distance.

    Returns:
        One line that says how many it takes.
    """
    least = FEWEST[metric] if num_features is None else num_features + 1
    fewest = min(num_images, num_images if num_reference is None else num_reference)
    if fewest >= least:
        return None
    sides = "" if num_reference is None else " on each side"
    reason = "" if num_features is None else ", more than features"
    advice = "" if num_features is None else ": fewer features (--feature-dims N), or more pictures"
    return f"{metric} takes at least {least:,} pictures{sides}{reason}, got {fewest:,}{advice}"


def check_count(
    metric: str, num_images: int, num_reference: int | None, num_features: int | None = None
) -> None:
    """Raise RefusedError where `refusal` has a reason; the arguments are its."""
    problem = refusal(metric, num_images, num_reference, num_features)
    if problem is not None:
        raise RefusedError(problem)
