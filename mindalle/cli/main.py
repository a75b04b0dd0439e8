"""The `mindalle` console command: the scripts of `tools/` as subcommands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata

COMMANDS = {
    "generate": ("mindalle.cli.generate", "draw pictures from a prompt or a class"),
    "reconstruct": ("mindalle.cli.reconstruct", "pictures through an image tokenizer and back"),
    "convert": ("mindalle.cli.convert", "any known checkpoint to a native one"),
    "train": ("mindalle.cli.train", "train a model with Lightning"),
    "export": ("mindalle.cli.export", "finished training runs to a native checkpoint"),
    "encode": ("mindalle.cli.encode", "pictures to codes, once, for training a sequence model"),
    "benchmark": ("mindalle.cli.benchmark", "how fast a model draws, on this machine"),
    "generate-set": ("mindalle.cli.generate_set", "many pictures of prompts or classes, to evaluate"),
    "evaluate": ("mindalle.cli.evaluate", "the numbers of tokenizers, pictures and models"),
    "report": ("mindalle.cli.report", "a page of figures of a model, with their data"),
    "train-tokenizer": ("mindalle.cli.train_tokenizer", "captions to a text tokenizer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first argument names.

    Args:
        argv: arguments; None = the program's own.

    Returns:
        Its exit code; 2 if there is no such command.
    """
    name, *rest = (list(argv) if argv is not None else sys.argv[1:]) or [""]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"mindalle {metadata.version('mindalle')}")
        return 0
    if name not in COMMANDS:
        problem = f"no command {name!r}" if name else "no command given"
        print(
            f"mindalle: error: {problem}; known are {', '.join(COMMANDS)} (see mindalle --help)",
            file=sys.stderr,
        )
        return 2
    return int(import_module(COMMANDS[name][0]).main(rest, prog=f"mindalle {name}"))


def _help() -> str:
    lines = [f"  {command:<16} {summary}" for command, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: mindalle COMMAND ...  (mindalle COMMAND --help says more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
