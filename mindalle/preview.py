"""Pictures that are still being drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mindalle.image import to_pil
from mindalle.memory import decode_in_parts
from stage1_vqgan.autoencoder import QuantizedAutoencoder


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture in the making."""

    num_done: int  # codes drawn
    num_codes: int  # codes in all
    codes: Tensor  # int64 (B, *code_shape), zeros where not yet drawn
    image_tokenizer: QuantizedAutoencoder

    @property
    def images(self) -> list[Image.Image]:
        """The pictures so far, white where nothing is drawn yet; of a pyramid up to the last whole scale."""
        shape = self.image_tokenizer.code_shape
        if len(shape) == 1:
            return self._coarse_images()
        depth = shape[2] if len(shape) == 3 else 1
        with torch.inference_mode():
            images = decode_in_parts(self.image_tokenizer, self.codes)  # (B, 3, H, W)
        is_done = torch.arange(shape[0] * shape[1], device=images.device) < self.num_done // depth
        cell = (images.shape[2] // shape[0], images.shape[3] // shape[1])
        # (h * w,) -> (H, W): every code position covers one cell of pixels
        is_drawn = (
            is_done.view(shape[0], shape[1]).repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1)
        )
        return to_pil(torch.where(is_drawn, images, 1.0))

    def _coarse_images(self) -> list[Image.Image]:
        """What the whole scales of a pyramid show."""
        kept = [
            part for part in self.image_tokenizer.coarse_to_fine(self.codes) if part.shape[1] <= self.num_done
        ]
        size = self.image_tokenizer.convnet.image_size
        if not kept:
            return to_pil(torch.ones(len(self.codes), 3, size, size))
        with torch.inference_mode():
            return to_pil(decode_in_parts(self.image_tokenizer, kept[-1]))
