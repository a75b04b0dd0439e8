"""What `mindalle evaluate` does: open both sides, run the networks once, measure, print, write."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mindalle.cli.command import UsageError, say
from mindalle.cli.evaluate_sides import (
    check_listed,
    check_moments,
    check_options,
    choose_metrics,
    load_networks,
    network_of_reconstructions,
    open_reference,
    read_with_bar,
)
from mindalle.cli.output import RESULTS, atomic_directory, check_free, save_png
from mindalle.data.code_cache import file_hash, identified_tokenizer, tensors_hash
from mindalle.data.samples import Source, open_source
from mindalle.evaluation.codebook import codebook_measures
from mindalle.evaluation.comparison import Comparison, measure_all
from mindalle.evaluation.features import FeatureNetwork, clip_hash
from mindalle.evaluation.likelihood import likelihood_measures
from mindalle.evaluation.model import Prompt, draw_pictures, measure_data, sequence_model
from mindalle.evaluation.moments import Moments, moments_of, save_moments
from mindalle.evaluation.pictures import Collector, PictureSet, measure_pictures, picture_batches
from mindalle.evaluation.reconstruction import load_perceptual, measure_reconstruction, quality_measures
from mindalle.evaluation.results import Context, Measure, append_results, table
from mindalle.hub import resolve_model
from mindalle.image import fit, to_tensor
from mindalle.pipeline import Pipeline
from mindalle.rerank import ClipReranker
from stage1_vqgan import RQVAE
from stage1_vqgan.autoencoder import QuantizedAutoencoder


def evaluate_tokenizer(args: argparse.Namespace, command: str) -> None:
    """Measure an image tokenizer on a data set."""
    check_options(args)
    source = open_source(args.data)
    tokenizer, weights_hash = identified_tokenizer(args.tokenizer)
    tokenizer.to(args.device)
    if args.depths and len(tokenizer.code_shape) == 2:
        raise UsageError("--depths is for residual codes (RQ-VAE): this tokenizer has one code per position")
    wanted = set(args.metrics or ("pixels", "perceptual", "rfd", "codebook"))
    has_perceptual = "perceptual" in wanted and args.perceptual != "none"
    perceptual = load_perceptual(args.perceptual, args.device) if has_perceptual else None
    network = network_of_reconstructions(args, source) if "rfd" in wanted else None
    data = PictureSet(name=source.name, fingerprint=source.fingerprint)
    found = measure_reconstruction(
        tokenizer,
        _image_batches(args, source, data, tokenizer),
        perceptual=perceptual,
        network=network,
        has_all_depths=args.depths,
    )
    measures = quality_measures(
        found,
        has_pixels="pixels" in wanted,
        perceptual=perceptual,
        network=network,
        num_components=args.feature_dims,
        seed=args.seed,
        may_refuse=args.metrics is None,
    )
    if "codebook" in wanted:
        measures += codebook_measures(found.codes, _codebook_sizes(tokenizer), seed=args.seed)
    subject = {"kind": "reconstructions by", "name": args.tokenizer, "sha256": weights_hash}
    _report(args, command, measures, subject, data.about("data"))


def evaluate_images(args: argparse.Namespace, command: str) -> None:
    """Measure pictures against a reference, and against their captions."""
    check_options(args)
    reference = open_reference(args.reference)
    metrics = choose_metrics(args, reference)
    if not metrics and args.save_stats is None:
        raise UsageError("there is nothing to measure: name a REFERENCE, or a CLIP with --clip")
    source = open_source(args.images)
    network, judge = load_networks(args, metrics, has_moments=args.save_stats is not None)
    if isinstance(reference, Moments):
        check_moments(reference, network, args.reference)
    if args.metrics is not None:
        check_listed(args, metrics, source, reference, network)
    pictures = _measure(args, source, network, judge)
    theirs: PictureSet | Moments | None = None
    if reference is not None:
        theirs = reference if isinstance(reference, Moments) else _measure(args, reference, network, None)
    if args.save_stats is not None and network is not None and pictures.vectors is not None:
        about = {"features_hash": network.weights_hash, "resize": network.resize}
        save_moments(args.save_stats, moments_of(pictures.vectors, **about))
        say(args.save_stats, is_note=True)
    comparison = _comparison(args, pictures, theirs, network, judge)
    measures = measure_all(comparison, metrics, may_refuse=args.metrics is None) if metrics else []
    _report(args, command, measures, pictures.about("pictures"), _about_reference(theirs, args.reference))


def evaluate_model(args: argparse.Namespace, command: str) -> None:
    """Measure a model's likelihood of a data set, and pictures drawn from its captions against it."""
    check_options(args)
    if args.save_images is not None:
        check_free(args.save_images)
    source = open_source(args.data)
    metrics = choose_metrics(args, source)
    network, judge = load_networks(args, metrics)
    pipe = Pipeline.from_pretrained(args.model, device=args.device)
    model, size = sequence_model(pipe), pipe.image_tokenizer.convnet.image_size
    if args.metrics is not None:
        check_listed(args, metrics, source, source, network)
    data = PictureSet(name=source.name, fingerprint=source.fingerprint)
    samples = read_with_bar(source, args.limit, "reading")
    nats, prompts = measure_data(pipe, data, samples, Collector(network, None), batch_size=args.batch_size)
    measures = []
    if args.metrics is None or "nll" in args.metrics:
        positions = model.code_shape[0] * model.code_shape[1]
        measures = likelihood_measures(nats, num_positions=positions, num_pixels=size * size, seed=args.seed)
    if metrics or args.save_images is not None:
        pictures = _draw(args, pipe, prompts, network, judge)
        comparison = _comparison(args, pictures, data, network, judge)
        measures += measure_all(comparison, metrics, may_refuse=args.metrics is None)
    subject = {
        "kind": "model",
        "name": args.model,
        "sha256": _model_hashes(args.model, pipe),
        "sampling": asdict(pipe.sampling.params),
        "candidates": 1,
    }
    _report(args, command, measures, subject, data.about("data"))


def _measure(
    args: argparse.Namespace, source: Source, network: FeatureNetwork | None, judge: ClipReranker | None
) -> PictureSet:
    """Run the networks over a side."""

    def prepare(picture: Image.Image) -> Image.Image:
        return fit(picture, (args.size, args.size))

    return measure_pictures(
        source,
        read_with_bar(source, args.limit, f"reading {source.name}"),
        network=network,
        judge=judge,
        prepare=prepare if args.size is not None else None,
        batch_size=args.batch_size,
    )


def _codebook_sizes(tokenizer: QuantizedAutoencoder) -> tuple[int, ...]:
    """V of each depth."""
    if isinstance(tokenizer, RQVAE):
        return tokenizer.config.quantizer.codebook_sizes
    return (tokenizer.codebook_size,)


def _image_batches(
    args: argparse.Namespace, source: Source, data: PictureSet, tokenizer: QuantizedAutoencoder
) -> Iterator[Tensor]:
    """The pictures of a data set as a tokenizer takes them."""
    size = (tokenizer.convnet.image_size,) * 2
    samples = read_with_bar(source, args.limit, "reconstructing")
    for batch in picture_batches(samples, data, args.batch_size):
        yield torch.stack([to_tensor(fit(sample.image, size)) for sample in batch]).to(args.device)


def _draw(
    args: argparse.Namespace,
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    network: FeatureNetwork | None,
    judge: ClipReranker | None,
) -> PictureSet:
    """A picture for each prompt, measured, and kept if asked for."""
    captions: list[tuple[str, ...]] = [(prompt,) if isinstance(prompt, str) else () for prompt in prompts]
    drawn = PictureSet(name=f"{args.model}, drawn", fingerprint="", captions=captions)
    collector = Collector(network, judge)
    with contextlib.ExitStack() as stack:
        folder = None
        if args.save_images is not None:
            folder = stack.enter_context(atomic_directory(args.save_images))
        bar = stack.enter_context(tqdm(total=len(prompts), desc="drawing"))
        for batch in draw_pictures(pipe, prompts, seed=args.seed, batch_size=args.batch_size):
            collector.add(batch)
            if folder is not None:
                _keep(folder, batch, prompts, int(bar.n), args.seed)
            bar.update(len(batch))
    collector.fill(drawn)
    return drawn


def _keep(
    folder: Path, pictures: Sequence[Image.Image], prompts: Sequence[Prompt], first: int, seed: int
) -> None:
    """Add pictures to a folder that `evaluate.py images` reads."""
    with (folder / RESULTS).open("a", encoding="utf-8") as lines:
        for index, picture in enumerate(pictures, start=first):
            name, prompt = f"{index:06d}.png", prompts[index]
            key = "class_label" if isinstance(prompt, int) else "prompt"
            save_png(folder / name, picture, {key: str(prompt)})
            line = {"file": name, key: prompt, "seed": seed, "index": index, "score": None}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _comparison(
    args: argparse.Namespace,
    pictures: PictureSet,
    reference: PictureSet | Moments | None,
    network: FeatureNetwork | None,
    judge: ClipReranker | None,
) -> Comparison:
    return Comparison(
        pictures=pictures,
        reference=reference,
        network=network,
        judge=judge,
        judge_hash=clip_hash(judge) if judge is not None else None,
        num_components=args.feature_dims,
        seed=args.seed,
    )


def _about_reference(reference: PictureSet | Moments | None, name: str | None) -> dict[str, Any] | None:
    if isinstance(reference, PictureSet):
        return reference.about("pictures")
    if reference is None or name is None:
        return None
    return {
        "kind": "mu and sigma",
        "name": name,
        "fingerprint": file_hash(name),
        "num_images": reference.num_images,
        "features_sha256": reference.features_hash,
        "resize": reference.resize,
    }


def _model_hashes(name: str, pipe: Pipeline) -> dict[str, str]:
    """SHA-256 of each part: of its file in a native checkpoint, of names and values in any other."""
    path = resolve_model(name)
    parts = {"image_tokenizer": pipe.image_tokenizer, "model": sequence_model(pipe)}
    return {
        part: file_hash(native)
        if (native := path / f"{part}.safetensors").is_file()
        else tensors_hash(module.state_dict())
        for part, module in parts.items()
    }


def _report(
    args: argparse.Namespace,
    command: str,
    measures: Sequence[Measure],
    subject: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
) -> None:
    """Print the results and add them to the file."""
    context = Context(
        subject=subject,
        reference=reference,
        seed=args.seed,
        command=command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    records = [context.record(measure) for measure in measures]
    for line in table(records):
        say(line)
    for warning in dict.fromkeys(warning for measure in measures for warning in measure.warnings):
        say(f"warning: {warning}", is_note=True)
    if args.out is not None:
        append_results(args.out, records)
        say(args.out, is_note=True)
