"""`mindalle benchmark`, `tools/benchmark.py`: how fast a model draws, against what the machine could do."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindalle.cli.command import (
    Parser,
    UsageError,
    add_device_options,
    check_writable,
    choose_machine,
    positive_int,
    run,
    say,
    with_option_names,
)

if TYPE_CHECKING:
    import torch

    from stage1_vqgan.autoencoder import QuantizedAutoencoder
    from stage2_transformer import (
        GPT,
        GPTConfig,
        RQTransformer,
        RQTransformerConfig,
        SamplingParams,
        SequenceModel,
    )

EXAMPLES = """\
  {prog}
  {prog} --shape mindalle-1.3b --layers 6 --precision int8 --batch-size 1 8 --compare naive
  {prog} --model path/to/model --json speed.json --plot speed.png
  {prog} --shape gpt-small --train"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Time a model: prompt, codes, pictures, memory; against the machine and the naive way.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="bundled name, checkpoint path, release or hub id (emoji)")
    add("--shape", metavar="NAME", help="a known model's shape with random weights, such as mindalle-1.3b")
    add("--layers", type=positive_int, metavar="N", help="of --shape: fewer layers, the rest extrapolated")
    add("--batch-size", type=positive_int, nargs="+", default=[1], metavar="N", help="images at once (1)")
    add("--repeats", type=positive_int, default=3, metavar="N", help="medians are over so many (3)")
    precisions = ("auto", "fp32", "bf16", "fp16", "int8")
    add("--precision", choices=precisions, default="fp32", help="of the transformer (fp32)")
    add(
        "--speculative",
        type=positive_int,
        nargs="?",
        const=8,
        metavar="W",
        help="guess W codes at a time (8)",
    )
    add("--top-k", type=positive_int, default=256, metavar="K", help="keep the K likeliest codes (256)")
    add("--cfg-scale", type=float, default=1.0, metavar="S", help="guidance; 1 = off (1)")
    add("--compare", choices=("naive",), help="take turns with decoding as the originals do it, in fp32")
    add("--train", action="store_true", help="time a training step of both stages, too")
    add_device_options(parser)
    add("--json", type=Path, metavar="FILE", help="all numbers; overwritten")
    add(
        "--plot",
        type=Path,
        metavar="PNG",
        help="time by batch size and by place; overwritten (needs matplotlib)",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "benchmark.py") -> int:
    """Run the command; returns its exit code."""
    command = shlex.join([prog, *(argv if argv is not None else sys.argv[1:])])
    return run(build_parser(prog), lambda args: benchmark(args, command), argv)


def benchmark(args: argparse.Namespace, command: str) -> None:
    """Load or build the model, measure, print the table, write the files.

    Args:
        args: of `build_parser`.
        command: the command line, for the report.

    Raises:
        UsageError: if options exclude each other.
    """
    _check_options(args)
    choose_machine(args)
    import torch

    from mindalle.benchmark.report import plot, table

    report = _measure(args, torch.device(args.device))
    report |= {"command": command, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for line in table(report):
        say(line)
    if args.json is not None:
        from checkpoint_io import atomic_path

        with atomic_path(args.json) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        say(args.json)
    if args.plot is not None:
        from mindalle.cli.output import save_png

        save_png(args.plot, plot(report), {"command": command})
        say(args.plot)


def _check_options(args: argparse.Namespace) -> None:
    if args.model is not None and args.shape is not None:
        raise UsageError("--model and --shape exclude each other: a shape has random weights")
    if args.layers is not None and args.shape is None:
        raise UsageError("--layers is for --shape: a checkpoint's layers are all needed")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise UsageError(f"--plot must end in .png, got {args.plot}")
    if args.plot is not None:
        from mindalle.report.plots import require_matplotlib

        require_matplotlib()
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path is not None:
            check_writable(path.parent, f"--{option}")
            if path.is_dir():
                raise UsageError(f"--{option} must be a file, and {path} is a directory")


def _measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from mindalle.benchmark.machine import describe_machine, measure_bandwidth, measure_multiply_adds
    from mindalle.benchmark.measure import measure_image_tokenizer
    from mindalle.benchmark.training import measure_training
    from stage2_transformer.precision import DTYPES, precision_of

    params = _params(args)
    tokenizer, model = _load(args, device, args.precision)
    precision = precision_of(model)
    limits = {
        "bytes_per_second": measure_bandwidth(device),
        "multiply_adds_per_second": measure_multiply_adds(device),
    }
    report = {
        "machine": describe_machine(device),
        "model": _describe(args, model, precision),
        "sampling": asdict(params),
        "repeats": args.repeats,
        "limits": limits,
        "image_tokenizer": [
            measure_image_tokenizer(tokenizer, size, repeats=args.repeats, device=device)
            for size in args.batch_size
        ],
        "decode": _measure_decode(args, model, params, limits, device),
        "training": None,
    }
    if args.train:
        del model  # weights in memory twice, with moments, may be too many
        tokenizer, trained = _load(args, device, "fp32")
        dtype = DTYPES.get(precision, DTYPES["fp32"])
        report["training"] = measure_training(
            tokenizer, trained, max(args.batch_size), repeats=args.repeats, dtype=dtype, device=device
        )
    return report


def _params(args: argparse.Namespace) -> SamplingParams:
    from stage2_transformer import SamplingParams

    try:
        return SamplingParams(top_k=args.top_k, cfg_scale=args.cfg_scale, window=args.speculative or 1)
    except ValueError as error:
        raise UsageError(with_option_names(str(error))) from error


def _load(
    args: argparse.Namespace, device: torch.device, precision: str
) -> tuple[QuantizedAutoencoder, GPT | RQTransformer]:
    from mindalle.benchmark.shapes import SHAPES, build_random, load_stages, with_layers

    if args.shape is None:
        return load_stages(args.model or "emoji", precision, device)
    if args.shape not in SHAPES:
        raise UsageError(f"--shape must be one of {', '.join(SHAPES)}, got {args.shape!r}")
    shape = SHAPES[args.shape]
    if args.layers is not None:
        try:
            with_layers(shape.model, args.layers)
        except ValueError as error:
            raise UsageError(str(error).replace("num_layers", "--layers", 1)) from error
    return build_random(shape, precision, device, num_layers=args.layers)


def _describe(args: argparse.Namespace, model: GPT | RQTransformer, precision: str) -> dict[str, Any]:
    import math

    from checkpoint_io import config_to_mapping
    from stage2_transformer.checkpoint import build_model

    codebook: Any = getattr(model, "codebook", None)
    plain = build_model(model.config, codebook)  # of an int8 model the weights are no parameters
    return {
        "name": args.shape or args.model or "emoji",
        "has_random_weights": args.shape is not None,
        "precision": precision,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "num_codes": math.prod(model.code_shape),
        "num_layers": _num_layers(model.config),
        "config": config_to_mapping(model.config),
    }


def _measure_decode(
    args: argparse.Namespace,
    model: GPT | RQTransformer,
    params: SamplingParams,
    limits: dict[str, float],
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row for every batch size and way of decoding."""
    from mindalle.benchmark.measure import draw_condition, measure_decoding
    from mindalle.benchmark.naive import naive
    from stage2_transformer.precision import precision_of

    precision = precision_of(model)
    ours = precision if params.window == 1 else f"{precision} window {params.window}"
    models: dict[str, SequenceModel] = {ours: model}
    precisions, settings = {ours: precision, "naive": "fp32"}, {ours: params}
    cond = draw_condition(model.config)
    cond = cond.to(device) if cond is not None else None
    # the warm-up, and the peak memory without the model to compare with
    peaks = {
        size: measure_decoding(models, cond, settings, size, repeats=1, device=device)[ours]
        for size in args.batch_size
    }
    if args.compare == "naive":
        models["naive"] = naive(model if precision == "fp32" else _load(args, device, "fp32")[1])
        settings["naive"] = replace(params, window=1)
    rows = []
    for size in args.batch_size:
        measured = measure_decoding(models, cond, settings, size, repeats=args.repeats, device=device)
        measured[ours]["peak_memory_bytes"] = peaks[size]["peak_memory_bytes"]
        for name, row in measured.items():
            slower = measured["naive"]["seconds"] if "naive" in measured and name == ours else None
            rows.append(
                {
                    "variant": name,
                    "precision": precisions[name],
                    **row,
                    **_against_machine(args, model.config, row, precisions[name], limits),
                    "speedup": slower / row["seconds"] if slower is not None else None,
                }
            )
    return rows


def _against_machine(
    args: argparse.Namespace,
    config: GPTConfig | RQTransformerConfig,
    row: dict[str, Any],
    precision: str,
    limits: dict[str, float],
) -> dict[str, Any]:
    """Shares of the machine's limits, and of a model with fewer layers what the whole one would take."""
    from mindalle.benchmark.measure import against_limits, decoding_work
    from mindalle.benchmark.shapes import SHAPES

    is_guided = args.cfg_scale != 1
    work = decoding_work(config, row["batch_size"], precision, is_guided=is_guided)
    extrapolated = None
    if args.layers is not None:
        whole = SHAPES[args.shape].model
        more = decoding_work(whole, row["batch_size"], precision, is_guided=is_guided)
        factor = more.bytes_read / work.bytes_read
        extrapolated = {
            "num_layers": _num_layers(whole),
            "code_seconds": factor * row["code_seconds"],
            "images_per_second": row["images_per_second"] / factor,
        }
    return {**against_limits(work, row["code_seconds"], limits), "extrapolated": extrapolated}


def _num_layers(config: GPTConfig | RQTransformerConfig) -> int:
    """Of the GPT, or of the RQ-Transformer's body."""
    from stage2_transformer import GPTConfig

    return (config.transformer if isinstance(config, GPTConfig) else config.body).num_layers
