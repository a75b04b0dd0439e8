"""Sequence models: condition -> codes."""

from stage2_transformer.cache import KVCache
from stage2_transformer.checkpoint import STAGE2
from stage2_transformer.conditioning import ConditionConfig
from stage2_transformer.generate import generate, iterate_codes
from stage2_transformer.gpt import GPT, GPTConfig
from stage2_transformer.interface import SequenceModel, SequenceOutput
from stage2_transformer.layers import TransformerConfig
from stage2_transformer.precision import PRECISIONS, choose_precision
from stage2_transformer.pyramid_gpt import PyramidGPT, PyramidGPTConfig
from stage2_transformer.rq_transformer import RQTransformer, RQTransformerConfig
from stage2_transformer.sampling import SamplingParams, code_probabilities, image_seeds, sample_next

__all__ = [
    "GPT",
    "PRECISIONS",
    "STAGE2",
    "ConditionConfig",
    "GPTConfig",
    "KVCache",
    "PyramidGPT",
    "PyramidGPTConfig",
    "RQTransformer",
    "RQTransformerConfig",
    "SamplingParams",
    "SequenceModel",
    "SequenceOutput",
    "TransformerConfig",
    "choose_precision",
    "code_probabilities",
    "generate",
    "image_seeds",
    "iterate_codes",
    "sample_next",
]
