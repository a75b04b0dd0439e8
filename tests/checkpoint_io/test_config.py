"""Typed configs: what goes through YAML comes back equal, and every mistake is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from checkpoint_io import config_from_mapping, config_to_mapping, flatten_config, read_yaml
from stage1_vqgan import (
    ConvNetConfig,
    ResidualQuantizerConfig,
    RQVAEConfig,
    VectorQuantizerConfig,
    VQGANConfig,
)
from stage2_transformer import ConditionConfig, GPTConfig, RQTransformerConfig, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["plain", "fancy"] = "plain"
    rate: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    width: int
    name: str = "a"
    is_deep: bool = False
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


CONVNET = ConvNetConfig(
    image_size=64,
    channels=32,
    channel_multipliers=(1, 2, 3),
    num_res_blocks=1,
    attention_resolutions=(32, 16),
    latent_channels=7,
    dropout=0.25,
)
STACK = TransformerConfig(
    width=48,
    num_layers=3,
    num_heads=4,
    activation="quick_gelu",
    has_attention_bias=False,
    has_mlp_bias=False,
    residual_dropout=0.1,
    attention_dropout=0.2,
)
CONFIGS = {
    "VQGAN": VQGANConfig(
        convnet=CONVNET,
        quantizer=VectorQuantizerConfig(codebook_size=5, width=3, commitment_weight=0.5),
    ),
    "RQVAE": RQVAEConfig(
        convnet=CONVNET,
        quantizer=ResidualQuantizerConfig(codebook_sizes=(5, 4), width=8, is_shared=False),
        latent_width=2,
        patch=(2, 2),
    ),
    "GPT": GPTConfig(
        transformer=STACK,
        condition=ConditionConfig(kind="class", vocab_size=10, length=1, has_null_class=True),
        vocab_size=5,
        code_shape=(2, 3, 4),
        embedding_dropout=0.5,
    ),
    "RQTransformer": RQTransformerConfig(
        body=STACK,
        head=TransformerConfig(width=48, num_layers=1, num_heads=2),
        condition=ConditionConfig(kind="none", vocab_size=1, length=1),
        codebook_sizes=(5, 4),
        code_shape=(2, 3, 2),
        codebook_width=9,
        has_codebook_body=False,
        has_codebook_head=False,
        has_cumulative_head=False,
        has_shared_embedding=False,
        has_shared_classifier=False,
        embedding_dropout=0.5,
    ),
}


class TestRoundTrip:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_through_yaml(self, tmp_path: Path, config: Any) -> None:
        OmegaConf.save(OmegaConf.create(config_to_mapping(config)), tmp_path / "config.yaml")
        again = config_from_mapping(type(config), read_yaml(tmp_path / "config.yaml"), where="config.yaml")
        assert again == config
        assert hash(again) == hash(config)  # lists would not be hashable

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_nothing_is_left_to_defaults(self, config: Any) -> None:
        """A default may change one day; a checkpoint's config must not change with it."""

        def names(value: Any) -> Any:
            if not isinstance(value, dict):
                return None
            return {key: names(item) for key, item in value.items()}

        assert names(config_to_mapping(config)) == names(config_to_mapping(type(config)()))
        # every field of these configs differs from its default, or the round trip would show nothing
        plain = {
            key: value for key, value in config_to_mapping(config).items() if not isinstance(value, dict)
        }
        assert all(config_to_mapping(type(config)())[key] != value for key, value in plain.items())

    def test_plain_values_only(self) -> None:
        mapping = config_to_mapping(Outer(width=3, inner=Inner(sizes=(4, 5))))
        assert mapping == {
            "width": 3,
            "name": "a",
            "is_deep": False,
            "limit": None,
            "inner": {"sizes": [4, 5], "kind": "plain", "rate": 0.5},
        }

    def test_missing_fields_keep_their_defaults(self) -> None:
        config = config_from_mapping(Outer, {"width": 3, "inner": {"rate": 0.25}}, where="here")
        assert config == Outer(width=3, inner=Inner(rate=0.25))
        assert isinstance(config.inner.sizes, tuple)

    def test_the_mapping_stays_as_it_is(self) -> None:
        mapping = {"width": 3, "inner": {"sizes": [7]}}
        config_from_mapping(Outer, mapping, where="here")
        assert mapping == {"width": 3, "inner": {"sizes": [7]}}


class TestErrors:
    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            (
                {"widht": 3, "depth": 1},
                "unknown keys in here: depth, widht; known are width, name, is_deep, limit",
            ),
            ({"width": 3, "inner": {"sise": [1]}}, r"here: inner\.sise: Key 'sise' not in 'Inner'"),
            ({}, "here: width: .*[Mm]issing mandatory value: width"),
            ({"width": "wide"}, "here: width: Value 'wide' of type 'str' could not be converted to Integer"),
            ({"width": 1.5}, "here: width: Value '1.5' of type 'float' could not be converted to Integer"),
            ({"width": None}, "here: width: .*None"),
            ({"width": [1]}, "here: width: "),
            ({"width": 3, "is_deep": "maybe"}, "here: is_deep: Value 'maybe' is not a valid bool"),
            ({"width": 3, "inner": 5}, "here: .*Inner"),
            ({"width": 3, "inner": None}, "here: inner: .*not Optional"),
            ({"width": 3, "inner": {"sizes": 5}}, r"here: inner\.sizes: "),
            (
                {"width": 3, "inner": {"sizes": [1, "two"]}},
                "here: Value 'an entry' of type 'another' could not",
            ),
            (
                {"width": 3, "inner": {"kind": "odd"}},
                r"here: inner\.kind: Invalid value 'odd', expected one of",
            ),
            ({"width": 3, "inner": {"rate": 1.5}}, r"here: rate must be in \[0, 1\), got 1.5"),
        ],
    )
    def test_config(self, mapping: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            config_from_mapping(Outer, mapping, where="here")
        assert "$" not in str(
            error.value
        )  # OmegaConf forgets to fill in its own template for entries of a list
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- 1\n- 2\n", "must hold a mapping of keys to values, got list"),
            ("3", "must hold a mapping of keys to values, got int"),
            ("a: [1, 2", "is not valid YAML"),
            ("\x00", "is not valid YAML"),
        ],
    )
    def test_yaml(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.yaml {message}"):
            read_yaml(path)

    def test_no_file(self, tmp_path: Path) -> None:
        for path in (tmp_path / "config.yaml", tmp_path):
            with pytest.raises(FileNotFoundError, match=r"no config at .* holds a config\.yaml"):
                read_yaml(path)


def test_yaml_is_resolved_to_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: {b: 3, c: [1.0, x]}\nd: ${a.b}\n7: seven\ne: 1e-6\n")
    config = read_yaml(path)
    assert config == {"a": {"b": 3, "c": [1.0, "x"]}, "d": 3, "7": "seven", "e": 1e-6}
    assert (type(config), type(config["a"]), type(config["a"]["c"])) == (dict, dict, list)


def test_flatten_config() -> None:
    """Empty sections name nothing; lists are values."""
    nested = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": {}}
    assert flatten_config(nested) == {"a": 1, "b.c": [1, 2], "b.d.e": None}


def test_what_is_not_used_does_not_matter(tmp_path: Path) -> None:
    """A variable that is not set, in a part that nobody reads, kept the whole file from being read."""
    (tmp_path / "config.yaml").write_text(
        'size: 8\nsides: ["${size}", 1e-4]\ndata: {root: "${oc.env:NOT_SET_HERE}/x", other: "${nowhere}"}\n'
        "callbacks: !!python/object/apply:os.system [touch marker]\nbetas: !!python/tuple [1, 2]\n"
        'shell: "${HOME:-/root"\n'
    )
    config = read_yaml(tmp_path / "config.yaml")
    assert config["betas"] == [1, 2]
    assert config["data"]["other"] == "${nowhere}"
    assert "os.system" in config["callbacks"]
    (tmp_path / "config.yaml").write_text('size: 8\nsides: ["${size}", 1e-4]\nroot: "${oc.env:NOT_SET_HERE}"')
    assert read_yaml(tmp_path / "config.yaml")["sides"] == [8, 1e-4]
