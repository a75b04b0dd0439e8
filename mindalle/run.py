"""Training runs on disk: which checkpoint is meant, what it holds, and the model in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint_io import (
    CheckpointError,
    check_finite,
    config_from_mapping,
    load_strict,
    read_tensors,
    read_yaml,
    without_storage,
)
from mindalle.clip import ClipConfig, NativeClip, make_clip_tokenizer
from mindalle.clip_weights import load_native_clip
from mindalle.hub import resolve_model
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.checkpoint import STAGE1, load_tokenizer, tokenizer_from_config
from stage2_transformer.checkpoint import STAGE2, build_model, fill_model

RUN_KEY = "mindalle"
"""Of a Lightning checkpoint: what is needed to build the model, {"kind": ..., "config": ...}.

Of a CLIP also "text_tokenizer": with another one it would read other words.
"""
CONFIGS: dict[str, type[Any]] = {kind: config for kind, (_, config) in (STAGE1 | STAGE2).items()}
CONFIGS["clip"] = ClipConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checkpoint of a training run, and the settings the run was started with."""

    file: Path  # the checkpoint
    kind: str  # of the model, a key of CONFIGS
    config: Any  # of the model, a dataclass
    content: Mapping[str, Any]  # of the checkpoint; its tensors are mapped from the file
    settings: Mapping[str, Any]  # the config.yaml that tools/train.py wrote; empty where there is none

    @property
    def num_steps(self) -> int:
        """Optimiser steps trained; 0 if the checkpoint does not say."""
        steps = self.content.get("global_step")
        return steps if isinstance(steps, int) else 0

    @property
    def is_averaged(self) -> bool:
        """Whether the weights are averages over the training."""
        return "current_model_state" in self.content

    def data_setting(self, name: str) -> Any:
        """What the run's config.yaml says for an argument of its data module; None = nothing."""
        found: Any = self.settings
        for key in ("data", "init_args", name):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def build(
        self,
        codebook: Tensor | None = None,
        *,
        use_raw: bool = False,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> Any:
        """Build the model and fill it.

        Args:
            codebook: (D, V, C) of the image tokenizer, which a sequence model needs.
            use_raw: the weights of the last step instead of their averages.
            precision: of a sequence model, see `stage2_transformer.choose_precision`.
            device: where it will compute.

        Returns:
            The model, in evaluation mode, on the CPU, anything but a sequence model in float32.

        Raises:
            CheckpointError: if the weights do not fit the config, or there are no raw ones beside averages.
        """
        section = "current_model_state" if use_raw else "state_dict"
        weights = self.content.get(section)
        if not isinstance(weights, Mapping):
            problem = "no averaged weights, and so no raw ones beside them" if use_raw else "no state_dict"
            raise CheckpointError(f"{self.file} has {problem}")
        tensors = {
            name.removeprefix("model."): tensor
            for name, tensor in weights.items()
            if isinstance(name, str) and name.startswith("model.") and isinstance(tensor, Tensor)
        }
        model: nn.Module
        if self.kind == "clip":
            with without_storage(str(self.file)):
                model = self.config.build()
        elif self.kind in STAGE1:
            model = tokenizer_from_config(self.section, where=str(self.file))
        else:
            assert codebook is not None
            empty = build_model(self.config, codebook, source=str(self.file))
            return fill_model(empty, tensors, source=str(self.file), precision=precision, device=device)
        load_strict(model, tensors, source=str(self.file))
        if self.kind not in STAGE2:  # whose logits are looked at when codes are drawn
            check_finite(model, source=str(self.file))
        return model.eval()

    @property
    def section(self) -> dict[str, Any]:
        """The model's section of a native config.yaml."""
        return {"type": self.kind, **self.content[RUN_KEY]["config"]}


def find_run(path: str | Path) -> Run | None:
    """Open a training run, if it is one.

    Args:
        path: a `.ckpt` file, or a directory with such files in it or in `checkpoints/`: of these last.ckpt
            is taken, or the newest.

    Returns:
        The run; None if there is no checkpoint at `path`, or one of another project.

    Raises:
        CheckpointError: if the checkpoint is damaged.
    """
    path = Path(path)
    files = _checkpoint_files(path) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return None
    file, *others = files
    try:
        content = read_tensors(file)
        return _read_run(file, content) if RUN_KEY in content else None
    except CheckpointError as error:
        names = ", ".join(other.name for other in others)
        raise CheckpointError(f"{error} The run's others: {names}" if others else str(error)) from error


def open_run(path: str | Path) -> Run:
    """Open a training run, see `find_run`.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: if it is no run, or its checkpoint is damaged.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no training run at {path}")
    run = find_run(path)
    if run is None:
        raise CheckpointError(
            f"{path} is no training run: expected a .ckpt file written by tools/train.py, or a directory of "
            "such files. Foreign checkpoints are for tools/convert_checkpoint.py"
        )
    return run


def load_image_tokenizer(name_or_path: str | Path, *, use_ema: bool = False) -> QuantizedAutoencoder:
    """Load an image tokenizer from wherever there is one, in evaluation mode, float32, on the CPU.

    Args:
        name_or_path: a training run, see `find_run`, or what `mindalle.hub.resolve_model` finds.
        use_ema: take the averaged weights of an rq-vae release; nothing else has any to choose.

    Returns:
        A VQGAN or an RQVAE.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        CheckpointError: if it is damaged or no image tokenizer.
    """
    path = resolve_model(name_or_path)
    run = None if use_ema else find_run(path)
    if run is None:
        return load_tokenizer(path, use_ema=use_ema)
    if run.kind not in STAGE1:
        raise CheckpointError(f"{run.file} holds a {run.kind}, expected one of {', '.join(STAGE1)}")
    tokenizer: QuantizedAutoencoder = run.build()
    return tokenizer


def clip_of_run(run: Run, *, use_raw: bool = False) -> NativeClip:
    """Build the CLIP of a run, with the text tokenizer it was trained with.

    Args:
        run: of a CLIP.
        use_raw: see `Run.build`.

    Returns:
        The CLIP, in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: if the checkpoint lacks the tokenizer, or the weights do not fit the config.
    """
    words = str(run.content[RUN_KEY].get("text_tokenizer")).encode()
    source = f"the text tokenizer in {run.file}"
    tokenize = make_clip_tokenizer(words, run.config, source=source, where=str(run.file))
    return NativeClip(model=run.build(use_raw=use_raw), config=run.config, tokenize=tokenize)


def load_own_clip(name_or_path: str | Path) -> NativeClip:
    """Load a CLIP that was trained here, in evaluation mode, float32, on the CPU.

    Args:
        name_or_path: a training run, see `find_run`, or a native checkpoint that
            `mindalle.hub.resolve_model` finds.

    Returns:
        The CLIP with its text tokenizer.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if it is damaged or no CLIP.
    """
    path = resolve_model(name_or_path)
    run = find_run(path)
    if run is None:
        return load_native_clip(path)
    if run.kind != "clip":
        raise CheckpointError(f"{run.file} holds a {run.kind}, expected a clip")
    return clip_of_run(run)


def _checkpoint_files(directory: Path) -> list[Path]:
    """The run's checkpoints, the one that is meant first, then from new to old."""
    if (directory / ".metadata").exists():
        raise CheckpointError(
            f"{directory} is a checkpoint in shards: make one file of it with "
            f"python -m pytorch_lightning.utilities.consolidate_checkpoint {directory}"
        )
    found = [
        file
        for folder in (directory, directory / "checkpoints")
        for file in folder.glob("*.ckpt")
        if not file.name.startswith(".")
    ]
    # a second run into the same directory writes last-v1.ckpt
    return sorted(found, key=lambda file: (file.name.startswith("last"), file.stat().st_mtime), reverse=True)


def _read_run(file: Path, content: Mapping[str, Any]) -> Run:
    about = content[RUN_KEY]
    kind, config = (about.get("kind"), about.get("config")) if isinstance(about, Mapping) else (None, None)
    if not isinstance(kind, str) or kind not in CONFIGS or not isinstance(config, Mapping):
        raise CheckpointError(
            f"{file} holds a model of kind {kind!r}, known are {', '.join(CONFIGS)}: "
            "was it trained by a newer version?"
        )
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    settings = folder / "config.yaml"
    return Run(
        file=file,
        kind=kind,
        config=config_from_mapping(CONFIGS[kind], config, where=f"the model's config in {file}"),
        content=content,
        settings=read_yaml(settings) if settings.is_file() else {},
    )
