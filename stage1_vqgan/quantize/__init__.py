"""Quantizers: latents <-> codes."""

from stage1_vqgan.quantize.averages import CodebookAverages, CodebookTrainingConfig
from stage1_vqgan.quantize.interface import Quantizer, QuantizerOutput
from stage1_vqgan.quantize.pyramid import CorruptedCodes, PyramidQuantizer, PyramidQuantizerConfig
from stage1_vqgan.quantize.residual import ResidualQuantizer, ResidualQuantizerConfig
from stage1_vqgan.quantize.vector import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "CodebookAverages",
    "CodebookTrainingConfig",
    "CorruptedCodes",
    "PyramidQuantizer",
    "PyramidQuantizerConfig",
    "Quantizer",
    "QuantizerOutput",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "VectorQuantizer",
    "VectorQuantizerConfig",
]
