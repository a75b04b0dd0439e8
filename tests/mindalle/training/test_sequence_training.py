"""Training of sequence models: losses fall, runs resume exactly, configs build it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from sequence_runs import CONDITIONS, FAST, OneBatch, assert_equal, batch_for, both, fit, training
from torch import Tensor

from mindalle.run import open_run
from mindalle.text import TextTokenizer
from mindalle.training import GPTTraining, RQTransformerTraining
from mindalle.training.base import OptimizerConfig
from mindalle.training.sequence import SequenceTraining
from stage2_transformer import GPT, ConditionConfig, RQTransformer
from stage2_transformer.layers import Transformer
from stage2_transformer.losses import SequenceLossConfig


@both
class TestLosses:
    @pytest.mark.parametrize("condition", CONDITIONS)
    def test_they_fall(self, model: GPT | RQTransformer, table: Tensor, condition: str) -> None:
        null_probability = 0.1 if condition in ("text", "class_null") else 0.0
        module = training(model, condition, null_probability=null_probability)
        batch = batch_for(model.code_shape, CONDITIONS[condition])
        _, metrics = fit(module, OneBatch(batch, table), max_steps=20)
        assert metrics[0]["train/code_loss"] == pytest.approx(math.log(24), abs=0.3)
        # nothing tells the four apart where there is no condition
        assert metrics[-1]["train/loss"] < (0.85 if condition == "none" else 0.75) * metrics[0]["train/loss"]
        assert ("train/text_loss" in metrics[-1]) == (condition == "text")
        names = {name for name in metrics[-1] if "depth" in name and "train" in name}
        depth = 3 if isinstance(model, RQTransformer) else 0
        assert names == {f"train/code_loss_depth{d}" for d in range(depth)}

    def test_the_condition_is_learnt(self, model: GPT | RQTransformer, table: Tensor) -> None:
        """The first code follows from the text alone, and not from the null condition."""
        module = training(model, null_probability=0.1)
        batch = batch_for(model.code_shape, CONDITIONS["text"])
        fit(module, OneBatch(batch, table), max_steps=60)
        trained = module.model.eval()
        with torch.no_grad():
            logits = trained(**batch).logits.flatten(1, -2)
            without = trained(batch["codes"], trained.null_condition(batch["cond"])).logits.flatten(1, -2)
        assert torch.equal(logits[:, 0].argmax(-1), batch["codes"].flatten(1)[:, 0])
        assert without[:, 0].unique(dim=0).shape[0] == 1

    def test_validation(self, model: GPT | RQTransformer, table: Tensor) -> None:
        """All of what is logged, of the weights that are there; conditions are not dropped."""
        module = training(model, loss=SequenceLossConfig(text_weight=0.3), null_probability=1.0)
        batch = batch_for(model.code_shape, CONDITIONS["text"])
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        (logged,) = trainer.validate(module, OneBatch(batch, table), verbose=False)
        with torch.no_grad():
            output = module.model.eval()(**batch)
        code = F.cross_entropy(output.logits.flatten(0, -2), batch["codes"].flatten()).item()
        text = F.cross_entropy(output.text_logits.flatten(0, 1), batch["cond"][:, 1:].flatten()).item()
        assert logged["val/code_loss"] == pytest.approx(code, abs=1e-5)
        assert logged["val/text_loss"] == pytest.approx(text, abs=1e-5)
        assert logged["val/loss"] == pytest.approx(code + 0.3 * text, abs=1e-5)
        is_right = (output.logits.argmax(-1) == batch["codes"]).float()
        assert logged["val/accuracy"] == pytest.approx(is_right.mean().item())

    def test_soft_targets(self, model: GPT | RQTransformer, table: Tensor) -> None:
        """What is learnt are the distributions; the loss falls to their entropy and not to zero."""
        batch = batch_for(model.code_shape, CONDITIONS["text"])
        batch["targets"] = 0.5 * F.one_hot(batch["codes"], 24) + 0.5 * F.one_hot(
            (batch["codes"] + 1) % 24, 24
        )
        module = training(model, loss=SequenceLossConfig(text_weight=0.0))
        _, metrics = fit(module, OneBatch(batch, table), max_steps=60)
        assert metrics[-1]["train/loss"] == pytest.approx(math.log(2), abs=0.15)
        with torch.no_grad():
            probabilities = module.model.eval()(batch["codes"], batch["cond"]).logits.softmax(-1)
        assert (probabilities - batch["targets"]).abs().mean() < 0.02

    def test_in_bfloat16(self, model: GPT | RQTransformer, table: Tensor) -> None:
        batch = batch_for(model.code_shape, CONDITIONS["text"])
        module = training(model, gradient_checkpointing=True)
        _, metrics = fit(module, OneBatch(batch, table), max_steps=12, precision="bf16-mixed")
        assert metrics[-1]["train/loss"] < 0.9 * metrics[0]["train/loss"]
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}

    def test_decay_is_for_matrices(self, model: GPT | RQTransformer, table: Tensor) -> None:
        module = training(model, optimizer=replace(FAST, weight_decay=0.2))
        batch = batch_for(model.code_shape, CONDITIONS["text"])
        trainer, _ = fit(module, OneBatch(batch, table), max_steps=1)
        decayed, others = trainer.optimizers[0].param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0)
        assert {parameter.ndim for parameter in decayed["params"]} == {2}
        assert {parameter.ndim for parameter in others["params"]} == {1}
        assert len(decayed["params"]) + len(others["params"]) == len(list(module.parameters()))

    def test_muon(self, model: GPT | RQTransformer, table: Tensor) -> None:
        """It trains what stands between the layers; its steps of a matrix are all but orthogonal."""
        config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, final_share=1.0, muon=True)
        module = training(model, optimizer=config)
        before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        batch = batch_for(model.code_shape, CONDITIONS["text"])
        trainer, _ = fit(module, OneBatch(batch, table), max_steps=1)
        matrices, *others = trainer.optimizers[0].param_groups
        names = {
            name for name, p in module.model.named_parameters() if any(p is q for q in matrices["params"])
        }
        assert names == {name for name, p in before.items() if ".blocks." in name and p.ndim == 2}
        assert sum(len(group["params"]) for group in (matrices, *others)) == len(before)
        for name in names:
            step = before[name] - module.model.get_parameter(name).detach()
            values = torch.linalg.svdvals(step) / (1e-2 * 0.2 * max(step.shape) ** 0.5)
            assert values.median() == pytest.approx(
                1, abs=0.35
            )  # of an AdamW step all but a few are far below
        _, metrics = fit(training(model, optimizer=config), OneBatch(batch, table), max_steps=12)
        assert metrics[-1]["train/loss"] < 0.7 * metrics[0]["train/loss"]


class TestConditionDropout:
    @pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("condition", ["text", "class_null"])
    def test_how_often(self, tiny_gpt: GPT, condition: str, probability: float) -> None:
        module = training(tiny_gpt, condition, null_probability=probability)
        cond = torch.randint(1, 5, (400, 6) if condition == "text" else (400,))
        given = cond.clone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seen = module._drop_conditions(given)
        assert torch.equal(given, cond)  # not changed in place
        is_null = (seen == (0 if condition == "text" else 5)).view(400, -1)
        assert torch.equal(is_null.all(dim=1), is_null.any(dim=1))  # whole rows
        assert torch.equal(seen[~is_null[:, 0]], cond[~is_null[:, 0]])
        assert is_null[:, 0].float().mean().item() == pytest.approx(probability, abs=0.06)

    def test_in_training_only(self, tiny_gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        module = training(tiny_gpt, null_probability=1.0)
        monkeypatch.setattr(module, "log_dict", lambda *args, **options: None)
        monkeypatch.setattr(module, "log", lambda *args, **options: None)
        batch, seen = batch_for((4, 4), CONDITIONS["text"]), []
        module.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        module.training_step(batch, 0)
        module.validation_step(batch, 0)
        assert not seen[0].any()
        assert torch.equal(seen[1], batch["cond"])

    @pytest.mark.parametrize(
        ("condition", "probability", "message"),
        [
            ("text", 1.1, r"null_probability must be in \[0, 1\], got 1.1"),
            ("none", 0.1, "null_probability is 0.1, but the model has no condition: set it to 0$"),
            ("class", 0.1, "the model has no null class: set it to 0, or condition.has_null_class to true"),
        ],
    )
    def test_refused(self, tiny_gpt: GPT, condition: str, probability: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            training(tiny_gpt, condition, null_probability=probability)


@both
class TestPastNoise:
    def test_how_much_of_each_sample(self, model: GPT | RQTransformer, table: Tensor) -> None:
        """Whole positions come from the sample before; the shares are uniform below the largest."""
        module = training(model, past_noise=0.6)
        size = model.code_shape[:2]
        codes = torch.arange(2000).view(-1, *[1] * len(model.code_shape)).expand(-1, *model.code_shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seen = module._disturbed(codes)
        is_other = seen != codes
        assert torch.equal(seen[is_other], ((codes - 1) % 2000)[is_other])
        by_position = is_other.view(2000, *size, -1)
        assert torch.equal(by_position.all(dim=-1), by_position.any(dim=-1))
        shares = is_other.float().flatten(1).mean(dim=1)
        assert shares.mean().item() == pytest.approx(0.3, abs=0.02)
        assert (shares > 0.5).any()
        assert (shares < 0.1).any()
        assert training(model, past_noise=0.0)._disturbed(codes) is None

    def test_in_training_only(
        self, model: GPT | RQTransformer, table: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = training(model, past_noise=1.0)
        monkeypatch.setattr(module, "log_dict", lambda *args, **options: None)
        monkeypatch.setattr(module, "log", lambda *args, **options: None)
        batch, seen = batch_for(model.code_shape, CONDITIONS["text"]), []
        module.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
        module.training_step(batch, 0)
        module.validation_step(batch, 0)
        assert seen[0].shape == batch["codes"].shape
        assert not torch.equal(seen[0], batch["codes"])
        assert seen[1] is None

    def test_refused(self, model: GPT | RQTransformer, table: Tensor) -> None:
        with pytest.raises(ValueError, match=r"past_noise must be in \[0, 1\], got 1.5"):
            training(model, past_noise=1.5)


def test_gradient_checkpointing_reaches_every_stack(tiny_rq: RQTransformer) -> None:
    for is_on in (False, True):
        module = training(tiny_rq, gradient_checkpointing=is_on)
        stacks = [part for part in module.modules() if isinstance(part, Transformer)]
        assert [stack.recomputes_blocks for stack in stacks] == [is_on, is_on]


class TestData:
    """What the data module tells the module before training."""

    def test_the_codebook_is_the_datas(self, tiny_rq: RQTransformer, table: Tensor) -> None:
        module = training(tiny_rq)
        assert not module.model.codebook.any()
        batch = batch_for(tiny_rq.code_shape, CONDITIONS["text"])
        trainer, _ = fit(module, OneBatch(batch, table), max_steps=1)
        assert torch.equal(module.model.codebook, table)
        assert not module.model.codebook.requires_grad
        assert "model.codebook" not in trainer.lightning_module.state_dict()

    def test_no_codebook(self, tiny_rq: RQTransformer) -> None:
        with pytest.raises(ValueError, match=r"a data module that has codebook\(\), .* got NoneType"):
            fit(training(tiny_rq), [batch_for(tiny_rq.code_shape, CONDITIONS["text"])], max_steps=1)

    def test_a_model_of_tables_needs_none(self, tiny_rq: RQTransformer) -> None:
        config = replace(tiny_rq.config, has_codebook_body=False, has_codebook_head=False)
        module = RQTransformerTraining(config, FAST)
        fit(module, [batch_for(tiny_rq.code_shape, CONDITIONS["text"])], max_steps=1)

    @both
    @pytest.mark.parametrize(
        ("attributes", "message"),
        [
            ({"num_codes": 25}, "a vocabulary of 24 codes, its image tokenizer 25"),
            ({"code_shape": (2, 2)}, r"draws codes of shape .*, its image tokenizer makes \(2, 2\)"),
            ({"num_classes": 6}, "the data have 6 classes, the model 5: set config.condition.vocab_size"),
            (
                {"condition": "text"},
                "the data's condition is 'text', the model's 'class': set data.condition",
            ),
        ],
    )
    def test_other_data(self, model: GPT | RQTransformer, attributes: dict[str, Any], message: str) -> None:
        table = torch.zeros(3, attributes.get("num_codes", 24), 8)
        data = OneBatch(batch_for(model.code_shape, CONDITIONS["class"]), table, **attributes)
        with pytest.raises(ValueError, match=message):
            fit(training(model, "class"), data, max_steps=1)

    def test_the_text_tokenizer(
        self, tiny_gpt: GPT, table: Tensor, tiny_text_tokenizer: TextTokenizer
    ) -> None:
        """Its ids may be fewer than the model has; its length must be the same."""
        batch = batch_for((4, 4), CONDITIONS["text"])
        data = OneBatch(batch, table, condition="text", text_tokenizer=tiny_text_tokenizer)
        fit(GPTTraining(tiny_gpt.config), data, max_steps=1)
        for sizes in ({"length": 5}, {"vocab_size": tiny_text_tokenizer.vocab_size - 1}):
            config = replace(tiny_gpt.config, condition=replace(CONDITIONS["text"], **sizes))
            with pytest.raises(ValueError, match=r"the text tokenizer gives 6 ids below 41, the model reads"):
                fit(GPTTraining(config), data, max_steps=1)

    def test_codebook_of_another_width(self, tiny_rq: RQTransformer) -> None:
        data = OneBatch(batch_for(tiny_rq.code_shape, CONDITIONS["text"]), torch.zeros(3, 24, 9))
        with pytest.raises(ValueError, match=r"\(D, V, C\) = \(3, 24, 8\), got \(3, 24, 9\): set codebook_"):
            fit(training(tiny_rq), data, max_steps=1)


@both
@pytest.mark.parametrize(
    ("is_averaged", "optimizer"),
    [
        (True, FAST),
        (False, FAST),
        pytest.param(True, replace(FAST, muon=True), marks=pytest.mark.slow, id="muon"),
    ],
)
def test_a_resumed_run_goes_on_exactly(
    model: GPT | RQTransformer, table: Tensor, tmp_path: Path, is_averaged: bool, optimizer: OptimizerConfig
) -> None:
    """With dropout and dropped conditions; what is exported are the averaged weights, if there are any.

    Lightning copies the module for the average before `setup`, so an average made then had no codebook: after
    resuming, validation and the trained model read codes as vectors near zero.
    """
    key = "transformer" if isinstance(model, GPT) else "body"
    stack = replace(getattr(model.config, key), residual_dropout=0.2)
    model.config = replace(model.config, **{key: stack})
    batch = batch_for(model.code_shape, CONDITIONS["text"])

    def run(folder: str, **options: Any) -> tuple[SequenceTraining, dict[str, Any]]:
        saver = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        callbacks: list[pl.Callback] = [saver]
        if is_averaged:
            callbacks.append(EMAWeightAveraging(decay=0.5))
        module = training(model, null_probability=0.5, optimizer=optimizer)
        fit(module, OneBatch(batch, table), *callbacks, max_steps=6, **options)
        return module, torch.load(tmp_path / folder / "step=6.ckpt", weights_only=True)

    whole, expected = run("whole")
    resumed, found = run("resumed", ckpt_path=tmp_path / "whole" / "step=3.ckpt")
    parts = ["state_dict", "optimizer_states"] + ["current_model_state"] * is_averaged
    assert ("current_model_state" in expected) == is_averaged
    for part in parts:
        assert_equal(found[part], expected[part])
    for module in (whole, resumed):
        if isinstance(model, RQTransformer):
            assert torch.equal(module.model.codebook, table)
    exported = open_run(tmp_path / "resumed" / "step=6.ckpt")
    assert exported.is_averaged == is_averaged
    for name, tensor in exported.build(table).state_dict().items():
        # at the end of the training the averages are what the module has
        assert torch.equal(tensor, whole.model.state_dict()[name])
        if is_averaged and tensor.ndim > 1:
            assert not torch.equal(tensor, expected["current_model_state"][f"model.{name}"])


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        (
            "mindalle.training.GPTTraining",
            {
                "config": {
                    "vocab_size": 24,
                    "code_shape": [4, 4],
                    "transformer": {"width": 32, "num_layers": 1, "num_heads": 2},
                    "condition": {"kind": "class", "vocab_size": 5, "length": 1, "has_null_class": True},
                },
                "null_probability": 0.1,
            },
        ),
        (
            "mindalle.training.RQTransformerTraining",
            {
                "config": {
                    "codebook_sizes": [24, 24],
                    "code_shape": [4, 4, 2],
                    "codebook_width": 8,
                    "body": {"width": 32, "num_layers": 1, "num_heads": 2},
                    "head": {"width": 32, "num_layers": 1, "num_heads": 2},
                    "condition": {"kind": "none", "vocab_size": 1, "length": 1},
                }
            },
        ),
        (
            "mindalle.training.RQTransformerTraining",
            {"pretrained": "emoji", "condition": {"kind": "class", "vocab_size": 5, "length": 1}},
        ),
    ],
    ids=["gpt", "rq", "pretrained"],
)
def test_from_a_config_file(tmp_path: Path, class_path: str, arguments: dict[str, Any]) -> None:
    """What jsonargparse builds of YAML, in the mode of the command line."""
    more = {
        "optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.96]},
        "loss": {"text_weight": 0.2, "ignores_padding": True},
        "gradient_checkpointing": True,
    }
    config = {"model": {"class_path": class_path, "init_args": arguments | more}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    cli = LightningCLI(args=["--config", str(path)], run=False, parser_kwargs={"parser_mode": "omegaconf"})
    assert cli.model.optimizer_config == OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.96))
    assert cli.model.loss_config == SequenceLossConfig(text_weight=0.2, ignores_padding=True)
    condition = cli.model.model.config.condition
    assert condition == ConditionConfig(
        **(arguments["condition"] if "condition" in arguments else arguments["config"]["condition"])
    )
