"""The checkpoints of `make` have the originals' keys, and the oracle computes on every variant of them."""

import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import gpt, rq_transformer, rqvae, vqgan
from .make import Release, make_mindalle, make_mindalle_finetuned, make_rq, make_taming

RQ_VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "no_cumsum": {"cumsum_depth_ctx": False},
    "own_input": {"input_emb_vqvae": False},
    "own_head": {"head_emb_vqvae": False},
    "own_both": {"input_emb_vqvae": False, "head_emb_vqvae": False},
    "own_per_depth": {"input_emb_vqvae": False, "head_emb_vqvae": False, "shared_tok_emb": False},
    "cls_per_depth": {"shared_cls_emb": False},
    "no_bias": {"body__block__attn_bias": False, "head__block__mlp_bias": False},
    "gelu_v2": {"body__block__gelu": "v2"},
    "separate_codebooks": {"shared_codebook": False},
    "sizes_per_depth": {
        "shared_codebook": False,
        "n_embed": [24, 12, 18],
        "shared_tok_emb": False,
        "shared_cls_emb": False,
        "head_emb_vqvae": False,
    },
    "cells_2x2": {"code_shape": [2, 2, 4]},
    "cells_1x2": {"code_shape": [4, 2, 2]},
    "depth_1": {"code_shape": [4, 4, 1]},
    "depth_8": {"code_shape": [2, 2, 8]},
}


class Recorder(Mapping[str, Tensor]):
    """A state dict that remembers which keys were read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self.state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def unread(self) -> set[str]:
        return set(self.state) - self.read


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def assert_causal(logits: Tensor, changed: Tensor, n: int) -> None:
    """Changing code n moves the logits after n and no others; both (B, codes, V)."""
    assert torch.equal(logits[:, : n + 1], changed[:, : n + 1])
    assert not torch.equal(logits[:, n + 1 :], changed[:, n + 1 :])


class TestKeys:
    """Key by key the same as the fixtures, which the original systems wrote."""

    @pytest.mark.parametrize("cond", ["text", "class"])
    def test_rq(self, fixtures_dir: Path, tmp_path: Path, cond: Any) -> None:
        texts = {"vocab_size_cond": 2000, "block_size_cond": 32} if cond == "text" else {}
        release = make_rq(
            tmp_path,
            cond,
            **texts,
            stage1__arch__hparams__embed_dim=32,
            n_embed=64,
            z_channels=32,
            resolution=32,
            ch_mult=[1, 1, 2, 2],
            code_shape=[4, 4, 4],
            stage2__arch__embed_dim=64,
            body__n_layer=3,
            head__n_layer=2,
        )
        folder = fixtures_dir / {"text": "rq-cc3m-tiny", "class": "rq-classcond-tiny"}[cond]
        for stage, state in (("stage1", release.stage1_state), ("stage2", release.stage2_state)):
            original = torch.load(folder / stage / "model.pt", weights_only=True)["state_dict"]
            assert state is not None
            assert shapes(state) == shapes(original)

    def test_mindalle(self, fixtures_dir: Path, tmp_path: Path) -> None:
        sizes = {
            "stage2__hparams__embed_dim": 32,
            "n_layers": 3,
            "vocab_size_txt": 16384,
            "context_length": 64,
        }
        vqgan = {"stage1__embed_dim": 32, "z_channels": 32, "n_embed": 128}
        resolution = {"resolution": 64, "attn_resolutions": [16]}
        release = make_mindalle(tmp_path, **sizes, **vqgan, **resolution)
        for name, state in (("stage1", release.stage1_state), ("stage2", release.stage2_state)):
            path = fixtures_dir / "mindalle-tiny" / f"{name}_last.ckpt"
            assert state is not None
            assert shapes(state) == shapes(torch.load(path, weights_only=True)["state_dict"])

    def test_mindalle_finetuned(self, fixtures_dir: Path, tmp_path: Path) -> None:
        sizes = {"stage2__hparams__embed_dim": 32, "stage1__embed_dim": 32, "z_channels": 32, "n_embed": 64}
        make_mindalle_finetuned(tmp_path, **sizes, resolution=32, attn_resolutions=[8])
        state, original = (
            torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
            for folder in (tmp_path, fixtures_dir / "mindalle-classcond-tiny")
        )
        assert shapes(state) == shapes(original)

    def test_taming(self, fixtures_dir: Path, tmp_path: Path) -> None:
        sizes = {"embed_dim": 24, "n_embed": 96, "z_channels": 32, "resolution": 64, "attn_resolutions": [8]}
        release = make_taming(tmp_path, **sizes, ch_mult=[1, 1, 2, 2])
        original = torch.load(fixtures_dir / "taming-vqgan-tiny" / "last.ckpt", weights_only=True)[
            "state_dict"
        ]
        kept = {key: value for key, value in original.items() if not key.startswith("loss.")}
        assert shapes(release.stage1_state) == shapes(kept)


@pytest.mark.parametrize("cond", ["text", "class", "none"])
@pytest.mark.parametrize("variant", RQ_VARIANTS)
def test_rq_variant(tmp_path: Path, images: Tensor, cond: Any, variant: str) -> None:
    release = make_rq(tmp_path, cond, **RQ_VARIANTS[variant])
    assert release.stage2_config is not None
    assert release.stage2_state is not None
    config = release.stage1_config
    codes = rqvae.encode(release.stage1_state, config, images)
    assert codes.shape[1:] == tuple(config["arch"]["hparams"]["code_shape"])
    assert codes.unique().numel() > 6
    assert rqvae.decode(release.stage1_state, config, codes).shape == images.shape

    arch = release.stage2_config["arch"]
    labels = torch.randint(arch["vocab_size_cond"], (3, arch["block_size_cond"]))
    tables, state = rqvae.codebooks(release.stage1_state, config), Recorder(release.stage2_state)

    def logits(codes: Tensor) -> Tensor:
        return rq_transformer.text_logits_and_image_logits(
            state, release.stage2_config or {}, tables, codes, None if cond == "none" else labels
        )[1].flatten(1, 3)  # (B, h, w, D, V) -> (B, codes, V)

    changed = codes.flatten(1).clone()
    changed[:, 1] = (changed[:, 1] + 1) % 12
    before = logits(codes)
    assert_causal(before, logits(changed.view_as(codes)), 1)
    assert before.softmax(dim=-1).isfinite().all()
    assert state.unread() <= {"tok_emb.offsets"}


def test_rq_separate_codebooks_give_a_list_of_soft_codes(tmp_path: Path, images: Tensor) -> None:
    release = make_rq(tmp_path, **RQ_VARIANTS["sizes_per_depth"])
    soft_codes = rqvae.soft_codes(release.stage1_state, release.stage1_config, images, temp=0.5)
    assert [p.shape[-1] for p in soft_codes] == [24, 12, 18]
    codes = rqvae.encode(release.stage1_state, release.stage1_config, images)
    assert torch.equal(torch.stack([p.argmax(dim=-1) for p in soft_codes], dim=-1), codes)


def test_rq_cells_are_an_inverse_pair() -> None:
    hparams = {"latent_shape": [4, 6, 2], "code_shape": [2, 2, 5]}
    latents = torch.arange(48.0).view(1, 4, 6, 2)  # (B, lh, lw, c)
    vectors = rqvae.to_code_shape(latents, hparams)
    assert vectors[0, 0, 0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        12,
        13,
        14,
        15,
        16,
        17,
    ]  # two rows of three latents
    assert torch.equal(rqvae.to_latent_shape(vectors, hparams), latents)


def test_rq_depths_bring_the_picture_closer(tmp_path: Path, images: Tensor) -> None:
    release = make_rq(tmp_path, code_shape=[4, 4, 4])
    state, config = release.stage1_state, release.stage1_config
    assert state["quantizer.codebooks.0.weight"] is state["quantizer.codebooks.3.weight"]
    vectors = rqvae.embed(state, config, rqvae.encode(state, config, images))  # (B, h, w, D, C)
    assert vectors.norm(dim=-1).mean(dim=(0, 1, 2)).diff().lt(0).any()  # later residuals are smaller


@pytest.mark.parametrize("settings", [{}, {"attn_bias": False, "mlp_bias": False}, {"gelu_use_approx": True}])
def test_mindalle(tmp_path: Path, images: Tensor, settings: dict[str, bool]) -> None:
    release = make_mindalle(tmp_path, **settings)
    assert release.stage2_config is not None
    assert release.stage2_state is not None
    stage1, stage2 = Recorder(release.stage1_state), Recorder(release.stage2_state)
    codes = vqgan.encode(stage1, release.stage1_config, images)
    assert vqgan.decode(stage1, release.stage1_config, codes).shape == images.shape
    assert codes.unique().numel() > 6

    codes, text = codes.flatten(1), torch.randint(40, (3, 6))
    changed = codes.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 24
    before, after = (
        gpt.text_logits_and_image_logits(stage2, release.stage2_config, c, text)[1] for c in (codes, changed)
    )
    assert_causal(before, after, 3)
    assert not stage1.unread()
    assert not stage2.unread()


@pytest.mark.parametrize("cond", ["class", "none"])
def test_mindalle_finetuned(tmp_path: Path, images: Tensor, cond: Any) -> None:
    release = make_mindalle_finetuned(tmp_path, cond)
    assert release.stage2_config is not None
    assert release.stage2_state is not None
    state, labels = Recorder(release.stage2_state), torch.tensor([1, 5, 9]) if cond == "class" else None
    codes = vqgan.encode(release.stage1_state, release.stage1_config, images).flatten(1)
    changed = codes.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 24
    before, after = (gpt.igpt_logits(state, release.stage2_config, c, labels) for c in (codes, changed))
    assert_causal(before, after, 3)
    assert not state.unread()


@pytest.mark.parametrize("layout", ["flat", "release", "logs"])
def test_taming_pickles_what_cannot_be_imported(tmp_path: Path, layout: Any) -> None:
    canary = tmp_path / "canary"
    make_taming(tmp_path, layout=layout, canary=canary)
    path = next(tmp_path.rglob("last.ckpt"))
    assert "lightning_callbacks_of_2020" not in sys.modules
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    assert not canary.exists()


def test_settings_left_out_take_the_originals_defaults(tmp_path: Path, images: Tensor) -> None:
    left_out = ["attn_bias", "stage2__hparams__mlp_bias", "gelu_use_approx", "double_z"]
    full, short = make_mindalle(tmp_path / "full"), make_mindalle(tmp_path / "short", omit=left_out)
    outputs = [_mindalle_logits(release, images) for release in (full, short)]
    assert short.stage2_config != full.stage2_config
    assert torch.equal(outputs[0], outputs[1])


def test_overrides_must_name_one_setting(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="names 0 settings"):
        make_mindalle(tmp_path, n_layer=3)
    with pytest.raises(KeyError, match="stage1__embed_dim"):
        make_mindalle(tmp_path, embed_dim=8)


def _mindalle_logits(release: Release, images: Tensor) -> Tensor:
    assert release.stage2_config is not None
    assert release.stage2_state is not None
    codes = vqgan.encode(release.stage1_state, release.stage1_config, images).flatten(1)
    text = torch.arange(18).view(3, 6)
    return gpt.text_logits_and_image_logits(release.stage2_state, release.stage2_config, codes, text)[1]
