"""The recipes in `configs/`: they parse, their parts go together, and their models are the published ones.

Nothing is trained, loaded or downloaded: parameters are counted on torch's meta device.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.strategies import StrategyRegistry

from mindalle.cli.train import TrainingCLI
from mindalle.data import CodeData, ImageData
from mindalle.hub import RELEASES, bundled_models, resolve_text_tokenizer
from mindalle.run import load_image_tokenizer
from mindalle.text import TextTokenizer
from mindalle.training import ClipTraining, PromptSheet
from mindalle.training.sequence import SequenceTraining
from mindalle.training.tokenizer import TokenizerTraining
from stage1_vqgan import RQVAE, VQGAN, PyramidVAE
from stage2_transformer.checkpoint import check_fit

ROOT = Path(__file__).parents[1]
RECIPES = {
    str(path.relative_to(ROOT / "configs").with_suffix("")): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in RECIPES.items()}
ORIGINALS = [name for name, text in TEXTS.items() if "# Source: " in text]
TAMING = ["imagenet/vqgan_f16_1024", "imagenet/vqgan_f16_16384", "imagenet/gpt_1.4b"]

# A release that a recipe starts from, and the recipes that describe its parts.
RELEASED = {"minDALL-E/1.3B": {"model": "cc3m/mindalle_1.3b", "image_tokenizer": "imagenet/vqgan_f16_16384"}}

# Millions of parameters as published or counted in the original's code, and what ours lacks of them. Fusing
# query, key and value does not change a count; moving averages of codebooks are no parameters on either side.
PADDING_ROW = 256  # of the RQ-VAE's codebook, which all depths share: it is all zeros, and no code names it
PUBLISHED = {
    "imagenet/vqgan_f16_16384": ("76.07", 0),
    "imagenet/rqvae_8x8x4": ("104.40", PADDING_ROW),
    "ffhq/rqvae_8x8x4": ("100.73", PADDING_ROW),
    "lsun/rqvae_8x8x4": ("104.40", PADDING_ROW),
    # classes are ids of the codes' table in the original, and have 1000 rows of their own here
    "imagenet/gpt_1.4b": ("1410.6", -1000 * 1536),
    "cc3m/mindalle_1.3b": ("1291.08", 0),
    "transfer/mindalle_text": ("1291.08", 0),
    "transfer/mindalle_imagenet_class": ("1242.19", 0),
    "transfer/mindalle_imagenet_uncond": ("1240.65", 0),
    "ffhq/rq_transformer_355m": ("355.39", 0),
    "lsun/rq_transformer_church_370m": ("370.09", 0),
    "lsun/rq_transformer_cat_612m": ("612.06", 0),
    "lsun/rq_transformer_bedroom_612m": ("612.06", 0),
    "imagenet/rq_transformer_480m": ("480.92", 0),
    "imagenet/rq_transformer_821m": ("820.90", 0),
    "imagenet/rq_transformer_1.4b": ("1387.53", 0),
    "imagenet/rq_transformer_3.8b": ("3822.49", 0),
    "cc3m/rq_transformer_654m": ("654.06", 0),
    "cc3m/rq_transformer_3.9b": ("3903.9", 0),  # "3.9B": its shape is assumed
}
recipes = pytest.mark.parametrize("name", RECIPES)


class ParserOnly(TrainingCLI):
    """The command line of `tools/train.py` up to the point where it would build anything."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


@cache
def parser() -> LightningArgumentParser:
    first = next(iter(RECIPES.values()))
    cli = ParserOnly(args=["--config", str(first), "--seed_everything=false"], run=False)
    parser: LightningArgumentParser = cli.parser
    return parser


@cache
def parse(*args: str) -> Namespace:
    """The settings of `tools/train.py fit ARGS`."""
    located = [str(ROOT / arg) if arg.startswith("configs/") else arg for arg in args]
    return parser().parse_args(located)


def settings(name: str) -> Namespace:
    return parse("--config", f"configs/{name}.yaml")


@cache
def commands(name: str) -> list[tuple[str, list[str]]]:
    """The commands in a recipe's comment: script and arguments."""
    joined = re.sub(r"\\\n# *", "", TEXTS[name])
    found = re.findall(r"^# +python tools/(\w+)\.py (.*)$", joined, flags=re.MULTILINE)
    return [(script, shlex.split(arguments, comments=True)) for script, arguments in found]


def all_commands(script: str) -> Iterator[list[str]]:
    return (arguments for name in RECIPES for found, arguments in commands(name) if found == script)


def parse_command(script: str, arguments: Sequence[str]) -> argparse.Namespace:
    module = import_module(f"mindalle.cli.{script}")
    parsed: argparse.Namespace = module.build_parser(script).parse_intermixed_args(arguments)
    return parsed


@cache
def runs() -> dict[str, Namespace]:
    """Folder of a run -> its settings: of each recipe, and of the commands in comments that change one."""
    found = {config.trainer.default_root_dir: config for config in map(settings, RECIPES)}
    for _, *arguments in all_commands("train"):
        config = parse(*arguments)
        found.setdefault(config.trainer.default_root_dir, config)
    return found


@cache
def build(folder: str) -> Any:
    """Model, data module and callbacks of a run, without memory for the parameters."""
    config = runs()[folder].clone()
    arguments = config.model.init_args
    if "loss" in arguments and "perceptual" in (arguments.loss or {}):
        arguments.loss.perceptual = "none"  # its weights would be downloaded
    is_bundled = {arguments.pretrained, arguments.get("start_from")} & set(bundled_models())
    if arguments.pretrained is not None and not is_bundled:
        assert arguments.config is None
        arguments.config = pretrained_config(arguments.pretrained)
        if arguments.get("condition") is not None:
            arguments.config.condition = arguments.pop("condition")
        arguments.pretrained = None
        if "decoder_only" in arguments:
            arguments.decoder_only = False  # there is no decoder to keep codes for
    with nullcontext() if is_bundled else torch.device("meta"):
        return parser().instantiate_classes(config)


@cache
def exported() -> dict[str, str]:
    """Native checkpoint that a command in a comment writes -> the run it is of."""
    exports = [parse_command("export", arguments) for arguments in all_commands("export")]
    return {str(args.destination): str(args.run) for args in exports}


def pretrained_config(pretrained: str) -> Namespace:
    """The config of a model that a recipe starts from."""
    if pretrained in RELEASES:
        source = settings(RELEASED[pretrained]["model"])
    else:
        source = runs()[exported().get(pretrained, pretrained)]
    found: Namespace = source.model.init_args.config.clone()
    return found


def built(name: str) -> Any:
    return build(settings(name).trainer.default_root_dir)


def num_parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in built(name).model.model.parameters())


def find_image_tokenizer(name: str) -> VQGAN | RQVAE | PyramidVAE:
    if name in bundled_models():
        tokenizer = load_image_tokenizer(name)
    elif name in RELEASES:
        tokenizer = built(RELEASED[name]["image_tokenizer"]).model.model
    else:
        tokenizer = build(exported().get(name, name)).model.model
    assert isinstance(tokenizer, (VQGAN, RQVAE, PyramidVAE))
    return tokenizer


def text_sizes(name: str) -> tuple[int, int | None]:
    """Vocabulary and ids per caption of a text tokenizer: a model's, or as a comment says to train it.

    A bundled one's file does not say for how many ids it was made.
    """
    if name in RELEASES:
        condition = pretrained_config(name).condition
        return condition.vocab_size, condition.length
    if name in bundled_models():
        return TextTokenizer.from_file(resolve_text_tokenizer(name), length=1).vocab_size, None
    trainings = [parse_command("train_tokenizer", arguments) for arguments in all_commands("train_tokenizer")]
    (sizes,) = {(args.vocab_size, args.length) for args in trainings if str(args.out) == name}
    return sizes


@recipes
def test_it_parses(name: str) -> None:
    """Unknown keys and wrong types are errors of the parser; so is a command of the comment that is wrong."""
    config = settings(name)
    assert config.trainer.max_steps > 0 or (config.trainer.max_epochs or 0) > 0
    assert f"configs/{name}.yaml" in [path for args in all_commands("train") for path in args]
    for script, arguments in commands(name):
        if script == "train":
            assert arguments[0] == "fit"
            parse(*arguments[1:])
        else:
            parse_command(script, arguments)


def test_a_misspelt_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "misspelt.yaml"
    text = TEXTS["imagenet/rq_transformer_480m"]
    file.write_text(text.replace("codebook_width:", "codebok_width:"), encoding="utf-8")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert "codebok_width" in capsys.readouterr().err


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str) -> None:
    published, num_lacking = PUBLISHED[name]
    num_digits = len(published.partition(".")[2])
    assert f"{(num_parameters(name) + num_lacking) / 1e6:.{num_digits}f}" == published


def test_numbers_that_follow_from_each_other() -> None:
    """They differ by rows of one table alone; of the VQGAN with 1024 codes no number was published."""
    counts = {name: num_parameters(name) for name in RECIPES if name in {*PUBLISHED, *TAMING}}
    assert counts["imagenet/vqgan_f16_16384"] - counts["imagenet/vqgan_f16_1024"] == (16384 - 1024) * 256
    assert counts["imagenet/rqvae_8x8x4"] - counts["ffhq/rqvae_8x8x4"] == (16384 - 2048) * 256
    transferred = [counts[f"transfer/mindalle_imagenet_{kind}"] for kind in ("class", "uncond")]
    assert transferred[0] - transferred[1] == 999 * 1536
    # what reads and predicts text: table and head of 16384, positions of 64
    assert counts["cc3m/mindalle_1.3b"] - transferred[1] == (2 * 16384 + 64 - 1) * 1536


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_comment_is_true(name: str) -> None:
    """Number of parameters and global batch, and that every recipe of an original tells its batch."""
    config = settings(name)
    for number in re.findall(r"([\d.]+)M parameters", TEXTS[name]):
        assert f"{num_parameters(name) / 1e6:.{len(number.partition('.')[2])}f}" == number
    (batch,) = re.findall(r"^# Global batch: (\d+) = (.*)$", TEXTS[name], flags=re.MULTILINE)
    shown = re.fullmatch(r"(\d+) devices? x (\d+)(?: x (\d+) accumulated)?", batch[1])
    assert shown is not None
    devices, batch_size, accumulated = (int(number or 1) for number in shown.groups())
    trainer = config.trainer
    assert (devices, batch_size) == (trainer.devices, config.data.init_args.batch_size)
    assert accumulated == trainer.accumulate_grad_batches
    assert int(batch[0]) == devices * batch_size * accumulated * trainer.num_nodes


@pytest.mark.parametrize("name", TAMING)
def test_learning_rate_per_picture(name: str) -> None:
    """In taming-transformers it is 4.5e-6 times the global batch."""
    config = settings(name)
    assert config.trainer.accumulate_grad_batches == 1
    global_batch = config.trainer.devices * config.data.init_args.batch_size
    assert config.model.init_args.optimizer.learning_rate == pytest.approx(4.5e-6 * global_batch)


@recipes
def test_data_and_model_agree(name: str) -> None:
    training, data = built(name).model, built(name).data
    if isinstance(data, ImageData):
        model = training.config if isinstance(training, ClipTraining) else training.model.convnet
        assert data.transform.image_size == model.image_size
    if isinstance(training, ClipTraining) and training.text_tokenizer is not None:
        vocab_size, length = text_sizes(training.text_tokenizer)
        # start and end beside the words
        assert training.config.vocab_size == vocab_size + 2
        assert length is None or training.config.context_length <= length + 2
    assert isinstance(training, SequenceTraining) == isinstance(data, CodeData)
    assert isinstance(training, TokenizerTraining | ClipTraining) == isinstance(data, ImageData)


CODES = [name for name, text in TEXTS.items() if "mindalle.data.CodeData" in text]


@pytest.mark.parametrize("name", CODES)
def test_codes_and_model_agree(name: str) -> None:
    config, data = built(name).model.model.config, built(name).data
    tokenizer = find_image_tokenizer(data.image_tokenizer)
    check_fit(config, tokenizer.code_shape, tokenizer.codebook(), source=name)
    if isinstance(tokenizer, (RQVAE, PyramidVAE)):
        assert config.codebook_sizes == tokenizer.config.quantizer.codebook_sizes
        assert config.codebook_width == tokenizer.config.quantizer.width
    assert data.temperature is None or isinstance(tokenizer, RQVAE)
    assert data.transform is None or data.transform.image_size == tokenizer.convnet.image_size
    assert data.condition == config.condition.kind
    if data.condition == "text":
        vocab_size, length = text_sizes(data.text_tokenizer_file)
        assert vocab_size <= config.condition.vocab_size
        assert data.text_length == config.condition.length
        assert length in (None, data.text_length)


@pytest.mark.parametrize("name", CODES)
def test_codes_come_from_somewhere(name: str) -> None:
    """Pictures with a folder for their codes, or a cache that a command in the comment writes."""
    data = built(name).data
    if data.cache_dir is not None:
        return
    encodings = [parse_command("encode", args) for script, args in commands(name) if script == "encode"]
    by_folder = {str(args.out): args for args in encodings}
    for folder in data.specs.values():
        assert by_folder[folder].image_tokenizer == data.image_tokenizer
        assert by_folder[folder].latents == data.needs_latents


@recipes
def test_callbacks(name: str) -> None:
    """Prompts are of the model's kind; sharded weights are neither averaged nor drawn with on one device."""
    training, trainer = built(name).model, built(name).trainer
    strategy = trainer.strategy
    assert strategy == "auto" or strategy in StrategyRegistry.available_strategies()
    for callback in trainer.callbacks or []:
        if strategy == "fsdp_blocks":
            assert not isinstance(callback, (PromptSheet, WeightAveraging))
        if isinstance(callback, PromptSheet):
            condition = training.model.config.condition
            callback.params.check_depths(max(training.model.code_depths) + 1)
            prompts = callback.prompts or []
            assert bool(prompts) == (condition.kind != "none")
            expected = {"class": int, "text": str, "none": str}[condition.kind]
            assert all(isinstance(prompt, expected) for prompt in prompts)
            assert condition.kind != "class" or max(prompts) < condition.vocab_size
