"""What a tokenizer's training says of dying codes and of an adversary that has won, lost or is blown up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequence_runs import fit
from tokenizer_runs import CODEBOOK, draw_batch, losses, training
from torch import Tensor

from mindalle.training.tokenizer import TokenizerTraining
from mindalle.training.watch import TokenizerWatch
from stage1_vqgan.diff_augment import DiffAugmentConfig
from stage1_vqgan.losses import TokenizerLossConfig
from stage1_vqgan.quantize import CodebookTrainingConfig
from stage1_vqgan.quantize.interface import Assignment

PICTURES = draw_batch(0, 1)
ADVERSARIAL = TokenizerLossConfig(perceptual="none")


def run(module: TokenizerTraining, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Train for four windows of two batches; returns what was said."""
    module.watch.window = 2
    fit(module, [PICTURES] * 4, max_steps=8)
    return [record.message for record in caplog.records if record.name == "mindalle.training.watch"]


def watch(
    loss: TokenizerLossConfig = ADVERSARIAL,
    codebook: CodebookTrainingConfig | None = None,
    *,
    is_codebook_trained: bool = True,
) -> TokenizerWatch:
    return TokenizerWatch(loss, codebook, is_codebook_trained=is_codebook_trained, window=4)


def parts(hinge: float, weight: float = 1.0) -> dict[str, Tensor]:
    names = {"discriminator": hinge, "generator": 0.0, "adaptive_weight": weight}
    return {name: torch.tensor(value) for name, value in names.items()}


def chosen(*codes: int, size: int = 16) -> Assignment:
    return Assignment(torch.zeros(size, 2), torch.zeros(len(codes), 2), torch.tensor(codes))


class TestRuns:
    def test_a_sound_run_says_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        assert not run(training("rqvae", loss=losses(adversarial_weight=0.1, adversarial_warmup=4)), caplog)

    @pytest.mark.parametrize(
        ("kind", "options", "cure"),
        [
            ("vqgan", {}, "Set codebook to {}"),
            (
                "vqgan",
                {"codebook": CodebookTrainingConfig(restart_after=0)},
                "Set codebook.restart_after to 100",
            ),
            ("rqvae", {"codebook": CODEBOOK}, "Lower codebook.restart_after (5)"),
        ],
    )
    def test_codes_die(
        self,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        options: dict[str, Any],
        cure: str,
    ) -> None:
        """All entries but one are out of reach; said once, however long the run."""
        module = training(kind, **options)
        if module.averages is not None:
            module.is_pretrained = True  # no k-means start
            monkeypatch.setattr(module.averages, "update", lambda *_: None)  # nor restarts
        with torch.no_grad():
            for table in module.model.quantizer.parameters():
                table[1:] = 1e3
        (message,) = run(module, caplog)
        assert "codes die: 1 of 24 entries of the codebook were chosen" in message
        assert cure in message

    def test_a_frozen_codebook_is_left_in_peace(self, caplog: pytest.LogCaptureFixture) -> None:
        watcher = watch(is_codebook_trained=False)
        for _ in range(12):
            watcher.observe({}, [chosen(*[0] * 16)])
        assert not caplog.messages

    def test_the_adversary_wins(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A discriminator that knows the pictures by heart."""
        module = training("vqgan", loss=losses(adversarial_weight=1e-6, is_adaptive=False))
        (weight, *_), real = module.loss.parameters(), PICTURES["images"]

        def recognise(images: Tensor) -> Tensor:
            is_real = (images.detach() == real).all(dim=(1, 2, 3)).float()
            return 2 * (2 * is_real - 1) + 0 * images.mean(dim=(1, 2, 3)) + 0 * weight.sum()

        monkeypatch.setattr(module.loss.discriminator, "forward", recognise)
        (message,) = run(module, caplog)
        assert "the adversary wins outright: its loss is 0.000" in message
        assert "set loss.augmentation to {}" in message
        assert "loss.discriminator.width" in message

    def test_the_adversary_loses(self, caplog: pytest.LogCaptureFixture) -> None:
        """One that cannot learn: its last layer is zero and its learning is cut off."""
        module = training("vqgan", loss=losses(adversarial_weight=0.75, is_adaptive=False))
        for parameter in module.loss.parameters():
            parameter.requires_grad_(False).zero_()
        (message,) = run(module, caplog)
        assert "the adversary loses outright: its loss is 1.000" in message
        assert "loss.adversarial_warmup (0)" in message

    def test_the_adaptive_weight_saturates(self, caplog: pytest.LogCaptureFixture) -> None:
        """The pixels' gradient is huge beside that of an adversary without an opinion."""
        module = training("vqgan", loss=losses(adversarial_weight=0.75, adversarial_start=1))
        for parameter in module.loss.parameters():
            parameter.requires_grad_(False).zero_()
        module.loss._perceptual = (Loud(),)
        lost, saturated = run(module, caplog)
        assert "the adversary loses outright" in lost
        assert "the adaptive weight is at its bound of 10000 in 100% of the batches" in saturated
        assert "loss.is_adaptive to false" in saturated

    def test_weights_of_a_checkpoint_are_as_before(self) -> None:
        assert not [name for name in training("rqvae").state_dict() if "watch" in name]


class Loud(torch.nn.Module):
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return 1e6 * (images - others).abs().mean()


class TestJudgements:
    @pytest.mark.parametrize(("hinge", "kind"), [(0.04, "wins"), (0.06, None), (0.98, None), (1.7, "loses")])
    def test_limits_of_the_hinge(
        self, caplog: pytest.LogCaptureFixture, hinge: float, kind: str | None
    ) -> None:
        watcher = watch()
        for _ in range(40):
            watcher.observe(parts(hinge), [])
        assert [f"adversary {kind} outright" in message for message in caplog.messages] == [True] * bool(kind)

    def test_before_it_is_heard_it_may_be_anything(self, caplog: pytest.LogCaptureFixture) -> None:
        """A window that it was heard in for a part only is not judged."""
        watcher = watch()
        for step in range(8):
            watcher.observe(parts(0.0) if step > 4 else {"discriminator": torch.tensor(0.0)}, [])
        assert not caplog.messages
        for _ in range(4):
            watcher.observe(parts(0.0), [])
        assert len(caplog.messages) == 1

    def test_what_is_on_is_not_advised(self, caplog: pytest.LogCaptureFixture) -> None:
        watcher = watch(TokenizerLossConfig(perceptual="none", augmentation=DiffAugmentConfig()))
        for hinge in (0.0, 1.0):
            for _ in range(4):
                watcher.observe(parts(hinge), [])
        won, lost = caplog.messages
        assert "augmentation" not in won
        assert "weaken loss.augmentation" in lost

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("bounded", "is_told"), [(1, False), (2, True), (4, True)])
    def test_weight_at_its_bound(
        self, caplog: pytest.LogCaptureFixture, bounded: int, is_told: bool, dtype: torch.dtype
    ) -> None:
        watcher = watch()
        for i in range(4):
            terms = parts(0.5, 1e4 if i < bounded else 9000.0)
            watcher.observe({name: part.to(dtype) for name, part in terms.items()}, [])
        assert ["at its bound" in message for message in caplog.messages] == [True] * is_told

    def test_a_small_batch_cannot_take_all_entries(self, caplog: pytest.LogCaptureFixture) -> None:
        """Four choices of 1000 entries, all different, are as good as it gets."""
        watcher = watch()
        for step in range(12):
            watcher.observe({}, [chosen(step % 4, size=1000)])
        assert not caplog.messages

    def test_the_first_window_is_for_finding_a_place(self, caplog: pytest.LogCaptureFixture) -> None:
        watcher = watch()
        for step in range(12):
            watcher.observe({}, [chosen(*([0] * 16 if step < 4 else range(16)))])
        assert not caplog.messages

    def test_it_names_the_codebook(self, caplog: pytest.LogCaptureFixture) -> None:
        watcher = watch()
        for _ in range(8):
            watcher.observe({}, [chosen(*range(16)), chosen(*[3] * 32, size=32)])
        (message,) = caplog.messages
        assert (
            "1 of 32 entries of codebook 1 were chosen, where an even choice would have taken 31" in message
        )
