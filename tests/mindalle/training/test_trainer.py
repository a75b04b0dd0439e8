"""The precision that a recipe leaves to the machine."""

from __future__ import annotations

import logging

import pytest

from mindalle.training import trainer as module
from mindalle.training.trainer import MachineTrainer


@pytest.mark.parametrize(("has_it", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_takes_bfloat16_where_the_processor_has_it(
    has_it: bool, precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fine-tuning step took 5 s instead of 0.7 s on CPUs that only imitate bfloat16."""
    monkeypatch.setattr(module, "has_bfloat16", lambda device: has_it)
    with caplog.at_level(logging.INFO, logger="mindalle"):
        trainer = MachineTrainer(precision="auto", accelerator="cpu", logger=False)
    assert trainer.precision == precision
    said = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert [line.split(":")[0] for line in said] == [f"precision {precision}"]


@pytest.mark.parametrize(
    ("given", "precision"), [("bf16-mixed", "bf16-mixed"), ("32-true", "32-true"), (None, "32-true")]
)
def test_what_is_named_is_taken(
    given: str, precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "has_bfloat16", lambda device: given != "bf16-mixed")
    with caplog.at_level(logging.INFO, logger="mindalle"):
        trainer = MachineTrainer(precision=given, accelerator="cpu", logger=False)  # type: ignore[arg-type]
    assert trainer.precision == precision
    assert module.__name__ not in {record.name for record in caplog.records}


@pytest.mark.parametrize("accelerator", ["gpu", "auto", "mps"])
def test_a_gpu_of_apples_trains_in_float32(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "best_device", lambda: "mps")
    assert module.choose_training_precision(accelerator) == "32-true"
