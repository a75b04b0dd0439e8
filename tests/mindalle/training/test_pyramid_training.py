"""From pictures to drawn pyramids of codes: encoding, training on mistakes, drawing, previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from shard_files import write_shard

from mindalle import Pipeline
from mindalle.checkpoint import SamplingDefaults, load_checkpoint, save_checkpoint
from mindalle.data import CodeData
from mindalle.text import TextTokenizer
from mindalle.training import PyramidGPTTraining, PyramidVAETraining
from mindalle.training.base import OptimizerConfig
from stage1_vqgan import RQVAE, PyramidVAE
from stage1_vqgan.losses import TokenizerLossConfig
from stage1_vqgan.quantize import CodebookTrainingConfig
from stage2_transformer import ConditionConfig, PyramidGPTConfig, SamplingParams, TransformerConfig
from stage2_transformer.losses import SequenceLossConfig

CONFIG = PyramidGPTConfig(
    transformer=TransformerConfig(width=32, num_layers=2, num_heads=2),
    condition=ConditionConfig(kind="text", vocab_size=64, length=6),
    scales=(1, 2, 2, 4),
    codebook_sizes=(9, 24, 24, 24),
    codebook_width=8,
)


@pytest.fixture
def data(tmp_path: Path, tiny_pyramid: PyramidVAE) -> CodeData:
    save_checkpoint(tmp_path / "tokenizer", image_tokenizer=tiny_pyramid)
    TextTokenizer.train(["a red square circle", "a green one"], vocab_size=64, length=6).save(
        tmp_path / "words.json"
    )
    captions = {n: ["a red square"] for n in range(8)}
    return CodeData(
        train=str(write_shard(tmp_path / "train.tar", range(8), captions)),
        val=str(write_shard(tmp_path / "val.tar", range(2), captions)),
        image_tokenizer=str(tmp_path / "tokenizer"),
        cache_dir=str(tmp_path / "codes"),
        text_tokenizer=str(tmp_path / "words.json"),
        text_length=6,
        batch_size=8,
        num_workers=0,
        mistakes=0.5,
    )


def fit(module: pl.LightningModule, data: Any, max_steps: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def test_batches_hold_mistakes_and_what_repairs_them(data: CodeData, tiny_pyramid: PyramidVAE) -> None:
    """The first code that is read wrongly is right in the targets; validation reads the right codes."""
    data.prepare_data()
    data.setup("fit")
    (batch,) = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    assert batch["past"].shape == batch["codes"].shape == (8, 25)
    assert not torch.equal(batch["past"], batch["codes"])
    (held_out,) = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert "past" not in held_out
    assert "latents" not in held_out
    exact = {tuple(code.tolist()) for code in held_out["codes"]}
    for n, key in enumerate(batch["keys"]):
        if key in held_out["keys"]:
            right = held_out["codes"][held_out["keys"].index(key)]
            first_scale = batch["codes"][n, :1]
            assert torch.equal(first_scale, right[:1])
    assert len(exact) == 2


def test_a_model_learns_and_draws(data: CodeData, tmp_path: Path, tiny_pyramid: PyramidVAE) -> None:
    module = PyramidGPTTraining(
        CONFIG,
        optimizer=OptimizerConfig(learning_rate=0.01),
        loss=SequenceLossConfig(depth_weights=(1.0, 1.0, 1.0, 0.5)),
        null_probability=0.1,
    )
    first = float(fit(module, data, 1).callback_metrics["train/loss"])
    metrics = fit(module, data, 40).callback_metrics
    assert float(metrics["train/loss"]) < 0.7 * first
    assert {f"val/code_loss_depth{scale}" for scale in range(4)} <= set(metrics)
    words = TextTokenizer.from_file(tmp_path / "words.json", length=6)
    save_checkpoint(
        tmp_path / "model",
        image_tokenizer=tiny_pyramid,
        model=module.model.eval(),
        text_tokenizer=words,
        sampling=SamplingDefaults(
            params=SamplingParams(temperature=(1.0, 1.0, 0.5, 0.0), cfg_scale=(3.0, 2.0, 1.0, 1.0))
        ),
    )
    assert load_checkpoint(tmp_path / "model").sampling.params.temperature == (1.0, 1.0, 0.5, 0.0)
    pipe = Pipeline.from_pretrained(str(tmp_path / "model"))
    previews = list(pipe.stream("a red square", num_images=2, seed=0))
    whole = pipe("a red square", num_images=2, seed=0)
    assert torch.equal(previews[-1].codes, whole.codes)
    seen = [preview.images[0].tobytes() for preview in previews]
    assert len(set(seen)) == 5  # white, then a picture per scale
    assert seen[-1] == whole.images[0].tobytes()
    with pytest.raises(ValueError, match=r"temperature needs one value or one per depth \(4\)"):
        pipe("a red square", params=SamplingParams(temperature=(1.0, 0.5)))
    with pytest.raises(ValueError, match="this model draws a pyramid of codes"):
        pipe.known_codes(whole.images[0], 1)


def test_a_tokenizer_starts_from_another(tmp_path: Path, tiny_rqvae: RQVAE, tiny_pyramid: PyramidVAE) -> None:
    save_checkpoint(tmp_path / "rqvae", image_tokenizer=tiny_rqvae)
    loss = TokenizerLossConfig(perceptual="none", adversarial_weight=0.0)
    module = PyramidVAETraining(
        tiny_pyramid.config,
        loss=loss,
        codebook=CodebookTrainingConfig(swap_share=0.5, swap_steps=40),
        start_from=str(tmp_path / "rqvae"),
    )
    assert torch.equal(module.model.encoder.conv_in.weight, tiny_rqvae.encoder.conv_in.weight)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loader = torch.utils.data.DataLoader([{"images": image} for image in images], batch_size=8)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=20, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, loader, loader)
    assert {f"val/usage_depth{scale}" for scale in range(4)} <= set(trainer.callback_metrics)
    assert module.model.quantizer.swap_share == pytest.approx(0.5 * (1 - 19 / 40))
    assert bool((module.model.quantizer.phi[0].weight != 0).any())
    with pytest.raises(ValueError, match="pretrained and start_from contradict each other"):
        PyramidVAETraining(tiny_pyramid.config, pretrained="a", start_from="b")


def test_mistakes_need_a_pyramid(data: CodeData, tmp_path: Path, tiny_rqvae: RQVAE) -> None:
    save_checkpoint(tmp_path / "rqvae", image_tokenizer=tiny_rqvae)
    data.image_tokenizer = str(tmp_path / "rqvae")
    data.prepare_data()
    with pytest.raises(ValueError, match=r"mistakes are for pyramids of codes, .* this is a RQVAE"):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"mistakes must be in \[0, 1\], got 2"):
        CodeData(train="a", image_tokenizer="b", mistakes=2)
