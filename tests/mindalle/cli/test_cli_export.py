"""`export.py`: of every kind of run a checkpoint that loads and draws as the trained model, or one line."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_results import Command
from clip_models import CAPTIONS, captioned, clip_training, fit
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

from checkpoint_io import config_to_mapping, read_tensors
from mindalle.checkpoint import save_checkpoint
from mindalle.image import to_pil
from mindalle.pipeline import Pipeline
from mindalle.rerank import ClipReranker
from mindalle.run import RUN_KEY
from mindalle.text import TextTokenizer
from stage1_vqgan import RQVAE, VQGAN, load_tokenizer
from stage2_transformer import GPT, ConditionConfig, RQTransformer, SamplingParams


def save_run(path: Path, kind: str, model: Any) -> Path:
    """A checkpoint as Lightning saves one of our training modules."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    about = {"kind": kind, "config": config_to_mapping(model.config)}
    weights["discriminator.weight"] = torch.zeros(3)
    torch.save({"state_dict": weights, RUN_KEY: about, "global_step": 1234}, path)
    return path


def save_settings(folder: Path, data: dict[str, Any]) -> None:
    """The config.yaml that LightningCLI writes."""
    settings = {"seed_everything": 0, "trainer": {}, "data": {"class_path": "x.Y", "init_args": data}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture
def words(tmp_path: Path, tiny_text_tokenizer: TextTokenizer) -> Path:
    path = tmp_path / "words.json"
    tiny_text_tokenizer.save(path)
    return path


@pytest.fixture
def runs(tmp_path: Path, words: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT) -> Path:
    """`vqgan` and `gpt`, whose config.yaml names the other parts."""
    save_run(tmp_path / "vqgan" / "last.ckpt", "vqgan", tiny_vqgan)
    save_run(tmp_path / "gpt" / "last.ckpt", "gpt", tiny_gpt)
    data = {
        "train": [
            str(tmp_path / "secret" / "train-{0..3}.tar"),
            "https://me:password@host/a/b.tar?token=abc",
        ],
        "val": None,
        "image_tokenizer": str(tmp_path / "vqgan"),
        "text_tokenizer": str(words),
    }
    save_settings(tmp_path / "gpt", data)
    return tmp_path


@pytest.fixture
def clip_run(tmp_path: Path, words: Path) -> Path:
    """A CLIP trained for a few steps, with averaged weights."""
    run = tmp_path / "clip"
    callbacks = [EMAWeightAveraging(decay=0.9), ModelCheckpoint(run, save_last=True, every_n_train_steps=5)]
    module = clip_training(words)
    fit(module, [captioned(CAPTIONS)], max_steps=5, callbacks=callbacks, enable_checkpointing=True)
    return run


def same_weights(model: Any, expected: Any) -> bool:
    states = model.state_dict(), expected.state_dict()
    return all(torch.equal(tensor, states[0][name]) for name, tensor in states[1].items())


class TestWhatIsExported:
    def test_image_tokenizers(
        self, mindalle: Command, tmp_path: Path, tiny_vqgan: VQGAN, tiny_rqvae: RQVAE
    ) -> None:
        for kind, model in (("vqgan", tiny_vqgan), ("rqvae", tiny_rqvae)):
            run = save_run(tmp_path / kind / "last.ckpt", kind, model)
            result = mindalle("export", run, tmp_path / f"my-{kind}")
            assert (result.code, result.out, result.err) == (0, [str(tmp_path / f"my-{kind}")], [])
            assert same_weights(load_tokenizer(tmp_path / f"my-{kind}"), model)
            card = (tmp_path / f"my-{kind}" / "README.md").read_text()
            assert card.startswith(f"# my-{kind}\n\nAn image tokenizer")
            size = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
            assert f"16x16 pixels to {'x'.join(map(str, model.code_shape))} codes of 24 | {size} |" in card
            assert "- 1,234 optimiser steps, up to the checkpoint `last.ckpt`\n" in card
            assert f"python tools/reconstruct.py picture.png --model my-{kind}\n" in card

    def test_a_text_model_with_what_its_run_names(
        self,
        mindalle: Command,
        runs: Path,
        tiny_vqgan: VQGAN,
        tiny_gpt: GPT,
        tiny_text_tokenizer: TextTokenizer,
    ) -> None:
        options = ("--top-k", 7, "--temperature", 0.5, "--num-candidates", 3)
        result = mindalle("export", runs / "gpt", runs / "my-model", *options)
        assert (result.code, result.out, result.err) == (0, [str(runs / "my-model")], [])
        pipe = Pipeline.from_pretrained(runs / "my-model")
        assert pipe.sampling.params == SamplingParams(top_k=7, temperature=0.5)
        assert (pipe.sampling.num_candidates, pipe.reranker) == (3, None)
        expected = Pipeline(tiny_vqgan, tiny_gpt, tiny_text_tokenizer)
        params = pipe.sampling.params
        assert torch.equal(pipe("a red car").codes, expected("a red car", params=params).codes)

        card = (runs / "my-model" / "README.md").read_text()
        assert "A text-to-image model" in card
        assert "GPT, 2 layers, width 32, texts of 6 ids of 64" in card
        assert "- train: `train-{0..3}.tar`, `b.tar`\n- image tokenizer: `vqgan`\n" in card
        assert not any(private in card for private in (str(runs), "secret", "password", "token=abc"))
        assert 'generate.py --model my-model --prompt "a red apple"\n' in card

    def test_parts_by_option(
        self,
        mindalle: Command,
        runs: Path,
        words: Path,
        tiny_vqgan: VQGAN,
    ) -> None:
        """They go before those of config.yaml; here a native tokenizer, and a run without config.yaml."""
        with torch.no_grad():
            tiny_vqgan.quantizer.codebook.mul_(2)
        save_checkpoint(runs / "other", image_tokenizer=tiny_vqgan)
        result = mindalle("export", runs / "gpt", runs / "a", "--image-tokenizer", runs / "other")
        assert result.code == 0
        assert same_weights(load_tokenizer(runs / "a"), tiny_vqgan)

        (runs / "gpt" / "config.yaml").unlink()
        options = ("--image-tokenizer", runs / "vqgan" / "last.ckpt", "--text-tokenizer", words)
        assert mindalle("export", runs / "gpt" / "last.ckpt", runs / "b", *options).code == 0
        assert Pipeline.from_pretrained(runs / "b")("a red car").images[0].size == (16, 16)

    def test_rq_transformer(
        self,
        mindalle: Command,
        tmp_path: Path,
        words: Path,
        tiny_rqvae: RQVAE,
        tiny_rq: RQTransformer,
        tiny_text_tokenizer: TextTokenizer,
    ) -> None:
        """Its codebook is not in its checkpoint: it comes from the image tokenizer."""
        save_run(tmp_path / "rqvae" / "checkpoints" / "last.ckpt", "rqvae", tiny_rqvae)
        save_run(tmp_path / "rq" / "checkpoints" / "last.ckpt", "rq_transformer", tiny_rq)
        data = {"image_tokenizer": str(tmp_path / "rqvae"), "text_tokenizer": str(words)}
        save_settings(tmp_path / "rq", data)
        assert mindalle("export", tmp_path / "rq", tmp_path / "my-model", "--top-k", 5).code == 0
        pipe = Pipeline.from_pretrained(tmp_path / "my-model")
        expected = Pipeline(tiny_rqvae, tiny_rq, tiny_text_tokenizer)
        params = pipe.sampling.params
        assert torch.equal(pipe("a red car").codes, expected("a red car", params=params).codes)
        assert "RQTransformer, 2 + 1 layers" in (tmp_path / "my-model" / "README.md").read_text()

    @pytest.mark.parametrize(("kind", "vocab_size"), [("class", 10), ("none", 1)])
    def test_models_that_read_no_text(
        self, mindalle: Command, runs: Path, tiny_gpt: GPT, kind: Any, vocab_size: int
    ) -> None:
        """The text tokenizer that config.yaml names is left out."""
        condition = ConditionConfig(kind=kind, vocab_size=vocab_size, length=1)
        save_run(runs / "gpt" / "last.ckpt", "gpt", GPT(replace(tiny_gpt.config, condition=condition)))
        assert mindalle("export", runs / "gpt", runs / "my-model").code == 0
        assert not (runs / "my-model" / "text_tokenizer.json").exists()
        pipe = Pipeline.from_pretrained(runs / "my-model")
        assert pipe(3 if kind == "class" else None).codes.shape == (1, 4, 4)
        result = mindalle("export", runs / "gpt", runs / "other", "--text-tokenizer", runs / "words.json")
        assert result.code == 2
        assert f"--text-tokenizer goes with a model that reads text: {runs}/gpt/last.ckpt" in result.err[0]
        assert f"condition {kind!r}" in result.err[0]

    def test_dtype_and_card(self, mindalle: Command, runs: Path) -> None:
        (runs / "card.md").write_text("# Mine")
        options = ("--dtype", "fp16", "--card", runs / "card.md")
        assert mindalle("export", runs / "vqgan", runs / "out", *options).code == 0
        assert (runs / "out" / "README.md").read_text() == "# Mine"
        tensors = read_tensors(runs / "out" / "image_tokenizer.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


class TestClip:
    def test_alone(self, mindalle: Command, clip_run: Path, tmp_path: Path) -> None:
        """The averages are taken unless the last step's weights are asked for."""
        content = read_tensors(clip_run / "last.ckpt")
        averages, raw = content["state_dict"], content["current_model_state"]
        assert not torch.equal(averages["model.text_projection"], raw["model.text_projection"])
        for options, expected in (((), averages), (("--raw-weights",), raw)):
            destination = tmp_path / f"my-clip{len(options)}"
            assert mindalle("export", clip_run, destination, *options).code == 0
            reranker = ClipReranker.from_pretrained(destination)
            for name, tensor in reranker.model.state_dict().items():
                assert torch.equal(tensor, expected[f"model.{name}"]), name
        cards = [(tmp_path / f"my-clip{i}" / "README.md").read_text() for i in (0, 1)]
        assert "- weights averaged over the steps\n" in cards[0]
        assert "- weights of the last step\n" in cards[1]
        assert "generate.py --clip my-clip0 --num-candidates 16" in cards[0]
        assert "vision transformer of 1 layers, width 32, for 16x16 pixels" in cards[0]

    def test_scores_as_in_training(self, mindalle: Command, tmp_path: Path, words: Path) -> None:
        """Trained on four pictures, the exported one finds the caption of each."""
        batch = captioned(CAPTIONS)
        trainer = fit(clip_training(words), [batch], max_steps=40)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        assert mindalle("export", tmp_path / "run.ckpt", tmp_path / "my-clip").code == 0
        reranker = ClipReranker.from_pretrained(tmp_path / "my-clip")
        images = to_pil(batch["images"])
        for index, caption in enumerate(CAPTIONS):
            assert reranker.score(images, caption).argmax() == index

    def test_beside_a_model(self, mindalle: Command, runs: Path, clip_run: Path) -> None:
        """From its run, or from its own export; pictures are ranked at once."""
        assert mindalle("export", clip_run, runs / "my-clip").code == 0
        for name, clip in (("a", clip_run), ("b", runs / "my-clip"), ("c", runs / "a")):
            options = ("--clip", clip, "--num-candidates", 4)
            assert mindalle("export", runs / "gpt", runs / name, *options).code == 0
            drawn = Pipeline.from_pretrained(runs / name)("a red car", num_images=2)
            assert drawn.scores is not None
            assert (len(drawn.images), drawn.scores) == (2, sorted(drawn.scores, reverse=True))
            assert "| CLIP | vision transformer" in (runs / name / "README.md").read_text()

    def test_another_text_tokenizer(self, mindalle: Command, runs: Path) -> None:
        """A checkpoint has one text_tokenizer.json: with the model's ids the CLIP would read nonsense."""
        other = runs / "other.json"
        TextTokenizer.train(["quite other words"], vocab_size=64, length=6).save(other)
        trainer = fit(clip_training(other), [captioned(CAPTIONS)], max_steps=1)
        trainer.save_checkpoint(runs / "clip" / "last.ckpt")
        result = mindalle("export", runs / "gpt", runs / "out", "--clip", runs / "clip")
        assert (result.code, len(result.err)) == (1, 1)
        assert "the model and the CLIP read text with different tokenizers" in result.err[0]
        assert not (runs / "out").exists()

    def test_is_no_model(self, mindalle: Command, tmp_path: Path, clip_run: Path) -> None:
        assert mindalle("export", clip_run, tmp_path / "my-clip").code == 0
        with pytest.raises(ValueError, match=r"my-clip holds a CLIP alone, .* pass it as such \(--clip\)"):
            Pipeline.from_pretrained(tmp_path / "my-clip")

    def test_with_a_tokenizer_that_is_none(self, mindalle: Command, tmp_path: Path, words: Path) -> None:
        module = clip_training(words)
        about = {"kind": "clip", "config": config_to_mapping(module.config)}
        weights = {"state_dict": module.state_dict()}
        short = about["config"] | {"vocab_size": 9}
        for wrong, message in (
            ({}, "the text tokenizer in .*run.ckpt is not a Hugging Face tokenizer"),
            ({"text_tokenizer": "{}"}, "the text tokenizer in .*run.ckpt is not a Hugging Face tokenizer"),
            ({"text_tokenizer": words.read_text(), "config": short}, "run.ckpt: vocab_size must be .* got 9"),
        ):
            torch.save(weights | {RUN_KEY: about | wrong}, tmp_path / "run.ckpt")
            result = mindalle("export", tmp_path / "run.ckpt", tmp_path / "out")
            assert (result.code, len(result.err)) == (1, 1)
            assert re.search(message, result.err[0]), result.err[0]


class TestWhichCheckpoint:
    """Of a run's directory."""

    @pytest.fixture
    def run(self, tmp_path: Path, tiny_vqgan: VQGAN) -> Path:
        """Checkpoints whose codebooks say which one they are, the newest last."""
        run = tmp_path / "run"
        for number, name in enumerate(("last", "step=10", "step=20", ".half-written")):
            with torch.no_grad():
                tiny_vqgan.quantizer.codebook.fill_(number)
            path = save_run(run / f"{name}.ckpt", "vqgan", tiny_vqgan)
            os.utime(path, (number, number))
        return run

    def codebook(self, mindalle: Command, run: Path) -> float:
        destination = run.parent / f"out{len(list(run.parent.iterdir()))}"
        result = mindalle("export", run, destination)
        assert result.code == 0, result.err
        return float(load_tokenizer(destination).codebook().detach().mean())

    def test_last_then_newest(self, mindalle: Command, run: Path, tiny_vqgan: VQGAN) -> None:
        assert self.codebook(mindalle, run) == 0
        with torch.no_grad():
            tiny_vqgan.quantizer.codebook.fill_(7)
        save_run(run / "last-v1.ckpt", "vqgan", tiny_vqgan)  # of a second run into the same directory
        assert self.codebook(mindalle, run) == 7
        assert self.codebook(mindalle, run / "step=10.ckpt") == 1
        for file in run.glob("last*"):
            file.unlink()
        assert self.codebook(mindalle, run) == 2

    def test_damaged(self, mindalle: Command, run: Path) -> None:
        os.truncate(run / "last.ckpt", 1000)
        result = mindalle("export", run, run.parent / "out")
        assert (result.code, len(result.err)) == (1, 1)
        assert "last.ckpt (1000 bytes) is not a readable torch checkpoint" in result.err[0]
        assert "The run's others: step=20.ckpt, step=10.ckpt" in result.err[0]
        assert not (run.parent / "out").exists()

    def test_in_shards(self, mindalle: Command, tmp_path: Path) -> None:
        """What Lightning's FSDP writes unless told otherwise is a directory."""
        (tmp_path / "step.ckpt").mkdir()
        (tmp_path / "step.ckpt" / ".metadata").touch()
        result = mindalle("export", tmp_path / "step.ckpt", tmp_path / "out")
        assert result.code == 1
        assert f"utilities.consolidate_checkpoint {tmp_path / 'step.ckpt'}" in result.err[0]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["nowhere"], 1, "no training run at"),
            (["empty"], 1, "is no training run: expected a .ckpt file written by tools/train.py"),
            (["foreign.ckpt"], 1, "foreign.ckpt is no training run"),
            (["newer.ckpt"], 1, "kind 'diffusion', known are vqgan, rqvae, pyramid, gpt, pyramid_gpt, "),
            (["other.ckpt"], 1, "config in .*other.ckpt: convnet; known are"),
            (["hollow.ckpt"], 1, "hollow.ckpt has no state_dict"),
            (["gpt", "--top-p", 2], 2, r"--top-p must be in \(0, 1\], got 2.0"),
            (
                ["vqgan", "--top-k", 3, "--clip", "emoji"],
                2,
                "--clip, --top-k: not for a vqgan, which is what",
            ),
            (["vqgan", "--raw-weights"], 1, "last.ckpt has no averaged weights, and so no raw ones beside"),
            (["vqgan", "--card", "none.md"], 1, "no model card at none.md"),
            (
                ["gpt", "--image-tokenizer", "gpt"],
                1,
                "gpt/last.ckpt holds a gpt, expected one of vqgan, rqvae",
            ),
            (["gpt", "--clip", "vqgan"], 1, "vqgan/last.ckpt holds a vqgan, expected a clip"),
            (["bare"], 2, "--image-tokenizer is needed: there is no config.yaml beside .*bare/last.ckpt"),
            (
                ["bare", "--image-tokenizer", "vqgan"],
                2,
                "--text-tokenizer is needed: there is no config.yaml",
            ),
            (["large"], 1, "vocabulary of 25 codes, its image tokenizer 24"),
        ],
    )
    def test_in_one_line(
        self,
        mindalle: Command,
        runs: Path,
        tiny_gpt: GPT,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[Any],
        code: int,
        message: str,
    ) -> None:
        monkeypatch.chdir(runs)
        (runs / "empty").mkdir()
        torch.save({"state_dict": {"a": torch.zeros(1)}}, "foreign.ckpt")
        for name, kind, config in (
            ("newer", "diffusion", {}),
            ("other", "gpt", {"convnet": 3}),
            ("hollow", "gpt", config_to_mapping(tiny_gpt.config)),
        ):
            torch.save({RUN_KEY: {"kind": kind, "config": config}}, f"{name}.ckpt")
        save_run(runs / "bare" / "last.ckpt", "gpt", tiny_gpt)
        save_run(runs / "large" / "last.ckpt", "gpt", GPT(replace(tiny_gpt.config, vocab_size=25)))
        (runs / "large" / "config.yaml").write_bytes((runs / "gpt" / "config.yaml").read_bytes())
        parts = ["--image-tokenizer", "vqgan", "--text-tokenizer", "words.json"]
        options = parts if arguments == ["hollow.ckpt"] else []
        before = sorted(runs.rglob("*"))
        result = mindalle("export", arguments[0], "out", *arguments[1:], *options)
        assert (result.code, len(result.err)) == (code, 1)
        assert re.search(message, result.err[0]), result.err[0]
        assert sorted(runs.rglob("*")) == before

    def test_nothing_is_overwritten(self, mindalle: Command, runs: Path) -> None:
        result = mindalle("export", runs / "vqgan", runs / "gpt")
        assert result.code == 1
        assert "gpt exists, and nothing is overwritten: choose another DST" in result.err[0]


class TestNamedAsAModel:
    """What `export.py` and `encode.py` took for a model, `generate.py` and `reconstruct.py` refused."""

    @pytest.mark.parametrize("name", ["gpt", "gpt/last.ckpt"])
    def test_a_run_draws(self, runs: Path, tiny_gpt: GPT, name: str) -> None:
        pipe = Pipeline.from_pretrained(runs / name)
        assert pipe.text_tokenizer is not None
        assert pipe.model is not None
        for key, tensor in tiny_gpt.state_dict().items():
            torch.testing.assert_close(pipe.model.state_dict()[key], tensor)
        assert len(pipe("a red apple", num_images=1, seed=0).images) == 1

    def test_a_run_is_reconstructed_with(self, mindalle: Command, runs: Path) -> None:
        picture = runs / "picture.png"
        to_pil(torch.zeros(1, 3, 16, 16))[0].save(picture)
        done = mindalle("reconstruct", picture, "--model", runs / "vqgan", "--out", runs / "sheet.png")
        assert done.code == 0, done.err
