"""`mindalle reconstruct`, `tools/reconstruct.py`: pictures through an image tokenizer and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindalle.cli.command import Parser, UsageError, check_device, check_writable, positive_int, run, say

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from stage1_vqgan.autoencoder import QuantizedAutoencoder

EXAMPLES = """\
  {prog} photo.jpg
  {prog} folder/of/pictures --model minDALL-E/1.3B --out sheet.png
  {prog} photo.jpg --model path/to/rq-vae/ffhq --depths --size 256x512"""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHEET_ROWS = 64  # pictures on the sheet; of more only the measures are given


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Encode pictures, decode the codes, and show both side by side with PSNR and codebook usage.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="files or folders")
    add("--model", default="emoji", help="bundled name, checkpoint path, release or hub id (emoji)")
    add("--ema", action="store_true", help="take the averaged weights of an rq-vae checkpoint")
    add("--size", metavar="HxW", help="resize and crop to it; default: the tokenizer's training size")
    add("--depths", action="store_true", help="residual codes: a column for each number of depths")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="pictures at once (8)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
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
    check_device(args.device)
    from tqdm import tqdm

    from mindalle.cli.output import free_stem, save_png
    from mindalle.hub import resolve_model
    from mindalle.image import contact_sheet
    from stage1_vqgan import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(args.model), use_ema=args.ema).to(args.device)
    size = _size(args.size, tokenizer)
    if args.depths and len(tokenizer.code_shape) == 2:
        raise UsageError("--depths is for residual codes (RQ-VAE), and this tokenizer has one code per position")
    totals = _Totals(tokenizer)
    with tqdm(total=len(files), unit=" pictures", disable=len(files) <= args.batch_size, file=sys.stderr) as bar:
        for batch, images, codes, columns in _reconstruct(tokenizer, files, size, args):
            totals.add(batch, images, codes, columns)
            bar.update(len(batch))
    for line in totals.lines():
        say(line)
    if len(files) > SHEET_ROWS:
        say(f"the sheet shows the first {SHEET_ROWS} of {len(files)} pictures", is_note=True)
    path = out.with_name(free_stem(out.parent, out.stem, [".png"]) + ".png")
    save_png(path, contact_sheet(totals.cells, columns=totals.num_columns + 1), {"model": str(args.model)})
    say(path)


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path} holds no pictures (of {', '.join(SUFFIXES)}): pass another folder")
        files += found
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"no image at {missing}")
    return files
