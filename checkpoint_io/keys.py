"""Models without storage, and tensors of a file into their parameters: strictly, and one tensor at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoint_io.errors import CheckpointError
from checkpoint_io.tensors import release_pages

KeyTable: TypeAlias = "Mapping[str, str | None]"
"""Their name -> our name.

`{}` stands for a number, `*` for weight or bias, `**` for anything; `None` drops the tensor on purpose; a
target `name[i/n]` makes the tensor part i of n of ours along dimension 0 (their query, key and value are our
one qkv).
"""

_PART = re.compile(r"^(?P<name>.*)\[(?P<index>\d+)/(?P<parts>\d+)\]$")


@contextlib.contextmanager
def without_storage(source: str = "the model") -> Iterator[None]:
    """Models built in this context have parameters on the meta device, for `load_strict` to fill.

    Args:
        source: whose config they are built of, for messages.

    Raises:
        CheckpointError: for whatever building raises.
    """
    try:
        with torch.device("meta"), _NoInitialisation():
            yield
    except Exception as error:  # sizes that do not fit each other fail in any of a dozen ways
        reason = (str(error) or type(error).__name__).splitlines()[0]  # without C++'s stack trace
        raise CheckpointError(f"{source}: no model can be built of its config: {reason}") from error


class _NoInitialisation(TorchFunctionMode):
    """Leaves `torch.nn.init` out: to make no numbers on the meta device, torch imports its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_strict(
    model: nn.Module,
    tensors: MutableMapping[str, Tensor],
    *,
    source: str,
    table: KeyTable | None = None,
    take: Callable[[str, Tensor, int, int], bool] | None = None,
) -> None:
    """Fill all of `model` from `tensors`.

    Args:
        model: its parameters may be on the meta device: each gets its storage when its tensor arrives. A
            tensor that fits as it is becomes the parameter, still mapped from its file; the pages of one that
            is copied are given back. So weights are in memory once.
        tensors: name -> tensor; emptied on the way.
        source: where the tensors come from, for messages.
        table: foreign names -> ours; None when the names are ours already.
        take: called with our name, the tensor and which part of how many it is, before it is placed. Where it
            returns True it has made of the tensor what it needs, and the parameter is left alone.

    Raises:
        CheckpointError: if a tensor is not in the table, fits no parameter or has another shape, or if a
            parameter got no tensor. All offending keys are listed.
    """
    parameters = dict(model.state_dict(keep_vars=True))
    problems = []
    filled: dict[str, int] = {}  # our name -> how many of its parts are still to come
    for name in list(tensors):
        tensor = tensors.pop(name)
        target = name if table is None else translate(name, table)
        if target is None:
            continue
        part = _PART.match(target)
        ours, index, parts = (
            (part["name"], int(part["index"]), int(part["parts"])) if part else (target, 0, 1)
        )
        if ours not in parameters:
            problems.append(f"unexpected {name} {tuple(tensor.shape)}")
            continue
        parameter = parameters[ours]
        expected = (
            (parameter.shape[0] // parts, *parameter.shape[1:]) if parts > 1 else tuple(parameter.shape)
        )
        filled[ours] = filled.get(ours, parts) - 1
        if tuple(tensor.shape) != expected:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        elif take is not None and take(ours, tensor, index, parts):
            release_pages(tensor)
        elif parameter.is_meta and parts == 1 and tensor.dtype == parameter.dtype:
            parameters[ours] = _place(model, ours, tensor.contiguous())
        else:
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)  # empty_like imports the compiler
                parameter = parameters[ours] = _place(model, ours, empty)
            slot = parameter.detach().chunk(parts)[index] if parts > 1 else parameter.detach()
            slot.copy_(tensor)
            release_pages(tensor)
    problems += [
        f"missing {name} {tuple(parameters[name].shape)}" for name in parameters if filled.get(name, 1)
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit its config, {len(problems)} keys: {'; '.join(problems[:20])}"
            f"{' ...' if len(problems) > 20 else ''}. Is this config.yaml the one of these weights?"
        )


def check_finite(model: nn.Module, *, source: str) -> None:
    """Refuse weights that are no numbers: nothing that comes of them would be.

    Args:
        model: filled.
        source: where its weights come from, for the message.

    Raises:
        CheckpointError: names the first parameter or buffer with NaN or infinity in it.
    """
    for name, values in model.state_dict().items():
        if values.is_floating_point() and not values.isfinite().all():
            raise CheckpointError(
                f"{source} is damaged: its {name} holds NaN or infinity: did the training that wrote it "
                "diverge? Take an earlier checkpoint"
            )


def translate(name: str, table: KeyTable) -> str | None:
    """Our name for a foreign one.

    Args:
        name: a foreign key, such as "blocks.3.attn.key.bias".
        table: see `KeyTable`.

    Returns:
        Our name, None for a tensor dropped on purpose, and for a name that is not in the table a note saying
        so, which fits no parameter and thus gets reported.
    """
    for theirs, ours in table.items():
        match = _regex(theirs).fullmatch(name)
        if match:
            return None if ours is None else ours.replace("*", "{}").format(*match.groups())
    return "(no rule for this key)"


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{\}", r"(\d+)")
    return re.compile(escaped.replace(r"\*\*", ".*").replace(r"\*", "(weight|bias)"))


def _place(model: nn.Module, name: str, values: Tensor) -> Tensor:
    """Put `values` in the place of a parameter or buffer without storage."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        parameter = nn.Parameter(values, requires_grad=values.is_floating_point())
        setattr(module, leaf, parameter)
        return parameter
    setattr(module, leaf, values)
    return values
