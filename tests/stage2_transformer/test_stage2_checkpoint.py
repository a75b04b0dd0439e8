"""Official checkpoints give what the originals compute, native ones what was saved, bad ones clear errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf
from oracle import gpt as oracle_gpt
from oracle import rq_transformer as oracle_rq
from oracle import rqvae as oracle_rqvae
from oracle import sampling as oracle_sampling
from oracle.make import Release, make_mindalle, make_mindalle_finetuned, make_rq
from sequence_models import CONDITIONS, MODELS, SOME, Model, build, draw_codebook, draw_codes, draw_cond, rq
from torch import Tensor

from checkpoint_io import CheckpointError, config_to_mapping, find_parts, write_safetensors
from stage2_transformer import STAGE2, GPTConfig, SamplingParams, generate
from stage2_transformer.checkpoint import (
    build_model,
    check_fit,
    mindalle_config,
    model_config,
    model_from_part,
    rq_config,
)
from stage2_transformer.int8 import has_int8, quantize_

Cond = Literal["text", "class", "none"]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def load(directory: Path, code_shape: tuple[int, ...], codebook: Tensor, use_ema: bool = False) -> Model:
    part = find_parts(directory)["model"]
    return model_from_part(part, code_shape=tuple(code_shape), codebook=codebook, use_ema=use_ema)


def stack(tables: list[Tensor]) -> Tensor:
    """An RQ-VAE's tables (V_d + 1, C), without their padding rows -> (D, V, C)."""
    return torch.nn.utils.rnn.pad_sequence([table[:-1] for table in tables], batch_first=True)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    is_finite = expected.isfinite()
    assert torch.equal(ours.isfinite(), is_finite)
    expected = expected[is_finite]
    assert (ours[is_finite] - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


class TestFixtures:
    """Written by the original systems."""

    def test_mindalle(self, fixtures_dir: Path) -> None:
        folder = fixtures_dir / "mindalle-tiny"
        expected = _read(folder / "expected.pt")
        codebook = _read(folder / "stage1_last.ckpt")["state_dict"]["quantize.embedding.weight"]
        model = load(folder, expected["codes"].shape[1:], codebook[None])
        output = model(expected["codes"], expected["token_ids"][:3])
        assert_close(output.logits.flatten(1, 2), expected["logits_image"])
        assert_close(output.text_logits[:1], expected["logits_text"])
        codes = generate(model, expected["token_ids"][:2], GREEDY, seeds=[0, 1])
        assert torch.equal(codes.flatten(1), expected["greedy_codes"])

    def test_mindalle_finetuned(self, fixtures_dir: Path) -> None:
        folder = fixtures_dir / "mindalle-classcond-tiny"
        expected = _read(folder / "expected.pt")
        codebook = _read(folder / "last.ckpt")["state_dict"]["stage1.quantize.embedding.weight"]
        model = load(folder, expected["codes"].shape[1:], codebook[None])
        output = model(expected["codes"], expected["labels"])
        assert_close(output.logits.flatten(1, 2), expected["logits"])
        assert output.text_logits is None
        codes = generate(model, expected["labels"][:2], GREEDY, seeds=[0, 1])
        assert torch.equal(codes.flatten(1), expected["greedy_codes"])

    @pytest.mark.parametrize("name", ["rq-cc3m-tiny", "rq-classcond-tiny"])
    def test_rq(self, fixtures_dir: Path, name: str) -> None:
        expected = _read(fixtures_dir / name / "expected.pt")
        stage1 = _read(fixtures_dir / name / "stage1" / "model.pt")["state_dict"]
        codebook = stack([stage1[f"quantizer.codebooks.{d}.weight"] for d in range(4)])
        model = load(fixtures_dir / name, expected["codes"].shape[1:], codebook)
        output = model(expected["codes"], expected["cond"])
        assert_close(output.logits, expected["logits"])
        if expected["logits_cond"] is None:
            assert output.text_logits is None
        else:
            assert_close(output.text_logits[:1], expected["logits_cond"])
        codes = generate(model, expected["cond"][:2], GREEDY, seeds=[0, 1])
        assert torch.equal(codes, expected["greedy_codes"])

        ema = load(fixtures_dir / name, expected["codes"].shape[1:], codebook, use_ema=True)
        for key, value in ema.state_dict().items():  # in the fixtures half of the weights
            torch.testing.assert_close(2 * value, model.state_dict()[key])


MINDALLE: dict[str, dict[str, Any]] = {
    "released": {},
    "no biases": {"attn_bias": False, "stage2__hparams__mlp_bias": False},
    "no attention bias": {"attn_bias": False},
    "approximate gelu": {"gelu_use_approx": True},
    "deeper": {"n_layers": 4, "n_heads": 8, "stage2__hparams__embed_dim": 32},
    "settings left out": {
        "omit": ["attn_bias", "stage2__hparams__mlp_bias", "gelu_use_approx", "resid_pdrop"]
    },
}


@pytest.mark.parametrize("cond", ["text", "class", "none"])
@pytest.mark.parametrize("variant", MINDALLE)
def test_mindalle_equals_the_oracle(tmp_path: Path, variant: str, cond: Cond) -> None:
    if cond == "text":
        release = make_mindalle(tmp_path, **MINDALLE[variant])
    else:
        release = make_mindalle_finetuned(tmp_path, cond, **MINDALLE[variant])
    state, config = release.stage2_state, release.stage2_config
    model = load(tmp_path, (4, 4), release.stage1_state["quantize.embedding.weight"][None])
    codes, ids = draw_codes(model.config, 3), draw_cond(model.config, 3)

    def forward(codes: Tensor, count: int = 3) -> Tensor:  # any number of leading rows of the grid
        own = None if ids is None else ids[:count]
        if cond == "text":
            return oracle_gpt.text_logits_and_image_logits(state, config, codes.flatten(1), own)[1]
        return oracle_gpt.igpt_logits(state, config, codes.flatten(1), own)

    output = model(codes, ids)
    assert_close(output.logits.flatten(1, 2), forward(codes))
    if cond == "text":
        expected = oracle_gpt.text_logits_and_image_logits(state, config, codes.flatten(1), ids)[0]
        assert_close(output.text_logits, expected)
    greedy = oracle_sampling.greedy(lambda codes: forward(codes, 2), 2, (4, 4))
    ids = None if ids is None else ids[:2]
    assert torch.equal(generate(model, ids, GREEDY, seeds=[0, 1]), greedy)


RQ: dict[str, dict[str, Any]] = {
    "released": {},
    "not cumulative": {"cumsum_depth_ctx": False},
    "table for the body": {"input_emb_vqvae": False},
    "table for the head": {"head_emb_vqvae": False},
    "table for both": {"input_emb_vqvae": False, "head_emb_vqvae": False},
    "table per depth": {"input_emb_vqvae": False, "head_emb_vqvae": False, "shared_tok_emb": False},
    "table per depth for the head": {"head_emb_vqvae": False, "shared_tok_emb": False},
    "classifier per depth": {"shared_cls_emb": False},
    "nothing of the codebook": {
        "input_emb_vqvae": False,
        "head_emb_vqvae": False,
        "omit": ["input_embed_dim", "stage2__arch__input_emb_vqvae", "head_emb_vqvae"],
    },
    "vocabulary per depth": {
        "shared_codebook": False,
        "n_embed": [24, 12, 18],
        "shared_tok_emb": False,
        "shared_cls_emb": False,
        "head_emb_vqvae": False,
    },
    "codebook per depth": {"shared_codebook": False},
    "no biases": {
        f"{half}__block__{part}_bias": False for half in ("body", "head") for part in ("attn", "mlp")
    },
    "other blocks in the head": {
        "body__block__attn_bias": False,
        "head__block__mlp_bias": False,
        "head__block__gelu": "v2",
        "head__block__n_head": 1,
        "head__n_layer": 3,
    },
    "gelu v2": {"body__block__gelu": "v2", "head__block__gelu": "v2"},
    "one code per position": {"code_shape": [4, 4, 1], "shared_cls_emb": False},
    "eight codes per position": {"code_shape": [2, 2, 8]},
    "wide positions": {"code_shape": [4, 2, 2]},
    "settings left out": {
        "omit": [
            *("body__block__attn_bias", "body__block__resid_pdrop"),
            *("head__block__gelu", "head__block__resid_pdrop", "embd_pdrop"),
        ]
    },
}
RQ_CASES = [(variant, "class") for variant in RQ] + [
    (variant, cond)
    for variant in ("released", "table for both", "vocabulary per depth", "one code per position")
    for cond in ("text", "none")
]


@pytest.mark.parametrize(("variant", "cond"), RQ_CASES)
def test_rq_equals_the_oracle(tmp_path: Path, variant: str, cond: Cond) -> None:
    release = make_rq(tmp_path, cond, ema=False, **{"code_shape": [2, 2, 3], **RQ[variant]})
    _check_rq(release, release.stage1_state, release.stage2_state, use_ema=False)


@pytest.mark.parametrize("cond", ["text", "class", "none"])
def test_averaged_weights_equal_the_oracle(tmp_path: Path, cond: Cond) -> None:
    release = make_rq(tmp_path, cond, code_shape=[2, 2, 3])
    _check_rq(release, release.stage1_ema, release.stage2_ema, use_ema=True)


def _check_rq(release: Release, stage1: Any, stage2: Any, *, use_ema: bool) -> None:
    tables = oracle_rqvae.codebooks(stage1, release.stage1_config)
    shape = tuple(release.stage2_config["arch"]["block_size"])
    model = load(release.directory, shape, stack(tables), use_ema)
    codes, ids = draw_codes(model.config, 3), draw_cond(model.config, 3)

    def forward(codes: Tensor) -> tuple[Tensor | None, Tensor]:
        own = None if ids is None else ids[: len(codes)]
        return oracle_rq.text_logits_and_image_logits(stage2, release.stage2_config, tables, codes, own)

    output, (text_logits, logits) = model(codes, ids), forward(codes)
    assert_close(output.logits, logits)
    assert (output.text_logits is None) == (text_logits is None)
    if text_logits is not None:
        assert_close(output.text_logits, text_logits)
    greedy = oracle_sampling.greedy(lambda codes: forward(codes)[1], 2, shape)
    assert torch.equal(generate(model, None if ids is None else ids[:2], GREEDY, seeds=[0, 1]), greedy)


@pytest.mark.parametrize("name", MODELS)
def test_native_checkpoints_hold_every_model(tmp_path: Path, name: str) -> None:
    config, model = MODELS[name], build(name)
    _save_native(tmp_path, config, model)
    loaded = load(tmp_path, config.code_shape, _codebook(config))
    assert type(loaded) is type(model)
    assert loaded.config == config
    assert not loaded.training
    codes, cond = draw_codes(config, 2), draw_cond(config, 2)
    torch.testing.assert_close(loaded(codes, cond), model(codes, cond), rtol=0, atol=0)


@pytest.mark.skipif(not has_int8(), reason="no FBGEMM on this machine")
@pytest.mark.parametrize("name", SOME)
def test_int8_from_a_file_is_int8_from_memory(tmp_path: Path, name: str) -> None:
    config = MODELS[name]
    _save_native(tmp_path, config, build(name))
    part, codebook = find_parts(tmp_path)["model"], _codebook(config)
    loaded = model_from_part(part, code_shape=config.code_shape, codebook=codebook, precision="int8")
    codes, cond = draw_codes(config, 2), draw_cond(config, 2)
    expected = quantize_(build(name))(codes, cond)
    torch.testing.assert_close(loaded(codes, cond), expected, rtol=0, atol=0)


def test_half_precision_files_are_loaded_as_float32(tmp_path: Path) -> None:
    config, model = MODELS["gpt_text"], build("gpt_text").half()
    _save_native(tmp_path, config, model)
    loaded = load(tmp_path, config.code_shape, _codebook(config))
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[key].float())


Edit = Callable[[dict[str, Tensor]], Any]
KEY_ERRORS: dict[str, Edit] = {
    r"missing text_norm.bias \(16,\)": lambda state: state.pop("cond_classifier.layer_norm.bias"),
    r"missing body.blocks.1.attention.qkv.weight \(48, 16\)": lambda state: state.pop(
        "body_transformer.blocks.1.attn.key.weight"
    ),
    r"2 keys: missing body_input.linear.weight .*; missing body_input.linear.bias": lambda state: [
        state.pop(f"input_mlp.{kind}") for kind in ("weight", "bias")
    ],
    r"unexpected body_transformer.blocks.2.ln1.bias \(16,\)": lambda state: state.update(
        {"body_transformer.blocks.2.ln1.bias": torch.zeros(16)}
    ),
    r"unexpected tok_emb.weight \(24, 16\)": lambda state: state.update(
        {"tok_emb.weight": torch.zeros(24, 16)}
    ),
    r"unexpected codebook \(3, 24, 16\)": lambda state: state.update({"codebook": torch.zeros(3, 24, 16)}),
    r"pos_emb_hw has shape \(9, 16\), expected \(16, 16\)": lambda state: state.update(
        {"pos_emb_hw": torch.zeros(1, 9, 16)}
    ),
    r"pos_emb_hw has shape \(16,\), expected \(16, 16\)": lambda state: state.update(
        {"pos_emb_hw": torch.zeros(16)}
    ),
    r"attn.query.weight has shape \(8, 16\), expected \(16, 16\)": lambda state: state.update(
        {"head_transformer.blocks.0.attn.query.weight": torch.zeros(8, 16)}
    ),
}


@pytest.mark.parametrize("message", KEY_ERRORS)
def test_key_errors(tmp_path: Path, message: str) -> None:
    release = make_rq(tmp_path, "text", ema=False)
    KEY_ERRORS[message](release.stage2_state)
    torch.save({"state_dict": release.stage2_state}, tmp_path / "stage2" / "model.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path, (4, 4, 3), torch.zeros(3, 24, 16))
    assert "does not fit its config" in str(error.value)
    assert str(tmp_path / "stage2" / "model.pt") in str(error.value)


def test_two_stages_that_do_not_fit(tmp_path: Path) -> None:
    make_rq(tmp_path / "rq")
    with pytest.raises(
        CheckpointError, match="has a vocabulary of 24 codes, its image tokenizer 25: both must"
    ):
        load(tmp_path / "rq", (4, 4, 3), torch.zeros(3, 25, 16))
    with pytest.raises(
        CheckpointError, match=r"draws codes of shape \(4, 4, 3\), its image tokenizer makes \(4, 4, 2\)"
    ):
        load(tmp_path / "rq", (4, 4, 2), torch.zeros(2, 24, 16))
    with pytest.raises(
        ValueError, match=r"\(D, V, C\) = \(3, 24, 16\), got \(3, 24, 8\): is this the image token"
    ):
        load(tmp_path / "rq", (4, 4, 3), torch.zeros(3, 24, 8))
    make_mindalle(tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="has a vocabulary of 24 codes, its image tokenizer 23"):
        load(tmp_path / "gpt", (4, 4), torch.zeros(1, 23, 16))
    with pytest.raises(CheckpointError, match=r"draws 16 codes, its image tokenizer makes \(4, 8\)"):
        load(tmp_path / "gpt", (4, 8), torch.zeros(1, 24, 16))
    with pytest.raises(
        CheckpointError, match=r"somewhere: .* draws codes of shape \(2, 3\), .* makes \(3, 2\)"
    ):
        check_fit(MODELS["gpt_text"], (3, 2), torch.zeros(1, 20, 8), source="somewhere")


RELEASES = {
    # millions of parameters: condition, V, width, layers of the body and of the head, heads
    355.39: ("none", 2048, 1024, 24, 4, 16),
    370.09: ("none", 16384, 1024, 24, 4, 16),
    480.92: ("class", 16384, 1536, 12, 4, 24),
    1387.53: ("class", 16384, 1536, 42, 6, 24),
    3822.49: ("class", 16384, 2560, 42, 6, 40),
    654.06: ("text", 16384, 1280, 26, 4, 20),
}


@pytest.mark.parametrize("millions", RELEASES)
def test_released_rq_transformers_have_their_size(millions: float) -> None:
    cond, size, width, num_body, num_head, num_heads = RELEASES[millions]
    arch = {
        **dict.fromkeys(("shared_tok_emb", "shared_cls_emb", "input_emb_vqvae", "head_emb_vqvae"), True),
        "vocab_size": size,
        "block_size": [8, 8, 4],
        "embed_dim": width,
        "input_embed_dim": 256,
        "body": {"n_layer": num_body, "block": {"n_head": num_heads}},
        "head": {"n_layer": num_head, "block": {"n_head": num_heads}},
        "vocab_size_cond": {"none": 1, "class": 1000, "text": 16384}[cond],
        "block_size_cond": 32 if cond == "text" else 1,
    }
    assert _millions(rq_config({"arch": arch})) == millions


@pytest.mark.parametrize(
    ("stage2", "millions"),
    [
        ({}, 1291.08),
        ({"type": "igpt", "use_cls_cond": True, "hparams": {"n_classes": 1000}}, 1242.19),
        ({"type": "igpt"}, 1240.65),
    ],
)
def test_released_mindalle_has_its_size(stage2: dict[str, Any], millions: float) -> None:
    assert _millions(mindalle_config({"stage2": stage2}, (16, 16))) == millions
    assert (mindalle_config({"stage2": stage2}, (16, 16)) == GPTConfig()) == (stage2 == {})


def test_settings_that_are_missing(tmp_path: Path) -> None:
    make_rq(tmp_path / "rq", omit=["stage2__arch__vocab_size", "stage2__dataset__vocab_size"])
    with pytest.raises(CheckpointError, match=r"no arch.vocab_size: take the config.yaml of the release"):
        load(tmp_path / "rq", (4, 4, 3), torch.zeros(3, 24, 16))
    make_mindalle_finetuned(tmp_path / "gpt", "class", omit=["n_classes"])
    with pytest.raises(CheckpointError, match="lacks the setting 'n_classes'"):
        load(tmp_path / "gpt", (4, 4), torch.zeros(1, 24, 16))


def test_the_vocabulary_may_stand_in_the_dataset_section(tmp_path: Path) -> None:
    release = make_rq(tmp_path, omit=["stage2__arch__vocab_size"])
    assert rq_config(release.stage2_config).codebook_sizes == (24, 24, 24)


def test_settings_that_are_unknown(tmp_path: Path) -> None:
    make_rq(tmp_path, head__block__gelu="v3")
    with pytest.raises(CheckpointError, match="activation must be one of gelu, quick_gelu, got 'v3'"):
        load(tmp_path, (4, 4, 3), torch.zeros(3, 24, 16))
    with pytest.raises(
        CheckpointError,
        match=r"unknown type 'bert' in model.yaml: known are gpt, pyramid_gpt, rq_transformer",
    ):
        model_config({"type": "bert"}, where="model.yaml")
    with pytest.raises(
        ValueError, match=r"unknown keys in model.yaml: colour; known are transformer, condition"
    ):
        model_config({"type": "gpt", "colour": "red"}, where="model.yaml")
    with pytest.raises(ValueError, match="vocab_size must be positive"):
        model_config({"type": "gpt", "vocab_size": 0}, where="model.yaml")


def test_averaged_weights_that_are_missing(tmp_path: Path) -> None:
    make_rq(tmp_path, ema=False)
    with pytest.raises(CheckpointError, match=r"has no EMA weights \(keys: epoch, state_dict\)"):
        load(tmp_path, (4, 4, 3), torch.zeros(3, 24, 16), use_ema=True)


def test_a_codebook_that_nothing_reads_is_not_checked() -> None:
    """A config without `input_embed_dim` gave a model of codebook width 1, which no tokenizer fits."""
    config = rq(has_codebook_body=False, has_codebook_head=False, codebook_width=1)
    assert build(config).codebook is None
    assert CONDITIONS["class"] == config.condition


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _millions(config: Any) -> float:
    model = build_model(config, torch.zeros(4, getattr(config, "codebook_sizes", [1])[0], 256))
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)


def _codebook(config: Any) -> Tensor:
    """What the image tokenizer beside a native model would give."""
    codebook = None if isinstance(config, GPTConfig) else draw_codebook(config)
    return torch.zeros(config.code_shape[-1], 20, 6) if codebook is None else codebook


def _save_native(directory: Path, config: Any, model: Model) -> None:
    kind = next(kind for kind, classes in STAGE2.items() if classes[1] is type(config))
    write_safetensors(directory / "model.safetensors", model.state_dict())
    section = {"type": kind, **config_to_mapping(config)}
    OmegaConf.save(OmegaConf.create({"format": "mindalle-1", "model": section}), directory / "config.yaml")
