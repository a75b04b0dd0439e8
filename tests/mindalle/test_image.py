"""Pixels: bytes to [-1, 1] and back, transparency, sizes, PSNR against its formula, unreadable files."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from mindalle.image import contact_sheet, fit, on_white, open_image, psnr, to_pil, to_tensor

WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # tag of EXIF


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green to the bottom."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def pixels(image: Image.Image) -> list[Any]:
    assert image.mode == "RGB"
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def reread(image: Image.Image, **options: Any) -> Image.Image:
    """Through a PNG file, which is how transparency beside the pixels comes about."""
    file = BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(file)


class TestRange:
    def test_ends_and_middle(self) -> None:
        tensor = to_tensor(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
        torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
        assert (tensor.shape, tensor.dtype) == ((3, 1, 1), torch.float32)

    def test_channels_rows_columns(self) -> None:
        tensor = to_tensor(gradient(5, 3))
        assert tensor.shape == (3, 3, 5)
        assert tensor[0, 0].diff().min() > 0  # red along the row
        assert tensor[1, :, 0].diff().min() > 0  # green along the column

    def test_all_bytes_survive_the_round_trip(self) -> None:
        """63 of 256 came back one darker: float32 put them just below themselves, and to_pil truncates."""
        values = np.arange(256, dtype=np.uint8).reshape(16, 16)
        image = Image.fromarray(np.stack([values, values[::-1], values.T], axis=2))
        (back,) = to_pil(to_tensor(image).unsqueeze(0))
        assert np.array_equal(np.asarray(back), np.asarray(image))

    def test_truncated_as_the_originals_do(self) -> None:
        """(x * 0.5 + 0.5).clip(0, 1) * 255, then astype(uint8): 99.9 is 99."""
        levels = torch.tensor([-1000.0, -1e-3, 0.0, 0.4, 0.999, 1.0, 99.9, 254.9, 255.0, 1e9])
        images = (levels / 127.5 - 1).view(1, 1, 1, -1).expand(1, 3, 1, -1)
        (image,) = to_pil(images)
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 0, 0, 1, 99, 254, 255, 255]

    def test_batch_of_any_dtype_with_gradients(self) -> None:
        images = torch.zeros(2, 3, 4, 6, dtype=torch.bfloat16, requires_grad=True)
        pictures = to_pil(images)
        assert [picture.size for picture in pictures] == [(6, 4), (6, 4)]
        assert pixels(pictures[1])[0] == (127, 127, 127)


class TestOnWhite:
    @pytest.mark.parametrize(
        ("mode", "colour", "expected"),
        [
            ("RGB", (1, 2, 3), (1, 2, 3)),
            ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
            ("RGBA", (1, 2, 3, 0), WHITE),
            ("RGBA", (0, 100, 255, 51), (204, 224, 255)),  # one fifth of the colour, four of white
            ("L", 7, (7, 7, 7)),
            ("LA", (7, 0), WHITE),
            ("LA", (0, 51), (204, 204, 204)),
            ("1", 1, WHITE),
            ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ],
    )
    def test_modes(self, mode: str, colour: Any, expected: tuple[int, ...]) -> None:
        assert pixels(on_white(Image.new(mode, (1, 1), colour))) == [expected]

    @pytest.mark.parametrize(
        ("transparency", "expected"),
        [(1, [(255, 0, 0), WHITE]), (b"\xcc\xff", [(255, 51, 51), (0, 255, 0)])],
    )
    def test_palette(self, transparency: Any, expected: list[tuple[int, ...]]) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.putpixel((1, 0), 1)
        file = reread(image, transparency=transparency)
        assert file.mode == "P"
        assert pixels(on_white(file)) == expected

    @pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9)), ("I;16", 777)])
    def test_one_colour_stands_for_transparency(self, mode: str, colour: Any) -> None:
        image = Image.new(mode, (2, 1), colour)
        image.putpixel((1, 0), 0 if mode != "RGB" else (0, 0, 0))
        assert pixels(on_white(reread(image, transparency=colour))) == [WHITE, (0, 0, 0)]

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_sixteen_bits_are_scaled(self, dtype: type) -> None:
        """Pillow itself clips: all but the darkest grey of 16 bits became white."""
        values = np.array([[0, 257, 128 * 257, 65535]], dtype=dtype)
        image = Image.fromarray(values)
        assert image.mode == ("I;16" if dtype is np.uint16 else "I")
        assert pixels(on_white(image)) == [(v, v, v) for v in (0, 1, 128, 255)]


class TestFit:
    @pytest.mark.parametrize("size", [(8, 8), (8, 16), (16, 8), (33, 7), (1, 1)])
    @pytest.mark.parametrize("original", [(64, 64), (100, 30), (30, 100), (5, 3), (1, 1), (1000, 1)])
    def test_size(self, size: tuple[int, int], original: tuple[int, int]) -> None:
        assert fit(gradient(*original), size).size == (size[1], size[0])  # PIL's sizes are (width, height)

    def test_nothing_to_do(self) -> None:
        image = gradient(16, 8)
        assert np.array_equal(np.asarray(fit(image, (8, 16))), np.asarray(image))

    def test_keeps_the_centre(self) -> None:
        """A wide picture of three stripes loses those at the sides; nothing is squeezed in or padded."""
        image = Image.new("RGB", (60, 20), "red")
        image.paste((0, 0, 255), (20, 0, 40, 20))
        assert set(pixels(fit(image, (20, 20)))) == {(0, 0, 255)}
        assert set(pixels(fit(image.rotate(90, expand=True), (20, 20)))) == {(0, 0, 255)}

    def test_covers_when_it_grows(self) -> None:
        assert set(pixels(fit(Image.new("RGB", (3, 5), "red"), (40, 30)))) == {(255, 0, 0)}


class TestPsnr:
    def test_closed_form(self) -> None:
        """An error of d everywhere is 10 log10(4 / d^2): in [-1, 1] the range is 2."""
        images = torch.zeros(3, 3, 4, 4)
        errors = torch.tensor([0.1, 0.5, 1.0])
        expected = [10 * math.log10(4 / error**2) for error in (0.1, 0.5, 1.0)]
        values = psnr(images, images + errors.view(3, 1, 1, 1))
        torch.testing.assert_close(values, torch.tensor(expected))
        torch.testing.assert_close(values[2], torch.tensor(6.0206), atol=1e-4, rtol=0)

    def test_mean_over_the_image_not_of_the_batch(self) -> None:
        images = torch.rand(2, 3, 6, 5) * 2 - 1
        others = torch.rand(2, 3, 6, 5) * 2 - 1
        mse = ((images - others) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(psnr(images, others), 10 * (4 / mse).log10())

    def test_reconstructions_are_clamped(self) -> None:
        white = torch.ones(1, 3, 2, 2)
        assert psnr(white, 7 * white).item() == math.inf
        assert psnr(white, -7 * white).item() == 0


class TestContactSheet:
    @pytest.mark.parametrize(
        ("count", "columns", "grid"),
        [(1, None, (1, 1)), (2, None, (2, 1)), (5, None, (3, 2)), (9, None, (3, 3)), (4, 4, (4, 1))],
    )
    def test_size(self, count: int, columns: int | None, grid: tuple[int, int]) -> None:
        images = [Image.new("RGB", (70, 70), "red")] * count
        sheet = contact_sheet(images, columns=columns)
        assert sheet.size == tuple(n * (70 + 4) + 4 for n in grid)
        with_captions = contact_sheet(images, columns=columns, captions=["a"] * count)
        assert with_captions.height == sheet.height + 14 * grid[1]

    def test_places(self) -> None:
        colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        sheet = contact_sheet([Image.new("RGB", (8, 8), colour) for colour in colours], columns=2, cell=8)
        centres = [sheet.getpixel((4 + 4 + 12 * (i % 2), 4 + 4 + 12 * (i // 2))) for i in range(4)]
        assert centres == [*colours, WHITE]
        assert sheet.getpixel((0, 0)) == sheet.getpixel((13, 8)) == WHITE

    def test_small_images_grow_without_blur(self) -> None:
        image = Image.new("RGB", (2, 1), "red")
        image.putpixel((1, 0), (0, 0, 255))
        assert set(pixels(contact_sheet([image]))) == {(255, 0, 0), (0, 0, 255), WHITE}

    @pytest.mark.parametrize("caption", ["two\nlines", "東京 ☃ é", "long " * 99, "", "\n"])
    def test_any_caption(self, caption: str) -> None:
        """A prompt with a line break used to fail after the drawing was done."""
        assert contact_sheet([Image.new("RGB", (64, 64))], captions=[caption]).size == (72, 86)

    def test_captions_stay_in_their_cells(self) -> None:
        image = Image.new("RGB", (64, 64), "white")
        sheet = np.asarray(contact_sheet([image, image], columns=2, captions=["W" * 50, ""]))
        assert sheet[:, :68].min() < 128
        assert sheet[:, 69:].min() == 255

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="a caption for each or none, got 0 images and no captions"):
            contact_sheet([])
        with pytest.raises(ValueError, match="got 1 images and 2 captions"):
            contact_sheet([Image.new("RGB", (8, 8))], captions=["a", "b"])


class TestOpenImage:
    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"picture{suffix}"
        Image.new("RGB", (9, 5), "white").save(path)
        image = open_image(str(path))
        assert (image.mode, image.size) == ("RGB", (9, 5))
        path.unlink()
        assert set(pixels(image)) == {WHITE}  # wholly read

    def test_upright(self, tmp_path: Path) -> None:
        """Cameras write rows as they come and note how the camera was held."""
        image = gradient(40, 20)
        exif = Image.Exif()
        exif[ORIENTATION] = 6  # turn clockwise to view
        image.save(tmp_path / "turned.png", exif=exif)
        opened = open_image(tmp_path / "turned.png")
        assert np.array_equal(np.asarray(opened), np.asarray(image.rotate(-90, expand=True)))
        assert opened.size == (20, 40)

    def test_missing(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.png", tmp_path):
            with pytest.raises(FileNotFoundError, match=f"no image at {path}"):
                open_image(path)

    @pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
    def test_no_image(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "file.png").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"file.png is not a (picture of a known format|readable picture)"
        ):
            open_image(tmp_path / "file.png")

    def test_programs_are_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An EPS picture by the name of a PNG was given to Ghostscript."""
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
        program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
        (tmp_path / "file.png").write_bytes(program)
        with pytest.raises(ValueError, match=r"file.png is not a picture of a known format: expected PNG,"):
            open_image(tmp_path / "file.png")

    @pytest.mark.parametrize(
        ("width", "height", "is_line"), [(65000, 1, True), (1, 101, True), (2, 200, False)]
    )
    def test_lines_are_refused(self, tmp_path: Path, width: int, height: int, is_line: bool) -> None:
        """Resized by its shorter side to 256 pixels, the longest would be 16,640,000 pixels wide."""
        Image.new("1", (width, height)).save(tmp_path / "line.png")
        if is_line:
            message = f"line.png is no picture but a line: {width} x {height} pixels"
            with pytest.raises(ValueError, match=message):
                open_image(tmp_path / "line.png")
        else:
            assert open_image(tmp_path / "line.png").size == (width, height)

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_truncated(self, tmp_path: Path, suffix: str, share: float) -> None:
        path = tmp_path / f"cut{suffix}"
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(ValueError, match=rf"cut{suffix} is not a "):
            open_image(path)

    def test_decompression_bomb(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
    ) -> None:
        """Pillow warns of many pixels and refuses twice as many; the warning is not for users."""
        Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        open_image(tmp_path / "bomb.png")
        assert not recwarn.list
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
        with pytest.raises(ValueError, match=r"bomb.png is refused: .*1600 pixels.*; scale it down first"):
            open_image(tmp_path / "bomb.png")


def test_floating_point_pictures(tmp_path: Path) -> None:
    """A TIFF with values in [0, 1] was read as black: Pillow takes 255 for white."""
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "unit.tif")
    assert np.asarray(open_image(tmp_path / "unit.tif"))[7, 7].tolist() == [255, 255, 255]
    assert np.asarray(open_image(tmp_path / "unit.tif"))[3, 4].tolist() == [113, 113, 113]  # 28 / 63
    for unclear in (values * 255, values - 0.5, values * np.nan):
        Image.fromarray(unclear).save(tmp_path / "unclear.tif")
        with pytest.raises(ValueError, match=r"is no clear picture: its floating-point values lie in"):
            open_image(tmp_path / "unclear.tif")
    Image.fromarray(np.int32([[0, 70_000]])).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"is no clear picture: its values lie in \[0, 70000\]"):
        open_image(tmp_path / "wide.tif")
