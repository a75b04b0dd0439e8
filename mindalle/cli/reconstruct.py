"""`mindalle reconstruct`, `tools/reconstruct.py`: pictures through an image tokenizer and back."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mindalle.cli.command import (
    Parser,
    UsageError,
    add_device_options,
    add_ema_option,
    check_writable,
    choose_machine,
    positive_int,
    run,
    say,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from stage1_vqgan.autoencoder import QuantizedAutoencoder

EXAMPLES = """\
  {prog} photo.jpg
  {prog} folder/of/pictures --model minDALL-E/1.3B --out sheet.png
  {prog} photo.jpg --model path/to/rq-vae/ffhq --depths --size 256x512"""
SHEET_ROWS = 64  # pictures on the sheet; of more only the measures are given


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Encode pictures, decode the codes; show both side by side, PSNR and codebook usage.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="files or folders")
    add("--model", default="emoji", help="bundled name, checkpoint, training run, release or hub id (emoji)")
    add_ema_option(parser)
    add("--size", metavar="HxW", help="resize and crop to it; default: the tokenizer's training size")
    add("--depths", action="store_true", help="residual codes: a column for each number of depths")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="pictures at once (8)")
    add_device_options(parser)
    default = Path("outputs/reconstruction.png")
    add("--out", type=Path, default=default, metavar="PNG", help=f"the sheet, not overwritten ({default})")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "reconstruct.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), reconstruct_pictures, argv)


def reconstruct_pictures(args: argparse.Namespace) -> None:
    """Load the tokenizer, reconstruct batch by batch, print measures, write the sheet."""
    files = _image_files(args.images)
    out = _sheet_path(args.out)
    choose_machine(args)
    from mindalle.cli.output import free_stem, save_png
    from mindalle.image import contact_sheet
    from mindalle.run import load_image_tokenizer

    tokenizer = load_image_tokenizer(args.model, use_ema=args.ema).to(args.device)
    size = _size(args.size, tokenizer)
    if args.depths and len(tokenizer.codebook_sizes) == 1:
        raise UsageError(
            "--depths is for residual codes (RQ-VAE), and this tokenizer has one code per position"
        )
    totals = _Totals(tokenizer)
    for batch in _reconstruct(tokenizer, files, size, args):
        totals.add(*batch)
    if not totals.count:
        raise ValueError(f"none of the {len(files)} pictures can be read: name others")
    for line in totals.lines():
        say(line)
    if totals.count < len(files):
        skipped = len(files) - totals.count
        say(f"{skipped} of {len(files)} pictures could not be read and were skipped", is_note=True)
    if totals.count > SHEET_ROWS:
        say(f"the sheet shows the first {SHEET_ROWS} of {totals.count} pictures", is_note=True)
    path = out.with_name(free_stem(out.parent, out.stem, [".png"]) + ".png")
    save_png(path, contact_sheet(totals.cells, columns=totals.num_columns + 1), {"model": str(args.model)})
    say(path)


def _image_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and the pictures in folders."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            from mindalle.data.names import is_leftover, is_picture
            from mindalle.image import PICTURE_SUFFIXES

            found = sorted(
                file for file in path.iterdir() if is_picture(file.name) and not is_leftover(file.name)
            )
            if not found:
                raise FileNotFoundError(
                    f"{path} holds no pictures (of {', '.join(PICTURE_SUFFIXES)}): pass another folder"
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no image at {path}")
    return files


def _sheet_path(out: Path) -> Path:
    is_directory = out.is_dir() or not out.suffix
    if not is_directory and out.suffix.lower() != ".png":
        raise UsageError(f"--out must end in .png, or be a directory for reconstruction.png, got {out}")
    path = out / "reconstruction.png" if is_directory else out
    check_writable(path.parent, "--out")
    return path


def _size(text: str | None, tokenizer: QuantizedAutoencoder) -> tuple[int, int]:
    """(height, width) in pixels."""
    if text is None:
        return (tokenizer.convnet.image_size, tokenizer.convnet.image_size)
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UsageError(f"--size must be HxW, such as 256x512, got {text!r}") from None
    step = tokenizer.downsampling
    if min(height, width) < 1 or height % step or width % step:
        raise UsageError(f"--size must be two multiples of {step} for this tokenizer, got {text}")
    return (height, width)


def _reconstruct(
    tokenizer: QuantizedAutoencoder, files: Sequence[Path], size: tuple[int, int], args: argparse.Namespace
) -> Iterator[tuple[Sequence[Path], Tensor, Tensor, list[Tensor]]]:
    """Batches: files, images, codes, and the reconstruction, or one for each number of depths."""
    import torch

    from mindalle.image import fit, to_tensor

    read = ((file, _read(file, is_named=file in args.images)) for file in files)
    pictures = ((file, picture) for file, picture in read if picture is not None)
    while batch := list(islice(pictures, args.batch_size)):
        images = torch.stack([to_tensor(fit(picture, size)) for _, picture in batch])
        with torch.inference_mode():
            codes = tokenizer.encode(images.to(args.device))
            kept = tokenizer.coarse_to_fine(codes) if args.depths else [codes]
            columns = [tokenizer.decode(part).cpu() for part in kept]
        yield [file for file, _ in batch], images, codes.cpu(), columns


def _read(file: Path, *, is_named: bool) -> Image.Image | None:
    """A picture; None where one that was not named, but found in a folder, cannot be read."""
    from mindalle.image import open_image

    try:
        return open_image(file)
    except (FileNotFoundError, ValueError) as error:
        if is_named:
            raise
        say(f"skipped: {error}", is_note=True)
        return None


class _Totals:
    """Measures over all pictures, and the first of them for the sheet."""

    def __init__(self, tokenizer: QuantizedAutoencoder) -> None:
        self.tokenizer = tokenizer
        self.psnr: list[Tensor] = []  # (B, columns) dB of each batch
        self.counts: Tensor | None = None  # (D, V) how often each entry is used
        self.cells: list[Image.Image] = []  # row by row: the picture, its reconstructions

    @property
    def count(self) -> int:
        """Pictures."""
        return sum(map(len, self.psnr))

    @property
    def num_columns(self) -> int:
        """Reconstructions of each picture."""
        return self.psnr[0].shape[1]

    def add(self, files: Sequence[Path], images: Tensor, codes: Tensor, columns: list[Tensor]) -> None:
        """Measure a batch and say each picture's PSNR."""
        import torch

        from mindalle.image import psnr, to_pil
        from stage1_vqgan.quantize.usage import code_counts

        values = torch.stack([psnr(images, column) for column in columns], dim=1)
        for file, value in zip(files, values[:, -1].tolist(), strict=True):
            say(f"{file}  PSNR {value:.2f} dB")
        self.psnr.append(values)
        counts = code_counts(self.tokenizer.by_depth(codes), self.tokenizer.codebook_size)
        self.counts = counts if self.counts is None else self.counts + counts
        rows = zip(*(to_pil(column) for column in (images, *columns)), strict=True)
        self.cells += [cell for row in rows for cell in row][
            : SHEET_ROWS * (1 + len(columns)) - len(self.cells)
        ]

    def lines(self) -> list[str]:
        """The mean PSNR of each column; per depth how many codebook entries are used, and how evenly."""
        import torch

        from stage1_vqgan.quantize.usage import perplexity

        assert self.counts is not None
        values = torch.cat(self.psnr)
        lines = []
        for depths, value in enumerate(values.mean(dim=0).tolist(), start=1):
            name = "mean" if self.num_columns == 1 else f"{depths} of {self.num_columns} depths"
            lines.append(f"{name}  PSNR {value:.2f} dB over {len(values)} pictures")
        by_depth = zip(self.counts, perplexity(self.counts).tolist(), strict=True)
        for depth, (row, evenness) in enumerate(by_depth, start=1):
            lines.append(
                f"codebook{f', depth {depth}' if len(self.counts) > 1 else ''}  {int((row > 0).sum())} of "
                f"{self.tokenizer.codebook_size} entries used by {int(row.sum())} codes, "
                f"perplexity {evenness:.1f}"
            )
        return lines
