"""Image tokenizers from checkpoints of every known layout compute what the original systems compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from oracle import rqvae, vqgan
from oracle.make import Release, make_mindalle, make_mindalle_finetuned, make_rq, make_taming, read_config
from torch import Tensor

from checkpoint_io import atomic_path
from stage1_vqgan import RQVAE, VQGAN, load_tokenizer
from stage1_vqgan.autoencoder import QuantizedAutoencoder

State = Mapping[str, Tensor]


def draw_images(*size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_float_equal(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


def edit_checkpoint(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace a torch file, not write over it: a loaded tokenizer's weights are mapped from it."""
    content = torch.load(path, weights_only=True)
    content["state_dict"] = edit(dict(content["state_dict"]))
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def edit_config(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = read_config(path)
    edited = edit(config)
    OmegaConf.save(OmegaConf.create(config if edited is None else edited), path)


@torch.inference_mode()
def assert_like_vqgan(
    tokenizer: QuantizedAutoencoder, state: State, config: Mapping[str, Any], images: Tensor | None = None
) -> None:
    images = draw_images(3, 3, 16, 16) if images is None else images
    assert isinstance(tokenizer, VQGAN)
    assert not tokenizer.training
    codes = vqgan.encode(state, config, images)
    assert codes.unique().numel() > 4
    assert torch.equal(tokenizer.encode(images), codes)
    assert tokenizer.codebook_size == len(state["quantize.embedding.weight"])
    assert_float_equal(tokenizer.decode(codes), vqgan.decode(state, config, codes))


@torch.inference_mode()
def assert_like_rqvae(tokenizer: QuantizedAutoencoder, state: State, config: Mapping[str, Any]) -> None:
    images = draw_images(3, 3, 16, 16)
    assert isinstance(tokenizer, RQVAE)
    assert not tokenizer.training
    codes = rqvae.encode(state, config, images)
    assert codes.unique().numel() > 4
    assert torch.equal(tokenizer.encode(images), codes)
    assert tokenizer.code_shape == tuple(config["arch"]["hparams"]["code_shape"])
    assert_float_equal(tokenizer.decode(codes), rqvae.decode(state, config, codes))
    for depth in range(codes.shape[-1]):
        expected = rqvae.partial(state, config, codes, depth)
        assert_float_equal(tokenizer.decode(codes[..., : depth + 1]), expected)
    soft_codes, _ = tokenizer.quantizer.soft_codes(tokenizer.encode_latents(images), 0.5)  # (B, h, w, D, V)
    for depth, expected in enumerate(soft_codes_by_depth(state, config, images)):
        assert_float_equal(soft_codes[..., depth, : expected.shape[-1]], expected)
    for ours, table in zip(tokenizer.codebook(), rqvae.codebooks(state, config), strict=True):
        assert torch.equal(ours[: len(table) - 1], table[:-1])  # their last row is padding


def soft_codes_by_depth(state: State, config: Mapping[str, Any], images: Tensor) -> list[Tensor]:
    soft_codes = rqvae.soft_codes(state, config, images, temp=0.5)
    return soft_codes if isinstance(soft_codes, list) else list(soft_codes.unbind(dim=3))


class TestConformance:
    """On what the original code wrote and computed."""

    @pytest.mark.parametrize(
        "name",
        [
            "mindalle-tiny",
            "mindalle-classcond-tiny",
            "rq-cc3m-tiny",
            "rq-classcond-tiny",
            "taming-vqgan-tiny",
        ],
    )
    @torch.inference_mode()
    def test_codes_and_pixels(self, fixtures_dir: Path, name: str) -> None:
        tokenizer = load_tokenizer(fixtures_dir / name)
        expected = torch.load(fixtures_dir / name / "expected.pt", weights_only=True)
        assert torch.equal(tokenizer.encode(expected["image"]), expected["codes"])
        assert tokenizer.code_shape == tuple(expected["codes"].shape[1:])
        pixels = tokenizer.decode(expected["codes"])
        for key in {"reconstruction", "decoded"} & set(expected):
            assert_float_equal(pixels, expected[key])
        if "greedy_pixels" in expected:
            greedy = tokenizer.decode(expected["greedy_codes"].view(2, *tokenizer.code_shape))
            assert_float_equal((greedy * 0.5 + 0.5).clamp(0, 1), expected["greedy_pixels"])

    @pytest.mark.parametrize("name", ["rq-cc3m-tiny", "rq-classcond-tiny"])
    @torch.inference_mode()
    def test_residual_codes(self, fixtures_dir: Path, name: str) -> None:
        tokenizer = load_tokenizer(fixtures_dir / name)
        assert isinstance(tokenizer, RQVAE)
        expected = torch.load(fixtures_dir / name / "expected.pt", weights_only=True)
        soft_codes, _ = tokenizer.quantizer.soft_codes(tokenizer.encode_latents(expected["image"]), 0.5)
        assert_float_equal(soft_codes, expected["soft_codes_t05"])
        for depth, picture in enumerate(expected["partial"], start=1):
            assert_float_equal(tokenizer.decode(expected["codes"][..., :depth]), picture)


CONVNETS: dict[str, dict[str, Any]] = {
    "as_made": {},
    "no_attention": {"attn_resolutions": []},
    "attention_at_two_levels": {"attn_resolutions": [4, 16]},
    "widths": {"ch_mult": [2, 1, 3]},
    "two_levels": {"ch_mult": [1, 2]},
    "one_level": {"ch_mult": [1], "resolution": 8, "attn_resolutions": [8]},
    "many_blocks": {"num_res_blocks": 3},
    "latent_width": {"z_channels": 6},
    "larger_pictures": {"resolution": 32},
}


class TestTaming:
    @pytest.mark.parametrize("settings", CONVNETS.values(), ids=CONVNETS)
    def test_convnet(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        release = make_taming(tmp_path, **settings)
        size = settings.get("resolution", 16)
        images = draw_images(3, 3, size, size)
        assert_like_vqgan(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config, images)

    def test_codebook_sizes(self, tmp_path: Path) -> None:
        release = make_taming(tmp_path, embed_dim=5, n_embed=40)
        assert_like_vqgan(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)

    @pytest.mark.parametrize(
        ("layout", "paths"),
        [
            ("flat", [".", "last.ckpt"]),
            ("release", [".", "ckpts", "ckpts/last.ckpt"]),
            ("logs", [".", "checkpoints", "checkpoints/last.ckpt"]),
        ],
    )
    def test_layouts(self, tmp_path: Path, layout: Any, paths: list[str]) -> None:
        release = make_taming(tmp_path, layout=layout)
        for path in paths:
            assert_like_vqgan(load_tokenizer(tmp_path / path), release.stage1_state, release.stage1_config)

    def test_defaults(self, tmp_path: Path) -> None:
        multipliers = {"ch_mult": [1, 2, 4, 8], "resolution": 32, "attn_resolutions": []}
        release = make_taming(tmp_path, **multipliers, omit=["ch_mult", "in_channels", "out_ch", "dropout"])
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.convnet.channel_multipliers == (1, 2, 4, 8)
        images = draw_images(2, 3, 32, 32)
        assert_like_vqgan(tokenizer, release.stage1_state, release.stage1_config, images)

    def test_the_file_that_was_named(self, tmp_path: Path) -> None:
        first = make_taming(tmp_path, seed=0)
        shutil.move(tmp_path / "last.ckpt", tmp_path / "epoch=3.ckpt")
        second = make_taming(tmp_path, seed=5)
        tokenizer = load_tokenizer(tmp_path / "epoch=3.ckpt")
        assert_like_vqgan(tokenizer, first.stage1_state, first.stage1_config)
        assert_like_vqgan(load_tokenizer(tmp_path), second.stage1_state, second.stage1_config)

    def test_inside_a_net2net_transformer(self, tmp_path: Path) -> None:
        """Its file has both models, and a condition stage that may have the first stage's shape."""
        release = make_taming(tmp_path, pickled=False)

        def embed(state: dict[str, Any]) -> dict[str, Any]:
            first = {f"first_stage_model.{key}": value for key, value in state.items()}
            other = {f"cond_stage_model.{key}": torch.zeros_like(value) for key, value in state.items()}
            return {**first, **other, "transformer.tok_emb.weight": torch.ones(3, 2)}

        def project(config: dict[str, Any]) -> dict[str, Any]:
            params = {"transformer_config": {"params": {"n_embd": 2}}, "first_stage_config": config["model"]}
            params["cond_stage_config"] = "__is_first_stage__"
            return {
                "model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}
            }

        edit_checkpoint(tmp_path / "last.ckpt", embed)
        edit_config(tmp_path / "model.yaml", project)
        assert_like_vqgan(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)

    def test_saved_from_a_data_parallel_wrapper(self, tmp_path: Path) -> None:
        release = make_taming(tmp_path, pickled=False)
        edit_checkpoint(
            tmp_path / "last.ckpt", lambda state: {f"module.{key}": value for key, value in state.items()}
        )
        assert_like_vqgan(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)

    def test_pickled_objects_beside_the_tensors(self, tmp_path: Path) -> None:
        """Lightning 1.0 saved its callbacks' classes and `AttributeDict`s, whose modules are long gone.

        A stand-in that the file fills like a dict was refused, and with it every such checkpoint.
        """
        release = make_taming(tmp_path, pickled=True)
        with pytest.raises(Exception, match="lightning_callbacks_of_2020"):
            torch.load(tmp_path / "last.ckpt", weights_only=False)
        assert_like_vqgan(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)


class TestMindalle:
    @pytest.mark.parametrize("variant", ["as_made", "no_attention", "widths", "latent_width"])
    def test_convnet(self, tmp_path: Path, variant: str) -> None:
        release = make_mindalle(tmp_path, **CONVNETS[variant])
        assert_like_vqgan(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)

    def test_defaults(self, tmp_path: Path) -> None:
        released = {"ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16], "num_res_blocks": 2}
        left_out = [*released, "double_z", "pdrop", "in_channels", "out_ch"]
        release = make_mindalle(tmp_path, **released, resolution=32, omit=left_out)
        tokenizer, images = load_tokenizer(tmp_path), draw_images(3, 3, 32, 32)
        assert tokenizer.convnet.channel_multipliers == (1, 1, 2, 2, 4)
        assert_like_vqgan(tokenizer, release.stage1_state, release.stage1_config, images)

    @pytest.mark.parametrize("cond", ["class", "none"])
    @pytest.mark.parametrize("path", [".", "last.ckpt"])
    def test_finetuned(self, tmp_path: Path, cond: Any, path: str) -> None:
        release = make_mindalle_finetuned(tmp_path, cond)
        tokenizer = load_tokenizer(tmp_path / path)
        assert_like_vqgan(tokenizer, release.stage1_state, release.stage1_config)

    def test_finetuned_by_its_epoch(self, tmp_path: Path) -> None:
        release = make_mindalle_finetuned(tmp_path)
        shutil.move(tmp_path / "last.ckpt", tmp_path / "imagenet-clscond-gen-04.ckpt")
        assert_like_vqgan(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)


RQ_VARIANTS: dict[str, dict[str, Any]] = {
    "as_made": {},
    "separate_codebooks": {"shared_codebook": False},
    "sizes_per_depth": {
        "shared_codebook": False,
        "n_embed": [24, 12, 18],
        "shared_tok_emb": False,
        "shared_cls_emb": False,
    },
    "depth_1": {"code_shape": [4, 4, 1]},
    "depth_8": {"code_shape": [4, 4, 8]},
    "cells_2x2": {"code_shape": [2, 2, 4]},
    "cells_1x2": {"code_shape": [4, 2, 2]},
    "cells_4x4_separate": {"code_shape": [1, 1, 8], "shared_codebook": False},
    "l1_loss": {"loss_type": "l1", "latent_loss_weight": 0.5},
    "no_attention": {"attn_resolutions": []},
    "widths": {"ch_mult": [2, 1, 3], "num_res_blocks": 2},
    "latent_width": {"z_channels": 6, "stage1__arch__hparams__embed_dim": 7},
}


class TestRq:
    @pytest.mark.parametrize("settings", RQ_VARIANTS.values(), ids=RQ_VARIANTS)
    def test_variant(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        release = make_rq(tmp_path, **settings)
        assert_like_rqvae(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)

    @pytest.mark.parametrize("path", ["stage1", "stage1/model.pt"])
    def test_stage1_alone(self, tmp_path: Path, path: str) -> None:
        release = make_rq(tmp_path)
        shutil.rmtree(tmp_path / "stage2")
        assert_like_rqvae(load_tokenizer(tmp_path / path), release.stage1_state, release.stage1_config)

    @pytest.mark.parametrize("settings", [{}, {"shared_codebook": False}])
    def test_averaged_weights(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        release = make_rq(tmp_path, **settings)
        assert release.stage1_ema is not None
        tokenizer = load_tokenizer(tmp_path, use_ema=True)
        assert_like_rqvae(tokenizer, release.stage1_ema, release.stage1_config)
        weights = load_tokenizer(tmp_path)
        assert not torch.equal(weights.codebook(), tokenizer.codebook())

    def test_defaults(self, tmp_path: Path) -> None:
        release = make_rq(tmp_path, omit=["latent_loss_weight", "decay", "loss_type", "masked_dropout"])
        assert_like_rqvae(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)

    def test_saved_from_a_data_parallel_wrapper(self, tmp_path: Path) -> None:
        release = make_rq(tmp_path, ema=False)
        edit_checkpoint(
            tmp_path / "stage1/model.pt",
            lambda state: {f"module.{key}": value for key, value in state.items()},
        )
        assert_like_rqvae(load_tokenizer(tmp_path), release.stage1_state, release.stage1_config)

    def test_a_shared_codebook_is_one_parameter(self, tmp_path: Path) -> None:
        make_rq(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert isinstance(tokenizer, RQVAE)
        assert len(tokenizer.quantizer.tables) == 1
        assert tokenizer.quantizer.tables[0].shape == (24, 16)  # without the row of padding


def make_any(kind: str, directory: Path) -> Release:
    makers: dict[str, Callable[[Path], Release]] = {
        "mindalle": make_mindalle,
        "finetuned": make_mindalle_finetuned,
        "rq": make_rq,
        "taming": lambda directory: make_taming(directory, pickled=False),
    }
    return makers[kind](directory)


@pytest.mark.parametrize("kind", ["mindalle", "finetuned", "rq", "taming"])
class TestEveryLayout:
    def test_half_precision_is_read_as_float32(self, tmp_path: Path, kind: str) -> None:
        make_any(kind, tmp_path)
        whole = load_tokenizer(tmp_path).state_dict()
        file = next(
            path
            for name in ("stage1_last.ckpt", "last.ckpt", "stage1/model.pt")
            for path in tmp_path.glob(name)
        )
        edit_checkpoint(file, lambda state: {key: value.half() for key, value in state.items()})
        half = load_tokenizer(tmp_path).state_dict()
        for name, tensor in half.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, whole[name], atol=1e-3, rtol=1e-3)

    def test_the_parameters_are_trainable(self, tmp_path: Path, kind: str) -> None:
        make_any(kind, tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert all(p.requires_grad and not p.is_meta for p in tokenizer.parameters())
        reconstructions, quantized = tokenizer.train()(draw_images(2, 3, 16, 16))
        (reconstructions.square().mean() + quantized.commitment_loss).backward()
        before = tokenizer.encoder.conv_in.weight.detach().clone()
        torch.optim.SGD(tokenizer.parameters(), lr=0.1).step()
        assert not torch.equal(tokenizer.encoder.conv_in.weight, before)

    def test_the_file_stays_as_it_is(self, tmp_path: Path, kind: str) -> None:
        """Weights are mapped from the file: what training does to them must not reach it."""
        make_any(kind, tmp_path)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        tokenizer = load_tokenizer(tmp_path)
        with torch.no_grad():
            for parameter in tokenizer.parameters():
                parameter.zero_()
        del tokenizer
        assert {path: path.read_bytes() for path in files} == files
