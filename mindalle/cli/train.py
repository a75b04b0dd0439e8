"""`tools/train.py`: the Lightning command line."""

from __future__ import annotations

from collections.abc import Sequence

from pytorch_lightning.cli import LightningCLI


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run `fit`, `validate` or `test` with a config.

    Args:
        argv: the arguments; None = the program's own.
        prog: name of the command, for messages.

    Returns:
        0; what goes wrong is raised.
    """
    LightningCLI(
        args=list(argv) if argv is not None else None,
        parser_kwargs={"parser_mode": "omegaconf", "allow_abbrev": False, "prog": prog},
        save_config_kwargs={"overwrite": True},
    )
    return 0
