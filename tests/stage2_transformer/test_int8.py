"""int8: the layer against exact arithmetic, rows that do not see each other, quality, loading, `auto`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sequence_models import MODELS, SOME, blocks, build, draw_codes, draw_cond, flat_logits, gpt
from torch import Tensor, nn

from stage2_transformer import GPT, RQTransformer, SamplingParams, generate
from stage2_transformer import precision as precision_module
from stage2_transformer.int8 import (
    Int8DepthClassifier,
    Int8Linear,
    Int8Loader,
    has_int8,
    quantize_,
    quantize_rows,
)
from stage2_transformer.precision import PRECISIONS, check_precision, choose_precision, precision_of

needs_int8 = pytest.mark.skipif(not has_int8(), reason="no FBGEMM on this machine")
needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="without VNNI pairs of full bytes overflow 16 bits"
)
LEVELS = [63, pytest.param(127, marks=needs_vnni)]
"""Of activations: 63 works on every CPU with the kernel, full bytes need VNNI."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def layer(*, width: int = 48, outputs: int = 40, has_bias: bool = True) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(width, outputs, bias=has_bias)
    return linear, Int8Linear(*quantize_rows(linear.weight), linear.bias)


def rounded(linear: nn.Linear, x: Tensor, levels: int) -> Tensor:
    """What the layer is defined as, in float64 and with no kernel: both sides rounded, then multiplied."""
    weight, scale = quantize_rows(linear.weight)
    step = x.double().abs().amax(dim=-1, keepdim=True) / levels
    # in float32, as the kernel divides: what is halfway between two steps goes the same way
    steps = (x / x.abs().amax(dim=-1, keepdim=True) / (1 / levels)).round().double()
    product = steps @ weight.double().T * step * scale.double()
    return product if linear.bias is None else product + linear.bias.double()


class TestWeights:
    def test_every_weight_is_within_half_a_step(self) -> None:
        weight = torch.randn(30, 50) * torch.logspace(-3, 3, 30)[:, None]
        steps, scale = quantize_rows(weight)
        assert steps.dtype == torch.int8
        assert int(steps.min()) == -127 or int(steps.max()) == 127
        error = (steps * scale[:, None] - weight).abs()
        assert bool((error <= scale[:, None] * 0.5001).all())

    def test_a_channel_of_zeros(self) -> None:
        steps, scale = quantize_rows(torch.zeros(2, 4))
        assert not steps.any()
        assert bool((scale > 0).all())


@needs_int8
class TestLayer:
    @pytest.mark.parametrize("has_bias", [True, False])
    @pytest.mark.parametrize("levels", LEVELS)
    def test_exact_arithmetic(self, monkeypatch: pytest.MonkeyPatch, levels: int, has_bias: bool) -> None:
        monkeypatch.setattr("stage2_transformer.int8.activation_levels", lambda: levels)
        linear, quantized = layer(has_bias=has_bias)
        x = torch.randn(6, 3, 48) * torch.logspace(-4, 4, 6)[:, None, None]
        expected = rounded(linear, x, levels)
        size = expected.abs().amax(dim=-1, keepdim=True)
        assert float(((quantized(x) - expected) / size).abs().max()) < 1e-5

    def test_nothing_saturates(self) -> None:
        """All bytes at their largest: kernels that add products in 16 bits get this wrong."""
        linear, _ = layer(width=512, has_bias=False)
        linear.weight.fill_(0.5)
        quantized = Int8Linear(*quantize_rows(linear.weight), None)
        for sign in (1.0, -1.0):
            x = torch.full((3, 512), sign)
            torch.testing.assert_close(quantized(x), linear(x))

    @pytest.mark.parametrize("shape", [(1536, 4608), (6144, 1536), (1536, 1000)])
    def test_rows_do_not_see_each_other(self, shape: tuple[int, int]) -> None:
        _, quantized = layer(width=shape[0], outputs=shape[1])
        x = torch.randn(17, 1, shape[0]) * torch.logspace(-2, 2, 17)[:, None, None]
        alone = torch.cat([quantized(row) for row in x.split(1)])
        for size in (2, 3, 8, 17):
            assert torch.equal(quantized(x[:size]), alone[:size])

    def test_zeros_give_the_bias(self) -> None:
        linear, quantized = layer()
        torch.testing.assert_close(quantized(torch.zeros(2, 48)), linear.bias.expand(2, -1))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_row_that_is_not_finite_stays_so(self, bad: float) -> None:
        _, quantized = layer()
        x = torch.randn(3, 48)
        whole = quantized(x)
        x[1, 5] = bad
        got = quantized(x)
        assert not got[1].isfinite().any()
        assert torch.equal(got[[0, 2]], whole[[0, 2]])

    def test_cannot_be_saved(self) -> None:
        with pytest.raises(ValueError, match="int8 model cannot be saved"):
            layer()[1].state_dict()


@needs_int8
class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_near_float32(self, name: str) -> None:
        """Weights here are large, and vocabularies tiny, so that the differences show: still under 10%."""
        model, quantized = build(name), quantize_(build(name))
        codes, cond = draw_codes(MODELS[name], 4), draw_cond(MODELS[name], 4)
        expected, got = flat_logits(model, codes, cond), flat_logits(quantized, codes, cond)  # type: ignore[arg-type]
        seen = expected.isfinite()
        assert torch.equal(seen, got.isfinite())
        assert not torch.equal(got, expected)
        assert float((got - expected)[seen].norm() / expected[seen].norm()) < 0.1

    @pytest.mark.parametrize("name", SOME)
    def test_what_is_replaced(self, name: str) -> None:
        model = quantize_(build(name))
        assert precision_of(model) == "int8"
        left = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert left <= {"body_input.linear", "head_input.linear", "code_embedding", "canvas_embedding"}
        stacks = ("body", "head") if isinstance(model, RQTransformer) else ("transformer",)
        for stack in stacks:
            layers = [m for m in model.get_submodule(stack).modules() if isinstance(m, Int8Linear)]
            assert len(layers) == 4 * len(model.get_submodule(f"{stack}.blocks"))  # type: ignore[arg-type]
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_a_classifier_per_depth_has_a_layer_per_depth(self) -> None:
        """It was left in float32 once: of a small model's weights, half."""
        model = build("rq_sizes_per_depth")
        assert isinstance(model, RQTransformer)
        plain: Any = model.classifier
        classifier = quantize_(model).get_submodule("classifier")
        assert isinstance(classifier, Int8DepthClassifier)
        x = torch.randn(5, 16)
        for depth, (weight, bias) in enumerate(zip(plain.weight, plain.bias, strict=True)):
            linear = nn.Linear(16, 20)
            linear.weight, linear.bias = nn.Parameter(weight.T), nn.Parameter(bias)
            expected = rounded(linear, x, classifier.layers[depth].levels)  # type: ignore[arg-type]
            torch.testing.assert_close(classifier(x, depth).double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", SOME)
    def test_cached_decode_is_the_full_forward_pass(self, name: str) -> None:
        model = quantize_(build(name))
        codes, cond = draw_codes(MODELS[name], 2).flatten(1), draw_cond(MODELS[name], 2)
        expected = flat_logits(model, codes, cond)  # type: ignore[arg-type]
        cache = model.make_cache(2)  # type: ignore[operator]
        got = [model.prefill(cond, cache)[:, None]]  # type: ignore[operator]
        got += [model.decode(codes[:, n : n + 1], cache) for n in range(codes.shape[1] - 1)]  # type: ignore[operator]
        # float noise may tip an activation over to the next step
        seen = expected.isfinite()
        assert float((torch.cat(got, dim=1) - expected)[seen].abs().max()) < 0.1

    @pytest.mark.parametrize("name", ["gpt_text", "rq_class"])
    def test_an_image_does_not_depend_on_its_batch(self, name: str) -> None:
        model, cond = quantize_(build(name)), draw_cond(MODELS[name], 1)
        seeds = list(range(8))
        together = generate(model, cond, SamplingParams(), seeds=seeds)  # type: ignore[arg-type]
        alone = [generate(model, cond, SamplingParams(), seeds=[seed]) for seed in seeds]  # type: ignore[arg-type]
        assert torch.equal(together, torch.cat(alone))
        assert len(together.unique(dim=0)) > 1

    def test_parts_make_the_same_layer(self) -> None:
        """minDALL-E keeps query, key and value apart; in any order they are our one qkv."""
        whole, by_parts = quantize_(build("gpt_text")), build("gpt_text")
        loader = Int8Loader(by_parts)
        for name in loader.names:
            parts = by_parts.get_parameter(name).detach().chunk(3) if "qkv" in name else None
            for index in (2, 0, 1) if parts else (0,):
                rows = parts[index] if parts else by_parts.get_parameter(name)
                assert loader.take(name, rows, index, 3 if parts else 1)
        assert not loader.take("code_positions", by_parts.get_parameter("code_positions"), 0, 1)
        codes, cond = draw_codes(MODELS["gpt_text"], 2), draw_cond(MODELS["gpt_text"], 2)
        assert torch.equal(by_parts(codes, cond).logits, whole(codes, cond).logits)


class TestPrecision:
    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision_module, "has_int8", lambda: True)
        assert choose_precision("auto", "cpu", 99_999_999) == "fp32"
        assert choose_precision("auto", "cpu", 100_000_000) == "int8"
        assert choose_precision("auto", "mps", 10**9) == "fp32"
        for is_new in (True, False):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda is_new=is_new, **_: is_new)
            assert choose_precision("auto", "cuda:1", 10) == ("bf16" if is_new else "fp16")
        monkeypatch.setattr(precision_module, "has_int8", lambda: False)
        assert choose_precision("auto", "cpu", 10**9) == "fp32"

    def test_what_is_asked_for_is_taken(self) -> None:
        for precision in set(PRECISIONS) - {"auto", "int8"}:
            assert choose_precision(precision, "cpu", 10**9) == precision

    def test_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"one of auto, fp32, bf16, fp16, int8, got 'int3'"):
            check_precision("int3", "cpu")
        with pytest.raises(ValueError, match=r"int8 is for CPUs, got device cuda: take bf16"):
            check_precision("int8", "cuda:0")
        monkeypatch.setattr(precision_module, "has_int8", lambda: False)
        with pytest.raises(ValueError, match=r"needs an x86 CPU .*: take fp32 or bf16"):
            check_precision("int8", "cpu")

    def test_of_a_model(self) -> None:
        assert precision_of(build("rq_text")) == "fp32"
        assert precision_of(build("gpt_text").half()) == "fp16"
        assert precision_of(build("gpt_text").bfloat16()) == "bf16"


@needs_int8
@pytest.mark.parametrize("levels", LEVELS)
def test_little_is_lost_on_a_model_of_usual_weights(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    """GPT-2's initialisation times five; a bundled model of 3.4 M weights loses as little (0.001 nats).

    With 127 levels more than 93 % of the likeliest codes stay, with 63 more than 91 %.
    """
    monkeypatch.setattr("stage2_transformer.int8.activation_levels", lambda: levels)
    torch.manual_seed(0)
    config = gpt(transformer=blocks(width=128, num_layers=4, num_heads=4), vocab_size=256, code_shape=(8, 8))
    model = GPT(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter *= 5
    codes, cond = draw_codes(config, 8), draw_cond(config, 8)
    expected = flat_logits(model, codes, cond)
    got = flat_logits(quantize_(model), codes, cond)  # type: ignore[arg-type]
    before, after = expected.log_softmax(dim=-1), got.log_softmax(dim=-1)
    divergence = (before.exp() * (before - after)).sum(dim=-1)
    assert float(divergence.mean()) < 0.002
    same = float((before.argmax(dim=-1) == after.argmax(dim=-1)).float().mean())
    assert same > {127: 0.93, 63: 0.91}[levels]
