"""Measures of tokenizers, models and CLIPs on held-out pictures."""

from mindalle.evaluation.reconstruction import ReconstructionQuality, measure_reconstruction
from mindalle.evaluation.retrieval import ranks_of_own, recall

__all__ = ["ReconstructionQuality", "measure_reconstruction", "ranks_of_own", "recall"]
