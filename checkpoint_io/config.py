"""Typed configs: a YAML mapping becomes a frozen dataclass, unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MAX_LIST = 1 << 12
"""Of any list in a config."""
MAX_ENTRIES = 64
"""Of a tuple in a config: levels of a network, depths of a code."""

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
    for name, value in flatten_config(mapping).items():
        if isinstance(value, (list, tuple)) and len(value) > MAX_LIST:  # OmegaConf takes 0.1 ms for each
            raise ValueError(f"{where}: {name} must have at most {MAX_LIST} entries, got {len(value)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), dict(mapping))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        field = f"{error.full_key}: " if error.full_key else ""
        message = str(error).splitlines()[0].replace("$VALUE_TYPE", "another").replace("$VALUE", "an entry")
        raise ValueError(f"{where}: {field}{message}") from error
    except Exception as error:  # a hostile value fails in any of a dozen ways
        raise ValueError(f"{where}: {error}") from error
    assert isinstance(config, cls)
    return config


def check_bounds(config: Any, **most: int) -> None:
    """Refuse sizes that no model has, before a model of such a size is built.

    Args:
        config: a dataclass with whole numbers, or tuples of them, in the fields named.
        most: field -> the largest value that it, or one of its entries, may have; a tuple has at most
            `MAX_ENTRIES`.

    Raises:
        TypeError: if there is something else in a field.
        ValueError: names the field, what it is and what it may be.
    """
    for name, limit in most.items():
        value = getattr(config, name)
        entries = value if isinstance(value, tuple) else (value,)
        if not all(type(entry) is int for entry in entries):
            raise TypeError(f"{name} must be of whole numbers, got {shortened(value)}")
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"{name} must have at most {MAX_ENTRIES} entries, got {len(entries)}")
        if max(entries, default=0) > limit:
            raise ValueError(f"{name} must be at most {limit}, got {shortened(max(entries))}")


def repeated(value: Any, count: Any) -> tuple[Any, ...]:
    """One setting for each of several depths, as configs of the originals write it.

    Args:
        value: one for all, or a list of one each.
        count: of the depths.

    Raises:
        ValueError: if there are more than `MAX_ENTRIES`.
    """
    if isinstance(value, (list, tuple)):
        return tuple(value)
    if type(count) is not int or not 0 <= count <= MAX_ENTRIES:
        raise ValueError(f"the depth must be a whole number of at most {MAX_ENTRIES}, got {shortened(count)}")
    return (value,) * count


def shortened(value: Any) -> str:
    """A value for a message: a hundred characters of it are enough."""
    if type(value) is int and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write out the longest
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


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
