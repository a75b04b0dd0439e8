"""Picture sets: drawn in bulk, for evaluation or training."""

from mindalle.generation.drawing import SetSummary, draw_set
from mindalle.generation.formats import open_set
from mindalle.generation.job import Condition, SetJob, SetPlan, plan_set

__all__ = ["Condition", "SetJob", "SetPlan", "SetSummary", "draw_set", "open_set", "plan_set"]
