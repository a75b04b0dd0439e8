"""Codebook averages in one process, or as a script in one of two: they must come to the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # this folder is named like the package

from stage1_vqgan import ResidualQuantizerConfig, VectorQuantizerConfig
from stage1_vqgan.quantize import (
    CodebookAverages,
    CodebookTrainingConfig,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
)

KINDS, NUM_BATCHES, WIDTH, SIZE = ("vector", "shared", "separate"), 5, 4, 40


def draw_batches() -> list[Tensor]:
    """Batches (4, C, 2, 3), in narrow clouds: many entries go unchosen, and restart."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, WIDTH, 1, 1, generator=generator)
        + 0.3 * torch.randn(4, WIDTH, 2, 3, generator=generator)
        for _ in range(NUM_BATCHES)
    ]


def state_after(kind: str, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Averages and codebooks after these batches, each process with its own."""
    torch.manual_seed(0)
    quantizer: Quantizer
    if kind == "vector":
        quantizer = VectorQuantizer(VectorQuantizerConfig(codebook_size=SIZE, width=WIDTH))
    else:
        config = ResidualQuantizerConfig(codebook_sizes=(SIZE,) * 3, width=WIDTH, is_shared=kind == "shared")
        quantizer = ResidualQuantizer(config)
    averages = CodebookAverages(quantizer, CodebookTrainingConfig(restart_after=2, decay=0.8))
    for latents in batches:
        averages.start(latents)
        averages.update(latents, quantizer.encode(latents))
    return dict(quantizer.state_dict()) | dict(averages.state_dict())


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    halves = [latents.chunk(2)[rank] for latents in draw_batches()]
    torch.save({kind: state_after(kind, halves) for kind in KINDS}, folder / f"{rank}.pt")
    dist.destroy_process_group()
