"""The two sides of `mindalle evaluate`: which metrics they give, and the networks that those take."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

from mindalle.cli.command import UsageError, check_writable, choose_machine, say
from mindalle.data.samples import Sample, Source, Unreadable, open_source
from mindalle.evaluation.comparison import METRICS
from mindalle.evaluation.features import FEATURES, FeatureNetwork, FeatureOptions, load_judge
from mindalle.evaluation.frechet import check_components
from mindalle.evaluation.moments import Moments, load_moments
from mindalle.evaluation.pictures import count_listed, read_samples, squared
from mindalle.evaluation.refusal import RefusedError, check_count, refusal
from mindalle.evaluation.results import read_results
from mindalle.generation.job import SetPlan, read_plan
from mindalle.parts import PLAN, check_empty
from mindalle.progress import progress_bar
from mindalle.rerank import ClipReranker


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded.

    Args:
        args: of any mode.

    Raises:
        UsageError: if options contradict each other.
        ValueError: if there is no such device, or --out is no file of results.
        OSError: if a file cannot be written where it is to be, or --save-images holds other things.
    """
    choose_machine(args)
    if args.features == "clip" and args.clip is None:
        raise UsageError("--features clip takes a CLIP: name it with --clip")
    if args.inception_weights is not None and args.features != "inception":
        raise UsageError(f"--inception-weights is for --features inception, got {args.features}")
    save_stats = getattr(args, "save_stats", None)
    if save_stats is not None and save_stats.suffix != ".npz":
        raise UsageError(f"--save-stats must end in .npz, got {save_stats}")
    for option, path in (("--out", args.out), ("--save-stats", save_stats)):
        if path is not None:
            check_writable(path.parent, option)
    save_images = getattr(args, "save_images", None)
    if save_images is not None:
        check_writable(save_images, "--save-images")
        if (save_images / PLAN).is_file():
            read_plan(save_images)
        elif save_images.is_dir():
            check_empty(save_images, SetPlan.contents)
    if args.out is not None and args.out.exists():
        read_results(args.out)  # else hours of work would have nowhere to go


def choose_metrics(args: argparse.Namespace, reference: Source | Moments | None) -> list[str]:
    """The metrics that were asked for, or all that can be had.

    Args:
        args: of `images` or `model`.
        reference: that is compared with.

    Returns:
        Keys of `METRICS`.

    Raises:
        UsageError: if one that was asked for lacks something.
    """
    lacking = {name: _lack(name, args, reference) for name in METRICS}
    if args.metrics is not None:
        chosen = [name for name in args.metrics if name in METRICS]
        for name in chosen:
            if lacking[name] is not None:
                raise UsageError(f"--metrics {name} takes {lacking[name]}")
        return chosen
    return [name for name in METRICS if lacking[name] is None]


def _lack(name: str, args: argparse.Namespace, reference: Source | Moments | None) -> str | None:
    metric = METRICS[name]
    if metric.needs_reference and reference is None:
        return "a reference: name it after the pictures"
    if metric.needs_reference and metric.needs_pictures and isinstance(reference, Moments):
        return "the pictures of the reference, not their mean and covariance (.npz)"
    if metric.needs_clip and args.clip is None:
        return "a CLIP that judges: name it with --clip"
    if metric.needs_classes and args.features == "clip":
        return "a network with classes: choose other --features"
    return None


def load_networks(
    args: argparse.Namespace, metrics: Sequence[str], *, has_moments: bool = False
) -> tuple[FeatureNetwork | None, ClipReranker | None]:
    """Load the feature network and the judge, where a metric needs them.

    Args:
        args: of `images` or `model`.
        metrics: of `choose_metrics`.
        has_moments: whether statistics of features are wanted besides.

    Returns:
        Network and judge; None where none is needed.

    Raises:
        ImportError: if a package is missing.
        FileNotFoundError: if weights cannot be had.
        ValueError: if they are damaged.
    """
    network = judge = None
    if has_moments or any(METRICS[name].needs_features for name in metrics):
        network = _load_network(args)
    if any(METRICS[name].needs_clip for name in metrics):
        is_shared = network is not None and network.clip is not None
        judge = network.clip if network is not None and is_shared else load_judge(args.clip, args.device)
    return network, judge


def _load_network(args: argparse.Namespace) -> FeatureNetwork:
    options = FeatureOptions(
        inception_weights=args.inception_weights, clip=args.clip, resize=args.resize, device=args.device
    )
    network = FEATURES[args.features](options)
    check_components(args.feature_dims, network)
    return network


def network_of_reconstructions(args: argparse.Namespace, source: Source) -> FeatureNetwork | None:
    """Load the feature network for an rFID.

    Args:
        args: of `reconstruct`.
        source: that is reconstructed.

    Returns:
        None if there are too few pictures for it and it was not asked for.

    Raises:
        RefusedError: if it was.
    """
    network = _load_network(args)
    listed = count_listed(source, args.limit)
    if listed is None:
        return network
    problem = refusal("rfd", listed, listed, args.feature_dims or network.num_features)
    if problem is not None and args.metrics is not None:
        raise RefusedError(problem)
    if problem is not None:
        say(f"left out: {problem}", is_note=True)
    return network if problem is None else None


def check_listed(
    args: argparse.Namespace,
    metrics: Sequence[str],
    source: Source,
    reference: Source | Moments | None,
    network: FeatureNetwork | None,
) -> None:
    """Refuse, before networks run, what there are too few pictures for; those that are damaged may be more.

    Args:
        args: of `images` or `model`.
        metrics: that were asked for.
        source: that is measured.
        reference: that it is compared with.
        network: of the features.

    Raises:
        RefusedError: says how many it takes.
    """
    count = count_listed(source, args.limit)
    if count is None:
        return
    others = reference.num_images if isinstance(reference, Moments) else None
    if reference is not None and not isinstance(reference, Moments):
        others = count_listed(reference, args.limit)
    for name in metrics:
        is_fd = name == "fd" and network is not None
        num_features = (args.feature_dims or network.num_features) if is_fd and network is not None else None
        check_count(name, count, others if METRICS[name].needs_reference else None, num_features)


def open_reference(name: str | None, *, allow_pipe: bool) -> Source | Moments | None:
    """Pictures, or the .npz of their statistics; None where none are named."""
    if name is None:
        return None
    return load_moments(name) if name.endswith(".npz") else open_source(name, allow_pipe=allow_pipe)


def resize_rule(network: FeatureNetwork, size: int | None) -> str:
    """How pictures reach a network when `images --size` cuts them before; None = it does not."""
    return network.resize if size is None else f"{network.resize}; before that {squared(size)}"


def check_moments(moments: Moments, network: FeatureNetwork | None, name: str, size: int | None) -> None:
    """Refuse statistics of another network or resize rule, as far as the file tells.

    Args:
        moments: of the file.
        network: of the other side.
        name: of the file.
        size: of --size.

    Raises:
        ValueError: says what differs.
    """
    if network is None:
        return
    if len(moments.mu) != network.num_features:
        raise ValueError(
            f"{name} is of {len(moments.mu)} features, {network.name} has {network.num_features}: "
            "choose the network it was made with (--features)"
        )
    for what, theirs, ours in (
        ("network", moments.features_hash, network.weights_hash),
        ("resize rule", moments.resize, resize_rule(network, size)),
    ):
        if theirs is not None and theirs != ours:
            raise ValueError(f"{name} was made with another {what}: {theirs}, expected {ours}")
    if moments.features_hash is None:
        say(
            f"{name} does not say its network and resize rule: the originals' files are of Inception with "
            "--resize torch",
            is_note=True,
        )


def read_with_bar(source: Source, limit: int | None, title: str) -> Iterator[Sample | Unreadable]:
    """The pictures of a side, see `read_samples`, with a progress bar of this title."""
    samples: Iterable[Sample | Unreadable] = read_samples(source, limit)
    yield from progress_bar(samples, desc=title, total=count_listed(source, limit), unit=" pictures")
