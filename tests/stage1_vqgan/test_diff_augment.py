"""Differentiable augmentation: each rule by hand, picture by picture, and gradients that pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vqgan.diff_augment import DiffAugmentConfig, diff_augment

PAPER = DiffAugmentConfig()
OFF = {"color": 0.0, "translation": 0.0, "cutout": 0.0}


def draw(batch: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 12)])
def test_shapes(dtype: torch.dtype, size: tuple[int, int]) -> None:
    images = draw(3, *size).to(dtype)
    augmented = diff_augment(images, PAPER)
    assert augmented.shape == images.shape
    assert augmented.dtype == dtype
    assert bool(augmented.isfinite().all())


def test_no_strength_is_the_identity() -> None:
    images = draw()
    assert torch.equal(diff_augment(images, DiffAugmentConfig(**OFF)), images)


def test_little_strength_is_near_it() -> None:
    """Less than half a pixel is none."""
    images = draw()
    little = DiffAugmentConfig(color=1e-4, translation=0.04, cutout=0.04)
    torch.testing.assert_close(diff_augment(images, little), images, rtol=0, atol=1e-3)


def test_colour_by_hand() -> None:
    """The paper's ranges; brightness, saturation and contrast solved for from what came out."""
    images = draw(2000, 4, 4)
    augmented = diff_augment(images, DiffAugmentConfig(**{**OFF, "color": 1.0}))
    brightness = augmented.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))  # the others keep the mean
    grey, grey_after = images.mean(dim=1, keepdim=True), augmented.mean(dim=1, keepdim=True)
    centred, centred_after = (x - x.mean(dim=(2, 3), keepdim=True) for x in (grey, grey_after))
    contrast = (centred_after / centred).flatten(1).median(dim=1).values
    both = ((augmented - grey_after) / (images - grey)).flatten(1).median(dim=1).values
    for values, low, high in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (both / contrast, 0.0, 2.0)):
        assert float(values.min()) == pytest.approx(low, abs=0.02)
        assert float(values.max()) == pytest.approx(high, abs=0.02)
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.05)


def test_translation_by_hand() -> None:
    """Every shift of up to a quarter of a side occurs, with zeros from outside, and no other."""
    images = draw(400)
    augmented = diff_augment(images, DiffAugmentConfig(**{**OFF, "translation": 0.25}))
    found = [find_shift(*pair) for pair in zip(images, augmented, strict=True)]
    assert {down for down, _ in found} == set(range(-2, 3))
    assert {right for _, right in found} == set(range(-3, 4))


def find_shift(image: Tensor, shifted: Tensor) -> tuple[int, int]:
    """Rows down and columns to the right."""
    _, height, width = image.shape
    blank = torch.zeros(3, 3 * height, 3 * width)
    blank[:, height : 2 * height, width : 2 * width] = image
    for down in range(-height + 1, height):
        for right in range(-width + 1, width):
            top, left = height - down, width - right
            if torch.equal(blank[:, top : top + height, left : left + width], shifted):
                return down, right
    raise AssertionError("no shift of the picture")


def test_cutout_by_hand() -> None:
    """A hole of half the sides, cut at the edges; its middle reaches all of the picture."""
    images = draw(400)
    augmented = diff_augment(images, DiffAugmentConfig(**{**OFF, "cutout": 0.5}))
    tops, lefts = set(), set()
    for image, cut in zip(images, augmented, strict=True):
        hole = (cut == 0).all(dim=0)  # (H, W)
        rows, columns = hole.any(dim=1).nonzero().flatten(), hole.any(dim=0).nonzero().flatten()
        top, bottom = int(rows[0]), int(rows[-1])
        left, right = int(columns[0]), int(columns[-1])
        assert bool(hole[top : bottom + 1, left : right + 1].all())
        assert torch.equal(cut[:, ~hole], image[:, ~hole])
        assert 2 <= bottom - top + 1 <= 4
        assert 3 <= right - left + 1 <= 6
        tops.add(top)
        lefts.add(left)
    assert tops == set(range(7))
    assert lefts == set(range(10))


def test_pictures_have_draws_of_their_own_that_a_seed_repeats() -> None:
    images = draw(1).expand(4, -1, -1, -1)
    torch.manual_seed(1)
    first = diff_augment(images, PAPER)
    assert all(not torch.equal(first[0], other) for other in first[1:])
    torch.manual_seed(1)
    assert torch.equal(diff_augment(images, PAPER), first)


@pytest.mark.parametrize("name", ["color", "translation", "cutout"])
def test_gradients_flow(name: str) -> None:
    """By differences, and to all that is still seen."""
    images = draw(2, 4, 6).double().requires_grad_()
    config = DiffAugmentConfig(**{**OFF, name: 0.5})

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return diff_augment(x, config)

    assert torch.autograd.gradcheck(seeded, (images,))
    seeded(images).square().sum().backward()
    assert images.grad is not None
    assert bool(images.grad.flatten(1).any(dim=1).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"color": 1.5}, r"color must be in \[0, 1\], got 1.5"),
        ({"color": float("nan")}, r"color must be in \[0, 1\], got nan"),
        ({"translation": 0.6}, r"translation must be in \[0, 0.5\], got 0.6"),
        ({"translation": -0.1}, r"translation must be in \[0, 0.5\], got -0.1"),
        ({"cutout": 1.0}, r"cutout must be in \[0, 1\), got 1.0"),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffAugmentConfig(**settings)
