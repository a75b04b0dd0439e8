"""The oracle computes what the original systems compute, on every conformance fixture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import gpt, rq_transformer, rqvae, sampling, vqgan
from .make import read_config

RQ_FIXTURES = ["rq-cc3m-tiny", "rq-classcond-tiny"]


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def assert_float_equal(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


def to_unit_range(images: Tensor) -> Tensor:
    return (images * 0.5 + 0.5).clamp(0, 1)


class TestMindalle:
    @pytest.fixture(autouse=True)
    def _load(self, fixtures_dir: Path) -> None:
        folder = fixtures_dir / "mindalle-tiny"
        self.config = read_config(folder / "config.yaml")
        self.stage1 = load(folder / "stage1_last.ckpt")["state_dict"]
        self.stage2 = load(folder / "stage2_last.ckpt")["state_dict"]
        self.expected = load(folder / "expected.pt")

    def test_tokenizer(self) -> None:
        codes = vqgan.encode(self.stage1, self.config, self.expected["image"])
        assert torch.equal(codes, self.expected["codes"])
        images = vqgan.decode(self.stage1, self.config, codes)
        assert_float_equal(images, self.expected["decoded"])
        assert_float_equal(images, self.expected["reconstruction"])

    def test_logits(self) -> None:
        text_logits, image_logits = gpt.text_logits_and_image_logits(
            self.stage2, self.config, self.expected["codes"].flatten(1), self.expected["token_ids"][:3]
        )
        assert_float_equal(text_logits[:1], self.expected["logits_text"])
        assert_float_equal(image_logits, self.expected["logits_image"])

    def test_greedy(self) -> None:
        text = self.expected["token_ids"][:2]

        def forward(codes: Tensor) -> Tensor:
            return gpt.text_logits_and_image_logits(self.stage2, self.config, codes, text)[1]

        codes = sampling.greedy(forward, len(text), self.expected["greedy_codes"].shape[1:])
        assert torch.equal(codes, self.expected["greedy_codes"])
        images = vqgan.decode(self.stage1, self.config, codes.view(2, *self.expected["codes"].shape[1:]))
        assert_float_equal(to_unit_range(images), self.expected["greedy_pixels"])

    def test_filter(self) -> None:
        settings = self.expected["filter"]
        probs = sampling.probabilities(
            settings["logits"], settings["temperature"], settings["top_k"], settings["top_p"]
        )
        assert torch.equal(probs > 0, settings["probs"] > 0)
        assert_float_equal(probs, settings["probs"])


class TestMindalleFinetuned:
    @pytest.fixture(autouse=True)
    def _load(self, fixtures_dir: Path) -> None:
        folder = fixtures_dir / "mindalle-classcond-tiny"
        self.config = read_config(folder / "config.yaml")
        self.state = load(folder / "last.ckpt")["state_dict"]
        self.expected = load(folder / "expected.pt")

    def test_codes(self) -> None:
        codes = vqgan.encode(strip(self.state, "stage1."), self.config, self.expected["image"])
        assert torch.equal(codes, self.expected["codes"])

    def test_logits(self) -> None:
        codes, labels = self.expected["codes"].flatten(1), self.expected["labels"]
        logits = gpt.igpt_logits(strip(self.state, "stage2."), self.config, codes, labels)
        assert_float_equal(logits, self.expected["logits"])

    def test_greedy(self) -> None:
        state, labels = strip(self.state, "stage2."), self.expected["labels"][:2]
        codes = sampling.greedy(
            lambda codes: gpt.igpt_logits(state, self.config, codes, labels),
            len(labels),
            self.expected["greedy_codes"].shape[1:],
        )
        assert torch.equal(codes, self.expected["greedy_codes"])


class TestRQ:
    @pytest.fixture(autouse=True, params=RQ_FIXTURES)
    def _load(self, fixtures_dir: Path, request: pytest.FixtureRequest) -> None:
        folder = fixtures_dir / request.param
        self.config1 = read_config(folder / "stage1/config.yaml")
        self.config2 = read_config(folder / "stage2/config.yaml")
        self.stage1 = load(folder / "stage1/model.pt")["state_dict"]
        self.stage2 = load(folder / "stage2/model.pt")["state_dict"]
        self.expected = load(folder / "expected.pt")
        self.codebooks = rqvae.codebooks(self.stage1, self.config1)

    def test_tokenizer(self) -> None:
        codes = rqvae.encode(self.stage1, self.config1, self.expected["image"])
        assert torch.equal(codes, self.expected["codes"])
        assert_float_equal(rqvae.decode(self.stage1, self.config1, codes), self.expected["reconstruction"])

    def test_partial_and_soft_codes(self) -> None:
        for depth, expected in enumerate(self.expected["partial"]):
            images = rqvae.partial(self.stage1, self.config1, self.expected["codes"], depth)
            assert_float_equal(images, expected)
        soft_codes = rqvae.soft_codes(self.stage1, self.config1, self.expected["image"], temp=0.5)
        assert isinstance(soft_codes, Tensor)
        assert_float_equal(soft_codes, self.expected["soft_codes_t05"])

    def test_logits(self) -> None:
        text_logits, image_logits = rq_transformer.text_logits_and_image_logits(
            self.stage2, self.config2, self.codebooks, self.expected["codes"], self.expected["cond"]
        )
        assert_float_equal(image_logits, self.expected["logits"])
        if self.expected["logits_cond"] is None:
            assert text_logits is None
        else:
            assert text_logits is not None
            assert_float_equal(text_logits[:1], self.expected["logits_cond"])

    def test_greedy(self) -> None:
        cond = self.expected["cond"][:2]

        def forward(codes: Tensor) -> Tensor:
            return rq_transformer.text_logits_and_image_logits(
                self.stage2, self.config2, self.codebooks, codes, cond
            )[1]

        codes = sampling.greedy(forward, len(cond), self.expected["greedy_codes"].shape[1:])
        assert torch.equal(codes, self.expected["greedy_codes"])
        images = rqvae.decode(self.stage1, self.config1, codes)
        assert_float_equal(to_unit_range(images), self.expected["greedy_pixels"])


class TestTaming:
    def test_tokenizer(self, fixtures_dir: Path) -> None:
        folder = fixtures_dir / "taming-vqgan-tiny"
        config = read_config(folder / "model.yaml")
        state = load(folder / "last.ckpt")["state_dict"]
        expected = load(folder / "expected.pt")
        codes = vqgan.encode(state, config, expected["image"])
        assert torch.equal(codes, expected["codes"])
        assert_float_equal(vqgan.decode(state, config, codes), expected["reconstruction"])
