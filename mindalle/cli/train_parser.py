"""The parser of `mindalle train`, whose errors are one line each."""

from __future__ import annotations

from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from mindalle.cli.command import USAGE_ERROR

# how the lines begin in which jsonargparse tells what it tried
TRIED = (
    "Does not validate against any of the Union subtypes",
    "Subtypes: ",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type: ",
    "Given value: Namespace(",
    "Given value: NestedArg(",
)


class TrainingParser(LightningArgumentParser):
    """Lightning's, with one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line and exit with code 2.

        Args:
            message: of jsonargparse, many lines.
            ex: what was raised.
        """
        if not self.exit_on_error:  # an inner parser, whose error the outer one shows
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        name = prog.removesuffix(" fit").removesuffix(" validate")
        self.exit(USAGE_ERROR, f"{name}: error: {essence(message)} (see {prog} --help)\n")


def essence(message: str) -> str:
    """What of jsonargparse's error is meant for users.

    Args:
        message: many lines.

    Returns:
        One line.
    """
    lines = (line.strip().removeprefix("- ") for line in message.splitlines())
    return " ".join(line for line in lines if not line.startswith(TRIED))
