"""Lightning modules that train the parts of a model, and the callbacks around them."""

from mindalle.training.fsdp import BlockFSDPStrategy
from mindalle.training.sequence import GPTTraining, RQTransformerTraining

__all__ = ["BlockFSDPStrategy", "GPTTraining", "RQTransformerTraining"]
