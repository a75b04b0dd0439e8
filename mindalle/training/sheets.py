"""Pictures of a run in the making: reconstructions of held-out images, drawings of fixed prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from checkpoint_io import atomic_path
from mindalle.image import contact_sheet, to_pil
from stage2_transformer import SamplingParams, generate, image_seeds


class Sheet(pl.Callback):
    """At each validation, a sheet of pictures: `samples/NAME_STEP.png` in the run's folder, and TensorBoard.

    Args:
        name: what the sheet shows.
        num_images: how many, >= 1.

    Raises:
        ValueError: if there are to be no images.
    """

    def __init__(self, name: str, num_images: int) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.name = name
        self.num_images = num_images

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw with the first batch; within the validation, where averaged weights are in place."""
        if batch_idx or not trainer.is_global_zero or trainer.sanity_checking:
            return
        sheet = self.draw(trainer, pl_module, batch)
        path = Path(trainer.default_root_dir) / "samples" / f"{self.name}_{trainer.global_step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="PNG")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    self.name, np.asarray(sheet), trainer.global_step, dataformats="HWC"
                )

    def draw(self, trainer: pl.Trainer, pl_module: Any, batch: Any) -> Image.Image:
        """Make the sheet.

        Args:
            trainer: of the run.
            pl_module: the training, with its model.
            batch: the first of the validation.
        """
        raise NotImplementedError


class ReconstructionSheet(Sheet):
    """The first held-out images beside what the tokenizer makes of them; of residual codes every depth.

    Args:
        num_images: rows of the sheet, >= 1.
    """

    def __init__(self, num_images: int = 8) -> None:
        super().__init__("reconstructions", num_images)

    def draw(self, trainer: pl.Trainer, pl_module: Any, batch: Any) -> Image.Image:
        """A row for each image: itself, then its reconstructions, coarse to fine."""
        images = batch["images"][: self.num_images]
        model = pl_module.model
        columns = [images, *map(model.decode, model.coarse_to_fine(model.encode(images)))]
        rows = [image for row in zip(*map(to_pil, columns), strict=True) for image in row]
        return contact_sheet(rows, columns=len(columns))


class PromptSheet(Sheet):
    """What the model draws for fixed prompts with fixed seeds.

    Args:
        prompts: texts, or labels of a class-conditional model; None = as many pictures without a condition.
        num_images: pictures per prompt, >= 1.
        params: how codes are sampled; None = temperature 1.
        seed: of the pictures.

    Raises:
        ValueError: if there are to be no images or prompts.
    """

    def __init__(
        self,
        prompts: list[str] | list[int] | None = None,
        num_images: int = 4,
        params: SamplingParams | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__("prompts", num_images)
        if prompts is not None and not prompts:
            raise ValueError("prompts must not be empty: leave them out to draw without a condition")
        self.prompts = prompts
        self.params = params or SamplingParams()
        self.seed = seed

    def draw(self, trainer: pl.Trainer, pl_module: Any, batch: Any) -> Image.Image:
        """A row for each prompt."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        cond = None if self.prompts is None else data.encode_prompts(self.prompts).to(pl_module.device)
        count = self.num_images * (1 if self.prompts is None else len(self.prompts))
        codes: Tensor = generate(pl_module.model, cond, self.params, seeds=image_seeds(self.seed, count))
        tokenizer = data.tokenizer.to(pl_module.device)
        images = [image for part in torch.split(codes, 16) for image in to_pil(tokenizer.decode(part))]
        captions = None
        if self.prompts is not None:
            captions = [str(prompt) for prompt in self.prompts for _ in range(self.num_images)]
        return contact_sheet(images, columns=self.num_images, captions=captions)
