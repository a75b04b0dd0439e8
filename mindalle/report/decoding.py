"""Section `decoding`: what a cache saves, and what depth saves, on models of random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_io import config_to_mapping
from mindalle.benchmark.measure import draw_condition, measure_decoding
from mindalle.benchmark.naive import NaiveCache, NaiveGPT, run_stack
from mindalle.progress import progress_bar
from mindalle.report.lab import Lab
from mindalle.report.page import Block, Figure, Table
from mindalle.report.plots import Curve, Panel, draw_panels
from mindalle.report.records import text
from stage2_transformer import (
    GPT,
    GPTConfig,
    RQTransformer,
    RQTransformerConfig,
    SamplingParams,
    SequenceModel,
)

GRID, RESIDUAL = (16, 16), (8, 8, 4)  # as many codes
CODEBOOK_WIDTH = 64
CACHED, NAIVE, UNCACHED = "cached", "naive cache", "no cache"
DEVICE = torch.device("cpu")


class UncachedGPT(NaiveGPT):
    """A GPT that reads prompt and codes anew for every code, as a lecture's first version does."""

    def _after_prompt(self, prompt: Tensor, cache: NaiveCache) -> Tensor:
        cache.body.append(prompt)
        return self._classify(run_stack(self.model.transformer, prompt, []))

    def _after_code(self, cache: NaiveCache) -> Tensor:
        length = cache.codes.shape[1]
        codes = self.model.code_embedding(cache.codes) + self.model.code_positions[:length]  # (B, n, C)
        return self._classify(run_stack(self.model.transformer, torch.cat([cache.body[0], codes], dim=1), []))


def settings(lab: Lab) -> dict[str, Any]:
    """What decides over the results: the shapes, not the weights."""
    if lab.pipe.model is None:
        return {"gpt": None}
    gpt, rq = shapes(lab)
    return {
        "gpt": config_to_mapping(gpt),
        "rq_transformer": config_to_mapping(rq),
        "lengths": lab.job.lengths,
        "batch_sizes": lab.job.batch_sizes,
        "repeats": lab.job.repeats,
        "threads": torch.get_num_threads(),
    }


def shapes(lab: Lab) -> tuple[GPTConfig, RQTransformerConfig]:
    """A GPT and an RQ-Transformer of equal width, layers, condition and codebook, after the model at hand."""
    config = lab.model.config
    if isinstance(config, GPTConfig):
        num_layers, vocab_size = max(2, config.transformer.num_layers), config.vocab_size
        whole, num_head = replace(config.transformer, num_layers=num_layers), max(1, num_layers // 4)
    else:
        num_head, vocab_size = config.head.num_layers, max(config.codebook_sizes)
        whole = replace(config.body, num_layers=config.body.num_layers + num_head)
    gpt = GPTConfig(transformer=whole, condition=config.condition, vocab_size=vocab_size, code_shape=GRID)
    rq = RQTransformerConfig(
        body=replace(whole, num_layers=whole.num_layers - num_head),
        head=replace(whole, num_layers=num_head),
        condition=config.condition,
        codebook_sizes=(vocab_size,) * RESIDUAL[2],
        code_shape=RESIDUAL,
        codebook_width=CODEBOOK_WIDTH,
    )
    return gpt, rq


@torch.inference_mode()
def measure(lab: Lab, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Time three ways of decoding by the number of codes, and two shapes of codes by batch size.

    Args:
        lab: says which shapes.
        folder: not used: nothing is drawn.

    Returns:
        Rows of times, and what is left out.
    """
    if lab.pipe.model is None:
        return {}, ["this checkpoint holds an image tokenizer alone, whose shape says nothing of a model's"]
    gpt, rq = shapes(lab)
    _time_caches(replace(gpt, code_shape=(2, 2)), 1)  # not counted: a process's first calls are slower
    by_length = [
        {"num_codes": side * side, **_time_caches(replace(gpt, code_shape=(side, side)), lab.job.repeats)}
        for side in progress_bar(lab.job.lengths, desc="timing caches", unit=" lengths")
    ]
    models: dict[str, SequenceModel] = {_shape(GRID): _build(gpt), _shape(RESIDUAL): _build(rq)}
    _time(models, gpt, 1, 1)
    by_batch = [
        {"batch_size": size, **_time(models, gpt, size, lab.job.repeats)}
        for size in progress_bar(lab.job.batch_sizes, desc="timing shapes", unit=" batch sizes")
    ]
    results = {
        "by_length": by_length,
        "by_batch": by_batch,
        "width": gpt.transformer.width,
        "num_layers": gpt.transformer.num_layers,
        "num_head_layers": rq.head.num_layers,
        "repeats": lab.job.repeats,
    }
    return results, []


def _time_caches(config: GPTConfig, repeats: int) -> dict[str, Any]:
    model = _build(config)
    assert isinstance(model, GPT)
    models: dict[str, SequenceModel] = {CACHED: model, NAIVE: NaiveGPT(model), UNCACHED: UncachedGPT(model)}
    return _time(models, config, 1, repeats)


def _time(
    models: Mapping[str, SequenceModel], config: GPTConfig, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Seconds of a whole drawing by each model: the median, and all of them."""
    params = SamplingParams(top_k=min(256, config.vocab_size))
    found = measure_decoding(
        models,
        draw_condition(config),
        dict.fromkeys(models, params),
        batch_size,
        repeats=repeats,
        device=DEVICE,
    )
    return {
        "seconds": {name: one["seconds"] for name, one in found.items()},
        "seconds_of_all_repeats": {name: one["seconds_of_all_repeats"] for name, one in found.items()},
    }


def _build(config: GPTConfig | RQTransformerConfig) -> GPT | RQTransformer:
    """With random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(config, GPTConfig):
            return GPT(config).eval()
        codebook = torch.randn(config.depth, max(config.codebook_sizes), config.codebook_width)
        return RQTransformer(config, codebook).eval()


def _shape(code_shape: tuple[int, ...]) -> str:
    return "x".join(map(str, code_shape))


def show(results: Mapping[str, Any]) -> Iterator[Block]:
    """Figures and tables of the results."""
    if not results:
        return
    model = f"width {results['width']}, {results['num_layers']} layers, random weights, float32"
    medians = f"medians of {results['repeats']}"
    rows = results["by_length"]
    panels = [
        Panel(
            title="one picture" + (", logarithmic" if has_log else ""),
            x_label="codes",
            y_label="seconds",
            curves=_curves(rows, "num_codes", per=None),
            has_log_y=has_log,
        )
        for has_log in (False, True)
    ]
    yield Figure(
        file="decoding-cache.svg",
        svg=draw_panels(panels),
        caption=f"Time to draw the codes of one picture by their number: GPT of {model}; {medians}. "
        "Naive cache: keys and values are put together anew for every code, as in the originals' code.",
        look="How the curves part: without a cache every code takes a pass over all before it, with one over "
        "itself alone.",
    )
    yield _table(rows, "num_codes", "codes", f"Seconds for one picture; {medians}.")
    rows = results["by_batch"]
    panels = [
        Panel(
            title=title,
            x_label="batch size",
            y_label=label,
            curves=_curves(rows, "batch_size", per=per),
            has_log_x=True,
            begins_at_zero=True,
        )
        for title, label, per in (
            ("time of a picture", "seconds", "picture"),
            ("throughput", "pictures per second", "second"),
        )
    ]
    yield Figure(
        file="decoding-shapes.svg",
        svg=draw_panels(panels),
        caption=f"256 codes as one grid ({_shape(GRID)}, a GPT) or as four depths of a smaller one "
        f"({_shape(RESIDUAL)}, an RQ-Transformer, {results['num_head_layers']} of whose layers are its "
        f"head's): {model}; {medians}.",
        look="How far apart the curves are: with depth, the deep stack runs once for four codes.",
    )
    yield _table(rows, "batch_size", "batch", f"Seconds for a batch; {medians}.")


def _curves(rows: list[Mapping[str, Any]], place: str, per: str | None) -> list[Curve]:
    """Seconds of each model by place; per picture of a batch, or pictures per second."""

    def scaled(row: Mapping[str, Any], seconds: float) -> float:
        if per is None:
            return seconds
        each = seconds / float(row["batch_size"])
        return each if per == "picture" else 1 / each

    return [
        Curve(
            name=name,
            x=[row[place] for row in rows],
            y=[scaled(row, row["seconds"][name]) for row in rows],
        )
        for name in rows[0]["seconds"]
    ]


def _table(rows: list[Mapping[str, Any]], place: str, label: str, caption: str) -> Table:
    names = list(rows[0]["seconds"])
    first = names[0]
    return Table(
        header=[label, *names, *(f"{name} / {first}" for name in names[1:])],
        rows=[
            [
                str(row[place]),
                *(text(row["seconds"][name]) for name in names),
                *(f"{row['seconds'][name] / row['seconds'][first]:.2f}" for name in names[1:]),
            ]
            for row in rows
        ],
        caption=caption,
    )
