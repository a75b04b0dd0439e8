"""Typed configs: a YAML mapping becomes a frozen dataclass, unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_EXPONENT = re.compile(r"[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)[eE][-+]?[0-9]+")
"""Numbers such as 1e-4, which YAML 1.1 takes for text."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file to plain dicts and lists, OmegaConf interpolations resolved where they can be.

    Args:
        path: the file.

    Returns:
        The mapping at the top of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}: a checkpoint directory holds a config.yaml")
    try:
        mapping = _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (Exception, RecursionError) as error:  # a damaged file fails in any of a dozen ways
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, got {type(mapping).__name__}")
    resolved = _resolve(mapping, _to_omegaconf(mapping))
    return {str(key): value for key, value in resolved.items()}


def _parse_yaml(text: str) -> Any:
    """Plain values; what a tag would make an object of is a list if it was one, else the tag's name."""
    import yaml  # lazy: importing a stage loads torch and einops only

    class Loader(yaml.SafeLoader):
        """Numbers as YAML 1.2 and OmegaConf write them; inert tags: none is imported, called or refused."""

    def inert(loader: Any, node: Any) -> Any:
        is_list = isinstance(node, yaml.SequenceNode) and node.tag.endswith("python/tuple")
        return loader.construct_sequence(node, deep=True) if is_list else f"<{node.tag}>"

    Loader.add_constructor(None, inert)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))
    content = yaml.load(text, Loader)
    return {} if content is None else content


def _to_omegaconf(mapping: Any) -> Any:
    """For its interpolations; None where it cannot be had."""
    from omegaconf import OmegaConf  # lazy: importing a stage loads torch and einops only

    try:
        return OmegaConf.create(mapping)
    except Exception:  # of a grammar that is not OmegaConf's, of types that it does not know
        return None


def _resolve(value: Any, config: Any) -> Any:
    """`value` with interpolations replaced; one that cannot be is left as it stands, and may not matter."""
    from omegaconf import OmegaConf

    def item(key: Any, inner: Any) -> Any:
        try:
            found = None if config is None else config[key]
            if isinstance(inner, str) and "${" in inner and config is not None:
                return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except Exception:  # OmegaConf's errors share no base class with those of its resolvers
            return inner
        return _resolve(inner, found)

    if isinstance(value, dict):
        return {key: item(key, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [item(index, inner) for index, inner in enumerate(value)]
    return value


def config_from_mapping(cls: type[T], mapping: Mapping[str, Any], *, where: str) -> T:
    """Build a frozen dataclass config from a mapping, checking names, types and ranges.

    Args:
        cls: the dataclass; its `__post_init__` checks ranges. Fields may be nested dataclasses.
        mapping: field name -> value; missing fields keep their defaults.
        where: what the mapping is, for messages ("model section of config.yaml").

    Returns:
        An instance of `cls`; lists become tuples.

    Raises:
        ValueError: for an unknown key, a missing field, a wrong type or a value out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(mapping) - set(known))
    if unknown:
        raise ValueError(f"unknown keys in {where}: {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), dict(mapping))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        field = f"{error.full_key}: " if error.full_key else ""
        message = str(error).splitlines()[0].replace("$VALUE_TYPE", "another").replace("$VALUE", "an entry")
        raise ValueError(f"{where}: {field}{message}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    assert isinstance(config, cls)
    return config


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Turn a dataclass config into plain dicts and lists, complete, ready for YAML.

    Args:
        config: a dataclass instance.

    Returns:
        Field name -> value, nested dataclasses as dicts, tuples as lists.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def flatten_config(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Name every setting by its path: {"a": {"b": 1}} -> {"a.b": 1}.

    Args:
        mapping: as `config_to_mapping` gives it.

    Returns:
        Dotted name -> value.
    """
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        inner = flatten_config(value) if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}.{name}": item for name, item in inner.items()}
    return flat
