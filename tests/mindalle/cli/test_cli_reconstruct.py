"""`reconstruct.py`: what it measures is what a test measures, and the sheet shows what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_results import Command, pixels, texts
from PIL import Image

from mindalle.cli import reconstruct as command
from mindalle.image import contact_sheet, fit, open_image, to_pil, to_tensor
from stage1_vqgan import load_tokenizer


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five pictures of other sizes, among them one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, size in enumerate([(16, 16), (40, 20), (20, 40), (8, 8), (33, 17)]):
        noise = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}{('.png', '.JPG')[number % 2]}")
    (folder / "notes.txt").write_text("no picture")
    return folder


def psnr_by_hand(images: torch.Tensor, reconstructions: torch.Tensor) -> list[float]:
    """From bytes-like ranges: 20 log10(255 / RMSE) of pixels in [0, 255]."""
    error = (reconstructions.clamp(-1, 1) - images) * 127.5
    return [20 * np.log10(255 / e.square().mean().sqrt().item()) for e in error]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mindalle", "rq-class", "taming"])
def test_measures_and_sheet(
    mindalle: Command, checkpoints: Path, photos: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "My Sheet.png"
    result = mindalle("reconstruct", photos, "--model", checkpoints / name, "--out", out, "--batch-size", 2)
    assert result.code == 0

    tokenizer = load_tokenizer(checkpoints / name)
    files = sorted(file for file in photos.iterdir() if file.suffix != ".txt")
    images = torch.stack([to_tensor(fit(open_image(file), (16, 16))) for file in files])
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    values = psnr_by_hand(images, decoded)
    for line, file, value in zip(result.out, files, values, strict=False):
        match = re.fullmatch(rf"{re.escape(str(file))}  PSNR (-?[\d.]+) dB", line)
        assert match
        assert float(match[1]) == pytest.approx(value, abs=0.006)
    assert f"mean  PSNR {np.mean(values):.2f} dB over 5 pictures" in result.out

    usage = [line for line in result.out if line.startswith("codebook")]
    by_depth = codes.flatten(0, 2).T if codes.ndim == 4 else codes.flatten()[None]
    assert len(usage) == len(by_depth)
    for line, row in zip(usage, by_depth.numpy(), strict=True):
        counts = np.unique(row, return_counts=True)[1] / len(row)
        perplexity = np.exp(-(counts * np.log(counts)).sum())
        assert f"{len(counts)} of 24 entries used by {len(row)} codes, perplexity {perplexity:.1f}" in line

    assert result.paths[-1] == out
    cells = [cell for row in zip(to_pil(images), to_pil(decoded), strict=True) for cell in row]
    shown = np.asarray(open_image(out)).astype(int)
    assert (
        np.abs(shown - np.asarray(contact_sheet(cells, columns=2))).max() <= 1
    )  # rounding, in other batches
    assert texts(out) == {"model": str(checkpoints / name)}


@torch.inference_mode()
def test_depths_show_coarse_to_fine(
    mindalle: Command, checkpoints: Path, photo: Path, tmp_path: Path
) -> None:
    model = checkpoints / "rq-class"
    result = mindalle("reconstruct", photo, "--model", model, "--depths", "--out", tmp_path / "sheet.png")
    tokenizer = load_tokenizer(model)
    image = to_tensor(open_image(photo)).unsqueeze(0)
    codes = tokenizer.encode(image)
    cells = to_pil(image)
    for depth in (1, 2, 3):
        decoded = tokenizer.decode(codes[..., :depth])
        assert (
            f"{depth} of 3 depths  PSNR {psnr_by_hand(image, decoded)[0]:.2f} dB over 1 pictures"
            in result.out
        )
        cells += to_pil(decoded)
    assert pixels(tmp_path / "sheet.png") == contact_sheet(cells, columns=4).tobytes()
    assert sum(line.startswith("codebook, depth ") for line in result.out) == 3


def test_a_rectangle(mindalle: Command, checkpoints: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    result = mindalle(
        "reconstruct", photo, "--model", checkpoints / "taming", "--size", "64x128", "--out", out
    )
    assert result.code == 0
    assert open_image(out).size == (2 * 128 + 3 * 4, 64 + 2 * 4)  # cells with gaps of 4, no room left empty
    assert any("used by 512 codes" in line for line in result.out)  # 16 x 32


def test_averaged_weights(mindalle: Command, checkpoints: Path, photo: Path, tmp_path: Path) -> None:
    model = ("--model", checkpoints / "rq-class", "--out", tmp_path)
    plain, averaged = mindalle("reconstruct", photo, *model), mindalle("reconstruct", photo, *model, "--ema")
    assert plain.out[0] != averaged.out[0]
    assert [path.name for path in (plain.paths[-1], averaged.paths[-1])] == [
        "reconstruction.png",
        "reconstruction_2.png",
    ]


def test_a_large_folder_gives_all_measures_and_a_sheet_of_the_first(
    mindalle: Command, checkpoints: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHEET_ROWS", 3)
    result = mindalle(
        "reconstruct", photos, "--model", checkpoints / "taming", "--out", tmp_path, "--batch-size", 2
    )
    assert any("over 5 pictures" in line for line in result.out)
    assert "the sheet shows the first 3 of 5 pictures" in result.err
    assert open_image(tmp_path / "reconstruction.png").size[1] == 3 * (64 + 4) + 4


def test_unreadable_pictures_of_a_folder_are_skipped(
    mindalle: Command, checkpoints: Path, photos: Path, photo: Path, tmp_path: Path
) -> None:
    """One damaged file ended a run over thousands; what is named must still be readable."""
    (photos / "1.JPG").write_bytes(b"no picture")
    (photos / "5.png").symlink_to("nowhere")
    model = ("--model", checkpoints / "taming", "--out", tmp_path)
    result = mindalle("reconstruct", photos, photo, *model, "--batch-size", 2)
    assert result.code == 0
    measured = [line.split("  ")[0] for line in result.out if " dB" in line and "over" not in line]
    assert measured == [str(photos / name) for name in ("0.png", "2.png", "3.JPG", "4.png")] + [str(photo)]
    assert any("over 5 pictures" in line for line in result.out)
    assert f"skipped: {photos / '1.JPG'} is not a picture of a known format" in result.err[0]
    assert result.err[1:] == [
        f"skipped: no image at {photos / '5.png'}",
        "2 of 7 pictures could not be read and were skipped",
    ]
    named = mindalle("reconstruct", photos, photos / "1.JPG", *model)
    assert (named.code, len(named.err)) == (1, 1)
    for file in photos.iterdir():
        file.write_bytes(b"no picture") if file.name != "5.png" else file.unlink()
    nothing = mindalle("reconstruct", photos, *model)
    assert nothing.code == 1
    assert "none of the 5 pictures can be read" in nothing.err[-1]


@pytest.mark.parametrize(
    ("code", "argv", "words"),
    [
        (2, ["--size", "16"], "--size must be HxW, such as 256x512, got '16'"),
        (2, ["--size", "16xA"], "--size must be HxW"),
        (2, ["--size", "18x16"], "--size must be two multiples of 4 for this tokenizer, got 18x16"),
        (2, ["--size", "0x16"], "two multiples of 4"),
        (2, ["--depths"], "--depths is for residual codes"),
        (2, ["--device", "banana"], "--device must be auto, cpu, cuda, cuda:N or mps, got 'banana'"),
        (2, ["--batch-size", "0"], "--batch-size: must be a whole number of at least 1, got '0'"),
        (
            2,
            ["--out", "sheet.jpg"],
            "--out must end in .png, or be a directory for reconstruction.png, got sheet.jpg",
        ),
        (1, ["--model", "nowhere/at/all"], "no such file or directory: nowhere/at/all"),
        (1, ["missing.png"], "no image at missing.png"),
        (1, ["--ema"], "has no EMA weights"),
    ],
)
def test_errors(
    mindalle: Command, checkpoints: Path, photo: Path, tmp_path: Path, code: int, argv: list[str], words: str
) -> None:
    result = mindalle("reconstruct", photo, "--model", checkpoints / "taming", "--out", tmp_path / "o", *argv)
    assert result.code == code
    assert len(result.err) == 1
    assert result.err[0].startswith("reconstruct.py: error: ")
    assert words in result.err[0]
    assert not (tmp_path / "o").exists()


def test_a_folder_without_pictures(mindalle: Command, checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = mindalle("reconstruct", tmp_path / "empty", "--model", checkpoints / "taming")
    assert (result.code, len(result.err)) == (1, 1)
    assert "empty holds no pictures (of png, jpg" in result.err[0]
