"""Which device stands behind "auto"; that GPUs are there is pretended."""

from __future__ import annotations

import logging

import pytest
import torch

from mindalle.device import DeviceNameError, choose_device


@pytest.mark.parametrize(
    ("has_cuda", "has_mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_the_best_at_hand_and_said(
    has_cuda: bool,
    has_mps: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Commands drew on the CPU even where a GPU was at hand."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    with caplog.at_level(logging.INFO, logger="mindalle"):
        assert choose_device() == torch.device(expected)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [f"device {expected}"]


def test_what_is_named_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2: this machine has 2 CUDA devices; take cpu"):
        choose_device("cuda:2")
    with pytest.raises(ValueError, match="device mps: this machine has no GPU of Apple's"):
        choose_device("mps")
    for name in ("banana", "meta", ""):
        with pytest.raises(DeviceNameError, match="device must be auto, cpu, cuda, cuda:N or mps, got"):
            choose_device(name)
