"""The machine that is measured on: what it is, how fast it reads and multiplies, how much memory was used."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

MEGABYTE = 1 << 20
ARRAY_BYTES = 256 * MEGABYTE  # larger than any cache
MATRIX_SIDE = 1024


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What a number must be read with.

    Args:
        device: that computes.

    Returns:
        device, processor, threads, python and torch.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": str(device),
        "processor": name,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """How fast memory is read, by the sum of an array.

    Args:
        device: whose memory.
        repeats: the fastest counts: other programs can only slow it down.

    Returns:
        Bytes per second, by all threads together.
    """
    array = torch.ones(ARRAY_BYTES // 4, device=device)
    array.sum()
    return ARRAY_BYTES / min(seconds(array.sum, device) for _ in range(repeats))


def measure_multiply_adds(device: torch.device, repeats: int = 5) -> float:
    """How fast matrices are multiplied, in float32.

    Args:
        device: that computes.
        repeats: the fastest counts.

    Returns:
        Multiply-adds per second.
    """
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device)
    matrix @ matrix
    return MATRIX_SIDE**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(repeats))


def seconds(body: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with all that it has a GPU do."""
    synchronize(device)
    begin = time.perf_counter()
    body()
    synchronize(device)
    return time.perf_counter() - begin


def median_seconds(body: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of several calls, after one that is not counted."""
    body()
    return statistics.median(seconds(body, device) for _ in range(repeats))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is done when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> bool:
    """Let `peak_memory` count from now.

    Returns:
        False where the system cannot: then the peak is that since the start of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """The most memory in use at once, the models among it.

    Returns:
        Bytes: resident in RAM, or allocated by torch on a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):  # unlike getrusage's, it follows reset_peak_memory
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
