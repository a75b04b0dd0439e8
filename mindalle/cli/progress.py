"""What is seen while pictures are drawn: a bar with codes per second, and a growing picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindalle.cli.output import save_png
from mindalle.image import contact_sheet
from mindalle.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from mindalle.preview import Preview


class Progress:
    """One bar over all prompts; and the codes of each whole batch, for who interrupts.

    Args:
        num_codes: to draw in all, of all pictures of all prompts.
    """

    def __init__(self, num_codes: int) -> None:
        self.bar = progress_bar(total=num_codes, unit=" codes")
        self.finished: list[Tensor] = []  # (B, *code_shape) of each whole batch of the prompt
        self._preview: Path | None = None
        self._num_done = self._rows_shown = 0  # of the batch at hand

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()

    def begin(self, title: str, preview: Path | None) -> None:
        """Start a prompt.

        Args:
            title: of the prompt.
            preview: where to show its pictures while they grow; None = nowhere.
        """
        self.bar.set_description(title, refresh=False)
        self.finished = []
        self._preview = preview
        self._num_done = sys.maxsize

    def show(self, preview: Preview) -> None:
        """Count the codes drawn; write the preview at the end of each row of codes."""
        batch_size, rows = preview.codes.shape[:2]
        rows_done = preview.num_done * rows // preview.num_codes
        if preview.num_done < self._num_done:  # a new batch; codes known from the start are not drawn
            self._num_done, self._rows_shown = preview.num_done, rows_done
        self.bar.update((preview.num_done - self._num_done) * batch_size)
        self._num_done = preview.num_done
        if preview.num_done == preview.num_codes:
            self.finished.append(preview.codes.clone())
        if self._preview is not None and rows_done > self._rows_shown:
            self._rows_shown = rows_done
            save_png(self._preview, contact_sheet(preview.images), {})
