"""Transforms: which part of a picture becomes the training image, measured on gradients."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mindalle.data.transforms import TransformConfig, transform
from mindalle.image import fit, to_tensor


def ramp(width: int, height: int) -> Image.Image:
    """Red tells how far right a pixel is, green how far down; both 0 to 1."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, 0 * x], axis=2) * 255).round().astype(np.uint8))


def box(images: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the part of a `ramp` that a square tensor shows, 0 to 1."""
    x, y = (images[:2] + 1) / 2  # (H, W) each
    x, y = x.mean(dim=0), y.mean(dim=1)
    half_x, half_y = (float((axis[-2] - axis[1]) / (len(axis) - 3) / 2) for axis in (x, y))
    return (
        float(x[1]) - 3 * half_x,
        float(y[1]) - 3 * half_y,
        float(x[-2]) + 3 * half_x,
        float(y[-2]) + 3 * half_y,
    )


def boxes(picture: Image.Image, count: int = 60, **settings: Any) -> list[tuple[float, float, float, float]]:
    config = TransformConfig(image_size=32, **settings)
    return [box(transform(picture, config, random.Random(seed))) for seed in range(count)]


class TestEvaluation:
    @pytest.mark.parametrize("crop", ["center", "random", "random_resized", "dalle"])
    @pytest.mark.parametrize("size", [(60, 40), (40, 60), (16, 16), (7, 33)])
    def test_center(self, crop: Any, size: tuple[int, int]) -> None:
        config = TransformConfig(image_size=16, crop=crop, flip_probability=1.0)
        expected = to_tensor(fit(ramp(*size), (16, 16)))
        assert torch.equal(transform(ramp(*size), config, None), expected)

    @pytest.mark.parametrize("crop", ["center", "random"])
    def test_center_of_a_larger_one(self, crop: Any) -> None:
        config = TransformConfig(image_size=32, resize_size=64, crop=crop)
        found = box(transform(ramp(200, 100), config, None))
        assert found == pytest.approx((3 / 8, 1 / 4, 5 / 8, 3 / 4), abs=0.02)


class TestCrops:
    def test_random(self) -> None:
        """As high as the picture, anywhere along its width."""
        found = np.array(boxes(ramp(200, 100), crop="random"))
        assert found[:, 2] - found[:, 0] == pytest.approx(0.5, abs=0.02)
        assert found[:, 1] == pytest.approx(0, abs=0.02)
        assert found[:, 0].min() == pytest.approx(0, abs=0.05)
        assert found[:, 2].max() == pytest.approx(1, abs=0.05)
        assert found[:, 0].mean() == pytest.approx(0.25, abs=0.06)

    def test_random_of_a_larger_one(self) -> None:
        found = np.array(boxes(ramp(100, 100), crop="random", resize_size=64))
        assert found[:, 2:] - found[:, :2] == pytest.approx(0.5, abs=0.02)
        assert found[:, :2].min() == pytest.approx(0, abs=0.05)
        assert found[:, 2:].max() == pytest.approx(1, abs=0.05)

    def test_random_resized(self) -> None:
        found = np.array(boxes(ramp(100, 100), crop="random_resized", min_scale=0.25))
        width, height = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
        assert width == pytest.approx(height, abs=0.03)
        area = width * height
        assert area.min() == pytest.approx(0.25, abs=0.04)
        assert area.max() == pytest.approx(1, abs=0.06)
        assert area.mean() == pytest.approx(5 / 8, abs=0.08)

    def test_dalle(self) -> None:
        """A square about the middle of the longer side, of which a crop shows 8/9 to 1."""
        found = np.array(boxes(ramp(300, 100), crop="dalle"))
        height = found[:, 3] - found[:, 1]
        assert 3 * (found[:, 2] - found[:, 0]) == pytest.approx(height, abs=0.04)
        assert height.min() == pytest.approx(8 / 9, abs=0.02)
        assert height.max() == pytest.approx(1, abs=0.02)
        assert found[:, 0].min() == pytest.approx(2 / 3 * 3 / 8, abs=0.04)
        assert found[:, 2].max() == pytest.approx(2 / 3 * 5 / 8 + 1 / 3, abs=0.04)

    @pytest.mark.parametrize("crop", ["random", "random_resized", "dalle"])
    @pytest.mark.parametrize("size", [(100, 1), (1, 100), (3, 2)])
    def test_small_pictures(self, crop: Any, size: tuple[int, int]) -> None:
        config = TransformConfig(image_size=256, crop=crop)
        for seed in range(5):
            image = transform(Image.new("RGB", size, "red"), config, random.Random(seed))
            assert image.shape == (3, 256, 256)
            assert torch.equal(image[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))

    def test_a_function_of_the_seed(self) -> None:
        config = TransformConfig(image_size=16, crop="random_resized", flip_probability=0.5)
        first, again, other = (transform(ramp(50, 40), config, random.Random(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestFlip:
    @pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (0.5, 50), (1.0, 100)])
    def test_share(self, probability: float, expected: int) -> None:
        config = TransformConfig(image_size=4, flip_probability=probability)
        images = [transform(ramp(4, 4), config, random.Random(seed)) for seed in range(100)]
        assert sum(bool(image[0, 0, 0] > image[0, 0, 3]) for image in images) == pytest.approx(
            expected, abs=15
        )
        assert all(image[1, 0, 0] < image[1, 3, 0] for image in images)


class TestPad:
    @pytest.mark.parametrize("size", [(40, 20), (8, 4)])
    def test_white(self, size: tuple[int, int]) -> None:
        config = TransformConfig(image_size=16, resize="pad")
        image = transform(Image.new("RGB", size, "red"), config, None)
        assert image[:, :4].eq(1).all()
        assert image[:, 12:].eq(1).all()
        assert torch.equal(image[:, 4:12], torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 8, 16))

    def test_blur(self) -> None:
        """Left and right of a tall picture is what is in it, not its border and not white."""
        config = TransformConfig(image_size=32, resize="pad", padding="blur")
        image = transform(ramp(100, 200), config, random.Random(0))
        assert box(image[:, :, 8:24].repeat_interleave(2, dim=2))[0::2] == pytest.approx((0, 1), abs=0.06)
        assert image[2].eq(-1).all()  # white would be blue, too
        assert image[1, 1, 2] < image[1, 16, 2] < image[1, 30, 2]

    def test_anywhere(self) -> None:
        """All of the picture, of a side between half and all of the square's, wherever there is room."""
        config = TransformConfig(image_size=40, resize="pad", crop="random", min_scale=0.25)
        found = []
        for seed in range(200):
            is_red = transform(Image.new("RGB", (9, 9), "red"), config, random.Random(seed))[1] < 0
            ys, xs = is_red.nonzero().unbind(dim=1)
            found.append([int(bound) for bound in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)])
            assert int(is_red.sum()) == (found[-1][2] - found[-1][0]) * (found[-1][3] - found[-1][1])
        left, top, right, bottom = np.array(found).T
        assert (right - left).tolist() == (bottom - top).tolist()
        assert (right - left).min() in (20, 21)
        assert ((right - left) ** 2).mean() / 40**2 == pytest.approx(5 / 8, abs=0.05)
        assert left.min() == top.min() == 0
        assert right.max() == bottom.max() == 40
        assert left.mean() == pytest.approx(40 - right.mean(), abs=1)
        assert not np.array_equal(left, top)
        middle = transform(Image.new("RGB", (9, 9), "red"), config, None)
        assert torch.equal(middle, torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 40, 40))

    @pytest.mark.parametrize("padding", ["white", "blur"])
    def test_lines(self, padding: Any) -> None:
        config = TransformConfig(image_size=16, resize="pad", padding=padding)
        assert transform(Image.new("RGB", (100, 1)), config, None).shape == (3, 16, 16)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"crop": "middle"}, "crop must be one of center, random, random_resized, dalle, got 'middle'"),
            ({"resize": "longer"}, "resize must be one of shorter, pad, got 'longer'"),
            ({"padding": "black"}, "padding must be one of white, blur, got 'black'"),
            ({"image_size": 0}, "image_size must be at least 1, got 0"),
            ({"image_size": 32, "resize_size": 31}, "resize_size must be at least image_size, 32, got 31"),
            ({"resize": "pad", "crop": "dalle"}, "is not cropped, but .*, got dalle and None"),
            ({"resize": "pad", "resize_size": 512}, "is not cropped, but .*, got center and 512"),
            (
                {"crop": "dalle", "resize_size": 512},
                "crop dalle chooses its size itself: leave resize_size out",
            ),
            ({"min_scale": 0.0}, r"min_scale must be in \(0, 1\] and .*, got 0.0 and 0.0"),
            ({"flip_probability": 1.5}, r"flip_probability in \[0, 1\], got 0.75 and 1.5"),
        ],
    )
    def test_errors(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TransformConfig(**settings)
