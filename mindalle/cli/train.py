"""`mindalle train`, `tools/train.py`: the Lightning command line."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence

from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from mindalle.cli.command import FAILURE, describe


class TrainingCLI(LightningCLI):
    """Lightning's command line with `--debug`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is not Lightning's."""
        parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")


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
    try:
        TrainingCLI(
            args=arguments,
            parser_kwargs={"parser_mode": "omegaconf", "allow_abbrev": False, "prog": prog},
            save_config_kwargs={"overwrite": True},
        )
    except (ValueError, OSError, ImportError) as error:
        if "--debug" in (sys.argv if arguments is None else arguments):
            traceback.print_exc()
        print(f"{prog}: error: {describe(error)}", file=sys.stderr)
        return FAILURE
    return 0
