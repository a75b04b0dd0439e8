"""Whole checkpoints: stages, text tokenizer, sampling defaults; read in any layout, written as native."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from checkpoint_io import (
    CheckpointError,
    CheckpointPart,
    Layout,
    atomic_path,
    check_bounds,
    config_to_mapping,
    find_parts,
    write_safetensors,
)
from mindalle.clip import NativeClip
from mindalle.hub import resolve_text_tokenizer
from mindalle.run import Run, find_run, load_image_tokenizer
from mindalle.text import BPE16K_FILES, TextTokenizer
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.checkpoint import STAGE1, tokenizer_from_part
from stage1_vqgan.precision import decode_in_, pixel_dtype
from stage2_transformer import GPT, STAGE2, RQTransformer, SamplingParams
from stage2_transformer.checkpoint import check_fit, model_from_part
from stage2_transformer.precision import precision_of

logger = logging.getLogger(__name__)
FORMAT = "mindalle-1"
SECTIONS = ("format", "image_tokenizer", "model", "sampling", "clip")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a checkpoint is sampled unless the user says otherwise."""

    params: SamplingParams = field(default_factory=SamplingParams)
    num_candidates: int = 1  # drawn per image that is kept, if there is a CLIP to choose with; in [1, 65536]

    def __post_init__(self) -> None:
        if type(self.num_candidates) is not int or self.num_candidates < 1:
            raise ValueError(f"num_candidates must be an integer of at least 1, got {self.num_candidates!r}")
        check_bounds(self, num_candidates=1 << 16)


@dataclass(kw_only=True)
class Checkpoint:
    """The loaded parts; None where a checkpoint has none."""

    layout: Layout | Literal["run"]
    image_tokenizer: QuantizedAutoencoder
    model: GPT | RQTransformer | None = None
    text_tokenizer: TextTokenizer | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)


def load_checkpoint(
    path: str | Path,
    *,
    text_tokenizer: str | Path | None = None,
    use_ema: bool = False,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Load all parts of a checkpoint but CLIP, on the CPU.

    Args:
        path: a directory or file of weights of any known layout, see `checkpoint_io.find_parts`, or a
            training run, see `mindalle.run.find_run`.
        text_tokenizer: what has it, if not the checkpoint, see `mindalle.hub.resolve_text_tokenizer`.
        use_ema: take the averaged weights of the sequence model, or of a tokenizer that is alone.
        precision: of the sequence model, see `stage2_transformer.choose_precision`; pictures are decoded in
            what fits it, see `stage1_vqgan.precision.pixel_dtype`, and the rest is in float32.
        device: where the models will compute.

    Returns:
        The parts.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: if the checkpoint is damaged, of an unknown layout or at odds with its config.
    """
    path = Path(path)
    if (path / "clip.safetensors").is_file() and not (path / "image_tokenizer.safetensors").is_file():
        raise CheckpointError(
            f"{path} holds a CLIP alone, which ranks the pictures of a model: pass it as such (--clip)"
        )
    try:
        parts = find_parts(path)
    except CheckpointError:
        run = find_run(path)
        if run is None:
            raise
        if use_ema:
            raise CheckpointError(
                f"{run.file} is a training run, of which averages are taken anyway: leave out --ema, use_ema"
            ) from None
        return _checkpoint_of_run(run, text_tokenizer, precision, device)
    if "image_tokenizer" not in parts:
        raise CheckpointError(
            f"{path} has a sequence model but no image tokenizer: "
            "pass the directory that holds both (stage1/ and stage2/)"
        )
    part = parts.get("model", parts["image_tokenizer"])
    _check_native(part)
    if use_ema and part.layout == "native":
        raise CheckpointError(
            f"{path} is native and has no EMA weights beside its own: leave out --ema, use_ema"
        )
    image_tokenizer = tokenizer_from_part(parts["image_tokenizer"], use_ema=use_ema and "model" not in parts)
    checkpoint = Checkpoint(
        layout=part.layout, image_tokenizer=image_tokenizer, sampling=sampling_defaults(part)
    )
    if "model" in parts:
        checkpoint.model = model_from_part(
            parts["model"],
            code_shape=image_tokenizer.code_shape,
            codebook=image_tokenizer.codebook().detach(),
            use_ema=use_ema,
            precision=precision,
            device=device,
        )
        decode_in_(image_tokenizer, pixel_dtype(precision_of(checkpoint.model), device))
        if checkpoint.model.config.condition.kind == "text":
            checkpoint.text_tokenizer = _find_text_tokenizer(path, checkpoint.model, text_tokenizer)
    if text_tokenizer is not None and checkpoint.text_tokenizer is None:
        logger.warning("the text tokenizer %s is not used: this model does not read text", text_tokenizer)
    return checkpoint


def _checkpoint_of_run(
    run: Run, text_tokenizer: str | Path | None, precision: str, device: str | torch.device
) -> Checkpoint:
    """The last weights of a run, with the tokenizers that it was trained with."""
    if run.kind in STAGE1:
        return Checkpoint(layout="run", image_tokenizer=run.build())
    if run.kind not in STAGE2:
        raise CheckpointError(f"{run.file} holds a {run.kind}, expected one of {', '.join(STAGE1 | STAGE2)}")
    named = run.data_setting("image_tokenizer")
    if not named:
        raise CheckpointError(
            f"there is no config.yaml beside {run.file} that says which image tokenizer its codes are of: "
            "name the run's directory, or make a checkpoint of it with tools/export.py --image-tokenizer"
        )
    image_tokenizer = load_image_tokenizer(named)
    check_fit(run.config, image_tokenizer.code_shape, image_tokenizer.codebook(), source=str(run.file))
    model = run.build(image_tokenizer.codebook().detach(), precision=precision, device=device)
    decode_in_(image_tokenizer, pixel_dtype(precision_of(model), device))
    checkpoint = Checkpoint(layout="run", image_tokenizer=image_tokenizer, model=model)
    words = text_tokenizer or run.data_setting("text_tokenizer")
    if run.config.condition.kind == "text":
        checkpoint.text_tokenizer = _find_text_tokenizer(run.file, model, words)
    elif text_tokenizer is not None:
        logger.warning("the text tokenizer %s is not used: this model does not read text", text_tokenizer)
    return checkpoint


def _check_native(part: CheckpointPart) -> None:
    if part.layout != "native":
        return
    unknown = sorted(set(part.config) - set(SECTIONS))
    if part.config.get("format") != FORMAT or unknown:
        raise CheckpointError(
            f"{part.file.parent / 'config.yaml'}: expected format {FORMAT} with sections "
            f"{', '.join(SECTIONS)}, got format {part.config.get('format')!r} "
            f"and unknown {', '.join(unknown) or 'nothing'}"
        )


def sampling_defaults(part: CheckpointPart) -> SamplingDefaults:
    """The sampling section of a config: native, or rq-vae-transformer's `sampling` or `experiment.sample`.

    Args:
        part: the sequence model's.

    Returns:
        The defaults; plain ones where the config has none.

    Raises:
        CheckpointError: for unknown keys, or values of another type or out of range.
    """
    where = f"sampling section beside {part.file}"
    found: Any = {}
    if part.layout == "rq-vae":
        found = part.config.get("sampling") or (part.config.get("experiment") or {}).get("sample") or {}
    elif part.layout == "native":
        found = part.config.get("sampling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} must be a mapping, got {found!r}")
    renamed = {"temp": "temperature"} if part.layout == "rq-vae" else {}
    section = {renamed.get(key, str(key)): value for key, value in found.items()}
    num_candidates = section.pop("num_candidates", 1)
    known = [item.name for item in fields(SamplingParams)]
    unknown = sorted(set(section) - set(known))
    if unknown:
        raise CheckpointError(f"unknown keys in {where}: {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return SamplingDefaults(params=SamplingParams(**section), num_candidates=num_candidates)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _find_text_tokenizer(
    path: Path, model: GPT | RQTransformer, given: str | Path | None
) -> TextTokenizer | None:
    """The tokenizer given, the checkpoint's own, or BPE-16k files found beside it."""
    condition = model.config.condition
    root = path if path.is_dir() else path.parent
    candidates = [root / "text_tokenizer.json", root / "tokenizer", root]
    # rq-vae-transformer's releases have none: minDALL-E's, beside them
    candidates += sorted(root.resolve().parent.glob("*/tokenizer"))
    for candidate in [resolve_text_tokenizer(given)] if given is not None else candidates:
        is_there = candidate.is_file() or all((candidate / name).is_file() for name in BPE16K_FILES)
        if not is_there and given is None:
            continue
        if given is None and candidate.parent not in (root, root.parent):
            logger.warning("the checkpoint has no text tokenizer, taking the BPE-16k of %s", candidate)
        return TextTokenizer.from_file(candidate, length=condition.length, vocab_size=condition.vocab_size)
    return None


def save_checkpoint(
    directory: str | Path,
    *,
    image_tokenizer: QuantizedAutoencoder | None = None,
    model: GPT | RQTransformer | None = None,
    text_tokenizer: TextTokenizer | None = None,
    clip: NativeClip | None = None,
    sampling: SamplingDefaults | None = None,
    card: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a native checkpoint: all of it, or nothing if a file cannot be written.

    Args:
        directory: created if need be.
        image_tokenizer: stage 1; None = the checkpoint is a CLIP alone.
        model: stage 2.
        text_tokenizer: of the model.
        clip: to rank the model's pictures with, or alone; reads text with the same tokenizer.
        sampling: defaults to store, of a checkpoint with a model.
        card: text of the model card, README.md.
        dtype: stored type of the weights (None = as they are); they are computed with in float32.

    Raises:
        FileExistsError: if one of the files is there already.
        ValueError: if there is nothing to write, a model without its image tokenizer, or CLIP and model have
            different text tokenizers.
        OSError: if a file cannot be written.
    """
    directory = Path(directory)
    if image_tokenizer is None and (clip is None or model is not None):
        raise ValueError("a checkpoint is an image tokenizer, with or without a model, or a CLIP alone")
    config: dict[str, Any] = {"format": FORMAT}
    writers: dict[str, Callable[[Path], None]] = {}
    if image_tokenizer is not None:
        writers["image_tokenizer.safetensors"] = _weights_writer(image_tokenizer, dtype)
        config["image_tokenizer"] = _section(image_tokenizer, STAGE1)
    if model is not None:
        writers["model.safetensors"] = _weights_writer(model, dtype)
        config |= {"model": _section(model, STAGE2), "sampling": _sampling_section(sampling)}
    if clip is not None:
        writers["clip.safetensors"] = _weights_writer(clip.model, dtype)
        config["clip"] = config_to_mapping(clip.config)
    words = _text_tokenizer_json(text_tokenizer, clip)
    if words:
        writers["text_tokenizer.json"] = partial(_write_text, text=words)
    if card:
        writers["README.md"] = partial(_write_text, text=card)
    # last: without it the other files are no checkpoint
    writers["config.yaml"] = partial(_write_text, text=_to_yaml(config))
    _write_all(directory, writers)


def _text_tokenizer_json(text_tokenizer: TextTokenizer | None, clip: NativeClip | None) -> str:
    """The one `text_tokenizer.json` that a checkpoint has; "" if nothing reads text."""
    texts = [text_tokenizer.tokenizer.to_str(pretty=True)] if text_tokenizer is not None else []
    texts += [clip.tokenize.to_str()] if clip is not None else []
    if len(set(texts)) > 1:
        raise ValueError(
            "the model and the CLIP read text with different tokenizers, and a checkpoint holds one: train "
            "the CLIP with the model's text_tokenizer.json, or keep it in a directory of its own (--clip)"
        )
    return texts[0] if texts else ""


def _write_all(directory: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write files, or none of them."""
    existing = [name for name in writers if (directory / name).exists()]
    if existing:
        raise FileExistsError(
            f"{directory} holds a checkpoint already ({', '.join(existing)}): choose another directory"
        )
    try:
        for name, write in writers.items():
            write(directory / name)
    except BaseException:  # the disk is full, the user interrupts
        for name in writers:
            (directory / name).unlink(missing_ok=True)
        raise


def _weights_writer(model: nn.Module, dtype: torch.dtype | None) -> Callable[[Path], None]:
    return lambda path: write_safetensors(path, model.state_dict(), dtype=dtype)


def _section(model: Any, table: Mapping[str, tuple[type[Any], type[Any]]]) -> dict[str, Any]:
    kind = next(name for name, (cls, _) in table.items() if type(model) is cls)
    return {"type": kind, **config_to_mapping(model.config)}


def _sampling_section(sampling: SamplingDefaults | None) -> dict[str, Any]:
    """What `sampling_defaults` reads; settings that are off are left out."""
    defaults = sampling or SamplingDefaults()
    params = {name: value for name, value in config_to_mapping(defaults.params).items() if value is not None}
    return params | {"num_candidates": defaults.num_candidates}


def _to_yaml(config: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
