"""Which device a model computes on where nobody names one."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


class DeviceNameError(ValueError):
    """The toolkit runs on no device of this name."""


def best_device() -> str:
    """The best kind that this machine has: "cuda", else Apple's "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """What "auto" stands for, said in one line of the log; a device that is named stands for itself.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps", on which nothing was ever run.

    Returns:
        The device.

    Raises:
        DeviceNameError: if the toolkit runs on no such kind.
        ValueError: if this machine does not have it.
    """
    if device == "auto":
        chosen = torch.device(best_device())
        logger.info("device %s, chosen as the best of this machine", chosen)
        return chosen
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda", "mps"):
        raise DeviceNameError(f"device must be auto, cpu, cuda, cuda:N or mps, got {str(device)!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ValueError(f"device {wanted}: this machine has {count or 'no'} CUDA devices; take cpu")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: this machine has no GPU of Apple's, or torch cannot use it; take cpu")
    return wanted
