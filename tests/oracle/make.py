"""Write small checkpoints with random weights in the official layouts, for tests with `tmp_path`.

Every `make_*` takes `**overrides` of any setting in the yaml it writes, by the end of its path joined with
"__": `attn_bias=False`, or `stage2__hparams__embed_dim=32` where the last part alone is ambiguous. Settings
that follow from others (vocabularies, grids) follow unless overridden. `omit` names settings to leave out
of the yaml.

The state dicts have exactly the originals' keys; `Release` gives them back, ready for the oracle.
"""

import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor

from .settings import Settings, mindalle_settings, omit_settings, rq_settings, taming_settings
from .weights import Weights, add_gpt, add_igpt, add_loss, add_rq_transformer, add_rqvae, add_vqgan

StateDict = OrderedDict[str, Tensor]

TAMING_LAYOUTS = {
    "flat": ("last.ckpt", "model.yaml"),
    "release": ("ckpts/last.ckpt", "configs/model.yaml"),
    "logs": ("checkpoints/last.ckpt", "configs/2021-04-23T18-11-19-project.yaml"),
}


@dataclass(frozen=True, kw_only=True)
class Release:
    """What was written. minDALL-E has one config for both stages; keys have no "stage1." in front."""

    directory: Path
    stage1_config: Settings
    stage1_state: StateDict
    stage1_ema: StateDict | None = None
    stage2_config: Settings | None = None
    stage2_state: StateDict | None = None
    stage2_ema: StateDict | None = None


def make_mindalle(
    directory: Path,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    omit: Sequence[str] = (),
    **overrides: Any,
) -> Release:
    """The release directory: config.yaml, stage1_last.ckpt, stage2_last.ckpt, and a copy of `tokenizer`."""
    config = mindalle_settings(overrides)
    stage1, stage2 = Weights(seed), Weights(seed + 1)
    add_vqgan(stage1, config["stage1"]["hparams"], config["stage1"]["embed_dim"], config["stage1"]["n_embed"])
    add_gpt(stage2, config["stage2"])

    _save(directory / "stage1_last.ckpt", {"state_dict": stage1.state})
    _save(directory / "stage2_last.ckpt", {"state_dict": stage2.state})
    if tokenizer is not None:
        shutil.copytree(tokenizer, directory / "tokenizer", dirs_exist_ok=True)
    config = _write_config(directory / "config.yaml", config, omit)
    return Release(
        directory=directory,
        stage1_config=config,
        stage1_state=stage1.state,
        stage2_config=config,
        stage2_state=stage2.state,
    )


def make_mindalle_finetuned(
    directory: Path,
    cond: Literal["class", "none"] = "class",
    *,
    seed: int = 0,
    omit: Sequence[str] = (),
    **overrides: Any,
) -> Release:
    """A fine-tuned Lightning checkpoint: last.ckpt with both stages, and config.yaml."""
    config = mindalle_settings({"stage2__type": "igpt", "use_cls_cond": cond == "class", **overrides})
    stage1, stage2 = Weights(seed), Weights(seed + 1)
    add_vqgan(stage1, config["stage1"]["hparams"], config["stage1"]["embed_dim"], config["stage1"]["n_embed"])
    add_igpt(stage2, config["stage2"])

    state = {f"stage1.{key}": value for key, value in stage1.state.items()}
    state |= {f"stage2.{key}": value for key, value in stage2.state.items()}
    lightning = {"epoch": 7, "global_step": 20016, "pytorch-lightning_version": "1.5.4"}
    _save(directory / "last.ckpt", {**lightning, "state_dict": OrderedDict(state)})

    text_only = ["tokenizer_type", "context_length", "vocab_size_txt", "ctx_len_txt"]
    omit = [*text_only, *([] if cond == "class" else ["n_classes"]), *omit]
    config = _write_config(directory / "config.yaml", config, omit)
    return Release(
        directory=directory,
        stage1_config=config,
        stage1_state=stage1.state,
        stage2_config=config,
        stage2_state=stage2.state,
    )


def make_rq(
    directory: Path,
    cond: Literal["text", "class", "none"] = "class",
    *,
    seed: int = 0,
    ema: bool = True,
    omit: Sequence[str] = (),
    **overrides: Any,
) -> Release:
    """stage1/ and stage2/, each with model.pt and config.yaml; `state_dict_ema` has weights of its own."""
    config = rq_settings(cond, overrides)
    states: dict[str, list[StateDict]] = {"stage1": [], "stage2": []}
    for offset in (0, 2) if ema else (0,):
        stage1, stage2 = Weights(seed + offset), Weights(seed + offset + 1)
        add_rqvae(stage1, config["stage1"]["arch"])
        add_rq_transformer(stage2, config["stage2"]["arch"])
        states["stage1"].append(stage1.state)
        states["stage2"].append(stage2.state)

    omit_settings(config, omit)
    for stage, epoch in (("stage1", 10), ("stage2", 100)):
        named = dict(zip(("state_dict", "state_dict_ema"), states[stage], strict=False))
        _save(directory / stage / "model.pt", {"epoch": epoch, **named})
        config[stage] = _write_config(directory / stage / "config.yaml", config[stage])
    return Release(
        directory=directory,
        stage1_config=config["stage1"],
        stage1_state=states["stage1"][0],
        stage1_ema=states["stage1"][1] if ema else None,
        stage2_config=config["stage2"],
        stage2_state=states["stage2"][0],
        stage2_ema=states["stage2"][1] if ema else None,
    )


def make_taming(
    directory: Path,
    *,
    seed: int = 0,
    layout: Literal["flat", "release", "logs"] = "flat",
    pickled: bool = True,
    canary: Path | None = None,
    omit: Sequence[str] = (),
    **overrides: Any,
) -> Release:
    """A VQGAN of taming-transformers: a Lightning 1.0 checkpoint with the loss's keys, and its yaml.

    Args:
        pickled: put Lightning's callbacks beside the tensors, of classes whose module is gone by then.
        canary: a directory that appears if the file is ever unpickled in a way that runs its code.
    """
    config = taming_settings(overrides)
    params = config["model"]["params"]
    weights, loss = Weights(seed), Weights(seed + 1)
    add_vqgan(weights, params["ddconfig"], params["embed_dim"], params["n_embed"])
    add_loss(loss)

    optimizer = {"state": {0: {"step": 2, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 5.4e-5}]}
    checkpoint: Settings = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "1.0.8",
        "state_dict": OrderedDict({**weights.state, **loss.state}),
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
    }
    ckpt_name, yaml_name = TAMING_LAYOUTS[layout]
    with _vanishing_module("lightning_callbacks_of_2020") as module:
        if pickled:
            checkpoint |= _pickled_callbacks(module)
        if canary is not None:
            checkpoint["canary"] = _Canary(canary)
        _save(directory / ckpt_name, checkpoint)
    config = _write_config(directory / yaml_name, config, omit)
    return Release(directory=directory, stage1_config=config, stage1_state=weights.state)


def read_config(path: Path) -> Settings:
    """A yaml file as plain dicts and lists."""
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _write_config(path: Path, config: Settings, omit: Sequence[str] = ()) -> Settings:
    omit_settings(config, omit)
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config), path)
    return read_config(path)


def _save(path: Path, checkpoint: Settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@contextmanager
def _vanishing_module(name: str) -> Iterator[ModuleType]:
    module = sys.modules[name] = ModuleType(name)
    try:
        yield module
    finally:
        del sys.modules[name]


def _pickled_callbacks(module: ModuleType) -> Settings:
    """Callback state under the callback's class, as Lightning 1.0 wrote it; an object; a dict subclass."""
    classes: dict[str, Any] = {}
    for name, base in (("ModelCheckpoint", object), ("AttributeDict", dict)):
        classes[name] = type(name, (base,), {"__module__": module.__name__})
        setattr(module, name, classes[name])
    best = {
        "monitor": "val/rec_loss",
        "best_model_score": torch.tensor(0.5),
        "best_model_path": "epoch=1.ckpt",
    }
    callback = classes["ModelCheckpoint"]()
    vars(callback).update(best, best_k_models={"epoch=1.ckpt": torch.tensor(0.5)})
    hparams = classes["AttributeDict"](callback=callback, learning_rate=5.4e-5)
    return {"callbacks": {classes["ModelCheckpoint"]: best}, "hyper_parameters": hparams}
