"""Progress bars: written over in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 15.0  # between two states of a bar where it is no terminal that shows them


class _Log:
    """Standard error that is no terminal: each state of a bar is a line, nothing is written over."""

    encoding = sys.stderr.encoding

    def write(self, text: str) -> None:
        """Write what is visible of it."""
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def flush(self) -> None:
        """Nothing is kept back."""


def progress_bar(items: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    """A bar on standard error.

    Args:
        items: that are counted as they are taken from the bar; None = its `update` counts.
        settings: of tqdm: what is done (`desc`), `total`, `initial` and `unit`.

    Returns:
        The bar, to iterate over or to use as a context.
    """
    is_seen = sys.stderr.isatty()
    return tqdm(
        items,
        mininterval=0.1 if is_seen else LOG_SECONDS,
        maxinterval=max(10.0, LOG_SECONDS),
        file=sys.stderr if is_seen else _Log(),
        **settings,
    )
