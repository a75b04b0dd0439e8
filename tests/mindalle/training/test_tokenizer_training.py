"""Training of VQGAN and RQ-VAE: they learn, codes live, the adversary keeps its time, and runs resume."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sequence_runs import assert_equal, fit
from tokenizer_runs import (
    CODEBOOK,
    FAST,
    RQVAE_CONFIG,
    VAL,
    VQGAN_CONFIG,
    Pictures,
    draw_batch,
    losses,
    training,
)
from torch import Tensor

from mindalle.checkpoint import save_checkpoint
from mindalle.image import psnr
from mindalle.run import load_image_tokenizer
from mindalle.training import RQVAETraining, VQGANTraining
from mindalle.training.tokenizer import TokenizerTraining
from stage1_vqgan import RQVAE, VQGAN, ResidualQuantizerConfig
from stage1_vqgan.discriminator import DiscriminatorConfig
from stage1_vqgan.losses import TokenizerLossConfig

PICTURES = draw_batch(*range(8))
BY_GRADIENT, BY_AVERAGES = "vqgan by gradient", "vqgan by averages"


def new_training(name: str, **options: Any) -> TokenizerTraining:
    """A VQGAN with either kind of codebook, or an RQ-VAE."""
    if name == BY_AVERAGES:
        options = {"codebook": CODEBOOK, **options}
    return training(name.split()[0], **options)


every = pytest.mark.parametrize("name", [BY_GRADIENT, BY_AVERAGES, "rqvae"])


def copy_state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class ConvDistance(torch.nn.Module):
    """A small perceptual network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Conv2d(3, 8, 3).requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return (self.network(images) - self.network(others)).abs().mean()


@every
class TestLearning:
    def test_reconstructions_get_better(self, name: str) -> None:
        module = new_training(name)
        _, metrics = fit(module, [PICTURES], max_steps=20)
        assert metrics[-1]["train/l1"] < 0.6 * metrics[0]["train/l1"]
        assert metrics[-1]["train/loss"] < metrics[3]["train/loss"]
        assert metrics[-1]["train/psnr"] > metrics[0]["train/psnr"] + 3
        if name == BY_GRADIENT:
            assert "train/codes_alive" not in metrics[-1]
            return
        assert metrics[-1]["train/codes_alive"] > 0.8
        with torch.no_grad():
            assert module.model.eval().encode(PICTURES["images"]).unique().numel() > 0.8 * 24

    def test_in_half_precision(self, name: str) -> None:
        """The perceptual network, of float32 weights, got bfloat16 pictures and crashed."""
        module = new_training(name, loss=losses(adversarial_weight=0.75))
        module.loss._perceptual = (ConvDistance(),)
        data = Pictures([PICTURES], VAL)
        trainer, metrics = fit(module, data, max_steps=12, precision="bf16-true")
        assert next(module.model.parameters()).dtype == torch.bfloat16
        assert metrics[-1]["train/perceptual"] < metrics[0]["train/perceptual"]
        assert math.isfinite(trainer.callback_metrics["val/perceptual"])

    def test_with_an_adversary(self, name: str) -> None:
        module = new_training(name, loss=losses(adversarial_weight=0.75))
        _, metrics = fit(module, [PICTURES], max_steps=12)
        assert all(math.isfinite(value) for values in metrics for value in values.values())
        assert metrics[0]["train/discriminator"] == pytest.approx(1, abs=0.2)
        # of two that play against each other neither loss need fall for long
        lowest = min(values["train/discriminator"] for values in metrics)
        assert lowest < 0.98 * metrics[0]["train/discriminator"]
        assert len({values["train/adaptive_weight"] for values in metrics}) == len(metrics)
        assert metrics[-1]["train/l1"] < 0.8 * metrics[0]["train/l1"]

    def test_the_codebook_moves_once_per_batch(self, name: str) -> None:
        """After the first depths and the last have chosen; with accumulated gradients for each of them."""
        module = new_training(name)
        fit(module, [PICTURES] * 4, max_steps=2, accumulate_grad_batches=2)
        if name == BY_GRADIENT:
            assert module.averages is None
            assert module.model.quantizer.codebook.grad is not None
            return
        assert module.averages is not None
        assert int(module.averages.num_updates) == 1 + 4  # the start, and the batches
        assert not any(table.requires_grad for table in module.model.quantizer.parameters())

    def test_what_is_optimised(self, name: str) -> None:
        module = new_training(name, loss=losses(adversarial_weight=0.75))
        trainer, _ = fit(module, [PICTURES], max_steps=1)
        optimised = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
        codebooks = set(module.model.quantizer.parameters()) if name != BY_GRADIENT else set()
        assert optimised == set(module.model.parameters()) - codebooks | set(module.loss.parameters())
        assert len(trainer.optimizers) == 1


class TestAdversary:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_it_starts_with_its_step(self, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
        """Until then not a weight of it moves, nor does the optimiser count it; steps count each batch once.

        In taming-transformers each of its two optimisers counted: the adversary came at half the time.
        """
        module = training("vqgan", loss=losses(adversarial_weight=0.75, adversarial_start=3))
        steps, weights = [], []
        forward = module.loss.forward

        def record(*args: Any, step: int, **options: Any) -> Any:
            steps.append(step)
            weights.append(next(module.loss.parameters()).detach().clone())
            return forward(*args, step=step, **options)

        monkeypatch.setattr(module.loss, "forward", record)
        trainer, metrics = fit(module, [PICTURES] * 20, max_steps=5, accumulate_grad_batches=accumulate)
        assert steps == [step for step in range(5) for _ in range(accumulate)]
        by_step = weights[::accumulate]
        assert all(torch.equal(weight, by_step[0]) for weight in by_step[:4])
        assert not torch.equal(by_step[4], by_step[3])
        assert "train/discriminator" not in metrics[3 * accumulate - 1]
        assert "train/discriminator" in metrics[3 * accumulate]
        moments = trainer.optimizers[0].state
        assert {int(moments[p]["step"]) for p in module.loss.parameters()} == {2}
        assert {int(moments[p]["step"]) for p in module.model.parameters()} == {5}

    def test_before_its_start_there_might_be_none(self) -> None:
        """Weights, losses and schedule are those of a training without it."""
        runs = []
        for settings in ({"adversarial_weight": 0.75, "adversarial_start": 4}, {"adversarial_weight": 0.0}):
            module = training("rqvae", loss=losses(**settings))
            _, metrics = fit(module, [PICTURES], max_steps=4)
            runs.append((copy_state(module.model), [values["train/loss"] for values in metrics]))
        assert_equal(*runs)

    @pytest.mark.parametrize("clip", [None, 0.01])
    def test_until_it_is_heard_the_tokenizer_might_be_alone(self, clip: float | None) -> None:
        """It learns, and the tokenizer's weights are those of a training without it, to the last bit.

        Clipped by their joint length, the tokenizer's gradient shrank with the adversary's.
        """
        runs = []
        for settings in (
            {"adversarial_weight": 0.75, "adversarial_start": 1, "adversarial_warmup": 3},
            {"adversarial_weight": 0.0},
        ):
            module = training("rqvae", loss=losses(**settings))
            before = copy_state(module.loss)
            _, metrics = fit(module, [PICTURES], max_steps=4, gradient_clip_val=clip)
            runs.append(copy_state(module.model))
            if module.loss.discriminator is not None:
                assert "train/discriminator" in metrics[-1]
                assert "train/generator" not in metrics[-1]
                after = module.loss.state_dict()
                assert not any(torch.equal(after[n], before[n]) for n in before if n.endswith("0.weight"))
        assert_equal(*runs)

    def test_every_player_s_gradient_is_clipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = training("vqgan", loss=losses(adversarial_weight=0.75))
        lengths: list[list[float]] = []

        def measure(optimizer: torch.optim.Optimizer) -> None:
            players = ([p.grad for p in part.parameters()] for part in module.trained_modules())
            lengths.append([float(torch.nn.utils.get_total_norm(grads)) for grads in players])

        step = torch.optim.AdamW.step

        def measured_step(self: Any, closure: Any = None) -> Any:
            def measured() -> Any:
                value = closure()
                measure(self)
                return value

            return step(self, measured)

        monkeypatch.setattr(torch.optim.AdamW, "step", measured_step)
        fit(module, [PICTURES], max_steps=2, gradient_clip_val=0.01)
        assert lengths
        for length in (length for pair in lengths for length in pair):
            assert length == pytest.approx(0.01, rel=1e-3)

    def test_pictures_that_are_too_small(self) -> None:
        """The error came from inside a convolution, with the adversary's first step: days into a run."""
        large = DiscriminatorConfig(num_layers=3)
        with pytest.raises(
            ValueError, match=r"at least 24 pixels, got 16: lower loss\.discriminator\.num_lay"
        ):
            training("vqgan", loss=losses(adversarial_weight=0.75, discriminator=large))
        training("vqgan", loss=losses(adversarial_weight=0.0, discriminator=large))
        with pytest.raises(
            ValueError, match="perceptual efflite needs pictures of at least 32 pixels, got 16"
        ):
            training("vqgan", loss=losses(perceptual="efflite"))


class TestValidation:
    @pytest.mark.parametrize("sizes", [(24, 24, 24), (24, 8, 3)])
    def test_use_of_codes_by_hand(self, sizes: tuple[int, ...]) -> None:
        """Of all held-out pictures together; a small codebook's share is of its own size."""
        quantizer = ResidualQuantizerConfig(codebook_sizes=sizes, width=8, is_shared=len(set(sizes)) == 1)
        module = training("rqvae", config=replace(RQVAE_CONFIG, quantizer=quantizer))
        logged = validate(module)
        counters = [Counter[int]() for _ in sizes]
        with torch.no_grad():
            codes = torch.cat([module.model.eval().encode(batch["images"]) for batch in VAL])
        for row in codes.flatten(0, 2).tolist():
            for counter, code in zip(counters, row, strict=True):
                counter[code] += 1
        for depth, (counter, size) in enumerate(zip(counters, sizes, strict=True)):
            shares = [count / counter.total() for count in counter.values()]
            entropy = -sum(share * math.log(share) for share in shares)
            assert logged[f"val/usage_depth{depth}"] == pytest.approx(len(counter) / size)
            assert logged[f"val/perplexity_depth{depth}"] == pytest.approx(math.exp(entropy), rel=1e-4)

    def test_a_second_one_counts_anew(self) -> None:
        module = training("vqgan")
        assert validate(module) == validate(module)

    @every
    def test_it_changes_nothing_and_has_no_adversary(self, name: str) -> None:
        module = new_training(name, loss=losses(adversarial_weight=0.75))
        fit(module, [PICTURES], max_steps=2)
        before = copy_state(module)
        logged = validate(module)
        assert_equal(copy_state(module), before)
        depths = 3 if name == "rqvae" else 1
        terms = {f"val/{term}" for term in ("loss", "l1", "commitment", "codebook", "psnr")}
        assert set(logged) == terms | {
            f"val/{what}_depth{depth}" for what in ("usage", "perplexity") for depth in range(depths)
        }
        images = torch.cat([batch["images"] for batch in VAL])
        with torch.no_grad():
            reconstructions, quantized = module.model.eval()(images)
        l1 = float((reconstructions - images).abs().mean())
        assert logged["val/l1"] == pytest.approx(l1, rel=1e-4)
        total = l1 + float(quantized.commitment_loss + quantized.codebook_loss)
        assert logged["val/loss"] == pytest.approx(total, rel=1e-4)
        assert logged["val/psnr"] == pytest.approx(float(psnr(images, reconstructions).mean()), rel=1e-4)


def validate(module: TokenizerTraining) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (logged,) = trainer.validate(module, datamodule=Pictures((), VAL), verbose=False)
    return dict(logged)


def test_images_of_another_size() -> None:
    """A convolutional model takes them, but the exported one would have another code grid than it learned."""
    batch = draw_batch(0, 1)
    batch["images"] = batch["images"].repeat(1, 1, 2, 2)
    with pytest.raises(
        ValueError, match=r"images must be \(B, 3, 16, 16\) for this tokenizer.*image_size to 16"
    ):
        training("rqvae").training_step(batch, 0)


class TestPretrained:
    @pytest.fixture
    def saved(self, tmp_path: Path, tiny_rqvae: RQVAE) -> str:
        save_checkpoint(tmp_path / "native", image_tokenizer=tiny_rqvae)
        return str(tmp_path / "native")

    @pytest.mark.parametrize("is_repeated", [False, True])
    def test_it_starts_from_these_weights(self, saved: str, tiny_rqvae: RQVAE, is_repeated: bool) -> None:
        module = RQVAETraining(tiny_rqvae.config if is_repeated else None, loss=losses(), pretrained=saved)
        assert module.model.config == tiny_rqvae.config
        assert_equal(copy_state(module.model), copy_state(tiny_rqvae))
        assert module.model.training

    @pytest.mark.parametrize("kind", ["vqgan", "rqvae"])
    def test_the_codebook_is_kept(
        self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_rqvae: RQVAE, kind: str
    ) -> None:
        """The first batch replaced it with k-means centres of its own latents."""
        model = tiny_vqgan if kind == "vqgan" else tiny_rqvae
        save_checkpoint(tmp_path / "native", image_tokenizer=model)
        cls = VQGANTraining if kind == "vqgan" else RQVAETraining
        codebook = replace(CODEBOOK, decay=0.9999, restart_after=0)
        module = cls(optimizer=FAST, loss=losses(), codebook=codebook, pretrained=str(tmp_path / "native"))
        fit(module, [PICTURES], max_steps=1)
        after, before = module.model.codebook(), model.codebook()
        assert not torch.equal(after, before)
        assert float((after - before).detach().norm()) < 0.1 * float(before.detach().norm())

    @pytest.mark.parametrize("kind", ["vqgan", "rqvae"])
    def test_the_decoder_alone(self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_rqvae: RQVAE, kind: str) -> None:
        """Reconstructions get better, codes stay: a code cache and a sequence model go on to fit."""
        model = tiny_vqgan if kind == "vqgan" else tiny_rqvae
        save_checkpoint(tmp_path / "native", image_tokenizer=model)
        cls = VQGANTraining if kind == "vqgan" else RQVAETraining
        module = cls(optimizer=FAST, loss=losses(), pretrained=str(tmp_path / "native"), decoder_only=True)
        _, metrics = fit(module, [PICTURES], max_steps=12)
        assert metrics[-1]["train/l1"] < 0.9 * metrics[0]["train/l1"]
        before, after = copy_state(model), copy_state(module.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if name.startswith(("decoder.", "post_quant_conv."))}

    def test_the_decoder_alone_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="decoder_only keeps the codes of a pretrained tokenizer: name"):
            RQVAETraining(RQVAE_CONFIG, loss=losses(), decoder_only=True)

    def test_another_kind(self, saved: str) -> None:
        with pytest.raises(ValueError, match="native has a RQVAE, expected a VQGAN"):
            VQGANTraining(loss=losses(), pretrained=saved)

    def test_another_config(self, saved: str) -> None:
        with pytest.raises(ValueError, match=r"another config than model\.config: leave out model\.config"):
            RQVAETraining(RQVAE_CONFIG, loss=losses(), pretrained=saved)

    @pytest.mark.parametrize("cls", [VQGANTraining, RQVAETraining])
    def test_neither(self, cls: Any) -> None:
        with pytest.raises(ValueError, match=r"model\.config is missing: describe the model, or name a pre"):
            cls()


class TestCheckpoints:
    @every
    def test_a_resumed_run_is_the_uninterrupted_one(self, name: str, tmp_path: Path) -> None:
        """From the middle of an epoch: losses, weights, codebook, adversary, moments, all to the last bit.

        The checkpoint of a batch is written before Lightning tells the module that the batch is over: what
        moves the codebook then would be missing in it.
        """
        settings = {"loss": losses(adversarial_weight=0.75, adversarial_start=2)}
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        whole = new_training(name, **settings)
        trainer, expected = fit(whole, [PICTURES] * 8, checkpoint, max_steps=8)
        resumed = new_training(name, **settings)
        again, metrics = fit(resumed, [PICTURES] * 8, max_steps=8, ckpt_path=tmp_path / "step=5.ckpt")
        assert_equal(metrics[-3:], expected[-3:])
        assert len(metrics) == 3
        assert_equal(resumed.state_dict(), whole.state_dict())
        assert_equal(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())

    @every
    def test_it_says_what_it_holds(self, name: str, tmp_path: Path) -> None:
        module = new_training(name)
        trainer, _ = fit(module, [PICTURES], max_steps=1)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        tokenizer = load_image_tokenizer(tmp_path / "run.ckpt")
        assert type(tokenizer) is type(module.model)
        assert tokenizer.config == module.model.config
        assert_equal(tokenizer.state_dict(), module.model.state_dict())


def test_defaults() -> None:
    """As in the originals: LPIPS is the default loss, and the moments' decay that adversaries need."""
    module = RQVAETraining(RQVAE_CONFIG, loss=losses())
    assert module.optimizer_config.betas == (0.5, 0.9)
    assert module.averages is not None
    assert module.loss.discriminator is None
    assert VQGANTraining(VQGAN_CONFIG, loss=losses()).averages is None
    assert TokenizerLossConfig().perceptual == "lpips"


@pytest.mark.slow  # two processes that import Lightning
def test_two_processes(tmp_path: Path) -> None:
    """Both have the same weights, codebooks and averages, and count the codes of all held-out pictures.

    They do not learn what one process with the joint batch learns: the discriminator's batch norm and the
    adversary's adaptive weight are those of each process's own share. That the codebooks' averages are the
    joint batch's is tested with the quantizers.

    A discriminator that had no gradient before its start was an error in the second step.
    """
    script = Path(__file__).with_name("tokenizer_runs.py")
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(first["state"], second["state"])
    assert "train/discriminator" in first["logged"]
    module = training("rqvae", loss=losses(adversarial_weight=0.75))
    assert not torch.equal(
        first["state"]["loss.discriminator.layers.0.weight"], next(module.loss.parameters())
    )
    module.load_state_dict(first["state"])
    alone = validate(module)
    for name in alone:
        for rank in (first, second):
            assert float(rank["logged"][name]) == pytest.approx(alone[name], rel=1e-4), name
