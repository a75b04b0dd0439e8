"""Whole checkpoints: what is saved is loaded, half of one is none, weights are in memory once."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracle.make import make_mindalle, make_mindalle_finetuned, make_rq, make_taming
from torch import Tensor, nn

import mindalle.checkpoint
from checkpoint_io import CheckpointError, CheckpointPart, read_tensors
from mindalle.checkpoint import (
    Checkpoint,
    SamplingDefaults,
    load_checkpoint,
    sampling_defaults,
    save_checkpoint,
)
from mindalle.pipeline import Pipeline
from mindalle.text import TextTokenizer
from stage1_vqgan import RQVAE, VQGAN, load_tokenizer
from stage2_transformer import (
    GPT,
    ConditionConfig,
    GPTConfig,
    RQTransformer,
    SamplingParams,
    TransformerConfig,
    generate,
)

CONDITIONS = {
    "text": ConditionConfig(kind="text", vocab_size=64, length=6),
    "class": ConditionConfig(kind="class", vocab_size=5, length=1),
    "class with null": ConditionConfig(kind="class", vocab_size=5, length=1, has_null_class=True),
    "none": ConditionConfig(kind="none", vocab_size=1, length=1),
}
GREEDY = SamplingParams(temperature=0)


def build(cls: type[Any], config: Any, *args: Any) -> Any:
    """A model with weights large enough to tell its logits apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = cls(config, *args).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def condition_of(model: GPT | RQTransformer, batch_size: int = 2) -> Tensor | None:
    condition = model.config.condition
    if condition.kind == "none":
        return None
    shape = (batch_size, condition.length) if condition.kind == "text" else (batch_size,)
    return torch.arange(batch_size * condition.length).view(shape) % condition.vocab_size


@torch.no_grad()
def assert_same(loaded: Checkpoint, image_tokenizer: Any, model: Any = None) -> None:
    """The same configs, codes, pixels and logits, to the last bit."""
    ours = loaded.image_tokenizer
    assert type(ours) is type(image_tokenizer)
    assert ours.config == image_tokenizer.config  # type: ignore[attr-defined]
    size = image_tokenizer.convnet.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = image_tokenizer.encode(images)
    assert torch.equal(ours.encode(images), codes)
    assert torch.equal(ours.decode(codes), image_tokenizer.decode(codes))
    if model is None:
        assert loaded.model is None
        return
    assert type(loaded.model) is type(model)
    assert loaded.model.config == model.config
    cond = condition_of(model)
    expected, got = model(codes, cond), loaded.model(codes, cond)
    assert torch.equal(got.logits, expected.logits)
    assert (got.text_logits is None) == (expected.text_logits is None)
    for part in (ours, loaded.model):
        assert not part.training
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


class TestRoundTrip:
    @pytest.mark.parametrize("kind", CONDITIONS)
    def test_vqgan_and_gpt(self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT, kind: str) -> None:
        model = build(GPT, replace(tiny_gpt.config, condition=CONDITIONS[kind]))
        save_checkpoint(tmp_path / "native", image_tokenizer=tiny_vqgan, model=model)
        assert_same(load_checkpoint(tmp_path / "native"), tiny_vqgan, model)

    @pytest.mark.parametrize(
        ("kind", "reads_codebook"), [*((kind, True) for kind in CONDITIONS), ("text", False)]
    )
    def test_rqvae_and_rq_transformer(
        self, tmp_path: Path, tiny_rqvae: RQVAE, tiny_rq: RQTransformer, kind: str, reads_codebook: bool
    ) -> None:
        config = replace(
            tiny_rq.config,
            condition=CONDITIONS[kind],
            has_codebook_body=reads_codebook,
            has_codebook_head=reads_codebook,
        )
        model = build(RQTransformer, config, tiny_rqvae.codebook().detach())
        save_checkpoint(tmp_path / "native", image_tokenizer=tiny_rqvae, model=model)
        assert_same(load_checkpoint(tmp_path / "native"), tiny_rqvae, model)

    @pytest.mark.parametrize("name", ["tiny_vqgan", "tiny_rqvae"])
    def test_image_tokenizer_alone(self, tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
        image_tokenizer = request.getfixturevalue(name)
        save_checkpoint(tmp_path, image_tokenizer=image_tokenizer)
        assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "image_tokenizer.safetensors"}
        loaded = load_checkpoint(tmp_path)
        assert_same(loaded, image_tokenizer)
        assert (loaded.text_tokenizer, loaded.sampling) == (None, SamplingDefaults())

    def test_all_parts(self, tmp_path: Path, tiny_pipeline: Pipeline) -> None:
        save_checkpoint(
            tmp_path / "deep" / "native",
            image_tokenizer=tiny_pipeline.image_tokenizer,
            model=tiny_pipeline.model,
            text_tokenizer=tiny_pipeline.text_tokenizer,
            card="# Apples — 東京\n",
        )
        folder = tmp_path / "deep" / "native"
        assert {path.name for path in folder.iterdir()} == {
            *("config.yaml", "image_tokenizer.safetensors", "model.safetensors"),
            *("text_tokenizer.json", "README.md"),
        }
        assert (folder / "README.md").read_text(encoding="utf-8") == "# Apples — 東京\n"
        loaded = load_checkpoint(folder)
        assert loaded.layout == "native"
        assert_same(loaded, tiny_pipeline.image_tokenizer, tiny_pipeline.model)
        assert loaded.text_tokenizer is not None
        assert tiny_pipeline.text_tokenizer is not None
        texts = ["a red apple", "☃ two cars"]
        assert torch.equal(loaded.text_tokenizer.encode(texts), tiny_pipeline.text_tokenizer.encode(texts))

    def test_the_config_is_complete_and_holds_no_code(
        self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT
    ) -> None:
        save_checkpoint(tmp_path, image_tokenizer=tiny_vqgan, model=tiny_gpt)
        config = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert set(config) == {"format", "image_tokenizer", "model", "sampling"}
        assert config["format"] == "mindalle-1"
        assert (config["image_tokenizer"]["type"], config["model"]["type"]) == ("vqgan", "gpt")
        assert set(config["model"]) == {"type", *tiny_gpt.config.__dataclass_fields__}
        assert set(config["model"]["transformer"]) == set(tiny_gpt.config.transformer.__dataclass_fields__)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_storage(
        self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT, dtype: torch.dtype
    ) -> None:
        save_checkpoint(tmp_path, image_tokenizer=tiny_vqgan, model=tiny_gpt, dtype=dtype)
        for name in ("image_tokenizer", "model"):
            stored = read_tensors(tmp_path / f"{name}.safetensors")
            assert {tensor.dtype for tensor in stored.values()} == {dtype}
        loaded = load_checkpoint(tmp_path)
        for ours, original in ((loaded.image_tokenizer, tiny_vqgan), (loaded.model, tiny_gpt)):
            assert ours is not None
            for name, tensor in original.state_dict().items():
                assert torch.equal(ours.state_dict()[name], tensor.to(dtype).float()), name
        codes, cond = torch.arange(16).view(1, 4, 4), condition_of(tiny_gpt, 1)
        with torch.no_grad():
            assert loaded.model is not None
            difference = loaded.model(codes, cond).logits - tiny_gpt(codes, cond).logits
            pixels = loaded.image_tokenizer.decode(codes) - tiny_vqgan.decode(codes)
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
        assert 0 < difference.abs().max() < tolerance
        assert 0 < pixels.abs().max() < tolerance

    def test_loaded_weights_can_be_trained(self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT) -> None:
        """They are mapped from the file, which must not change."""
        save_checkpoint(tmp_path, image_tokenizer=tiny_vqgan, model=tiny_gpt)
        before = (tmp_path / "model.safetensors").read_bytes()
        model = load_checkpoint(tmp_path).model
        assert model is not None
        codes = torch.zeros(1, 4, 4, dtype=torch.int64)
        model(codes, condition_of(model, 1)).logits.logsumexp(-1).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert not torch.equal(model.head.weight, tiny_gpt.head.weight)  # type: ignore[union-attr, arg-type]
        assert (tmp_path / "model.safetensors").read_bytes() == before


class TestSamplingDefaults:
    @pytest.mark.parametrize(
        "sampling",
        [
            SamplingDefaults(),
            SamplingDefaults(params=SamplingParams(temperature=0)),
            SamplingDefaults(params=SamplingParams(temperature=0.5, top_k=7, top_p=0.9, cfg_scale=3.0)),
            SamplingDefaults(params=SamplingParams(top_k=(9, 5, 1)), num_candidates=16),
        ],
    )
    def test_round_trip(
        self, tmp_path: Path, tiny_rqvae: RQVAE, tiny_rq: RQTransformer, sampling: SamplingDefaults
    ) -> None:
        save_checkpoint(tmp_path, image_tokenizer=tiny_rqvae, model=tiny_rq, sampling=sampling)
        assert load_checkpoint(tmp_path).sampling == sampling
        assert Pipeline.from_pretrained(tmp_path).sampling == sampling

    def test_rq_release(self, tmp_path: Path) -> None:
        make_rq(tmp_path, sampling__top_p=0.8, temp=0.7, top_k=[24, 12, 6])
        expected = SamplingParams(temperature=0.7, top_k=(24, 12, 6), top_p=0.8)
        assert load_checkpoint(tmp_path).sampling == SamplingDefaults(params=expected)

    def test_rq_run(self, tmp_path: Path) -> None:
        """A config written by training has them in another place."""
        make_rq(tmp_path)
        path = tmp_path / "stage2" / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["experiment"] = {"sample": {"top_p": 0.5}}
        del config["sampling"]
        path.write_text(yaml.safe_dump(config))
        assert load_checkpoint(tmp_path).sampling.params == SamplingParams(top_p=0.5)
        del config["experiment"]
        path.write_text(yaml.safe_dump(config))
        assert load_checkpoint(tmp_path).sampling == SamplingDefaults()

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            (
                {"top_q": 3, "temp": 1},
                "unknown keys in sampling section beside .*: temp, top_q; known are temp",
            ),
            ({"top_p": 2}, r"sampling section beside .*: top_p must be in \(0, 1\], got 2"),
            ({"temperature": "hot"}, "sampling section beside .*: must be real number"),
            ({"top_k": [3, 0]}, r"top_k must be an integer of at least 1, got \(3, 0\)"),
            ({"top_k": 64.5}, "sampling section beside .*: top_k must be an integer of at least 1, got 64.5"),
            ({"window": 2.5}, r"sampling section beside .*: window must be an integer .*, got 2.5"),
            ({"num_candidates": 0}, "num_candidates must be an integer of at least 1, got 0"),
            ({"num_candidates": 1.5}, "num_candidates must be an integer of at least 1, got 1.5"),
            ({"num_candidates": True}, "num_candidates must be an integer of at least 1, got True"),
            ({"num_candidates": "many"}, "num_candidates must be an integer of at least 1, got 'many'"),
            ([1, 2], r"sampling section beside .* must be a mapping, got \[1, 2\]"),
        ],
    )
    def test_errors(self, section: object, message: str) -> None:
        config = {"format": "mindalle-1", "sampling": section}
        part = CheckpointPart(layout="native", config=config, file=Path("model.safetensors"))
        with pytest.raises(CheckpointError, match=message):
            sampling_defaults(part)


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = yaml.safe_load((directory / "config.yaml").read_text())
    edit(config)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))


class TestLoadErrors:
    @pytest.fixture
    def native(self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT) -> Path:
        save_checkpoint(tmp_path / "native", image_tokenizer=tiny_vqgan, model=tiny_gpt)
        return tmp_path / "native"

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                lambda config: config.update(format="mindalle-2", optimizer={}),
                r"config.yaml: expected format mindalle-1 with sections format, image_tokenizer, model, "
                r"sampling, clip, got format 'mindalle-2' and unknown optimizer",
            ),
            (lambda config: config.pop("format"), "got format None and unknown nothing"),
            (
                lambda config: config["model"].update(layers=3),
                "unknown keys in model of .*: layers; known are",
            ),
            (lambda config: config["model"].update(type="vqgan"), "unknown type 'vqgan' in model of"),
            (lambda config: config.update(model=None), "model of .* must be a mapping with a type, got None"),
            (
                lambda config: config["image_tokenizer"].update(type="gpt"),
                "unknown type 'gpt' in image_tokenizer",
            ),
            (
                lambda config: config["model"].update(vocab_size=25),
                "vocabulary of 25 codes, its image tokenizer 24",
            ),
            (lambda config: config["model"].update(code_shape=[4, 5]), r"codes of shape \(4, 5\), its image"),
            (
                lambda config: config["model"]["transformer"].update(num_layers=3),
                "does not fit its config.*missing",
            ),
            (lambda config: config["model"]["transformer"].update(num_layers=0), "num_layers"),
            (
                lambda config: config.pop("image_tokenizer"),
                "has a sequence model but no image tokenizer: pass the",
            ),
        ],
    )
    def test_config(self, native: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
        edit_config(native, edit)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(native)

    @pytest.mark.parametrize("name", ["image_tokenizer.safetensors", "model.safetensors"])
    @pytest.mark.parametrize("size", [0, 1000, -1])
    def test_truncated(self, native: Path, name: str, size: int) -> None:
        os.truncate(native / name, size if size >= 0 else (native / name).stat().st_size - 1)
        with pytest.raises(
            CheckpointError, match=rf"{name} \(\d+ bytes\) is not a readable safetensors file"
        ):
            load_checkpoint(native)

    @pytest.mark.parametrize("name", ["image_tokenizer.safetensors", "model.safetensors"])
    def test_missing_weights(self, native: Path, name: str) -> None:
        (native / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"no checkpoint file at .*{name}"):
            load_checkpoint(native)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load_checkpoint(tmp_path / "none")
        with pytest.raises(CheckpointError, match="is no checkpoint of a known layout: it holds nothing"):
            load_checkpoint(tmp_path)

    def test_averaged_weights_of_a_native_checkpoint(self, native: Path) -> None:
        with pytest.raises(CheckpointError, match="is native and has no EMA weights"):
            load_checkpoint(native, use_ema=True)

    def test_sampling_defaults_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="num_candidates must be an integer of at least 1, got 0"):
            SamplingDefaults(num_candidates=0)


class TestSaving:
    def test_a_checkpoint_is_not_overwritten(self, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT) -> None:
        save_checkpoint(tmp_path, image_tokenizer=tiny_vqgan)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(
            FileExistsError,
            match=r"holds a checkpoint already \(image_tokenizer.safetensors, config.yaml\): choose another",
        ):
            save_checkpoint(tmp_path, image_tokenizer=tiny_vqgan, model=tiny_gpt)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_readme_is_not_overwritten(self, tmp_path: Path, tiny_vqgan: VQGAN) -> None:
        """`export .` replaced the README.md of the directory it was called in."""
        (tmp_path / "README.md").write_text("mine")
        with pytest.raises(FileExistsError, match=r"\(README.md\)"):
            save_checkpoint(tmp_path, image_tokenizer=tiny_vqgan, card="# A model")
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
        assert (tmp_path / "README.md").read_text() == "mine"

    @pytest.mark.parametrize(
        ("failing", "error"),
        [
            *((number, OSError(28, "No space left on device")) for number in range(5)),
            (4, KeyboardInterrupt()),
        ],
    )
    def test_a_failure_leaves_nothing(
        self,
        tmp_path: Path,
        tiny_pipeline: Pipeline,
        monkeypatch: pytest.MonkeyPatch,
        failing: int,
        error: BaseException,
    ) -> None:
        """Whichever of the five files cannot be written."""
        (tmp_path / "ATTRIBUTION.md").write_text("stays")
        written: list[str] = []
        replace_file = os.replace

        def fail(source: Path, target: Path) -> None:
            if len(written) == failing:
                raise error
            written.append(Path(target).name)
            replace_file(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(type(error)):
            save_all(tmp_path, tiny_pipeline)
        assert len(written) == failing
        assert [path.name for path in tmp_path.iterdir()] == ["ATTRIBUTION.md"]
        monkeypatch.undo()
        save_all(tmp_path, tiny_pipeline)
        load_checkpoint(tmp_path)

    def test_a_killed_process_leaves_nothing_that_loads(
        self, tmp_path: Path, tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the file that is written last the others are no checkpoint."""
        written: list[str] = []
        replace_file = os.replace

        def record(source: Path, target: Path) -> None:
            written.append(Path(target).name)
            replace_file(source, target)

        monkeypatch.setattr(os, "replace", record)
        save_all(tmp_path / "whole", tiny_pipeline)
        assert len(written) == 5
        for count in range(5):
            part = tmp_path / f"first {count}"
            part.mkdir()
            for name in written[:count]:
                shutil.copy(tmp_path / "whole" / name, part)
            with pytest.raises(CheckpointError, match="is no checkpoint of a known layout"):
                load_checkpoint(part)

    def test_directory_that_is_a_file(self, tmp_path: Path, tiny_vqgan: VQGAN) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OSError, match="file"):
            save_checkpoint(tmp_path / "file", image_tokenizer=tiny_vqgan)
        assert (tmp_path / "file").read_text() == "mine"


def save_all(directory: Path, pipeline: Pipeline) -> None:
    save_checkpoint(
        directory,
        image_tokenizer=pipeline.image_tokenizer,
        model=pipeline.model,
        text_tokenizer=pipeline.text_tokenizer,
        card="# A model",
    )


OFFICIAL: dict[str, Callable[[Path], Any]] = {
    "minDALL-E": make_mindalle,
    "minDALL-E fine-tuned, class": lambda path: make_mindalle_finetuned(path, "class"),
    "minDALL-E fine-tuned, none": lambda path: make_mindalle_finetuned(path, "none"),
    "rq-vae, text": lambda path: make_rq(path, "text"),
    "rq-vae, class": lambda path: make_rq(path, "class"),
    "rq-vae, none": lambda path: make_rq(path, "none"),
    "rq-vae, separate codebooks and tables": lambda path: make_rq(
        path,
        shared_codebook=False,
        input_emb_vqvae=False,
        head_emb_vqvae=False,
        cumsum_depth_ctx=False,
        shared_tok_emb=False,
        shared_cls_emb=False,
    ),
    "rq-vae, latents on a finer grid": lambda path: make_rq(path, code_shape=[2, 2, 3]),
    "taming": make_taming,
}


class TestAveragedWeights:
    @pytest.mark.parametrize("use_ema", [False, True])
    def test_a_tokenizer_that_is_alone(self, tmp_path: Path, use_ema: bool) -> None:
        """`convert_checkpoint.py stage1/ OUT --ema` wrote the weights of the last step, without a word."""
        make_rq(tmp_path)
        loaded = load_checkpoint(tmp_path / "stage1", use_ema=use_ema)
        assert_same(loaded, load_tokenizer(tmp_path / "stage1", use_ema=use_ema))

    def test_a_tokenizer_with_a_model(self, tmp_path: Path) -> None:
        """The tokenizer whose codes the model was trained on."""
        make_rq(tmp_path)
        loaded = load_checkpoint(tmp_path, use_ema=True)
        assert_same(loaded, load_tokenizer(tmp_path), loaded.model)


class TestConversion:
    """An official checkpoint and its native copy; what official ones compute is tested with the stages."""

    @pytest.mark.parametrize("name", OFFICIAL)
    def test_greedy_codes(self, tmp_path: Path, name: str) -> None:
        OFFICIAL[name](tmp_path / "official")
        official = load_checkpoint(tmp_path / "official")
        assert name.startswith(official.layout)
        save_checkpoint(
            tmp_path / "native",
            image_tokenizer=official.image_tokenizer,
            model=official.model,
            sampling=official.sampling,
        )
        native = load_checkpoint(tmp_path / "native")
        assert native.layout == "native"
        assert native.sampling == official.sampling
        assert_same(native, official.image_tokenizer, official.model)
        if official.model is None:
            assert name == "taming"
            return
        assert native.model is not None
        cond = condition_of(official.model)
        codes = generate(official.model, cond, GREEDY, seeds=[0, 1])
        assert torch.equal(generate(native.model, cond, GREEDY, seeds=[0, 1]), codes)
        assert codes.unique().numel() > 2

    def test_averaged_weights(self, tmp_path: Path) -> None:
        make_rq(tmp_path / "official")
        averaged = load_checkpoint(tmp_path / "official", use_ema=True)
        save_checkpoint(tmp_path / "native", image_tokenizer=averaged.image_tokenizer, model=averaged.model)
        assert_same(load_checkpoint(tmp_path / "native"), averaged.image_tokenizer, averaged.model)
        assert averaged.model is not None
        plain = load_checkpoint(tmp_path / "official").model
        assert plain is not None
        assert not torch.equal(next(plain.parameters()), next(averaged.model.parameters()))


class TestTextTokenizerOfOfficialCheckpoints:
    """rq-vae-transformer's releases have none: theirs is minDALL-E's."""

    @pytest.fixture
    def bpe16k(self, fixtures_dir: Path) -> Path:
        return fixtures_dir / "mindalle-tiny" / "tokenizer"

    def test_in_the_release(self, tmp_path: Path, bpe16k: Path, caplog: pytest.LogCaptureFixture) -> None:
        make_mindalle(tmp_path, tokenizer=bpe16k, vocab_size_txt=16384)
        check_bpe16k(load_checkpoint(tmp_path).text_tokenizer)
        assert not caplog.records

    def test_given(self, tmp_path: Path, bpe16k: Path, caplog: pytest.LogCaptureFixture) -> None:
        make_rq(tmp_path / "alone" / "cc3m", "text", vocab_size_cond=16384)
        assert load_checkpoint(tmp_path / "alone" / "cc3m").text_tokenizer is None
        check_bpe16k(load_checkpoint(tmp_path / "alone" / "cc3m", text_tokenizer=bpe16k).text_tokenizer)
        assert not caplog.records

    @pytest.mark.parametrize("name", ["minDALL-E/1.3B", "~/1.3B"])
    def test_of_a_model(
        self, tmp_path: Path, bpe16k: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """`--text-tokenizer minDALL-E/1.3B` was a path that does not exist."""
        monkeypatch.setenv("MINDALLE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HOME", str(tmp_path / "cache" / "releases" / "minDALL-E"))
        make_mindalle(tmp_path / "cache" / "releases" / "minDALL-E" / "1.3B", tokenizer=bpe16k)
        make_rq(tmp_path / "alone" / "cc3m", "text", vocab_size_cond=16384)
        check_bpe16k(load_checkpoint(tmp_path / "alone" / "cc3m", text_tokenizer=name).text_tokenizer)

    def test_of_a_bundled_model(self, tmp_path: Path) -> None:
        make_rq(tmp_path, "text", vocab_size_cond=4096)
        loaded = load_checkpoint(tmp_path, text_tokenizer="emoji").text_tokenizer
        assert loaded is not None
        assert loaded.encode(["a red apple"]).shape == (1, 6)

    def test_beside_the_release(self, tmp_path: Path, bpe16k: Path, caplog: pytest.LogCaptureFixture) -> None:
        make_rq(tmp_path / "cc3m", "text", vocab_size_cond=16384)
        (tmp_path / "1.3B").mkdir()
        (tmp_path / "1.3B" / "tokenizer").symlink_to(bpe16k)
        check_bpe16k(load_checkpoint(tmp_path / "cc3m").text_tokenizer)
        (message,) = (record.getMessage() for record in caplog.records)
        assert message.startswith("the checkpoint has no text tokenizer, taking the BPE-16k of ")
        assert message.endswith("1.3B/tokenizer")

    def test_not_needed(self, tmp_path: Path, bpe16k: Path, caplog: pytest.LogCaptureFixture) -> None:
        make_rq(tmp_path, "class")
        with caplog.at_level(logging.WARNING):
            assert load_checkpoint(tmp_path, text_tokenizer=bpe16k).text_tokenizer is None
        assert "tokenizer is not used: this model does not read text" in caplog.text

    def test_missing(self, tmp_path: Path) -> None:
        make_rq(tmp_path, "text")
        with pytest.raises(FileNotFoundError, match=r"no text tokenizer at .*none"):
            load_checkpoint(tmp_path, text_tokenizer=tmp_path / "none")


def check_bpe16k(tokenizer: TextTokenizer | None) -> None:
    assert tokenizer is not None
    assert tokenizer.encode(["a red apple"])[0].tolist() == [1022, 2165, 4137, 0, 0, 0]


MEASURE = """
import sys
from pathlib import Path
from mindalle.checkpoint import load_checkpoint

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

def load(path):
    model = load_checkpoint(path).model
    for parameter in model.parameters():
        parameter.detach().sum().item()  # in memory for real
    return model

load(sys.argv[1])  # the libraries that loading imports take 150 MB themselves
baseline = memory("VmRSS")
model = load(sys.argv[2])
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(weights, memory("VmHWM") - baseline)
"""  # not ru_maxrss: a new process inherits its parent's


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
class TestMemory:
    """minDALL-E has 5 GB of weights: in memory twice they would not load on a machine of 8 GB."""

    @pytest.mark.parametrize("layout", ["native", "minDALL-E"])
    def test_weights_are_held_once(self, tmp_path: Path, tiny_vqgan: VQGAN, layout: str) -> None:
        for name, width, num_layers in (("small", 16, 2), ("large", 512, 13)):
            if layout == "native":
                config = GPTConfig(
                    transformer=TransformerConfig(width=width, num_layers=num_layers, num_heads=2),
                    condition=ConditionConfig(kind="text", vocab_size=8192, length=64),
                    vocab_size=24,
                    code_shape=(4, 4),
                )
                save_checkpoint(tmp_path / name, image_tokenizer=tiny_vqgan, model=GPT(config))
            else:
                sizes = {"stage2__hparams__embed_dim": width, "n_layers": num_layers}
                make_mindalle(tmp_path / name, vocab_size_txt=8192, **sizes)
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(mindalle.checkpoint.__file__).parents[1],
        )
        weights, peak = map(int, result.stdout.split())
        assert weights > 190e6
        # a query, key and value become one tensor of ours: a quarter of a block's weights is copied
        assert 0.9 * weights < peak < 1.35 * weights
