"""Measures of tokenizers, models and CLIPs on held-out pictures, each with the protocol it was made by."""

from mindalle.evaluation.likelihood import likelihood_measures, negative_log_likelihood
from mindalle.evaluation.moments import Moments, load_moments, moments_of, save_moments
from mindalle.evaluation.reconstruction import measure_reconstruction
from mindalle.evaluation.results import Measure, append_results, read_results
from mindalle.evaluation.retrieval import r_precision, ranks_of_own, recall

__all__ = [
    "Measure",
    "Moments",
    "append_results",
    "likelihood_measures",
    "load_moments",
    "measure_reconstruction",
    "moments_of",
    "negative_log_likelihood",
    "r_precision",
    "ranks_of_own",
    "read_results",
    "recall",
    "save_moments",
]
