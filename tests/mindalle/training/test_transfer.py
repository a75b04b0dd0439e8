"""Training that starts from a pretrained model, for its condition or another."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sequence_runs import CONDITIONS, FAST, OneBatch, assert_equal, batch_for, both, fit, training
from torch import Tensor

from mindalle.checkpoint import load_checkpoint, save_checkpoint
from mindalle.training import GPTTraining, RQTransformerTraining
from stage1_vqgan import RQVAE, VQGAN
from stage2_transformer import GPT, ConditionConfig, RQTransformer, TransformerConfig

TRAININGS = {"gpt": GPTTraining, "rq": RQTransformerTraining}


@pytest.fixture
def checkpoints(
    tmp_path: Path, tiny_vqgan: VQGAN, tiny_rqvae: RQVAE, tiny_gpt: GPT, tiny_rq: RQTransformer
) -> dict[str, str]:
    """Paths of checkpoints of the tiny models."""
    save_checkpoint(tmp_path / "gpt", image_tokenizer=tiny_vqgan, model=tiny_gpt)
    save_checkpoint(tmp_path / "rq", image_tokenizer=tiny_rqvae, model=tiny_rq)
    save_checkpoint(tmp_path / "tokenizer", image_tokenizer=tiny_vqgan)
    return {name: str(tmp_path / name) for name in ("gpt", "rq", "tokenizer")}


@both
def test_all_of_it(model: GPT | RQTransformer, checkpoints: dict[str, str]) -> None:
    kind = "gpt" if isinstance(model, GPT) else "rq"
    module = TRAININGS[kind](pretrained=checkpoints[kind])
    assert module.model.config == model.config
    assert module.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], tensor)
    if isinstance(model, RQTransformer):
        assert torch.equal(module.model.codebook, model.codebook)


def test_a_config_may_change_the_dropout(tiny_gpt: GPT, checkpoints: dict[str, str]) -> None:
    stack = replace(tiny_gpt.config.transformer, residual_dropout=0.3)
    config = replace(tiny_gpt.config, transformer=stack)
    module = GPTTraining(config, pretrained=checkpoints["gpt"])
    assert module.model.config == config
    assert torch.equal(module.model.condition.embedding.weight, tiny_gpt.condition.embedding.weight)


@both
@pytest.mark.parametrize("condition", ["class", "class_null", "none", "other_text", "longer_text"])
def test_another_condition(
    model: GPT | RQTransformer,
    checkpoints: dict[str, str],
    condition: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All but the condition is taken; the original lost its image head here."""
    caplog.set_level(logging.INFO, logger="mindalle.training")
    wanted = CONDITIONS | {
        "other_text": ConditionConfig(kind="text", vocab_size=60, length=6),
        "longer_text": ConditionConfig(kind="text", vocab_size=64, length=7),
    }
    kind = "gpt" if isinstance(model, GPT) else "rq"
    module = TRAININGS[kind](pretrained=checkpoints[kind], condition=wanted[condition])
    assert module.model.config == replace(model.config, condition=wanted[condition])
    theirs, ours = model.state_dict(), module.model.state_dict()
    fresh = {name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])}
    assert {name.partition(".")[0] for name in fresh} <= {"condition", "text_head", "text_norm"}
    assert "condition.embedding.weight" in fresh
    assert not any(name.startswith("text_head") for name in ours) or "text_head.weight" in fresh
    assert "start fresh: condition." in caplog.text
    assert fresh <= set(caplog.text.replace(",", " ").split())


def test_of_a_training_run(tiny_gpt: GPT, table: Tensor, tmp_path: Path) -> None:
    module = training(tiny_gpt)
    trainer, _ = fit(module, OneBatch(batch_for((4, 4), CONDITIONS["text"]), table), max_steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    taken = GPTTraining(pretrained=str(tmp_path / "last.ckpt"))
    assert_equal(taken.model.state_dict(), module.model.state_dict())


def test_a_release(fixtures_dir: Path) -> None:
    """From minDALL-E to classes: the same hidden state gives the same logits, of images that is."""
    path = fixtures_dir / "mindalle-tiny"
    original = load_checkpoint(path).model
    assert isinstance(original, GPT)
    condition = ConditionConfig(kind="class", vocab_size=10, length=1)
    module = GPTTraining(pretrained=str(path), condition=condition)
    hidden = torch.randn(3, original.config.transformer.width)
    taken = module.model.eval()
    assert isinstance(taken, GPT)
    with torch.no_grad():
        torch.testing.assert_close(
            taken.head(taken.norm(taken.transformer(hidden[None]))),
            original.head(original.norm(original.transformer(hidden[None]))),
        )
    codes = torch.zeros(2, *original.code_shape, dtype=torch.int64)
    assert taken(codes, torch.tensor([0, 9])).logits.isfinite().all()


def test_what_does_not_fit(tiny_gpt: GPT, checkpoints: dict[str, str]) -> None:
    stack = TransformerConfig(width=16, num_layers=2, num_heads=2)
    config = replace(tiny_gpt.config, transformer=stack, vocab_size=25)
    message = (
        f"the config is not that of the pretrained model {checkpoints['gpt']}: "
        "transformer.width is 16, the pretrained's 32; vocab_size is 25, the pretrained's 24. Leave"
    )
    with pytest.raises(ValueError, match=message):
        GPTTraining(config, pretrained=checkpoints["gpt"])
    with pytest.raises(ValueError, match="rq holds a RQTransformer, expected a GPT"):
        GPTTraining(pretrained=checkpoints["rq"])
    with pytest.raises(ValueError, match="tokenizer holds no sequence model, expected a RQTransformer"):
        RQTransformerTraining(pretrained=checkpoints["tokenizer"])


def test_arguments_that_contradict_each_other(tiny_gpt: GPT) -> None:
    with pytest.raises(ValueError, match="needs a config, or the name of a model as pretrained"):
        GPTTraining()
    with pytest.raises(ValueError, match="condition replaces the one of a pretrained model: give it with"):
        GPTTraining(tiny_gpt.config, condition=CONDITIONS["none"])
    with pytest.raises(ValueError, match="condition replaces the one of a pretrained model: give it with"):
        GPTTraining(condition=CONDITIONS["none"])


def test_resuming_keeps_what_was_learnt(table: Tensor, checkpoints: dict[str, str]) -> None:
    """The pretrained weights do not come back."""
    folder = Path(checkpoints["gpt"]).parent / "run"
    data = OneBatch(batch_for((4, 4), CONDITIONS["text"]), table)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2)
    fit(GPTTraining(pretrained=checkpoints["gpt"], optimizer=FAST), data, saver, max_steps=2)
    module = GPTTraining(pretrained=checkpoints["gpt"], optimizer=FAST)
    fit(module, data, max_steps=2, ckpt_path=folder / "step=2.ckpt")  # not a step more
    expected = torch.load(folder / "step=2.ckpt", weights_only=True)["state_dict"]
    assert_equal(dict(module.state_dict()), expected)
