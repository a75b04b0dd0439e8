"""Section `depths`: what each depth of residual codes adds, and how much of its codebook is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mindalle.evaluation.codebook import CODEBOOK_RULES, codebook_measures
from mindalle.evaluation.pictures import PictureSet, picture_batches, read_samples
from mindalle.evaluation.reconstruction import measure_reconstruction, quality_measures
from mindalle.evaluation.refusal import refusal
from mindalle.image import fit, to_pil, to_tensor
from mindalle.progress import progress_bar
from mindalle.report.lab import NUM_EXAMPLES, Lab
from mindalle.report.page import Block, Figure
from mindalle.report.plots import Curve, Panel, draw_panels
from mindalle.report.scores import networks, score_panels, score_table, value

BATCH = 32


def settings(lab: Lab) -> dict[str, Any]:
    """What decides over the results."""
    return lab.settings(has_drawings=False)


def measure(lab: Lab, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Reconstruct the data from 1, 2, ... D depths.

    Args:
        lab: what to measure with.
        folder: not used: nothing is drawn.

    Returns:
        A row of measures for each number of depths and for each codebook, and what is left out.
    """
    tokenizer = lab.pipe.image_tokenizer
    dims = lab.num_components or lab.network.num_features
    problem = refusal("rfd", lab.num_pictures, lab.num_pictures, dims)
    network = lab.network if problem is None else None
    examples: list[Tensor] = []
    found = measure_reconstruction(tokenizer, _batches(lab, examples), network=network, has_all_depths=True)
    measures = quality_measures(
        found, network=network, num_components=lab.num_components, seed=lab.job.seed, may_refuse=True
    )
    sizes = tokenizer.codebook_sizes
    left_out = [f"Fréchet distances: {problem}"] if problem is not None else []
    if len(tokenizer.codebook_sizes) == 1:
        left_out.append("depths: this tokenizer has one code per position, so that there is one row")
    codebooks = codebook_measures(found.codes, sizes, seed=lab.job.seed)
    results = {
        "sheet": _draw_sheet(lab, torch.stack(examples)),
        "codebook_sizes": list(sizes),
        "by_depth": _rows([one.record() for one in measures], len(sizes)),
        "codebooks": _rows([one.record() for one in codebooks], len(sizes)),
    }
    return results, left_out


def _batches(lab: Lab, examples: list[Tensor]) -> Iterator[Tensor]:
    """The data as the tokenizer takes them; a few from all over them are kept as examples."""
    data = PictureSet(name=lab.source.name, fingerprint=lab.source.fingerprint)
    samples = read_samples(lab.source, lab.num_pictures)
    bar = progress_bar(samples, desc="reconstructing", total=lab.num_pictures, unit=" pictures")
    for batch in picture_batches(bar, data, BATCH):
        images = [to_tensor(fit(sample.image, lab.size)) for sample in batch]
        # of n pictures those at 1/10, 3/10, ... of n, if there are five
        places = {(2 * i + 1) * lab.num_pictures // (2 * NUM_EXAMPLES) for i in range(NUM_EXAMPLES)}
        first = len(data) - len(batch)
        examples += [images[place - first] for place in sorted(places) if first <= place < len(data)]
        yield torch.stack(images)


def _rows(measures: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Measures of all depths, depth by depth -> a row each, without the depth in the metrics' names."""
    per_depth = len(measures) // count
    return [
        {
            "depth": depth + 1,
            "measures": [
                one | {"metric": one["metric"].partition(",")[0]}
                for one in measures[depth * per_depth : (depth + 1) * per_depth]
            ],
        }
        for depth in range(count)
    ]


def _draw_sheet(lab: Lab, images: Tensor) -> str:
    """Pictures of the data in the first row, below them what 1, 2, ... D depths leave of them."""
    tokenizer = lab.pipe.image_tokenizer
    with torch.inference_mode():
        kept = tokenizer.coarse_to_fine(tokenizer.encode(images))
        rows: list[list[Image.Image]] = [to_pil(images), *(to_pil(tokenizer.decode(part)) for part in kept)]
    return lab.write_sheet("depths.png", [image for row in rows for image in row], columns=len(images))


def show(results: Mapping[str, Any]) -> Iterator[Block]:
    """Figures and tables of the results."""
    rows, codebooks = results["by_depth"], results["codebooks"]
    count = len(rows)
    below = "what the tokenizer makes of them" if count == 1 else f"reconstructions from 1 to {count} depths"
    yield Figure(
        file=results["sheet"],
        caption=f"Pictures of the data in the first row; below them {below}.",
        look="Which details each row adds, and which are in none but the first."
        if count > 1
        else "Which details the second row lacks.",
    )
    depths, names = [row["depth"] for row in rows], [str(row["depth"]) for row in rows]
    if count > 1:
        yield Figure(
            file="depths-quality.svg",
            svg=draw_panels(score_panels(rows, depths, "depths decoded")),
            caption=f"Reconstruction by number of depths; the bands are 95% intervals. {networks(rows)}.",
            look="How much each further depth still adds, against the width of the bands.",
        )
    label = "depths" if count > 1 else "code"
    yield score_table(rows, names, label, f"Reconstruction of the data. {networks(rows)}.")
    if count > 1:
        yield Figure(
            file="depths-codebooks.svg",
            svg=draw_panels([_codebook_panel(codebooks, metric) for metric in CODEBOOK_RULES]),
            caption=f"Use of the codebook of each depth by the codes of {_num_pictures(codebooks)} pictures. "
            "Usage: share of the entries that are used at all; perplexity: how many entries, used equally, "
            "would be as varied.",
            look="Depths with low usage waste entries; a perplexity far below the codebook's size means "
            "that few entries do most of the work.",
        )
    sizes = ", ".join(map(str, results["codebook_sizes"]))
    caption = f"Codebooks of {sizes} entries over {_num_pictures(codebooks)} pictures."
    yield score_table(codebooks, [str(row["depth"]) for row in codebooks], "depth", caption)


def _codebook_panel(rows: list[Mapping[str, Any]], metric: str) -> Panel:
    depths = [row["depth"] for row in rows]
    curve = Curve(name=metric, x=depths, y=[value(row, metric) for row in rows])
    return Panel(title=metric, x_label="depth", y_label=metric, curves=[curve], begins_at_zero=True)


def _num_pictures(rows: list[Mapping[str, Any]]) -> int:
    return int(rows[0]["measures"][0]["num_images"])
