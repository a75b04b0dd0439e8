"""What every sequence model promises, whatever its architecture."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequence_models import (
    CONDITIONAL,
    MODELS,
    SOME,
    Config,
    Model,
    blocks,
    build,
    code_sizes,
    draw_codes,
    draw_cond,
    flat_logits,
    gpt,
    num_depths,
    rq,
)
from torch import Tensor

from stage2_transformer import (
    GPT,
    STAGE2,
    ConditionConfig,
    GPTConfig,
    PyramidGPTConfig,
    RQTransformer,
    SequenceModel,
)
from stage2_transformer.checkpoint import build_model

KEYS = Path(__file__).with_name("state_dict_keys.txt")


def test_every_type_is_among_the_models() -> None:
    assert {type(config) for config in MODELS.values()} == {config for _, config in STAGE2.values()}


@pytest.mark.parametrize("name", MODELS)
class TestContract:
    def test_shapes(self, name: str) -> None:
        config, model = MODELS[name], build(name)
        codes, cond = draw_codes(config, 2), draw_cond(config, 2)
        assert isinstance(model, SequenceModel)
        assert (model.vocab_size, model.code_shape) == (20, config.code_shape)
        output = model(codes, cond)
        assert output.logits.shape == (2, *config.code_shape, 20)
        if config.condition.kind == "text":
            assert output.text_logits.shape == (2, 4, 30)
        else:
            assert output.text_logits is None
        cache = model.make_cache(2)
        assert model.prefill(cond, cache).shape == (2, 20)
        assert model.decode(codes.flatten(1)[:, :3], cache).shape == (2, 3, 20)

    def test_logits_are_finite_within_each_depths_codebook(self, name: str) -> None:
        config, model = MODELS[name], build(name)
        logits = flat_logits(model, draw_codes(config, 2), draw_cond(config, 2))
        is_code = torch.arange(20) < code_sizes(config)[:, None]  # (T, V)
        assert torch.equal(logits.isfinite(), is_code.expand_as(logits))
        assert bool(logits[:, ~is_code].isneginf().all())
        assert logits[:, is_code].std() > 0.5  # else the tolerances of other tests would mean little

    def test_training_mode_only_switches_dropout(self, name: str) -> None:
        config, model = MODELS[name], build(name)
        codes, cond = draw_codes(config, 2), draw_cond(config, 2)
        evaluated, trained = model(codes, cond), model.train()(codes, cond)
        torch.testing.assert_close(trained, evaluated, rtol=0, atol=0)

    def test_a_step_of_training_lowers_the_loss(self, name: str) -> None:
        config, model = MODELS[name], build(name).train()
        codes, cond = draw_codes(config, 4), draw_cond(config, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = _loss(model, codes, cond)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]
        assert [key for key, value in model.named_parameters() if value.grad is None] == []

    def test_meta_build_has_no_storage_and_the_same_tensors(self, name: str) -> None:
        config = MODELS[name]
        codebook = torch.zeros(num_depths(config), 20, getattr(config, "codebook_width", 1))
        model, real = build_model(config, codebook), build(name)
        assert all(parameter.is_meta for parameter in model.parameters())
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert shapes == {key: value.shape for key, value in real.state_dict().items()}

    def test_state_dict_keys_are_pinned(self, name: str) -> None:
        # a changed key is a checkpoint that no longer loads
        keys = dict.fromkeys(re.sub(r"\.\d+\.", ".{}.", key, count=1) for key in build(name).state_dict())
        assert sorted(keys) == _pinned_keys()[name]

    def test_every_code_depends_on_all_codes_before_it_and_on_no_others(self, name: str) -> None:
        config, model = MODELS[name], build(name)
        total = math.prod(config.code_shape)
        assert torch.equal(_influence(model, config), torch.ones(total, total, dtype=torch.bool).tril(-1))


@pytest.mark.parametrize("name", [name for name in CONDITIONAL if MODELS[name].condition.kind == "text"])
def test_a_word_depends_on_the_words_before_it_and_a_code_on_all_words(name: str) -> None:
    config, model = MODELS[name], build(name)
    words, codes = torch.arange(5)[None], draw_codes(config, 1)  # each word occurs once
    output = model(codes, words)
    words_read = [model.condition.embedding.weight]
    to_words = _dependence(output.text_logits[0], words_read)[0][:, :5]
    assert torch.equal(to_words, torch.ones(4, 5, dtype=torch.bool).tril())
    assert bool(_dependence(_finite(output.logits)[0].flatten(0, -2), words_read)[0][:, :5].all())
    tables = _code_tables(model)  # before the forward pass: they are new leaves
    assert not any(part.any() for part in _dependence(model(codes, words).text_logits[0], tables))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_condition_moves_every_code(name: str) -> None:
    config, model = MODELS[name], build(name)
    codes, cond = draw_codes(config, 1).expand(2, *config.code_shape), draw_cond(config, 2)
    logits = flat_logits(model, codes, cond)[..., :7]
    assert (logits[0] - logits[1]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("name", ["gpt_text", "gpt_residual_codes", "rq_text"])
def test_another_past(name: str) -> None:
    """What is read of it are earlier positions; an RQ-Transformer reads its own position from the codes."""
    config, model = MODELS[name], build(name)
    codes, cond = draw_codes(config, 2), draw_cond(config, 2)
    other = codes.roll(1, dims=0)
    with torch.no_grad():
        read, plain, own = (
            model(codes, cond, other).logits,
            model(other, cond).logits,
            model(codes, cond).logits,
        )
        assert torch.equal(model(codes, cond, codes).logits, own)
    if isinstance(model, RQTransformer):
        assert torch.equal(read[..., 0, :], plain[..., 0, :])
        assert not torch.equal(read[..., 1:, :], plain[..., 1:, :])
        first = (slice(None), 0, 0)  # before it there is the condition alone
        assert torch.equal(read[first], own[first])
    else:
        assert torch.equal(read, plain)
    assert not torch.equal(read, own)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_null_condition(name: str) -> None:
    model, cond = build(name), draw_cond(MODELS[name], 2)
    before = cond.clone()
    null = model.null_condition(cond)
    assert torch.equal(cond, before)
    value = 0 if MODELS[name].condition.kind == "text" else 7
    assert torch.equal(null, torch.full_like(cond, value))
    assert bool(flat_logits(model, draw_codes(MODELS[name], 2), null)[..., :7].isfinite().all())


@pytest.mark.parametrize("name", ["gpt_class", "rq_class"])
def test_the_null_class_of_a_model_without_one_is_the_mean_of_all(name: str) -> None:
    config, model = MODELS[name], build(name)
    codes = draw_codes(config, 2)
    null_logits = flat_logits(model, codes, torch.tensor([7, 3]))
    with torch.no_grad():
        model.condition.embedding.weight[0] = model.condition.embedding.weight.mean(dim=0)
    torch.testing.assert_close(null_logits, flat_logits(model, codes, torch.tensor([0, 3])))


DROPOUTS: dict[str, Config] = {
    "gpt_residual": gpt(transformer=blocks(residual_dropout=0.5)),
    "gpt_attention": gpt(transformer=blocks(attention_dropout=0.5)),
    "gpt_embedding": gpt(embedding_dropout=0.5),
    "rq_body_residual": rq(body=blocks(residual_dropout=0.5)),
    "rq_body_attention": rq(body=blocks(attention_dropout=0.5)),
    "rq_head_residual": rq(head=blocks(num_heads=4, residual_dropout=0.5)),
    "rq_head_attention": rq(head=blocks(num_heads=4, attention_dropout=0.5)),
    "rq_embedding": rq(embedding_dropout=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_acts_in_training_alone(name: str) -> None:
    config = DROPOUTS[name]
    model, plain = build(config), build({"gpt": gpt(), "rq_": rq()}[name[:3]])
    plain.load_state_dict(model.state_dict())
    codes, cond = draw_codes(config, 2), draw_cond(config, 2)
    assert torch.equal(flat_logits(model, codes, cond), flat_logits(plain, codes, cond))
    assert not torch.allclose(flat_logits(model.train(), codes, cond), flat_logits(plain, codes, cond))


def test_the_codebook_is_neither_trained_nor_saved() -> None:
    codebook = torch.nn.Parameter(torch.randn(3, 20, 6))
    model = RQTransformer(MODELS["rq_class"], codebook)
    _loss(model, draw_codes(MODELS["rq_class"], 2), torch.tensor([1, 2])).backward()
    assert codebook.grad is None
    assert "codebook" not in model.state_dict()
    assert "codebook" not in dict(model.named_parameters())


CONFIG_ERRORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "width must be a multiple of num_heads .* got width 16, num_heads 3": (blocks, {"num_heads": 3}),
    "all at least 1, got width 16, num_heads 2, num_layers 0": (blocks, {"num_layers": 0}),
    "width must be a multiple .* num_heads 0": (blocks, {"num_heads": 0}),
    "activation must be one of gelu, quick_gelu, got 'relu'": (blocks, {"activation": "relu"}),
    r"dropout must be in \[0, 1\), got 1.0 \(residual\)": (blocks, {"residual_dropout": 1.0}),
    r"dropout must be .* -0.1 \(attention\)": (blocks, {"attention_dropout": -0.1}),
    "condition kind must be text, class or none, got 'image'": (ConditionConfig, {"kind": "image"}),
    "vocab_size and length must be at least 1, got 0 and 64": (ConditionConfig, {"vocab_size": 0}),
    "a class condition has length 1, got 64": (ConditionConfig, {"kind": "class"}),
    "has_null_class is for class conditions, got kind 'text'": (ConditionConfig, {"has_null_class": True}),
    r"vocab_size must be positive and code_shape .* got 0 and \(2, 3\)": (gpt, {"vocab_size": 0}),
    r"code_shape \(h, w\) or \(h, w, D\), got 20 and \(6,\)": (gpt, {"code_shape": (6,)}),
    r"code_shape .* got 20 and \(2, 0\)": (gpt, {"code_shape": (2, 0)}),
    r"embedding_dropout must be in \[0, 1\), got 1": (gpt, {"embedding_dropout": 1.0}),
    r"one codebook size per depth, got \(2, 3, 3\) and 2 sizes": (rq, {"codebook_sizes": (20, 20)}),
    r"code_shape must be \(h, w, D\) .* got \(2, 0, 3\)": (rq, {"code_shape": (2, 0, 3)}),
    r"codebook_sizes must be at least 1, got \(20, 0, 20\)": (
        rq,
        {"codebook_sizes": (20, 0, 20), "has_shared_classifier": False},
    ),
    "body and head must have one width, got 16 and 8": (rq, {"head": blocks(width=8)}),
    r"a shared classifier needs codebooks of one size, got \(20, 7, 13\)": (
        rq,
        {"codebook_sizes": (20, 7, 13)},
    ),
    "a shared embedding needs codebooks of one size": (
        rq,
        {"codebook_sizes": (20, 7, 13), "has_shared_classifier": False, "has_codebook_body": False},
    ),
    "embedding_dropout must be .* got -1": (rq, {"embedding_dropout": -1.0}),
}


@pytest.mark.parametrize("message", CONFIG_ERRORS)
def test_config_errors(message: str) -> None:
    make, settings = CONFIG_ERRORS[message]
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_sizes_may_differ_where_no_table_is_shared() -> None:
    rq(codebook_sizes=(20, 7, 13), has_shared_classifier=False)  # has_shared_embedding, but no embedding


COND_ERRORS: dict[str, tuple[str, Any]] = {
    "this model is unconditional: pass cond=None": ("none", torch.tensor([0, 0])),
    "this model needs a text condition, got None": ("text", None),
    "this model needs a class condition, got None": ("class", None),
    r"a text condition must be int64 \(B, 5\), got torch.int64 \(2, 4\)": ("text", torch.zeros(2, 4).long()),
    r"a text condition must be int64 \(B, 5\), got torch.int64 \(2,\)": ("text", torch.tensor([1, 2])),
    r"a text condition must be int64 .* got torch.float32 \(2, 5\)": ("text", torch.zeros(2, 5)),
    r"a class condition must be int64 \(B,\), got torch.int64 \(2, 2\)": ("class", torch.zeros(2, 2).long()),
    r"text ids must be in \[0, 30\), got 30: is this the tokenizer": ("text", torch.full((2, 5), 30)),
    r"text ids must be in \[0, 30\), got -1: is this the tokenizer": ("text", torch.full((2, 5), -1)),
    r"class ids must be in \[0, 7\), got 8: no such class": ("class", torch.tensor([1, 8])),
    r"class ids must be in \[0, 7\), got -1: no such class": ("class", torch.tensor([-1, 1])),
}


@pytest.mark.parametrize("kind", ["gpt", "rq"])
@pytest.mark.parametrize("message", COND_ERRORS)
def test_condition_errors(kind: str, message: str) -> None:
    condition, cond = COND_ERRORS[message]
    model = build(f"{kind}_{condition}")
    with pytest.raises(ValueError, match=message):
        model(draw_codes(model.config, 2), cond)
    with pytest.raises(ValueError, match=message):
        model.prefill(cond, model.make_cache(2))


@pytest.mark.parametrize("name", SOME)
def test_code_errors(name: str) -> None:
    config, model = MODELS[name], build(name)
    codes, cond = draw_codes(config, 2), draw_cond(config, 2)
    expected = ", ".join(map(str, config.code_shape))
    with pytest.raises(ValueError, match=rf"codes must be int64 \(B, {expected}\), got torch.int64 \(2, 1\b"):
        model(codes[:, :1], cond)
    with pytest.raises(ValueError, match=rf"codes must be int64 \(B, {expected}\), got torch.float32"):
        model(codes.float(), cond)


@pytest.mark.parametrize("name", ["gpt_none", "rq_none"])
def test_no_guidance_without_a_condition(name: str) -> None:
    with pytest.raises(ValueError, match="this model is unconditional: use cfg_scale=1"):
        build(name).null_condition(None)


@pytest.mark.parametrize("name", ["gpt_text", "rq_class"])
def test_no_guidance_of_a_condition_that_is_missing(name: str) -> None:
    """It used to say that the model was unconditional, which it is not."""
    with pytest.raises(ValueError, match=r"this model needs a (text|class) condition, got None"):
        build(name).null_condition(None)


def test_codebook_errors() -> None:
    config = MODELS["rq_class"]
    with pytest.raises(ValueError, match=r"reads codes as codebook vectors: pass tokenizer.codebook\(\)"):
        RQTransformer(config)
    with pytest.raises(ValueError, match=r"must be \(D, V, C\) = \(3, 20, 6\), got \(3, 20, 5\)"):
        RQTransformer(config, torch.zeros(3, 20, 5))


def _loss(model: Model, codes: Tensor, cond: Tensor | None) -> Tensor:
    output = model(codes, cond)
    loss = F.cross_entropy(output.logits.flatten(0, -2), codes.flatten())
    if output.text_logits is not None:
        loss = loss + F.cross_entropy(output.text_logits.flatten(0, 1), cond[:, 1:].flatten())
    return loss


def _pinned_keys() -> dict[str, list[str]]:
    """Models of the same keys share a paragraph: `[their names]`, then one key a line."""
    keys: dict[str, list[str]] = {}
    for paragraph in KEYS.read_text().split("\n\n"):
        names, *lines = paragraph.strip().splitlines()
        keys |= dict.fromkeys(names.strip("[]").split(), lines)
    return keys


def _code_tables(model: Model) -> list[Tensor]:
    """The tensors that codes are read from, as leaves."""
    if type(model) is GPT:
        return [model.code_embedding.weight]
    if model.codebook is not None:
        model.codebook = model.codebook.clone().requires_grad_()
    table = model.table if isinstance(model, RQTransformer) else None
    return [table for table in (model.codebook, table and table.weight) if table is not None]


def _dependence(logits: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """For each table (*, C) whether the logits (n, V) have a gradient there, (n, *)."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for row in (logits * noise).sum(dim=-1):
        grads = torch.autograd.grad(row, tables, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append([grad.abs().sum(dim=-1) > 0 for grad in grads])
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _influence(model: Model, config: Config) -> Tensor:
    """(T, T): whether code m moves the logits of code n. Each row of a table is used by one code at most."""
    sizes = code_sizes(config)
    total, depth = len(sizes), 1 if isinstance(config, GPTConfig) else num_depths(config)
    places, depths = torch.arange(total), torch.tensor(model.code_depths)
    codes = places if total <= int(sizes.min()) else places // depth
    if isinstance(config, PyramidGPTConfig):  # of each scale from its first code on
        codes = places - torch.tensor([model.code_depths.index(scale) for scale in model.code_depths])
    tables = _code_tables(model)
    logits = _finite(flat_logits(model, codes[None], draw_cond(config, 1)))[0]
    influence = torch.zeros(total, total, dtype=torch.bool)
    for table, found in zip(tables, _dependence(logits, tables), strict=True):
        if table.ndim == 3:  # (T, D, V): the codebook
            influence |= found[:, depths, codes]
        elif not isinstance(config, GPTConfig) and not config.has_shared_embedding:
            first = torch.tensor([sum(config.codebook_sizes[:d]) for d in range(depth)])
            influence |= found[:, first[places % depth] + codes]
        else:
            influence |= found[:, codes]
    return influence


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits.isneginf(), 0)
