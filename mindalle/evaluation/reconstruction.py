"""Reconstruction: what is left of a picture after an image tokenizer, and which codes it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from checkpoint_io import tensors_hash
from mindalle.evaluation.features import FeatureNetwork
from mindalle.evaluation.frechet import frechet_measure
from mindalle.evaluation.moments import Moments, moments_of
from mindalle.evaluation.refusal import RefusedError
from mindalle.evaluation.results import Measure, mean_measure
from mindalle.image import psnr, to_pil
from stage1_vqgan import ImageTokenizer
from stage1_vqgan.perceptual import SMALLEST_SIDES, build_perceptual

logger = logging.getLogger(__name__)
PERCEPTUAL_NAMES = {"lpips": "LPIPS", "efflite": "EffLite-perceptual"}
"""Networks of `stage1_vqgan.perceptual`: what their distances are called."""


@dataclass(frozen=True, kw_only=True)
class PerceptualDistance:
    """How different two pictures look to a network."""

    name: str
    weights_hash: str  # SHA-256 of names and values
    min_size: int  # pixels of a side that the network takes at least
    distance: Callable[[Tensor, Tensor], Tensor]  # two batches of images in [-1, 1] -> the mean, a scalar

    def about(self) -> dict[str, str]:
        """For a record."""
        return {"name": self.name, "sha256": self.weights_hash, "resize": "none"}


def load_perceptual(name: str, device: str = "cpu") -> PerceptualDistance:
    """A network of `PERCEPTUAL_NAMES`.

    Args:
        name: its key.
        device: where it computes.

    Returns:
        The distance.

    Raises:
        ImportError: if a package is missing.
        FileNotFoundError: if weights cannot be had.
    """
    try:
        network = build_perceptual(name)
    except FileNotFoundError as error:  # which speaks of a training's settings
        message = str(error).replace("set loss.perceptual to efflite or none", "choose --perceptual efflite")
        raise FileNotFoundError(message) from error
    assert network is not None
    called, min_size = PERCEPTUAL_NAMES[name], SMALLEST_SIDES[name]
    return PerceptualDistance(
        name=called,
        min_size=min_size,
        weights_hash=tensors_hash(network.state_dict()),
        distance=network.to(device),
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructionQuality:
    """Measures of n pictures, one value each, decoded from some number of depths."""

    psnr: Tensor  # (n,) dB
    ssim: Tensor  # (n,) Wang et al. 2004, Gaussian window of 11 pixels, in [-1, 1]
    perceptual: Tensor | None  # (n,); None = was not asked for
    vectors: Tensor | None  # (n, C) features of the reconstructions; None = were not asked for


@dataclass(frozen=True, kw_only=True)
class Reconstructions:
    """What an image tokenizer makes of n pictures."""

    by_depth: tuple[ReconstructionQuality, ...]  # from 1, 2, ... D depths, or from all of them alone
    codes: tuple[Tensor, ...]  # of each depth int32 (n, T)
    vectors: Tensor | None  # (n, C) features of the pictures themselves


@torch.inference_mode()
def measure_reconstruction(
    tokenizer: ImageTokenizer,
    batches: Iterable[Tensor],
    *,
    perceptual: PerceptualDistance | None = None,
    network: FeatureNetwork | None = None,
    has_all_depths: bool = False,
) -> Reconstructions:
    """Encode and decode pictures and compare.

    Args:
        tokenizer: in evaluation mode.
        batches: images (B, 3, H, W) in [-1, 1], on the tokenizer's device.
        perceptual: see `load_perceptual`; None = is left out.
        network: of features, for Fréchet distances; it sees pictures of bytes. None = are left out.
        has_all_depths: of residual codes, decode from 1, 2, ... D depths; all depths alone otherwise.

    Returns:
        The values of all pictures.

    Raises:
        ValueError: if there are none.
    """
    codes, originals, columns = [], [], []
    for images in batches:
        code = tokenizer.encode(images)  # (B, *code_shape)
        kept = tokenizer.coarse_to_fine(code) if has_all_depths else [code]
        columns.append([_quality(images, tokenizer.decode(part), perceptual, network) for part in kept])
        codes.append([part.int().cpu() for part in tokenizer.by_depth(code)])
        if network is not None:
            originals.append(network.extract(to_pil(images)).vectors)
    if not codes:
        raise ValueError("there are no pictures to measure a reconstruction on")
    return Reconstructions(
        by_depth=tuple(map(_concatenate, zip(*columns, strict=True))),
        codes=tuple(map(torch.cat, zip(*codes, strict=True))),
        vectors=torch.cat(originals) if originals else None,
    )


def _quality(
    images: Tensor, decoded: Tensor, perceptual: PerceptualDistance | None, network: FeatureNetwork | None
) -> ReconstructionQuality:
    """One batch at one number of depths."""
    reconstructions = decoded.clamp(-1, 1)
    distances = None
    if perceptual is not None:  # which gives means: picture by picture
        if min(images.shape[2:]) < perceptual.min_size:
            raise ValueError(
                f"{perceptual.name} takes pictures of at least {perceptual.min_size} pixels, "
                f"got {min(images.shape[2:])}: leave it out (--perceptual none)"
            )
        pairs = zip(torch.split(images, 1), torch.split(reconstructions, 1), strict=True)
        distances = torch.stack([perceptual.distance(*pair) for pair in pairs]).cpu().clone()
    # of brightness from 0 to 1: about zero, the ratio of means says nothing
    unit = (reconstructions * 0.5 + 0.5, images * 0.5 + 0.5)
    similarities = torch.as_tensor(ssim(*unit, data_range=1.0, reduction="none"))
    return ReconstructionQuality(
        psnr=psnr(images, reconstructions).cpu().clone(),
        ssim=similarities.cpu().clone(),
        perceptual=distances,
        vectors=network.extract(to_pil(reconstructions)).vectors if network is not None else None,
    )


def _concatenate(batches: Sequence[ReconstructionQuality]) -> ReconstructionQuality:
    def joined(name: str) -> Tensor | None:
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else torch.cat(values)

    found = {name: joined(name) for name in ("psnr", "ssim", "perceptual", "vectors")}
    return ReconstructionQuality(**found)  # type: ignore[arg-type]  # psnr and ssim are never None


def quality_measures(
    found: Reconstructions,
    *,
    has_pixels: bool = True,
    perceptual: PerceptualDistance | None = None,
    network: FeatureNetwork | None = None,
    num_components: int | None = None,
    seed: int = 0,
    may_refuse: bool = False,
) -> list[Measure]:
    """The numbers of reconstructions, for each number of depths.

    Args:
        found: of `measure_reconstruction`.
        has_pixels: whether PSNR and SSIM are among them.
        perceptual: as it was measured with.
        network: as it was measured with.
        num_components: see `mindalle.evaluation.comparison.Comparison`.
        seed: of the intervals.
        may_refuse: whether Fréchet distances are named and left out if there are too few pictures.

    Returns:
        PSNR, SSIM, and what else was measured.

    Raises:
        RefusedError: if there are too few pictures for a Fréchet distance and `may_refuse` is false.
    """
    measures = []
    originals = moments_of(found.vectors) if found.vectors is not None else None
    for depth, quality in enumerate(found.by_depth, start=1):
        suffix = f", {depth} of {len(found.by_depth)} depths" if len(found.by_depth) > 1 else ""
        if has_pixels:
            measures.append(mean_measure(f"PSNR{suffix}", quality.psnr, unit="dB", seed=seed))
            measures.append(mean_measure(f"SSIM{suffix}", quality.ssim, seed=seed))
        if quality.perceptual is not None and perceptual is not None:
            name, about = f"{perceptual.name}{suffix}", perceptual.about()
            measures.append(mean_measure(name, quality.perceptual, network=about, seed=seed))
        if quality.vectors is not None and network is not None and originals is not None:
            measures += _frechet(
                quality.vectors, originals, network, suffix, num_components, seed, may_refuse
            )
    return measures


def _frechet(
    vectors: Tensor,
    originals: Moments,
    network: FeatureNetwork,
    suffix: str,
    num_components: int | None,
    seed: int,
    may_refuse: bool,
) -> list[Measure]:
    try:
        measure = frechet_measure(
            vectors,
            originals,
            network,
            metric="rfd",
            num_components=num_components,
            seed=seed,
            suffix=suffix,
        )
    except RefusedError as error:
        if not may_refuse:
            raise
        logger.warning("left out: %s", error)
        return []
    return [measure]
