"""`mindalle train`, `tools/train.py`: the Lightning command line."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger

from mindalle.cli.command import FAILURE, describe
from mindalle.training.callbacks import SeededSteps, SkippedReport, StopOnNonFinite

EXAMPLES = """\
examples:
  {prog} fit --config configs/toy/vqgan.yaml
  {prog} fit --config configs/toy/vqgan.yaml --ckpt_path last          go on after an interruption
  {prog} fit --config configs/toy/gpt.yaml --trainer.max_steps 500 --trainer.precision bf16-mixed
  {prog} fit --config configs/toy/gpt.yaml --trainer.devices 2 --trainer.strategy ddp
  {prog} fit --config configs/toy/gpt.yaml --print_config              all settings, as YAML"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, which leaves the lines of the examples alone."""


class TrainingCLI(LightningCLI):
    """Lightning's command line. A run's folder is `trainer.default_root_dir`.

    There are its `config.yaml`, checkpoints (`last.ckpt` is the newest), TensorBoard events and, in
    `samples/`, sheets of pictures.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be done, and the Trainer's arguments that the config gives."""
        return {
            name: arguments
            for name, arguments in LightningCLI.subcommands().items()
            if name in ("fit", "validate")
        }

    def __init__(self, *, prog: str = "train.py", **kwargs: Any) -> None:
        super().__init__(
            parser_kwargs={
                "parser_mode": "omegaconf",
                "allow_abbrev": False,
                "prog": prog,
                "formatter_class": _HelpFormatter,
                "fit": {"epilog": EXAMPLES.format(prog=prog)},
            },
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={"callbacks": [SeededSteps(), StopOnNonFinite(), SkippedReport()]},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpoints, and what is not Lightning's."""
        parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.every_n_train_steps": 500})
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, which logs to TensorBoard in the run's folder unless the config names a logger."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            folder = config.get("default_root_dir") or "."
            kwargs["logger"] = TensorBoardLogger(save_dir=folder, name="", version="")
        return super().instantiate_trainer(**kwargs)


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run `fit`, `validate` or `test` with a config.

    Args:
        argv: the arguments; None = the program's own.
        prog: name of the command, for messages.

    Returns:
        0 for success, 1 for failures. Errors that are not meant for users are raised: a long training should
        not have to fail twice to tell why.
    """
    arguments = list(argv) if argv is not None else None
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # `mindalle train` has both
    logging.basicConfig(format=f"{prog}: %(message)s", level=logging.WARNING)
    try:
        TrainingCLI(args=arguments, prog=prog)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if "--debug" in (sys.argv if arguments is None else arguments):
            traceback.print_exc()
        print(f"{prog}: error: {describe(error)}", file=sys.stderr)
        return FAILURE
    return 0
