"""The losses against sums written out, and blocks that are computed twice against blocks that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sequence_models import MODELS, blocks, build, code_sizes, draw_codes, draw_cond, gpt, rq
from torch import Tensor

from stage2_transformer.interface import SequenceOutput
from stage2_transformer.layers import Transformer
from stage2_transformer.losses import (
    SequenceLossConfig,
    code_cross_entropy,
    sequence_losses,
    soft_cross_entropy,
    text_cross_entropy,
)

ALL = ["gpt_text", "gpt_class", "gpt_none", "gpt_residual_codes", "rq_text", "rq_none", "rq_sizes_per_depth"]


def output_of(name: str) -> tuple[SequenceOutput, Tensor, Tensor | None]:
    config = MODELS[name]
    codes, cond = draw_codes(config, 3), draw_cond(config, 3)
    with torch.no_grad():
        return build(name)(codes, cond), codes, cond


def draw_targets(name: str) -> Tensor:
    """Distributions within the codebook of each code, (3, *code_shape, V)."""
    config = MODELS[name]
    is_code = torch.arange(20) < code_sizes(config)[:, None]  # (T, V)
    scores = torch.randn(3, *is_code.shape, generator=torch.Generator().manual_seed(1))
    return scores.masked_fill(~is_code, -torch.inf).softmax(dim=-1).view(3, *config.code_shape, 20)


@pytest.mark.parametrize("name", ALL)
def test_losses_by_hand(name: str) -> None:
    output, codes, cond = output_of(name)
    losses = sequence_losses(output, codes, cond, SequenceLossConfig(code_weight=0.7, text_weight=0.3))
    picked = -output.logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)  # (B, *code_shape)
    torch.testing.assert_close(losses.code, picked.mean())
    total = 0.7 * picked.mean()
    if output.text_logits is not None:
        words = -output.text_logits.log_softmax(-1).gather(-1, cond[:, 1:].unsqueeze(-1))
        torch.testing.assert_close(losses.text, words.mean())
        total = total + 0.3 * words.mean()
    else:
        assert losses.text is None
    torch.testing.assert_close(losses.total, total)
    if codes.ndim == 4:
        torch.testing.assert_close(losses.by_depth, torch.stack([p.mean() for p in picked.unbind(dim=-1)]))
    else:
        assert losses.by_depth is None


def test_weights_of_the_depths() -> None:
    """They change what is minimised, not what is reported; only their ratios count."""
    output, codes, cond = output_of("rq_text")
    losses = sequence_losses(
        output,
        codes,
        cond,
        SequenceLossConfig(code_weight=0.5, text_weight=0.0, depth_weights=(6.0, 0.0, 2.0)),
    )
    first, _, last = losses.by_depth
    torch.testing.assert_close(losses.total, 0.5 * (0.75 * first + 0.25 * last))
    torch.testing.assert_close(losses.code, losses.by_depth.mean())


@pytest.mark.parametrize(("name", "found"), [("gpt_text", "no depth"), ("rq_text", "3 depths")])
def test_a_weight_for_each_depth(name: str, found: str) -> None:
    output, codes, cond = output_of(name)
    with pytest.raises(ValueError, match=f"depth_weights has 2 weights, the codes have {found}"):
        sequence_losses(output, codes, cond, SequenceLossConfig(depth_weights=(1.0, 0.5)))


@pytest.mark.parametrize("weights", [(1.0, -0.5), (0.0, 0.0)])
def test_depth_weights_that_are_no_weights(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="depth_weights must be at least 0 and one of them above, got"):
        SequenceLossConfig(depth_weights=weights)


@pytest.mark.parametrize("name", ALL)
def test_a_certain_target_is_a_code(name: str) -> None:
    output, codes, _ = output_of(name)
    targets = torch.nn.functional.one_hot(codes, 20).float()
    torch.testing.assert_close(
        soft_cross_entropy(output.logits, targets), code_cross_entropy(output.logits, codes)
    )


@pytest.mark.parametrize("name", ["gpt_text", "rq_text", "rq_sizes_per_depth"])
def test_soft_targets_by_hand(name: str) -> None:
    """Beyond a smaller codebook 0 * -inf counts as 0, in the loss and in its gradient."""
    (output, codes, cond), targets = output_of(name), draw_targets(name)
    logits = output.logits.requires_grad_()
    losses = sequence_losses(
        output._replace(logits=logits), codes, cond, SequenceLossConfig(text_weight=0.0), targets
    )
    expected = 0.0
    for rows, wanted in zip(logits.detach().flatten(0, -2), targets.flatten(0, -2), strict=True):
        finite = rows.isfinite()
        expected -= float((wanted[finite] * rows[finite].log_softmax(0)).sum())
    assert losses.code.item() == pytest.approx(expected / codes.numel(), abs=1e-5)
    losses.total.backward()
    gradient = (logits.detach().softmax(-1) - targets) / codes.numel()
    torch.testing.assert_close(logits.grad, gradient)


def test_targets_of_another_shape() -> None:
    output, _, _ = output_of("gpt_text")
    with pytest.raises(ValueError, match=r"shape \(3, 2, 3, 20\), got \(3, 2, 3, 19\)"):
        soft_cross_entropy(output.logits, output.logits[..., 1:])


def test_padding_in_the_text() -> None:
    """It is learnt as in the originals, unless it is to be left out."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[3, 1, 0, 0], [2, 4, 1, 0]])
    each = -logits.log_softmax(-1).gather(-1, text[:, 1:].unsqueeze(-1)).squeeze(-1)  # (2, 3)
    torch.testing.assert_close(text_cross_entropy(logits, text), each.mean())
    expected = (each[0, 0] + each[1, 0] + each[1, 1]) / 3
    torch.testing.assert_close(text_cross_entropy(logits, text, ignores_padding=True), expected)
    output = SequenceOutput(torch.zeros(2, 1, 1, 4), logits)
    config = SequenceLossConfig(ignores_padding=True)
    losses = sequence_losses(output, torch.zeros(2, 1, 1, dtype=torch.int64), text, config)
    torch.testing.assert_close(losses.text, expected)
    assert float(text_cross_entropy(logits, torch.zeros_like(text), ignores_padding=True)) == 0


def test_a_text_of_one_id_predicts_none() -> None:
    config = replace(gpt("text"), condition=replace(MODELS["gpt_text"].condition, length=1))
    codes, cond = draw_codes(config, 2), draw_cond(config, 2)
    losses = sequence_losses(build(config)(codes, cond), codes, cond, SequenceLossConfig())
    assert losses.text is None
    torch.testing.assert_close(losses.total, losses.code)


def test_computed_in_float32_under_autocast() -> None:
    logits = torch.randn(2, 2, 3, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes = draw_codes(MODELS["gpt_text"], 2)
    targets = torch.nn.functional.one_hot(codes, 20).float()
    expected = code_cross_entropy(logits, codes)
    with torch.autocast("cpu", torch.bfloat16):
        for found in (code_cross_entropy(logits, codes), soft_cross_entropy(logits, targets)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weights", [{"code_weight": -1.0}, {"text_weight": -0.1}])
def test_weights_below_zero(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="code_weight and text_weight must be at least 0, got"):
        SequenceLossConfig(**weights)


class TestGradientCheckpointing:
    DROPOUT = blocks(residual_dropout=0.3, attention_dropout=0.2)

    @pytest.mark.parametrize(
        "config",
        [gpt("text", transformer=DROPOUT), rq("class", body=DROPOUT, head=DROPOUT)],
        ids=["gpt", "rq"],
    )
    def test_gradients_are_the_same(self, config: object) -> None:
        """With dropout, which must drop the same when blocks are computed again."""
        gradients, calls = [], []
        for recomputes in (False, True):
            model = build(config).train()
            count = [0]  # of forward passes through blocks
            for module in model.modules():
                if isinstance(module, Transformer):
                    module.recomputes_blocks = recomputes
                    for block in module.blocks:
                        block.attention.register_forward_pre_hook(
                            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
                        )
            torch.manual_seed(0)
            codes, cond = draw_codes(config, 2), draw_cond(config, 2)
            sequence_losses(model(codes, cond), codes, cond, SequenceLossConfig()).total.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            calls.append(count[0])
        assert calls[1] == 2 * calls[0]
        for plain, again in zip(*gradients, strict=True):
            torch.testing.assert_close(again, plain, rtol=0, atol=1e-6)

    def test_only_while_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise AssertionError("computed for a backward pass that does not come")

        monkeypatch.setattr("stage2_transformer.layers.checkpoint", refuse)
        config, model = MODELS["gpt_text"], build("gpt_text")
        model.transformer.recomputes_blocks = True
        codes, cond = draw_codes(config, 2), draw_cond(config, 2)
        model(codes, cond)  # evaluation
        model.train()
        with torch.no_grad():
            model(codes, cond)
        model.decode(codes.flatten(1)[:, :2], _prefilled(model, cond))
        with pytest.raises(AssertionError, match="does not come"):
            model(codes, cond)


def _prefilled(model: torch.nn.Module, cond: Tensor) -> object:
    cache = model.make_cache(len(cond))
    model.prefill(cond, cache)
    return cache
