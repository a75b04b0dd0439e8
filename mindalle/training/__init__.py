"""Lightning modules that train the parts of a model, and the callbacks around them."""

from mindalle.training.averaging import AveragedWeights
from mindalle.training.base import OptimizerConfig
from mindalle.training.callbacks import SeededSteps, SkippedReport, StopOnNonFinite
from mindalle.training.clip import ClipTraining
from mindalle.training.fsdp import BlockFSDPStrategy
from mindalle.training.sequence import GPTTraining, PyramidGPTTraining, RQTransformerTraining
from mindalle.training.sheets import PromptSheet, ReconstructionSheet
from mindalle.training.tokenizer import PyramidVAETraining, RQVAETraining, VQGANTraining

__all__ = [
    "AveragedWeights",
    "BlockFSDPStrategy",
    "ClipTraining",
    "GPTTraining",
    "OptimizerConfig",
    "PromptSheet",
    "PyramidGPTTraining",
    "PyramidVAETraining",
    "RQTransformerTraining",
    "RQVAETraining",
    "ReconstructionSheet",
    "SeededSteps",
    "SkippedReport",
    "StopOnNonFinite",
    "VQGANTraining",
]
