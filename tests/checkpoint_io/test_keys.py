"""Key tables, and the strict filling of a model from tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoint_io import CheckpointError, load_strict, without_storage
from checkpoint_io.keys import translate
from stage1_vqgan.checkpoint import RQVAE_KEYS, VQGAN_KEYS
from stage2_transformer.checkpoint import MINDALLE_KEYS, RQ_KEYS

TABLE = {
    "blocks.{}.attn.{}.*": "layers.{}.attentions.{}.*",
    "blocks.{}.attn.q.*": "layers.{}.qkv.*[0/3]",
    "embed.weight": "embedding",
    "loss.**": None,
    "mask": None,
    "**.num_batches_tracked": None,
}


class TestTranslate:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("blocks.3.attn.12.weight", "layers.3.attentions.12.weight"),
            ("blocks.0.attn.1.bias", "layers.0.attentions.1.bias"),
            ("blocks.7.attn.q.weight", "layers.7.qkv.weight[0/3]"),
            ("embed.weight", "embedding"),
            ("loss.discriminator.main.0.weight", None),
            ("loss.x", None),
            ("mask", None),
            ("encoder.norm.num_batches_tracked", None),
        ],
    )
    def test_rules(self, theirs: str, ours: str | None) -> None:
        assert translate(theirs, TABLE) == ours

    @pytest.mark.parametrize(
        "name",
        [
            "blocks.x.attn.1.weight",  # {} is a number
            "blocks..attn.1.weight",
            "blocks.3.attn.1.scale",  # * is weight or bias
            "blocks.3.attn.1.weights",
            "xblocks.3.attn.1.weight",  # the whole name must fit
            "embed.weight.more",
            "embedXweight",  # a dot is a dot
            "masks",
            "lossless",
        ],
    )
    def test_anything_else_has_no_rule(self, name: str) -> None:
        assert translate(name, TABLE) == "(no rule for this key)"

    @pytest.mark.parametrize("table", [VQGAN_KEYS, RQVAE_KEYS, MINDALLE_KEYS, RQ_KEYS])
    def test_no_key_of_the_tables_has_two_rules(self, table: dict[str, str | None]) -> None:
        for pattern in table:
            name = pattern.replace("{}", "4").replace("**", "any.thing").replace("*", "bias")
            matching = [other for other in table if translate(name, {other: "it"}) == "it"]
            assert matching == [pattern]


class Model(nn.Module):
    """Every kind of thing that a state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(2, 6)
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        self.tables = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))])
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))


def empty() -> Model:
    with torch.device("meta"):
        return Model()


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    state = Model().state_dict()
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(value.shape, generator=generator).to(dtype)
        for name, value in state.items()
        if value.is_floating_point()
    }
    return {**drawn, "steps": torch.tensor([5, 7])}


class TestLoadStrict:
    @pytest.mark.parametrize("build", [Model, empty])
    def test_fills_everything(self, build: Callable[[], Model]) -> None:
        model, expected = build(), tensors()
        load_strict(model, tensors(), source="here")
        assert model.state_dict().keys() == expected.keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name])
            assert tensor.dtype == expected[name].dtype
        assert {name for name, _ in model.named_parameters()} == set(expected) - {"steps"}
        assert all(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("build", [Model, empty])
    def test_converts_to_the_model_s_dtype(self, build: Callable[[], Model]) -> None:
        model, expected = build(), tensors(torch.float16)
        load_strict(model, tensors(torch.float16), source="here")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype))
        assert model.scale.dtype == torch.float32

    def test_parts_make_a_whole(self) -> None:
        table = {"key.*": "qkv.*[1/3]", "value.*": "qkv.*[2/3]", "query.*": "qkv.*[0/3]", "**.x": None}
        table |= {"rest.{}": "layers.{}.weight", "t{}": "tables.{}", "s": "scale", "n": "steps"}
        whole = tensors()
        theirs = {"some.x": torch.ones(1), "s": whole["scale"], "n": whole["steps"]}
        for i, name in enumerate(("query", "key", "value")):
            theirs |= {f"{name}.{leaf}": whole[f"qkv.{leaf}"].chunk(3)[i] for leaf in ("weight", "bias")}
        theirs |= {f"rest.{i}": whole[f"layers.{i}.weight"] for i in range(2)}
        theirs |= {f"t{i}": whole[f"tables.{i}"] for i in range(2)}
        model = empty()
        load_strict(model, theirs, source="here", table=table)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, whole[name])

    def test_a_part_that_is_missing(self) -> None:
        table = {"query.*": "qkv.*[0/3]", "key.*": "qkv.*[1/3]", "value.*": "qkv.*[2/3]", "**": None}
        theirs = {f"{name}.bias": torch.ones(2) for name in ("query", "key")}
        with pytest.raises(CheckpointError, match=r"missing qkv\.weight \(6, 2\); missing qkv\.bias \(6,\)"):
            load_strict(empty(), theirs, source="here", table=table)

    def test_every_problem_is_named(self) -> None:
        theirs = tensors()
        del theirs["scale"], theirs["tables.1"]
        theirs["layers.0.weight"] = torch.ones(2, 3)
        theirs["extra.weight"] = torch.ones(4)
        with pytest.raises(CheckpointError, match=r"there\.pt does not fit its config, 4 keys: ") as error:
            load_strict(empty(), theirs, source="there.pt")
        for problem in (
            "unexpected extra.weight (4,)",
            "layers.0.weight has shape (2, 3), expected (2, 2)",
            "missing scale ()",
            "missing tables.1 (4,)",
        ):
            assert problem in str(error.value)
        assert str(error.value).endswith("Is this config.yaml the one of these weights?")

    def test_a_part_of_the_wrong_shape(self) -> None:
        theirs = {"query.bias": torch.ones(6)}
        with pytest.raises(CheckpointError, match=r"query\.bias has shape \(6,\), expected \(2,\)"):
            load_strict(empty(), theirs, source="here", table={"query.*": "qkv.*[0/3]"})

    def test_two_tensors_for_one_parameter(self) -> None:
        theirs = {"first": torch.ones(()), "second": torch.ones(()), **tensors()}
        del theirs["scale"]
        table = {"first": "scale", "second": "scale", **{name: name for name in tensors()}}
        with pytest.raises(CheckpointError, match=r"1 keys: .*scale"):
            load_strict(empty(), theirs, source="here", table=table)

    def test_twenty_problems_are_enough(self) -> None:
        theirs = {**tensors(), **{f"extra{i}": torch.ones(1) for i in range(30)}}
        with pytest.raises(CheckpointError, match=r"30 keys: .* \.\.\.\. Is this") as error:
            load_strict(empty(), theirs, source="here")
        assert str(error.value).count("unexpected") == 20


class Watched(dict[str, Tensor]):
    """Tensors that come into being when they are asked for; looks at the model each time."""

    def __init__(self, model: nn.Module, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__(dict.fromkeys(shapes))  # type: ignore[arg-type]
        self.model = model
        self.shapes = shapes
        self.dtype = dtype
        self.given: list[tuple[str, weakref.ref[Tensor]]] = []

    def pop(self, name: str, *args: Any) -> Tensor:
        is_meta = {key: value.is_meta for key, value in self.model.state_dict(keep_vars=True).items()}
        arrived = {key for key, _ in self.given}
        assert is_meta == {key: key not in arrived for key in self.shapes}
        # the loop still holds the last one
        assert all(tensor() is None for _, tensor in self.given[:-1])
        super().pop(name)
        tensor = torch.ones(self.shapes[name], dtype=self.dtype)
        self.given.append((name, weakref.ref(tensor)))
        return tensor


class TestMemory:
    def test_a_parameter_is_made_when_its_tensor_arrives(self) -> None:
        """A model of N bytes must not need 2 N to load: float16 tensors are converted one at a time."""
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).to("meta")
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        watched = Watched(model, shapes, torch.float16)
        load_strict(model, watched, source="here")
        assert len(watched.given) == 8
        assert not watched
        assert all(torch.equal(value, torch.ones(value.shape)) for value in model.state_dict().values())

    def test_a_tensor_that_fits_is_not_copied(self) -> None:
        model, theirs = empty(), tensors()
        addresses = {name: tensor.data_ptr() for name, tensor in theirs.items()}
        load_strict(model, theirs, source="here")
        assert theirs == {}
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses

    def test_a_model_with_storage_keeps_it(self) -> None:
        model, theirs = Model(), tensors()
        addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        load_strict(model, theirs, source="here")
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses

    def test_a_view_across_memory_is_made_contiguous(self) -> None:
        theirs = {**tensors(), "qkv.weight": torch.arange(12.0).view(2, 6).T}
        model = empty()
        load_strict(model, theirs, source="here")
        assert model.qkv.weight.is_contiguous()
        assert torch.equal(model.qkv.weight, torch.arange(12.0).view(2, 6).T)


def test_models_without_storage_are_filled_like_others() -> None:
    """Nothing is drawn for them, so the random state stays where it is."""
    whole = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 2))
    before = torch.get_rng_state()
    with without_storage():
        empty = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 2))
        assert nn.init.normal_(tensor=empty[1].weight, std=0.1) is empty[1].weight
    assert all(parameter.is_meta for parameter in empty.parameters())
    load_strict(empty, dict(whole.state_dict()), source="here")
    assert torch.equal(torch.get_rng_state(), before)
    for ours, theirs in zip(empty.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not nn.Linear(2, 2).weight.is_meta
