"""A convolutional autoencoder with a pyramid of codes (Tian et al. 2024, VAR's tokenizer)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.convnet import ConvNetConfig
from stage1_vqgan.quantize import PyramidQuantizer, PyramidQuantizerConfig


@dataclass(frozen=True, kw_only=True)
class PyramidVAEConfig:
    """The boxes of the autoencoder."""

    convnet: ConvNetConfig = field(default_factory=ConvNetConfig)  # encoder and decoder
    quantizer: PyramidQuantizerConfig = field(default_factory=PyramidQuantizerConfig)  # between them

    def __post_init__(self) -> None:
        if self.quantizer.grid != self.convnet.latent_size:
            raise ValueError(
                f"the finest scale must be the latent grid's {self.convnet.latent_size}, "
                f"got scales {self.quantizer.scales}: change scales, image_size or channel_multipliers"
            )


class PyramidVAE(QuantizedAutoencoder):
    """An `ImageTokenizer` with codes (B, T): grids of rising size one after the other, coarse to fine.

    Codes up to the end of a scale decode to a coarser picture. Pictures have one size, that of the config.
    """

    quantizer: PyramidQuantizer

    def __init__(self, config: PyramidVAEConfig) -> None:
        super().__init__(
            config.convnet, PyramidQuantizer(config.quantizer), latent_width=config.quantizer.width
        )
        self.config = config

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """V of each scale."""
        return self.config.quantizer.codebook_sizes

    @property
    def code_shape(self) -> tuple[int]:
        """(T,)."""
        return (self.config.quantizer.ends[-1],)

    def code_shape_at(self, image_size: int) -> tuple[int, ...]:
        """(T,); of the config's size alone.

        Raises:
            ValueError: if the size is another.
        """
        if image_size != self.convnet.image_size:
            raise ValueError(
                f"image_size must be {self.convnet.image_size}, got {image_size}: "
                "a pyramid of codes is made for pictures of one size"
            )
        return self.code_shape

    def by_depth(self, codes: Tensor) -> list[Tensor]:
        """Codes (B, T) -> those of each scale (B, s * s)."""
        return list(torch.split(codes, [side * side for side in self.config.quantizer.scales], dim=1))

    def coarse_to_fine(self, codes: Tensor) -> list[Tensor]:
        """Codes (B, T) -> those up to the end of each scale."""
        return [codes[:, :end] for end in self.config.quantizer.ends]

    @torch.no_grad()
    def start_from(self, other: QuantizedAutoencoder) -> None:
        """Take encoder, decoder and the convolutions between them from another tokenizer.

        Args:
            other: of the same convnet and latent width.

        Raises:
            ValueError: if the shapes differ.
        """
        if other.convnet != self.convnet or other.quant_conv.weight.shape != self.quant_conv.weight.shape:
            raise ValueError(
                "the tokenizer to start from must have the same convnet and width, got "
                f"{other.convnet} with {other.quant_conv.out_channels}, expected {self.convnet} with "
                f"{self.quant_conv.out_channels}"
            )
        for name in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
            self.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
