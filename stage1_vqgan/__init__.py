"""Image tokenizers: pixels <-> codes."""

from stage1_vqgan.checkpoint import STAGE1, load_tokenizer
from stage1_vqgan.convnet import ConvNetConfig
from stage1_vqgan.interface import ImageTokenizer
from stage1_vqgan.pyramid import PyramidVAE, PyramidVAEConfig
from stage1_vqgan.quantize import PyramidQuantizerConfig, ResidualQuantizerConfig, VectorQuantizerConfig
from stage1_vqgan.rqvae import RQVAE, RQVAEConfig
from stage1_vqgan.vqgan import VQGAN, VQGANConfig

__all__ = [
    "RQVAE",
    "STAGE1",
    "VQGAN",
    "ConvNetConfig",
    "ImageTokenizer",
    "PyramidQuantizerConfig",
    "PyramidVAE",
    "PyramidVAEConfig",
    "RQVAEConfig",
    "ResidualQuantizerConfig",
    "VQGANConfig",
    "VectorQuantizerConfig",
    "load_tokenizer",
]
