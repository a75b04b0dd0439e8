"""What is wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that is truncated, hostile, of an unknown layout, or at odds with its own config."""
