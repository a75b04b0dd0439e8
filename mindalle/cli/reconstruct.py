"""`mindalle reconstruct`, `tools/reconstruct.py`: pictures through an image tokenizer and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindalle.cli.command import Parser, UsageError, positive_int, run

if TYPE_CHECKING:
    from torch import Tensor

    from stage1_vqgan.autoencoder import QuantizedAutoencoder

EXAMPLES = """\
  reconstruct.py photo.jpg
  reconstruct.py folder/of/pictures --model minDALL-E/1.3B --out sheet.png
  reconstruct.py photo.jpg --model path/to/rq-vae/ffhq --depths --size 256x512"""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def build_parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="reconstruct.py",
        description="Encode pictures, decode the codes, and show both side by side with PSNR and codebook usage.",
        examples=EXAMPLES,
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files or folders")
    parser.add_argument("--model", default="emoji", help="bundled name, checkpoint path, release or hub id (emoji)")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of an rq-vae checkpoint")
    parser.add_argument("--size", metavar="HxW", help="resize and crop to it; default: the tokenizer's training size")
    parser.add_argument("--depths", action="store_true", help="residual codes: a column for each number of depths")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="pictures at once (8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/reconstruction.png"), metavar="FILE", help="sheet (outputs/reconstruction.png)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(), reconstruct_pictures, argv)


def reconstruct_pictures(args: argparse.Namespace) -> None:
    """Load the tokenizer, reconstruct, print measures, write the sheet."""
    import torch

    from mindalle.cli.output import free_stem, save_png
    from mindalle.hub import resolve_model
    from mindalle.image import contact_sheet, fit, open_image, psnr, to_pil, to_tensor
    from stage1_vqgan import load_tokenizer

    files = _image_files(args.images)
    tokenizer = load_tokenizer(resolve_model(args.model), use_ema=args.ema).to(args.device)
    size = _size(args.size, tokenizer)
    if args.depths and len(tokenizer.code_shape) == 2:
        raise UsageError("--depths is for residual tokenizers (RQ-VAE); this one has a single code per position")
    images = torch.stack([to_tensor(fit(open_image(file), size)) for file in files])
    codes, reconstructions = _reconstruct(tokenizer, images, args)
    for file, value in zip(files, psnr(images, reconstructions[-1]).tolist(), strict=True):
        print(f"{file}  PSNR {value:.2f} dB")
    for depths, decoded in enumerate(reconstructions, start=1):
        name = f"{depths} of {len(reconstructions)} depths" if args.depths else "mean"
        print(f"{name}  PSNR {psnr(images, decoded).mean():.2f} dB over {len(files)} pictures")
    for line in _usage(codes, tokenizer):
        print(line)
    cells = [to_pil(column) for column in (images, *reconstructions)]
    rows = [cell for row in zip(*cells, strict=True) for cell in row]
    out: Path = args.out if args.out.suffix == ".png" else args.out / "reconstruction.png"
    path = out.with_name(free_stem(out.parent, out.stem) + ".png")
    save_png(path, contact_sheet(rows, columns=len(cells)), {"model": str(args.model)})
    print(path)


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise FileNotFoundError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
            files += found
        else:
            files.append(path)
    return files


def _size(text: str | None, tokenizer: QuantizedAutoencoder) -> tuple[int, int]:
    """(height, width) in pixels."""
    if text is None:
        return (tokenizer.convnet.image_size, tokenizer.convnet.image_size)
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UsageError(f"--size must be HxW, such as 256x512, got {text!r}") from None
    if min(height, width) < 1 or height % tokenizer.downsampling or width % tokenizer.downsampling:
        raise UsageError(f"--size must be multiples of {tokenizer.downsampling} for this tokenizer, got {text}")
    return (height, width)


def _reconstruct(
    tokenizer: QuantizedAutoencoder, images: Tensor, args: argparse.Namespace
) -> tuple[Tensor, list[Tensor]]:
    """Codes, and the reconstructions: one, or one for each number of depths."""
    import torch
    from tqdm import tqdm

    depths = range(1, tokenizer.code_shape[2] + 1) if args.depths else [None]
    codes: list[Tensor] = []
    columns: list[list[Tensor]] = [[] for _ in depths]
    with torch.inference_mode():
        for batch in tqdm(images.split(args.batch_size), unit="batch", disable=len(images) <= args.batch_size, file=sys.stderr):
            codes.append(tokenizer.encode(batch.to(args.device)).cpu())
            for column, depth in zip(columns, depths, strict=True):
                kept = codes[-1] if depth is None else codes[-1][..., :depth]
                column.append(tokenizer.decode(kept.to(args.device)).cpu())
    return torch.cat(codes), [torch.cat(column) for column in columns]


def _usage(codes: Tensor, tokenizer: QuantizedAutoencoder) -> list[str]:
    """A line per depth: how many entries of the codebook these pictures use, and how evenly."""
    import torch

    by_depth = codes.flatten(0, 2).T if codes.ndim == 4 else codes.flatten()[None]  # (D, M)
    lines = []
    for depth, row in enumerate(by_depth):
        counts = torch.bincount(row, minlength=tokenizer.codebook_size).double()
        shares = counts[counts > 0] / counts.sum()
        perplexity = (-(shares * shares.log()).sum()).exp()
        name = f"codebook, depth {depth + 1}" if len(by_depth) > 1 else "codebook"
        lines.append(
            f"{name}  {len(shares)} of {tokenizer.codebook_size} entries used by {len(row)} codes, "
            f"perplexity {perplexity:.1f}"
        )
    return lines
