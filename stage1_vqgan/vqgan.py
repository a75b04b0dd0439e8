"""VQGAN (Esser et al. 2021): convolutional encoder, one code per latent, convolutional decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.convnet import ConvNetConfig
from stage1_vqgan.quantize import VectorQuantizer, VectorQuantizerConfig


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The boxes of a VQGAN."""

    convnet: ConvNetConfig = field(default_factory=ConvNetConfig)  # encoder and decoder
    quantizer: VectorQuantizerConfig = field(default_factory=VectorQuantizerConfig)  # between them


class VQGAN(QuantizedAutoencoder):
    """An `ImageTokenizer` with codes (B, h, w), as in taming-transformers and minDALL-E."""

    quantizer: VectorQuantizer

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(
            config.convnet, VectorQuantizer(config.quantizer), latent_width=config.quantizer.width
        )
        self.config = config

    @property
    def code_shape(self) -> tuple[int, int]:
        """(h, w) at the training resolution."""
        return (self.convnet.latent_size, self.convnet.latent_size)
