"""`mindalle train`, `tools/train.py`: the Lightning command line."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import CheckpointIO

from mindalle.cli.command import FAILURE, USAGE_ERROR, describe
from mindalle.cli.recipes import UnknownRecipeError, with_recipe_paths
from mindalle.cli.train_parser import TrainingParser, essence
from mindalle.run import Run, find_run, open_run
from mindalle.training.callbacks import SeededSteps, SkippedReport, StopOnNonFinite
from mindalle.training.checkpoints import AtomicCheckpointIO, RunCheckpoint
from mindalle.training.trainer import MachineTrainer

logger = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  {prog} fit --config configs/toy/vqgan.yaml
  {prog} fit --config emoji/finetune --data.train my-pictures --data.val my-pictures      a recipe by its name
  {prog} fit --config configs/toy/vqgan.yaml --ckpt_path last          go on after an interruption
  {prog} fit --config configs/toy/gpt.yaml --trainer.max_steps 500 --trainer.precision bf16-mixed
  {prog} fit --config configs/toy/gpt.yaml --trainer.devices 2 --trainer.strategy ddp
  {prog} fit --config configs/toy/gpt.yaml --print_config              all settings, as YAML"""

NEEDLESS_WARNINGS = (
    "LightningCLI's args parameter",  # `mindalle train` has both
    "You're using the WeightAveraging callback with a model that overrides",  # ours may be called twice
    "You're using the WeightAveraging callback, but loading a checkpoint outside",  # it has the averages
    "Checkpoint directory .* exists and is not empty",  # the run's folder has its config
    "The number of training batches .* is smaller than the logging interval",  # steps count over epochs
    ".*isinstance.treespec, LeafSpec.",  # Lightning's own business with torch
)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, which leaves the lines of the examples alone."""


class SaveFitConfig(SaveConfigCallback):
    """Writes the run's config.yaml when it is trained; a validation leaves it alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class TrainingCLI(LightningCLI):
    """Lightning's command line. A run's folder is `trainer.default_root_dir`.

    There are its `config.yaml`, checkpoints (`last.ckpt` is the newest), TensorBoard events and, in
    `samples/`, sheets of pictures. A folder holds one run: only `--ckpt_path` goes on in it.

    Raises:
        FileNotFoundError: if there is no checkpoint to go on from or to validate.
        FileExistsError: if the folder holds another run.
        ValueError: if settings do not go together, or a checkpoint is damaged.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be done, and the Trainer's arguments that the config does not give."""
        return {
            name: arguments | {"weights_only"}
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
                "epilog": EXAMPLES.format(prog=prog),
                "fit": {"epilog": EXAMPLES.format(prog=prog)},
            },
            parser_class=TrainingParser,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            trainer_class=MachineTrainer,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={"callbacks": [SeededSteps(), StopOnNonFinite(), SkippedReport()]},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpoints, and what is not Lightning's."""
        parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.every_n_train_steps": 500,
                # a folder holds one run: no last-v1.ckpt beside last.ckpt
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")

    def _parse_ckpt_path(self) -> None:
        """Lightning would take the model's class and arguments from the file, whoever made that."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint that is meant, and see that no other run is overwritten."""
        self.config_given = deepcopy(self.config)
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        self.config_given[self.subcommand]["ckpt_path"] = None  # or the next run would start there, too
        folder = Path(config.trainer.default_root_dir or ".")
        if config.ckpt_path is not None and not _is_sharded(config.ckpt_path, folder):
            run = find_run(folder) if config.ckpt_path == "last" else open_run(config.ckpt_path)
            config.ckpt_path = None if run is None else str(run.file)
            if run is not None:
                _start_from(config.model.init_args, run)
            elif self.subcommand == "fit":  # so that the same command starts a run and goes on with it
                _warn_of_beginning(folder)
        if self.subcommand == "fit":
            is_saved = config.trainer.enable_checkpointing is not False and not config.trainer.fast_dev_run
            if is_saved and not _goes_on_in(folder, config.ckpt_path):
                _check_is_free(folder)
        elif config.ckpt_path is None and not config.model.init_args.get("pretrained"):
            raise FileNotFoundError(
                f"no checkpoint in {folder} to validate: say which with --ckpt_path, a file or last"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, which logs to TensorBoard in the run's folder unless the config names a logger."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            folder = config.get("default_root_dir") or "."
            kwargs["logger"] = TensorBoardLogger(save_dir=folder, name="", version="")
        if config.get("max_epochs") is None and config.get("max_steps") == -1:
            kwargs["max_epochs"] = -1  # Lightning would take 1000: what has no end is asked for one
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        self.config = self.config_given  # which is what config.yaml shall have
        return super().instantiate_trainer(**kwargs)

    def fit(self, **kwargs: Any) -> None:
        """Train; loading a checkpoint executes nothing."""
        self.trainer.fit(weights_only=True, **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Measure; loading a checkpoint executes nothing."""
        self.trainer.validate(weights_only=True, **kwargs)


def _is_sharded(ckpt_path: str, folder: Path) -> bool:
    """Whether the checkpoint is a directory, of a strategy that knows how to read it."""
    place = folder / "last.ckpt" if ckpt_path == "last" else Path(ckpt_path)
    return (place / ".metadata").exists()


@rank_zero_only
def _warn_of_beginning(folder: Path) -> None:
    logger.warning("no checkpoint in %s yet: starting from the beginning", folder)


def _goes_on_in(folder: Path, ckpt_path: str | None) -> bool:
    """Whether the checkpoint is one of the folder's own."""
    if ckpt_path is None or ckpt_path == "last":
        return ckpt_path is not None
    own = folder.resolve()
    return Path(ckpt_path).resolve().parent in (own, own / "checkpoints")


def _check_is_free(folder: Path) -> None:
    """Refuse a folder with checkpoints, whoever wrote them."""
    if not any(True for place in (folder, folder / "checkpoints") for _ in place.glob("[!.]*.ckpt")):
        return
    try:
        run = find_run(folder)
    except (ValueError, OSError):  # damaged, or in shards
        run = None
    step = "" if run is None else f" (step {run.num_steps})"
    raise FileExistsError(
        f"{folder} already holds a run{step}: continue it with --ckpt_path last, "
        "or choose another trainer.default_root_dir"
    )


def _start_from(settings: Any, run: Run) -> None:
    """Take the model from the run: what it was once started from need not be there any more."""
    if settings.get("pretrained") is not None:
        settings.pretrained = str(run.file)
        for name in ("config", "condition", "text_tokenizer"):
            if name in settings:
                settings[name] = None


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run `fit` or `validate` with a config.

    Args:
        argv: the arguments; None = the program's own.
        prog: name of the command, for messages.

    Returns:
        0 for success, 1 for failures. Errors that are not meant for users are raised: a long training should
        not have to fail twice to tell why.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for message in NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(format=f"{prog}: %(message)s", level=logging.WARNING)
    if not getattr(rank_zero_only, "rank", 0):
        logging.getLogger("mindalle").setLevel(logging.INFO)  # also what the data are taken for
    try:
        TrainingCLI(args=with_recipe_paths(arguments), prog=prog)
    except UnknownRecipeError as error:
        print(f"{prog}: error: {error} (see {prog} fit --help)", file=sys.stderr)
        return USAGE_ERROR
    except (ValueError, OSError, ImportError, FloatingPointError, MisconfigurationException) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        is_systems = isinstance(error, OSError) and error.errno is not None
        shown = error if is_systems else ValueError(essence(str(error)))
        print(f"{prog}: error: {describe(shown)}", file=sys.stderr)
        return FAILURE
    return 0
