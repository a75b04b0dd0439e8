"""What `mindalle evaluate` does: open both sides, run the networks once, measure, print, write."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from checkpoint_io import file_hash
from mindalle.cli.command import UsageError, say
from mindalle.cli.evaluate import RECONSTRUCTION_METRICS
from mindalle.cli.evaluate_sides import (
    check_listed,
    check_moments,
    check_options,
    choose_metrics,
    load_networks,
    network_of_reconstructions,
    open_reference,
    read_with_bar,
    resize_rule,
)
from mindalle.data.code_cache import identified_tokenizer
from mindalle.data.samples import Source, open_source
from mindalle.evaluation.codebook import codebook_measures
from mindalle.evaluation.comparison import METRICS, Comparison, measure_all
from mindalle.evaluation.features import FeatureNetwork
from mindalle.evaluation.likelihood import likelihood_measures
from mindalle.evaluation.model import measure_data, sequence_model
from mindalle.evaluation.moments import Moments, moments_of, save_moments
from mindalle.evaluation.pictures import (
    Collector,
    PictureSet,
    measure_pictures,
    picture_batches,
    square,
    squared,
)
from mindalle.evaluation.reconstruction import load_perceptual, measure_reconstruction, quality_measures
from mindalle.evaluation.refusal import RefusedError
from mindalle.evaluation.results import Context, Measure, append_results, table
from mindalle.generation import Condition, SetJob, draw_set, open_set, plan_set
from mindalle.generation.job import checkpoint_hash
from mindalle.image import to_tensor
from mindalle.pipeline import Pipeline
from mindalle.rerank import ClipReranker


def evaluate_tokenizer(args: argparse.Namespace, command: str) -> None:
    """Measure an image tokenizer on a data set."""
    check_options(args)
    source = open_source(args.data, allow_pipe=args.allow_pipe)
    tokenizer, weights_hash = identified_tokenizer(args.tokenizer, use_ema=args.ema)
    tokenizer.to(args.device)
    if args.depths and len(tokenizer.codebook_sizes) == 1:
        raise UsageError("--depths is for residual codes (RQ-VAE): this tokenizer has one code per position")
    wanted = set(args.metrics or RECONSTRUCTION_METRICS)
    has_perceptual = "perceptual" in wanted and args.perceptual != "none"
    perceptual = load_perceptual(args.perceptual, args.device) if has_perceptual else None
    network = network_of_reconstructions(args, source) if "rfd" in wanted else None
    size = tokenizer.convnet.image_size
    data = PictureSet(name=source.name, fingerprint=source.fingerprint, prepared=squared(size))
    found = measure_reconstruction(
        tokenizer,
        _image_batches(args, source, data, size),
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
        measures += codebook_measures(found.codes, tokenizer.codebook_sizes, seed=args.seed)
    subject = {
        "kind": "reconstructions by",
        "name": args.tokenizer,
        "sha256": weights_hash,
        "ema": args.ema,
    }
    _report(args, command, measures, subject, data.about("data"))


def evaluate_images(args: argparse.Namespace, command: str) -> None:
    """Measure pictures against a reference, and against their captions."""
    check_options(args)
    reference = open_reference(args.reference, allow_pipe=args.allow_pipe)
    metrics = choose_metrics(args, reference)
    source = open_source(args.images, allow_pipe=args.allow_pipe)
    network, judge = load_networks(args, metrics, has_moments=args.save_stats is not None)
    if isinstance(reference, Moments):
        check_moments(reference, network, args.reference, args.size)
    if args.metrics is not None:
        check_listed(args, metrics, source, reference, network)
    pictures = _measure(args, source, network, judge)
    theirs: PictureSet | Moments | None = None
    if reference is not None and any(METRICS[name].needs_reference for name in metrics):
        theirs = reference if isinstance(reference, Moments) else _measure(args, reference, network, None)
    if args.save_stats is not None and network is not None and pictures.vectors is not None:
        rule = resize_rule(network, args.size)
        moments = moments_of(pictures.vectors, features_hash=network.weights_hash, resize=rule)
        save_moments(args.save_stats, moments)
        say(args.save_stats, is_note=True)
    comparison = _comparison(args, pictures, theirs, network, judge)
    measures = measure_all(comparison, metrics, may_refuse=args.metrics is None)
    if args.save_stats is not None and not measures:
        return
    _report(args, command, measures, pictures.about("pictures"), _about_reference(theirs, args.reference))


def evaluate_model(args: argparse.Namespace, command: str) -> None:
    """Measure a model's likelihood of a data set, and pictures drawn from its captions against it."""
    check_options(args)
    source = open_source(args.data, allow_pipe=args.allow_pipe)
    metrics = choose_metrics(args, source)
    network, judge = load_networks(args, metrics)
    pipe = Pipeline.from_pretrained(
        args.model, device=args.device, text_tokenizer=args.text_tokenizer, use_ema=args.ema
    )
    is_drawn = bool(metrics) or args.save_images is not None
    if is_drawn and pipe.reranker is not None and pipe.sampling.num_candidates > 1:
        say(
            f"drawn without choosing, where generate.py takes the best of {pipe.sampling.num_candidates}: to "
            "measure those, draw them with generate_set.py, then evaluate.py images",
            is_note=True,
        )
    pipe.reranker = None
    model, size = sequence_model(pipe), pipe.image_tokenizer.convnet.image_size
    if args.metrics is not None:
        check_listed(args, metrics, source, source, network)
    data = PictureSet(name=source.name, fingerprint=source.fingerprint, prepared=squared(size))
    samples = read_with_bar(source, args.limit, "reading")
    nats, conditions = measure_data(pipe, data, samples, Collector(network, None), batch_size=args.batch_size)
    model_hash = checkpoint_hash(args.model, pipe)
    measures = []
    if args.metrics is None or "nll" in args.metrics:
        positions = model.code_shape[0] * model.code_shape[1]
        measures = likelihood_measures(nats, num_positions=positions, num_pixels=size * size, seed=args.seed)
    if is_drawn:
        pictures = _draw(args, pipe, model_hash, conditions, network, judge)
        comparison = _comparison(args, pictures, data, network, judge)
        measures += measure_all(comparison, metrics, may_refuse=args.metrics is None)
    subject = {
        "kind": "model",
        "name": args.model,
        "sha256": model_hash,
        "ema": args.ema,
        "sampling": asdict(pipe.sampling.params),
        "num_candidates": 1,  # of each picture, whatever the checkpoint's default
    }
    _report(args, command, measures, subject, data.about("data"))


def _measure(
    args: argparse.Namespace, source: Source, network: FeatureNetwork | None, judge: ClipReranker | None
) -> PictureSet:
    """Run the networks over a side."""
    size = getattr(args, "size", None)  # a model draws pictures of its own size
    found = measure_pictures(
        source,
        read_with_bar(source, args.limit, f"reading {source.name}"),
        network=network,
        judge=judge,
        prepare=partial(square, size=size) if size is not None else None,
        batch_size=args.batch_size,
    )
    if size is not None:
        found.prepared = squared(size)
    return found


def _image_batches(args: argparse.Namespace, source: Source, data: PictureSet, size: int) -> Iterator[Tensor]:
    """The pictures of a data set as a tokenizer takes them."""
    samples = read_with_bar(source, args.limit, "reconstructing")
    for batch in picture_batches(samples, data, args.batch_size):
        yield torch.stack([to_tensor(square(sample.image, size)) for sample in batch]).to(args.device)


def _draw(
    args: argparse.Namespace,
    pipe: Pipeline,
    model_hash: str,
    conditions: Sequence[Condition],
    network: FeatureNetwork | None,
    judge: ClipReranker | None,
) -> PictureSet:
    """A picture for each condition, without choosing among candidates, kept if asked for."""
    with contextlib.ExitStack() as stack:
        directory = args.save_images or Path(stack.enter_context(TemporaryDirectory()))
        job = SetJob(
            conditions=tuple(conditions),
            directory=directory,
            model=args.model,
            params=pipe.sampling.params,
            seed=args.seed,
            use_ema=args.ema,
            text_tokenizer=args.text_tokenizer,
            is_ranked=False,
            batch_size=args.batch_size,
            num_threads=torch.get_num_threads(),
            device=args.device,
        )
        draw_set(job, plan_set(job, pipe, model_hash=model_hash), pipe)
        drawn = _measure(args, open_set(directory), network, judge)
    drawn.name = f"drawn by {args.model}"
    return drawn


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
        judge_hash=judge.weights_hash if judge is not None else None,
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


def _report(
    args: argparse.Namespace,
    command: str,
    measures: Sequence[Measure],
    subject: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
) -> None:
    """Print the results and add them to the file; raises RefusedError if there are none."""
    if not measures:
        raise RefusedError(f"too few pictures in {subject['name']} for anything that could be measured")
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
