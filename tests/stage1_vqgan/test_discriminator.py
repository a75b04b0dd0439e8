"""The PatchGAN: its shapes, what a logit sees, its start, and its ranges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stage1_vqgan.discriminator import Discriminator, DiscriminatorConfig


@pytest.mark.parametrize(("num_layers", "patches", "field"), [(1, 14, 16), (2, 6, 34), (3, 2, 70)])
def test_patches(num_layers: int, patches: int, field: int) -> None:
    """The receptive field of a logit is 70 pixels wide with 3 layers, as in the paper."""
    torch.manual_seed(0)
    model = Discriminator(DiscriminatorConfig(width=2, num_layers=num_layers)).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1, patches, patches)
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = model(images)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    columns = images.grad.abs().amax(dim=(0, 1, 2)).nonzero().flatten()
    assert int(columns.max() - columns.min()) + 1 == field


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_pictures(num_layers: int) -> None:
    model = Discriminator(DiscriminatorConfig(width=2, num_layers=num_layers)).eval()
    assert model.min_size == {1: 6, 2: 12, 3: 24}[num_layers]
    assert model(torch.zeros(1, 3, model.min_size, model.min_size)).numel() == 1
    with pytest.raises(RuntimeError, match="Kernel size"):
        model(torch.zeros(1, 3, model.min_size - 2, model.min_size))


def test_widths_double_up_to_eight_times() -> None:
    model = Discriminator(DiscriminatorConfig(width=2, num_layers=5))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == [2, 4, 8, 16, 16, 16, 1]
    assert [module.stride[0] for module in convolutions] == [2, 2, 2, 2, 2, 1, 1]


def test_start() -> None:
    """DCGAN's: small weights, batch norm about one."""
    torch.manual_seed(0)
    for module in Discriminator(DiscriminatorConfig(width=64, num_layers=2)).modules():
        if isinstance(module, nn.Conv2d) and module.out_channels > 1:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert float(module.weight.detach().mean()) == pytest.approx(1, abs=0.01)
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
            assert not module.bias.any()


@pytest.mark.parametrize("settings", [{"width": 0}, {"num_layers": 0}])
def test_ranges(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="width and num_layers must be at least 1, got"):
        DiscriminatorConfig(**settings)
