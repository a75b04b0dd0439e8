"""The callbacks of every run: seeded steps, a stop at losses that are no numbers, a count of bad pictures."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sequence_runs import assert_equal
from tokenizer_runs import draw_batch, losses, training
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mindalle.training import SeededSteps, SkippedReport, StopOnNonFinite


class Line(pl.LightningModule):
    """One weight; notes what each step draws."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.draws: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.draws.append(float(torch.rand(())))
        return self.weight * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: pl.LightningModule, batches: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 1, **options},
    )
    with torch.random.fork_rng(devices=[]):
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


class TestSeededSteps:
    def draws(self, monkeypatch: pytest.MonkeyPatch, seed: int | None, before: int = 0) -> list[float]:
        """Of two epochs of three batches each."""
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if seed is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        module = Line()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(before)
            fit(module, [{}] * 3, SeededSteps(), max_epochs=2)
        return module.draws

    def test_same_seed_same_draws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever was drawn before the step: a resumed run has drawn less."""
        assert self.draws(monkeypatch, 5) == self.draws(monkeypatch, 5, before=1)

    def test_seeds_epochs_and_batches_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draws = self.draws(monkeypatch, 5) + self.draws(monkeypatch, 6)
        assert len(set(draws)) == 12

    def test_ranks_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.draws(monkeypatch, 5)
        monkeypatch.setattr(pl.Trainer, "global_rank", 1)
        assert not set(first) & set(self.draws(monkeypatch, 5))

    def test_without_a_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.draws(monkeypatch, None) == self.draws(monkeypatch, 0)

    def test_it_is_lightning_s_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "unset after the test")
        with torch.random.fork_rng(devices=[]):
            pl.seed_everything(123, verbose=False)
        assert os.environ["PL_GLOBAL_SEED"] == "123"


class TestStopOnNonFinite:
    @pytest.mark.parametrize("kind", ["vqgan", "rqvae"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nothing_has_changed(self, kind: str, value: float) -> None:
        """The codebooks of an RQ-VAE had moved already, and were not numbers any more."""
        good, bad = draw_batch(0, 1, 2, 3), draw_batch(4, 5, 6, 7)
        bad["images"][2, 0, 3, 3] = value
        module = training(kind, loss=losses(adversarial_weight=0.75))
        states = States()
        with pytest.raises(
            FloatingPointError, match=r"loss is (nan|inf) at step 2; the batch: picture 4, pict"
        ):
            fit(module, [good, good, bad, good], StopOnNonFinite(), states)
        assert len(states.parameters) == 2
        assert_equal(dict(module.named_parameters()), states.parameters[-1])
        if module.averages is not None:
            assert_equal(dict(module.averages.named_buffers()), states.averages[-1])

    def test_many_keys(self) -> None:
        batch = draw_batch(*range(8), *range(8))
        batch["images"][0] = float("nan")
        message = (
            r"^the loss is nan at step 0; the batch: picture 0, (picture \d, ){6}picture 7 and 8 more\. "
            r"The weights are as before it, the last checkpoint is good\..*--ckpt_path last and a lower "
            r"learning_rate, trainer\.gradient_clip_val 1\.0, or trainer\.precision 32-true$"
        )
        with pytest.raises(FloatingPointError, match=message):
            fit(training("vqgan"), [batch], StopOnNonFinite())

    @pytest.mark.parametrize("batch", [{"number": torch.ones(1)}, torch.ones(1)])
    def test_a_batch_without_keys(self, batch: Any) -> None:
        module = Line()
        module.weight.data.fill_(float("inf"))
        with pytest.raises(FloatingPointError, match="at step 0; the batch: unnamed samples"):
            fit(module, [batch], StopOnNonFinite())

    def test_good_losses_pass(self) -> None:
        assert fit(Line(), [{}] * 3, StopOnNonFinite()).global_step == 3


class States(pl.Callback):
    """Parameters and averages after each step."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.parameters.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        if pl_module.averages is not None:
            self.averages.append({name: b.clone() for name, b in pl_module.averages.named_buffers()})


class TestSkippedReport:
    def test_it_counts_by_epoch(self, caplog: pytest.LogCaptureFixture) -> None:
        logged: list[float] = []

        class Logged(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
                logged.append(float(trainer.callback_metrics.get("train/skipped", -1)))

        batches = [{"num_skipped": 0}, {"num_skipped": 2}, {}, {"num_skipped": 3}]
        with caplog.at_level(logging.WARNING, logger="mindalle.training.callbacks"):
            fit(Line(), batches, SkippedReport(), Logged(), max_epochs=2)
        assert logged == [-1, 2, 2, 5, 5, 2, 2, 5]  # 5: what the first epoch logged last
        messages = [record.message for record in caplog.records if "skipped" in record.message]
        assert messages == [
            f"5 pictures could not be read in epoch {epoch} and were skipped: the warnings above say which"
            for epoch in range(2)
        ]

    def test_silence_where_all_was_read(self, caplog: pytest.LogCaptureFixture) -> None:
        trainer = fit(Line(), [{"num_skipped": 0}, {}, torch.ones(1)], SkippedReport())
        assert "train/skipped" not in trainer.callback_metrics
        assert not [record for record in caplog.records if "skipped" in record.message]
