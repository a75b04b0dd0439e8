"""Lightning's Trainer, which may choose the precision by the machine."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

from lightning_fabric.connector import _PRECISION_INPUT  # type: ignore[attr-defined]
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import Accelerator

from mindalle.device import best_device
from stage1_vqgan.precision import has_bfloat16

logger = logging.getLogger(__name__)


class MachineTrainer(Trainer):
    """Lightning's, with one more precision for recipes that are to run on any machine.

    Args:
        precision: "auto" is bf16-mixed where the accelerator multiplies in bfloat16, and 32-true where it
            would only imitate it, many times slower; all others are Lightning's.
        accelerator: see Lightning's Trainer; "auto" is CUDA, else Apple's mps, else the CPU.
        kwargs: all other arguments of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        precision: _PRECISION_INPUT | Literal["auto"] | None = None,
        accelerator: str | Accelerator = "auto",
        **kwargs: Any,
    ) -> None:
        chosen = choose_training_precision(accelerator) if precision == "auto" else precision
        super().__init__(precision=chosen, accelerator=accelerator, **kwargs)


def choose_training_precision(accelerator: str | Accelerator) -> Literal["bf16-mixed", "32-true"]:
    """What precision "auto" stands for, said in one line of the log by the first process.

    Args:
        accelerator: "cpu", "cuda", "mps", "gpu", "auto" or another of Lightning's.

    Returns:
        "bf16-mixed" or "32-true".
    """
    kind = accelerator if isinstance(accelerator, str) else accelerator.name()
    device = best_device() if kind in ("auto", "gpu") else kind
    is_quick = device in ("cpu", "cuda") and has_bfloat16(device)
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if is_quick else "32-true"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.info(
            "precision %s: this machine's %s computes in bfloat16 %s; --trainer.precision overrules it",
            precision,
            device,
            "itself" if is_quick else "only by imitation, which is slow",
        )
    return precision
