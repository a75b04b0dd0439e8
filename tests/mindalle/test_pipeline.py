"""From prompt to pictures: the hops by hand, what pictures depend on, previews, completion, errors."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mindalle
from mindalle.checkpoint import SamplingDefaults, save_checkpoint
from mindalle.image import to_pil, to_tensor
from mindalle.pipeline import Pipeline
from mindalle.rerank import ClipReranker
from mindalle.text import TextTokenizer
from stage1_vqgan import RQVAE, VQGAN
from stage1_vqgan.precision import has_bfloat16
from stage2_transformer import (
    GPT,
    ConditionConfig,
    RQTransformer,
    SamplingParams,
    generate,
    image_seeds,
    sample_next,
)
from stage2_transformer.int8 import has_int8, quantize_
from stage2_transformer.precision import precision_of
from stage2_transformer.sampling import uniforms

PROMPT = "a red apple"
PARAMS = SamplingParams(temperature=0.9, top_k=20, top_p=0.95)


class ColourClip:
    """A CLIP whose features are a picture's mean colour, and the colour that a text names."""

    colours = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode_image(self, image: Tensor) -> Tensor:
        return image.mean(dim=(2, 3))

    def encode_text(self, text: Tensor) -> Tensor:
        return torch.tensor(self.colours)[text[:, 0]]

    def tokenize(self, texts: list[str]) -> Tensor:
        self.texts += texts
        return torch.tensor([[0 if "red" in text else 1] for text in texts])


@pytest.fixture
def clip() -> ColourClip:
    return ColourClip()


@pytest.fixture
def reranker(clip: ColourClip) -> ClipReranker:
    return ClipReranker(clip, to_tensor, clip.tokenize, batch_size=3)


@pytest.fixture
def ranked(tiny_pipeline: Pipeline, reranker: ClipReranker) -> Pipeline:
    tiny_pipeline.reranker = reranker
    return tiny_pipeline


@pytest.fixture
def rq_pipeline(tiny_rqvae: RQVAE, tiny_rq: RQTransformer, tiny_text_tokenizer: TextTokenizer) -> Pipeline:
    return Pipeline(tiny_rqvae, tiny_rq, tiny_text_tokenizer)


@pytest.fixture(params=["gpt", "rq"])
def pipeline(request: pytest.FixtureRequest, tiny_pipeline: Pipeline) -> Pipeline:
    return tiny_pipeline if request.param == "gpt" else request.getfixturevalue("rq_pipeline")


def with_condition(pipeline: Pipeline, condition: ConditionConfig) -> Pipeline:
    """The same pipeline around a GPT with another condition."""
    assert isinstance(pipeline.model, GPT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(replace(pipeline.model.config, condition=condition)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return Pipeline(pipeline.image_tokenizer, model)


def as_bytes(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def model_of(pipeline: Pipeline) -> GPT | RQTransformer:
    assert pipeline.model is not None
    return pipeline.model


class TestHops:
    def test_by_hand(self, pipeline: Pipeline, reranker: ClipReranker) -> None:
        """Encode, prefill, the loop, decode, score, PIL: each part alone, in the words of the design."""
        model, text_tokenizer = model_of(pipeline), pipeline.text_tokenizer
        assert text_tokenizer is not None
        pipeline.reranker = reranker
        result = pipeline(PROMPT, num_images=2, num_candidates=4, params=PARAMS, seed=5)

        with torch.no_grad():
            text = text_tokenizer.encode([PROMPT])
            assert text.shape == (1, 6)
            seeds = image_seeds(5, 4)
            cache = model.make_cache(4)
            logits = model.prefill(text, cache)
            num_codes = torch.Size(model.code_shape).numel()
            draws, drawn = uniforms(seeds, num_codes), []
            for n in range(num_codes):
                depth = n % model.code_shape[2] if len(model.code_shape) == 3 else 0
                drawn.append(sample_next(logits, PARAMS, draws[:, n], depth=depth))
                if n + 1 < num_codes:
                    logits = model.decode(drawn[-1][:, None], cache)[:, -1]
            codes = torch.stack(drawn, dim=1).view(4, *model.code_shape)
            assert torch.equal(generate(model, text, PARAMS, seeds=seeds), codes)
            images = to_pil(pipeline.image_tokenizer.decode(codes))
        scores = reranker.score(images, PROMPT)
        best = scores.argsort(descending=True)[:2].tolist()

        assert result.indices == best
        assert torch.equal(result.codes, codes[best])
        assert as_bytes(result.images) == [images[i].tobytes() for i in best]
        assert result.scores == pytest.approx(scores[best].tolist())

    def test_shapes_and_types(self, pipeline: Pipeline) -> None:
        result = pipeline(PROMPT, num_images=3)
        assert result.codes.shape == (3, *pipeline.image_tokenizer.code_shape)
        assert result.codes.dtype == torch.int64
        assert [(image.mode, image.size) for image in result.images] == [("RGB", (16, 16))] * 3
        assert (result.scores, result.indices) == (None, [0, 1, 2])

    @pytest.mark.parametrize("kind", ["class", "none"])
    def test_other_conditions(self, tiny_pipeline: Pipeline, kind: Any) -> None:
        condition = ConditionConfig(kind=kind, vocab_size=5 if kind == "class" else 1, length=1)
        pipe = with_condition(tiny_pipeline, condition)
        cond, prompt = (torch.tensor([3]), 3) if kind == "class" else (None, None)
        result = pipe(prompt, num_images=2, params=PARAMS, seed=1)
        expected = generate(model_of(pipe), cond, PARAMS, seeds=image_seeds(1, 2))
        assert torch.equal(result.codes, expected)
        if kind == "class":
            assert not torch.equal(pipe(0, num_images=2, params=PARAMS, seed=1).codes, expected)

    def test_the_prompt_matters(self, pipeline: Pipeline) -> None:
        """And a seed does, 0 among them."""
        pictures = [
            pipeline(prompt, params=PARAMS, seed=seed).codes
            for prompt, seed in ((PROMPT, 0), ("two red cars", 0), (PROMPT, 1), (PROMPT, 0))
        ]
        assert not torch.equal(pictures[0], pictures[1])
        assert not torch.equal(pictures[0], pictures[2])
        assert torch.equal(pictures[0], pictures[3])

    def test_guidance(self, tiny_pipeline: Pipeline) -> None:
        guided = replace(PARAMS, cfg_scale=4.0)
        result = tiny_pipeline(PROMPT, num_images=3, params=guided)
        assert torch.equal(
            result.codes, tiny_pipeline(PROMPT, num_images=3, params=guided, batch_size=1).codes
        )
        assert not torch.equal(result.codes, tiny_pipeline(PROMPT, num_images=3, params=PARAMS).codes)

    def test_defaults_of_the_checkpoint(self, tiny_pipeline: Pipeline, reranker: ClipReranker) -> None:
        tiny_pipeline.sampling = SamplingDefaults(params=SamplingParams(temperature=0), num_candidates=3)
        plain = tiny_pipeline(PROMPT, num_images=2)
        assert torch.equal(plain.codes[0], plain.codes[1])  # greedy
        assert not torch.equal(tiny_pipeline(PROMPT, params=PARAMS).codes[0], plain.codes[0])
        assert tiny_pipeline.count_candidates(PROMPT, 2) == 2  # nothing to choose with
        tiny_pipeline.reranker = reranker
        assert tiny_pipeline.count_candidates(PROMPT, 2) == 6
        assert len(tiny_pipeline(PROMPT, num_images=2).images) == 2


class TestIndependence:
    """Image i depends on the model, the prompt, the settings, the seed and i, and on nothing else."""

    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    def test_batch_size(self, pipeline: Pipeline, batch_size: int) -> None:
        expected = pipeline(PROMPT, num_images=8, params=PARAMS, seed=3, batch_size=16)
        result = pipeline(PROMPT, num_images=8, params=PARAMS, seed=3, batch_size=batch_size)
        assert torch.equal(result.codes, expected.codes)
        assert len(set(as_bytes(expected.images))) > 1
        for image, other in zip(result.images, expected.images, strict=True):
            difference = np.asarray(image).astype(int) - np.asarray(other)
            assert np.abs(difference).max() <= 1  # float noise of the decoder

    @pytest.mark.parametrize("num_candidates", [2, 5, 9])
    def test_candidates(self, ranked: Pipeline, num_candidates: int) -> None:
        all_codes = Pipeline(ranked.image_tokenizer, ranked.model, ranked.text_tokenizer)(
            PROMPT, num_images=9, params=PARAMS
        ).codes
        result = ranked(PROMPT, num_images=2, num_candidates=num_candidates, params=PARAMS, batch_size=4)
        assert max(result.indices) < num_candidates
        assert torch.equal(result.codes, all_codes[result.indices])

    def test_number_of_images(self, pipeline: Pipeline) -> None:
        many = pipeline(PROMPT, num_images=5, params=PARAMS).codes
        assert torch.equal(pipeline(PROMPT, num_images=2, params=PARAMS).codes, many[:2])

    def test_prompts_in_one_batch(self, pipeline: Pipeline) -> None:
        prompts = [PROMPT, "a blue cat"]
        codes = pipeline.draw_codes(prompts, num_candidates=3, params=PARAMS, seed=5)
        assert codes.shape == (2, 3, *pipeline.image_tokenizer.code_shape)
        for prompt, candidates in zip(prompts, codes, strict=True):
            assert torch.equal(candidates, pipeline(prompt, num_images=3, params=PARAMS, seed=5).codes)

    def test_global_randomness(self, pipeline: Pipeline) -> None:
        before = torch.get_rng_state()
        expected = pipeline(PROMPT, params=PARAMS).codes
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert torch.equal(pipeline(PROMPT, params=PARAMS).codes, expected)


class TestReranking:
    def test_order(self, ranked: Pipeline, clip: ColourClip) -> None:
        """The reddest first: scores against arithmetic on the pictures themselves."""
        result = ranked(PROMPT, num_images=6, num_candidates=6, params=PARAMS)
        scores = []
        for image in result.images:
            mean = (np.asarray(image) / 127.5 - 1).mean(axis=(0, 1))
            scores.append(mean[0] / np.linalg.norm(mean))
        assert scores == sorted(scores, reverse=True)
        assert result.scores == pytest.approx(scores, abs=1e-5)
        assert sorted(result.indices) == list(range(6))
        assert result.indices != list(range(6))
        assert clip.texts == [PROMPT]  # encoded once

    def test_the_best_of_many(self, ranked: Pipeline) -> None:
        everything = ranked(PROMPT, num_images=7, num_candidates=7, params=PARAMS)
        best = ranked(PROMPT, num_images=2, num_candidates=7, params=PARAMS)
        assert best.indices == everything.indices[:2]
        assert as_bytes(best.images) == as_bytes(everything.images[:2])
        assert torch.equal(best.codes, everything.codes[:2])

    def test_equal_scores_keep_their_order(self, ranked: Pipeline) -> None:
        """Greedy candidates are all alike."""
        result = ranked(PROMPT, num_images=3, num_candidates=5, params=SamplingParams(temperature=0))
        assert result.indices == [0, 1, 2]

    def test_without_a_reranker(self, tiny_pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            result = tiny_pipeline(PROMPT, num_images=2, num_candidates=7, params=PARAMS)
        assert (len(result.images), result.scores, result.indices) == (2, None, [0, 1])
        assert [record.getMessage() for record in caplog.records] == [
            "nothing to rank with: 2 candidates are drawn, not 7"
        ]

    def test_class_labels_are_not_ranked(self, ranked: Pipeline, reranker: ClipReranker) -> None:
        pipe = with_condition(ranked, ConditionConfig(kind="class", vocab_size=5, length=1))
        pipe.reranker = reranker
        assert pipe(2, num_images=2).scores is None


class TestStream:
    def test_first_and_last(self, pipeline: Pipeline) -> None:
        num_codes = torch.Size(model_of(pipeline).code_shape).numel()
        previews = list(pipeline.stream(PROMPT, num_images=2, params=PARAMS, seed=4))
        assert [preview.num_done for preview in previews] == list(range(num_codes + 1))
        assert {preview.num_codes for preview in previews} == {num_codes}
        assert all((np.asarray(image) == 255).all() for image in previews[0].images)
        result = pipeline(PROMPT, num_images=2, params=PARAMS, seed=4)
        assert torch.equal(previews[-1].codes, result.codes)
        assert as_bytes(previews[-1].images) == as_bytes(result.images)

    def test_previews_stay_as_they_were(self, pipeline: Pipeline) -> None:
        """All used to share one tensor, so that a kept preview showed what was drawn later."""
        previews = list(pipeline.stream(PROMPT, num_images=2, params=PARAMS))
        final = previews[-1].codes.flatten(1)
        for preview in previews:
            codes = preview.codes.flatten(1)
            assert torch.equal(codes[:, : preview.num_done], final[:, : preview.num_done])
            assert not codes[:, preview.num_done :].any()

    def test_what_is_drawn_shows(self, pipeline: Pipeline) -> None:
        """A position shows when all its depths are drawn; its cell is 4x4 pixels."""
        shape = model_of(pipeline).code_shape
        depth = shape[2] if len(shape) == 3 else 1
        for preview in pipeline.stream(PROMPT, params=PARAMS):
            with torch.no_grad():
                (decoded,) = to_pil(pipeline.image_tokenizer.decode(preview.codes))
            positions = preview.num_done // depth
            shown, pixels = np.asarray(preview.images[0]), np.asarray(decoded)
            for position in range(16):
                top, left = 4 * (position // 4), 4 * (position % 4)
                cell = slice(top, top + 4), slice(left, left + 4)
                if position < positions:
                    assert np.array_equal(shown[cell], pixels[cell])
                else:
                    assert (shown[cell] == 255).all()

    def test_on_step(self, tiny_pipeline: Pipeline) -> None:
        """After each code of each batch, and once before."""
        steps: list[tuple[int, int]] = []
        tiny_pipeline(
            PROMPT, num_images=3, batch_size=2, on_step=lambda p: steps.append((p.num_done, len(p.codes)))
        )
        assert steps == [(n, 2) for n in range(17)] + [(n, 1) for n in range(17)]


class TestCompletion:
    @pytest.fixture
    def picture(self) -> Image.Image:
        noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_keeps_the_rows(self, pipeline: Pipeline, picture: Image.Image, rows: int) -> None:
        known = pipeline.known_codes(picture, rows)
        per_row = torch.Size(pipeline.image_tokenizer.code_shape).numel() // 4
        assert (known.shape, known.dtype) == ((1, rows * per_row), torch.int64)
        result = pipeline(PROMPT, num_images=3, params=PARAMS, known=known, batch_size=2)
        assert torch.equal(result.codes[:, :rows].flatten(1), known.expand(3, -1))
        assert len(result.codes[:, rows:].unique(dim=0)) > 1
        model, tokenizer = model_of(pipeline), pipeline.text_tokenizer
        assert tokenizer is not None
        expected = generate(model, tokenizer.encode([PROMPT]), PARAMS, seeds=image_seeds(0, 3), known=known)
        assert torch.equal(result.codes, expected)

    def test_codes_of_the_fitted_picture(self, pipeline: Pipeline, picture: Image.Image) -> None:
        fitted = picture.resize((21, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))
        with torch.no_grad():
            codes = pipeline.image_tokenizer.encode(to_tensor(fitted).unsqueeze(0))
        assert torch.equal(pipeline.known_codes(picture, 2), codes[:, :2].flatten(1))

    def test_known_rows_show_from_the_start(self, pipeline: Pipeline, picture: Image.Image) -> None:
        known = pipeline.known_codes(picture, 2)
        first, *others = pipeline.stream(PROMPT, params=PARAMS, known=known)
        assert first.num_done == known.shape[1]
        assert len(others) == first.num_codes - first.num_done
        pixels = np.asarray(first.images[0])
        assert (pixels[8:] == 255).all()
        with torch.no_grad():
            (decoded,) = to_pil(pipeline.image_tokenizer.decode(first.codes))
        assert np.array_equal(pixels[:8], np.asarray(decoded)[:8])
        assert (pixels[:8] != 255).any()

    @pytest.mark.parametrize("rows", [-1, 0, 4, 5])
    def test_rows_out_of_range(self, pipeline: Pipeline, picture: Image.Image, rows: int) -> None:
        with pytest.raises(ValueError, match=rf"keep_rows must be between 1 and 3 rows of codes, got {rows}"):
            pipeline.known_codes(picture, rows)

    def test_codes_of_another_model(self, tiny_pipeline: Pipeline) -> None:
        with pytest.raises(ValueError, match=r"known codes must be in \[0, 24\), got 0 to 24: do they come"):
            tiny_pipeline(PROMPT, known=torch.tensor([[0, 24]]))
        with pytest.raises(ValueError, match=r"known codes must be \(2 or 1, at most 16\), got \(3, 4\)"):
            tiny_pipeline(PROMPT, num_images=2, known=torch.zeros(3, 4, dtype=torch.int64))


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "prompt", "message"),
        [
            ("text", None, r"draws from text, got None: pass a prompt"),
            ("text", 3, r"draws from text, got 3: pass a prompt"),
            ("class", None, r"draws classes 0 to 4, got None: pass a class label"),
            ("class", "a cat", r"draws classes 0 to 4, got 'a cat': pass a class label"),
            ("class", 5, r"class label must be in \[0, 5\), got 5"),
            ("class", -1, r"class label must be in \[0, 5\), got -1"),
            ("none", "a cat", r"is unconditional, got 'a cat': pass no prompt and no class label"),
            ("none", 0, r"is unconditional, got 0: pass no prompt and no class label"),
        ],
    )
    def test_condition(self, tiny_pipeline: Pipeline, kind: Any, prompt: Any, message: str) -> None:
        if kind != "text":
            condition = ConditionConfig(kind=kind, vocab_size=5 if kind == "class" else 1, length=1)
            tiny_pipeline = with_condition(tiny_pipeline, condition)
        for call in (tiny_pipeline, tiny_pipeline.encode_condition, lambda p: next(tiny_pipeline.stream(p))):
            with pytest.raises(ValueError, match=message):
                call(prompt)

    def test_no_text_tokenizer(self, tiny_vqgan: VQGAN, tiny_gpt: GPT) -> None:
        with pytest.raises(
            ValueError, match=r"has no text tokenizer .*pass text_tokenizer.*bpe-16k-vocab.json"
        ):
            Pipeline(tiny_vqgan, tiny_gpt)(PROMPT)

    def test_image_tokenizer_alone(self, tiny_vqgan: VQGAN) -> None:
        pipe = Pipeline(tiny_vqgan)
        for call in (pipe, pipe.encode_condition, lambda p: next(pipe.stream(p))):
            with pytest.raises(
                ValueError, match="image tokenizer only: it reconstructs, but cannot generate"
            ):
                call(PROMPT)
        assert pipe.known_codes(Image.new("RGB", (8, 8)), 1).shape == (1, 4)
        assert len(pipe.decode(torch.zeros(3, 4, 4, dtype=torch.int64))) == 3

    @pytest.mark.parametrize("numbers", [{"num_images": 0}, {"batch_size": 0}, {"num_images": -2}])
    def test_numbers(self, tiny_pipeline: Pipeline, numbers: dict[str, int]) -> None:
        got = [numbers.get("num_images", 1), numbers.get("batch_size")]
        with pytest.raises(ValueError, match=rf"must be at least 1, got {got[0]} and {got[1]}"):
            tiny_pipeline(PROMPT, **numbers)  # type: ignore[arg-type]

    @pytest.mark.parametrize("num_candidates", [0, 2])
    def test_fewer_candidates_than_images(self, ranked: Pipeline, num_candidates: int) -> None:
        with pytest.raises(
            ValueError, match=rf"num_candidates must be at least num_images = 3, got {num_candidates}"
        ):
            ranked(PROMPT, num_images=3, num_candidates=num_candidates)

    def test_no_images_to_stream(self, tiny_pipeline: Pipeline) -> None:
        with pytest.raises(ValueError, match="at least one image, got none"):
            next(tiny_pipeline.stream(PROMPT, num_images=0))

    def test_top_k_for_other_depths(self, rq_pipeline: Pipeline) -> None:
        with pytest.raises(ValueError, match=r"top_k needs one value or one per depth \(3\), got \(4, 4\)"):
            rq_pipeline(PROMPT, params=SamplingParams(top_k=(4, 4)))

    def test_guidance_without_a_condition(self, tiny_pipeline: Pipeline) -> None:
        pipe = with_condition(tiny_pipeline, ConditionConfig(kind="none", vocab_size=1, length=1))
        with pytest.raises(ValueError, match="guidance needs a condition"):
            pipe(params=SamplingParams(cfg_scale=2.0))

    def test_a_long_prompt_is_cut_with_one_warning(
        self, tiny_pipeline: Pipeline, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            tiny_pipeline("a red apple a red apple on a road", num_images=5, batch_size=2)
        assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["on a road"]


class TestFromPretrained:
    @pytest.fixture
    def native(self, tmp_path: Path, tiny_pipeline: Pipeline) -> Path:
        save_checkpoint(
            tmp_path / "native",
            image_tokenizer=tiny_pipeline.image_tokenizer,
            model=tiny_pipeline.model,
            text_tokenizer=tiny_pipeline.text_tokenizer,
            sampling=SamplingDefaults(params=PARAMS),
        )
        return tmp_path / "native"

    def test_same_pictures(self, native: Path, tiny_pipeline: Pipeline) -> None:
        pipe = mindalle.Pipeline.from_pretrained(native)
        expected = tiny_pipeline(PROMPT, num_images=2, params=PARAMS)
        assert as_bytes(pipe(PROMPT, num_images=2).images) == as_bytes(expected.images)
        assert pipe.reranker is None
        assert not model_of(pipe).training

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_precision_is_the_sequence_models_and_pixels_follow(self, native: Path, precision: str) -> None:
        pipe = Pipeline.from_pretrained(str(native), precision=precision)
        dtypes = {parameter.dtype for parameter in model_of(pipe).parameters()}
        assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
        tokenizer = pipe.image_tokenizer
        assert {parameter.dtype for parameter in tokenizer.encoder.parameters()} == {torch.float32}
        pixels = {parameter.dtype for parameter in tokenizer.decoder.parameters()}
        assert pixels == {torch.bfloat16 if precision == "bf16" and has_bfloat16("cpu") else torch.float32}
        assert len(pipe(PROMPT).images) == 1

    @pytest.mark.skipif(not has_int8(), reason="no FBGEMM on this machine")
    def test_int8_is_quantised_while_it_loads(self, native: Path, tiny_pipeline: Pipeline) -> None:
        model = model_of(Pipeline.from_pretrained(native, precision="int8"))
        assert precision_of(model) == "int8"
        expected = quantize_(copy.deepcopy(model_of(tiny_pipeline)))
        codes = torch.zeros(1, *model.code_shape, dtype=torch.int64)
        cond = tiny_pipeline.encode_condition(PROMPT)
        with torch.no_grad():
            assert torch.equal(model(codes, cond).logits, expected(codes, cond).logits)

    @pytest.mark.skipif(not has_int8(), reason="no FBGEMM on this machine")
    @pytest.mark.parametrize(("least", "chosen"), [(1, "int8"), (10**9, "fp32")])
    def test_auto_says_if_it_is_not_exact(
        self,
        native: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        least: int,
        chosen: str,
    ) -> None:
        monkeypatch.setattr("stage2_transformer.precision.INT8_WEIGHTS", least)
        with caplog.at_level("INFO", "mindalle"):
            pipe = Pipeline.from_pretrained(native, precision="auto")
        assert precision_of(model_of(pipe)) == chosen
        assert ("precision int8, chosen by device and size" in caplog.text) == (chosen == "int8")

    def test_int8_is_refused_before_anything_is_downloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ValueError, match="int8 is for CPUs"):
            Pipeline.from_pretrained("no-such-model", device="cuda", precision="int8")

    def test_unknown_precision(self, native: Path) -> None:
        with pytest.raises(
            ValueError, match="precision must be one of auto, fp32, bf16, fp16, int8, got 'int3'"
        ):
            Pipeline.from_pretrained(native, precision="int3")

    def test_which_clip(self, native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The checkpoint's own, unless another is named."""
        asked: list[object] = []
        monkeypatch.setattr(
            ClipReranker,
            "from_pretrained",
            lambda name, device: asked.append((name, str(device))) or "a reranker",
        )
        assert Pipeline.from_pretrained(native, clip="ViT-B/32").reranker == "a reranker"
        (native / "clip.safetensors").touch()
        Pipeline.from_pretrained(native)
        assert asked == [("ViT-B/32", "cpu"), (native, "cpu")]

    def test_given_text_tokenizer(self, native: Path, tmp_path: Path) -> None:
        (native / "text_tokenizer.json").rename(tmp_path / "moved.json")
        with pytest.raises(ValueError, match="has no text tokenizer"):
            Pipeline.from_pretrained(native)(PROMPT)
        pipe = Pipeline.from_pretrained(native, text_tokenizer=tmp_path / "moved.json")
        assert len(pipe(PROMPT).images) == 1


class TestImport:
    def test_the_package_alone_is_light(self) -> None:
        """What takes seconds to import is imported when it is asked for."""
        code = (
            "import sys, mindalle, stage1_vqgan, stage2_transformer\n"
            "heavy = {'open_clip', 'torchvision', 'pytorch_lightning', 'webdataset'}\n"
            "heavy |= {'tokenizers', 'omegaconf'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
            "mindalle.Pipeline\n"
            "heavy -= {'tokenizers', 'omegaconf'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        root = Path(mindalle.__file__).parents[1]
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.parametrize("name", mindalle.__all__)
    def test_public_names(self, name: str) -> None:
        assert getattr(mindalle, name).__name__ == name

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="module 'mindalle' has no attribute 'Dalle'"):
            mindalle.Dalle  # noqa: B018
