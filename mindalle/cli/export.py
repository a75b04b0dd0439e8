"""`mindalle export`, `tools/export.py`: checkpoints of training runs to one native checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindalle.cli.command import (
    Parser,
    UsageError,
    check_writable,
    positive_int,
    run,
    say,
    with_option_names,
)

EXAMPLES = """\
  {prog} --image-tokenizer runs/vqgan/last.ckpt runs/tokenizer
  {prog} --image-tokenizer runs/tokenizer --model runs/gpt/last.ckpt \\
      --text-tokenizer runs/text_tokenizer.json --top-k 256 --dtype fp16 my-model"""


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Write a native checkpoint, which Pipeline.from_pretrained loads, from training runs.",
        examples=EXAMPLES,
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to create")
    parser.add_argument(
        "--image-tokenizer", type=Path, required=True, metavar="PATH", help="run's .ckpt, or native"
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="run's .ckpt of the sequence model")
    parser.add_argument("--text-tokenizer", type=Path, metavar="FILE", help="text_tokenizer.json of the run")
    parser.add_argument("--temperature", type=float, default=1.0, help="default to store (1)")
    parser.add_argument("--top-k", type=positive_int, help="default to store")
    parser.add_argument("--top-p", type=float, help="default to store")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="default to store (1)")
    parser.add_argument("--card", type=Path, metavar="FILE", help="model card to store as README.md")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="stored type; default fp32")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "export.py") -> int:
    """Run the command; returns its exit code."""
    return run(build_parser(prog), export_checkpoint, argv)


def export_checkpoint(args: argparse.Namespace) -> None:
    """Load the runs' weights and save them as native."""
    if args.text_tokenizer is not None and args.model is None:
        raise UsageError("--text-tokenizer is of a model: pass --model too")
    if args.card is not None and not args.card.is_file():
        raise FileNotFoundError(f"no model card at {args.card}")
    check_writable(args.destination, "DST")
    from mindalle.checkpoint import SamplingDefaults, save_checkpoint
    from mindalle.pipeline import PRECISIONS
    from mindalle.text import TextTokenizer
    from stage1_vqgan import VQGAN, VQGANConfig, load_tokenizer
    from stage2_transformer import GPT, GPTConfig, SamplingParams
    from stage2_transformer.checkpoint import check_fit

    try:
        params = SamplingParams(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, cfg_scale=args.cfg_scale
        )
    except ValueError as error:
        raise UsageError(with_option_names(str(error))) from error
    if args.image_tokenizer.is_dir():
        image_tokenizer: Any = load_tokenizer(args.image_tokenizer)
    else:
        image_tokenizer = _from_run(args.image_tokenizer, VQGAN, VQGANConfig)
    model = _from_run(args.model, GPT, GPTConfig) if args.model else None
    text_tokenizer = None
    if model is not None:
        check_fit(
            model.config, image_tokenizer.code_shape, image_tokenizer.codebook(), source=str(args.model)
        )
        condition = model.config.condition
        if (condition.kind == "text") != (args.text_tokenizer is not None):
            raise UsageError(
                "--text-tokenizer goes with a model that reads text: "
                f"{args.model} has the condition {condition.kind!r}"
            )
        if args.text_tokenizer is not None:
            text_tokenizer = TextTokenizer.from_file(
                args.text_tokenizer, length=condition.length, vocab_size=condition.vocab_size
            )
    save_checkpoint(
        args.destination,
        image_tokenizer=image_tokenizer,
        model=model,
        text_tokenizer=text_tokenizer,
        sampling=SamplingDefaults(params=params),
        card=args.card.read_text(encoding="utf-8") if args.card else "",
        dtype=PRECISIONS[args.dtype] if args.dtype else None,
    )
    say(args.destination)


def _from_run(path: Path, cls: type[Any], config_cls: type[Any]) -> Any:
    """The model inside a Lightning checkpoint of one of this project's training modules."""
    import torch

    from checkpoint_io import CheckpointError, config_from_mapping, load_strict, read_tensors

    content = read_tensors(path)
    hyper_parameters = content.get("hyper_parameters")
    config = hyper_parameters.get("config") if isinstance(hyper_parameters, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(
            f"{path} is no checkpoint of a training run: it needs a state_dict and hyper_parameters.config"
        )
    config = config_from_mapping(config_cls, config, where=f"hyper-parameters of {path}")
    with torch.device("meta"):
        model = cls(config)
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith("model.")
    }
    load_strict(model, weights, source=str(path))
    return model.eval()
