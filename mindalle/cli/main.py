"""The `mindalle` console command: the scripts of `tools/` as subcommands."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "generate": ("mindalle.cli.generate", "draw pictures from a prompt or a class"),
    "reconstruct": ("mindalle.cli.reconstruct", "pictures through an image tokenizer and back"),
    "convert": ("mindalle.cli.convert", "any known checkpoint to a native one"),
    "train": ("mindalle.cli.train", "train a model with Lightning"),
    "export": ("mindalle.cli.export", "finished training runs to a native checkpoint"),
}


def main() -> int:
    """Run the subcommand that the first argument names; returns its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: mindalle COMMAND ...  (mindalle COMMAND --help says more)\n")
        for command, (_, summary) in COMMANDS.items():
            print(f"  {command:<12} {summary}")
        return 0
    if name not in COMMANDS:
        print(f"mindalle: error: no command {name!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return int(import_module(COMMANDS[name][0]).main(sys.argv[2:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
