"""Starting the training of a sequence model from a pretrained one, also for another condition."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, TypeVar

import torch

from checkpoint_io import config_to_mapping, flatten_config
from mindalle.checkpoint import load_checkpoint
from mindalle.hub import resolve_model
from mindalle.run import find_run
from stage2_transformer import GPT, STAGE2, ConditionConfig, GPTConfig, PyramidGPT, RQTransformer
from stage2_transformer.checkpoint import Model, ModelConfig

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", GPT, PyramidGPT, RQTransformer)

OF_CONDITION = ("condition.", "text_head.", "text_norm.")
"""How the names begin of what reads and predicts a condition, and is of no use for another one."""


def starting_model(
    cls: type[ModelT],
    config: ModelConfig | None,
    *,
    condition: ConditionConfig | None = None,
    pretrained: str | None = None,
) -> ModelT:
    """A new model, or a copy of a pretrained one.

    Args:
        cls: of the model.
        config: of the model; None = the pretrained model's.
        condition: replaces the pretrained model's.
        pretrained: training run, bundled name, path or release; None = random weights.

    Returns:
        The model, in training mode, float32, on the CPU. With a pretrained one of the same condition all
        weights are its own; with another one all but those of the condition, which start fresh. A codebook
        that the model reads is the pretrained's, or of zeros for now.

    Raises:
        ValueError: if the arguments contradict each other, or the pretrained model's architecture is another.
    """
    if condition is not None and (config is not None or pretrained is None):
        raise ValueError(
            "condition replaces the one of a pretrained model: give it with pretrained and without config, "
            "or as config.condition"
        )
    if pretrained is None:
        if config is None:
            raise ValueError("a sequence model needs a config, or the name of a model as pretrained")
        return _new_model(cls, config)
    source = _load(pretrained)
    if type(source) is not cls:
        found = "no sequence model" if source is None else f"a {type(source).__name__}"
        raise ValueError(f"pretrained: {pretrained} holds {found}, expected a {cls.__name__}")
    if config is None:
        config = source.config if condition is None else replace(source.config, condition=condition)
    differing = _differing_fields(config, source.config)
    if differing:
        raise ValueError(
            f"the config is not that of the pretrained model {pretrained}: {'; '.join(differing)}. Leave "
            "config out to take the pretrained's; only condition and dropout may differ"
        )
    model = _new_model(cls, config, getattr(source, "codebook", None))
    _transfer(model, source, pretrained)
    return model


def _load(name: str) -> Model | None:
    """The sequence model of a checkpoint, None if it has none."""
    path = resolve_model(name)
    run = find_run(path)
    if run is None:
        return load_checkpoint(path).model
    model: Model | None = run.build(_zeros(run.config)) if run.kind in STAGE2 else None
    return model


def _zeros(config: ModelConfig) -> torch.Tensor:
    """In place of a codebook (D, V, C) that is not known yet."""
    if isinstance(config, GPTConfig):
        return torch.zeros(0)
    return torch.zeros(len(config.codebook_sizes), config.vocab_size, config.codebook_width)


def _new_model(cls: type[ModelT], config: Any, codebook: torch.Tensor | None = None) -> ModelT:
    return cls(config, _zeros(config) if codebook is None else codebook)


def _differing_fields(config: Any, other: Any) -> list[str]:
    """What keeps the weights of one model from fitting another: dropout and condition do not."""
    ours, theirs = (flatten_config(config_to_mapping(one)) for one in (config, other))
    return [
        f"{name} is {ours[name]}, the pretrained's {theirs[name]}"
        for name in ours
        if ours[name] != theirs[name] and not name.startswith("condition.") and not name.endswith("_dropout")
    ]


def _transfer(model: Model, source: Model, name: str) -> None:
    """Copy all weights, or where the conditions differ all but the condition's."""
    is_same = model.config.condition == source.config.condition
    kept = {
        key: tensor
        for key, tensor in source.state_dict().items()
        if is_same or not key.startswith(OF_CONDITION)
    }
    missing, unexpected = model.load_state_dict(kept, strict=False)
    fresh = [key for key in model.state_dict() if not is_same and key.startswith(OF_CONDITION)]
    # equal configs have equal parameters: anything else is a mistake in OF_CONDITION
    assert sorted(missing) == sorted(fresh), missing
    assert not unexpected, unexpected
    logger.info(
        "took %d tensors from the pretrained %s; start fresh: %s", len(kept), name, ", ".join(fresh) or "none"
    )
