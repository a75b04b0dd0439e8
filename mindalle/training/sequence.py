"""Training a sequence model on codes: GPT, RQ-Transformer or a pyramid's GPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mindalle.training.base import OptimizerConfig, Training
from mindalle.training.transfer import starting_model
from stage2_transformer import (
    GPT,
    ConditionConfig,
    GPTConfig,
    PyramidGPT,
    PyramidGPTConfig,
    RQTransformer,
    RQTransformerConfig,
)
from stage2_transformer.checkpoint import ModelConfig, check_fit
from stage2_transformer.layers import Transformer
from stage2_transformer.losses import SequenceLossConfig, SequenceLosses, sequence_losses


class SequenceTraining(Training):
    """Fits a sequence model to codes.

    Batches are mappings with `codes` int64 (B, *code_shape); `cond`, text ids (B, N) or labels (B,), absent
    for an unconditional model; with soft targets `targets` (B, *code_shape, V), the probabilities to predict;
    and with mistakes to be repaired `past` (B, *code_shape), the codes that are read, see `CodeData`.

    Args:
        model: GPT or RQ-Transformer.
        optimizer: None = the defaults.
        loss: weights; None = the defaults.
        null_probability: chance that a sample's condition is replaced by the null condition, for guidance, in
            [0, 1].
        past_noise: largest share of a sample's codes that the model reads as those of another sample of the
            batch, in [0, 1]; each sample's own share is uniform below it. Without, a model that sees few
            pictures often knows each by its first codes, and heeds the condition little. (The `pkeep` of
            taming-transformers does this with random codes and one share for all.)
        gradient_checkpointing: whether blocks are computed again in the backward pass, to save memory.

    Raises:
        ValueError: if conditions are to be dropped and the model has no null condition, or a number is out of
            range.
    """

    model: GPT | RQTransformer

    def __init__(
        self,
        model: GPT | RQTransformer,
        *,
        optimizer: OptimizerConfig | None,
        loss: SequenceLossConfig | None,
        null_probability: float,
        past_noise: float,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__(optimizer)
        self.model = model
        self.loss_config = loss or SequenceLossConfig()
        self.null_probability = null_probability
        self.past_noise = past_noise
        _check_null(model.config.condition, null_probability)
        if not 0 <= past_noise <= 1:
            raise ValueError(f"past_noise must be in [0, 1], got {past_noise}")
        for module in model.modules():
            if isinstance(module, Transformer):
                module.recomputes_blocks = gradient_checkpointing

    def configure_model(self) -> None:
        """Take the codebook from the data module, and check that the data are the model's.

        In this hook and not in `setup`, since Lightning's weight averaging copies the model in between.

        Raises:
            ValueError: if codes, classes or text of the data are not what the model reads, or the data module
                has no codebook for a model that needs one.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None:
            _check_data(self.model.config, data)
        codebook = getattr(self.model, "codebook", None)
        if codebook is not None:
            codebook.copy_(_codebook(codebook, data))

    def block_matrices(self) -> list[nn.Parameter]:
        """The weights of attention and MLP in all blocks of body and head."""
        stacks = [module for module in self.model.modules() if isinstance(module, Transformer)]
        return [p for stack in stacks for p in stack.parameters() if p.ndim == 2 and p.requires_grad]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch, some conditions dropped; returns the loss."""
        cond = self._drop_conditions(batch.get("cond"))
        past = batch["past"] if "past" in batch else self._disturbed(batch["codes"])
        losses, _ = self._losses(batch, cond, past)
        self._log_losses("train", losses, len(batch["codes"]))
        return losses.total

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss on held-out images, and how many codes are the most likely ones."""
        losses, logits = self._losses(batch, batch.get("cond"))
        self._log_losses("val", losses, len(batch["codes"]))
        accuracy = (logits.argmax(dim=-1) == batch["codes"]).float().mean()
        self.log("val/accuracy", accuracy, batch_size=len(batch["codes"]), sync_dist=True)

    def _drop_conditions(self, cond: Tensor | None) -> Tensor | None:
        """Replace some rows by the null condition; the batch's own tensor is not changed."""
        if cond is None or self.null_probability == 0:
            return cond
        is_dropped = torch.rand(len(cond), device=cond.device) < self.null_probability  # (B,)
        is_dropped = is_dropped.view(-1, *[1] * (cond.ndim - 1))  # (B,) or (B, 1)
        return torch.where(is_dropped, self.model.null_condition(cond), cond)

    def _disturbed(self, codes: Tensor) -> Tensor | None:
        """The codes (B, *code_shape) with some positions of each sample as they are in another one."""
        if self.past_noise == 0:
            return None
        places = codes.shape[:3]  # all depths of a place of (B, h, w, D) are read together
        share = torch.rand(len(codes), *[1] * (len(places) - 1), device=codes.device) * self.past_noise
        is_other = torch.rand(places, device=codes.device) < share  # (B, h, w) or (B, T)
        is_other = is_other.view(*places, *[1] * (codes.ndim - len(places)))
        return torch.where(is_other, codes.roll(1, dims=0), codes)

    def _losses(
        self, batch: Mapping[str, Any], cond: Tensor | None, past: Tensor | None = None
    ) -> tuple[SequenceLosses, Tensor]:
        """Losses and logits (B, *code_shape, V)."""
        output = self.model(batch["codes"], cond, past)
        losses = sequence_losses(
            output, batch["codes"], cond, self.loss_config, batch.get("targets"), self.model.code_depths
        )
        return losses, output.logits

    def _log_losses(self, stage: str, losses: SequenceLosses, batch_size: int) -> None:
        shown = {"loss": losses.total, "code_loss": losses.code}
        more = {"text_loss": losses.text} if losses.text is not None else {}
        if losses.by_depth is not None:
            more |= {f"code_loss_depth{depth}": loss for depth, loss in enumerate(losses.by_depth)}
        for values, is_shown in ((shown, True), (more, False)):
            named = {f"{stage}/{name}": value.detach() for name, value in values.items()}
            # averaging over processes waits for all of them: not in every step
            self.log_dict(named, batch_size=batch_size, prog_bar=is_shown, sync_dist=stage == "val")


class GPTTraining(SequenceTraining):
    """Fits a GPT, see `SequenceTraining`.

    Args:
        config: of the model; None = the pretrained model's.
        optimizer: None = the defaults.
        loss: weights; None = the defaults.
        null_probability: share of conditions replaced by the null condition, in [0, 1].
        past_noise: largest share of codes read as another sample's, in [0, 1].
        gradient_checkpointing: whether to save memory by computing blocks twice.
        pretrained: training run, bundled name, path or release to start from, see `starting_model`.
        condition: replaces the pretrained model's.
    """

    kind = "gpt"

    def __init__(
        self,
        config: GPTConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        loss: SequenceLossConfig | None = None,
        null_probability: float = 0.0,
        past_noise: float = 0.0,
        gradient_checkpointing: bool = False,
        pretrained: str | None = None,
        condition: ConditionConfig | None = None,
    ) -> None:
        super().__init__(
            starting_model(GPT, config, condition=condition, pretrained=pretrained),
            optimizer=optimizer,
            loss=loss,
            null_probability=null_probability,
            past_noise=past_noise,
            gradient_checkpointing=gradient_checkpointing,
        )


class RQTransformerTraining(SequenceTraining):
    """Fits an RQ-Transformer, see `SequenceTraining`; the codebook it reads codes with is the data module's.

    Args:
        config: of the model; None = the pretrained model's.
        optimizer: None = the defaults.
        loss: weights; None = the defaults.
        null_probability: share of conditions replaced by the null condition, in [0, 1].
        past_noise: largest share of codes read as another sample's, in [0, 1].
        gradient_checkpointing: whether to save memory by computing blocks twice.
        pretrained: training run, bundled name, path or release to start from, see `starting_model`.
        condition: replaces the pretrained model's.
    """

    kind = "rq_transformer"

    def __init__(
        self,
        config: RQTransformerConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        loss: SequenceLossConfig | None = None,
        null_probability: float = 0.0,
        past_noise: float = 0.0,
        gradient_checkpointing: bool = False,
        pretrained: str | None = None,
        condition: ConditionConfig | None = None,
    ) -> None:
        super().__init__(
            starting_model(RQTransformer, config, condition=condition, pretrained=pretrained),
            optimizer=optimizer,
            loss=loss,
            null_probability=null_probability,
            past_noise=past_noise,
            gradient_checkpointing=gradient_checkpointing,
        )


class PyramidGPTTraining(SequenceTraining):
    """Fits a GPT to pyramids of codes, see `SequenceTraining`; the codebook it reads is the data module's.

    Args:
        config: of the model; None = the pretrained model's.
        optimizer: None = the defaults.
        loss: weights; None = the defaults.
        null_probability: share of conditions replaced by the null condition, in [0, 1].
        past_noise: largest share of codes read as another sample's, in [0, 1].
        gradient_checkpointing: whether to save memory by computing blocks twice.
        pretrained: training run, bundled name, path or release to start from, see `starting_model`.
        condition: replaces the pretrained model's.
    """

    kind = "pyramid_gpt"

    def __init__(
        self,
        config: PyramidGPTConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        loss: SequenceLossConfig | None = None,
        null_probability: float = 0.0,
        past_noise: float = 0.0,
        gradient_checkpointing: bool = False,
        pretrained: str | None = None,
        condition: ConditionConfig | None = None,
    ) -> None:
        super().__init__(
            starting_model(PyramidGPT, config, condition=condition, pretrained=pretrained),
            optimizer=optimizer,
            loss=loss,
            null_probability=null_probability,
            past_noise=past_noise,
            gradient_checkpointing=gradient_checkpointing,
        )


def _check_null(condition: ConditionConfig, null_probability: float) -> None:
    if not 0 <= null_probability <= 1:
        raise ValueError(f"null_probability must be in [0, 1], got {null_probability}")
    has_null = condition.kind == "text" or condition.has_null_class
    if null_probability > 0 and not has_null:
        reason = "has no condition" if condition.kind == "none" else "has no null class"
        raise ValueError(
            f"null_probability is {null_probability}, but the model {reason}: set it to 0"
            f"{', or condition.has_null_class to true' if condition.kind == 'class' else ''}"
        )


def _codebook(expected: Tensor, data: Any) -> Tensor:
    """The codebook (D, V, C) of the image tokenizer whose codes `data` has."""
    if not hasattr(data, "codebook"):
        raise ValueError(
            "an RQ-Transformer reads codes as vectors of the image tokenizer's codebook: train it with a "
            f"data module that has codebook(), such as mindalle.data.CodeData, got {type(data).__name__}"
        )
    codebook: Tensor = data.codebook()
    if codebook.shape != expected.shape:
        raise ValueError(
            f"the codebook of the data must be (D, V, C) = {tuple(expected.shape)}, "
            f"got {tuple(codebook.shape)}: set codebook_sizes, code_shape and codebook_width to the "
            "image tokenizer's"
        )
    return codebook.detach()


def _check_data(config: ModelConfig, data: Any) -> None:
    """Refuse data of other codes or conditions, as far as the data module tells (CodeData does)."""
    if hasattr(data, "codebook"):
        code_shape = getattr(data, "code_shape", config.code_shape)
        check_fit(config, tuple(code_shape), data.codebook(), source="config")
    condition = config.condition
    kind = getattr(data, "condition", condition.kind)
    if kind != condition.kind:
        raise ValueError(
            f"the data's condition is {kind!r}, the model's {condition.kind!r}: set data.condition or "
            "config.condition.kind"
        )
    num_classes = getattr(data, "num_classes", None) or 0
    if condition.kind == "class" and num_classes > condition.vocab_size:
        raise ValueError(
            f"the data have {num_classes} classes, the model {condition.vocab_size}: "
            "set config.condition.vocab_size to the number of classes"
        )
    text_tokenizer = getattr(data, "text_tokenizer", None)
    if condition.kind == "text" and text_tokenizer is not None:
        sizes = (text_tokenizer.length, text_tokenizer.vocab_size)
        if sizes[0] != condition.length or sizes[1] > condition.vocab_size:
            raise ValueError(
                f"the text tokenizer gives {sizes[0]} ids below {sizes[1]}, the model reads "
                f"{condition.length} below {condition.vocab_size}: set data.text_length and config.condition"
            )
