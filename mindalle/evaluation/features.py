"""Feature networks: pictures to the vectors in which sets of pictures are compared.

Each has a name of its own in every result: FID, KID and IS are Inception-v3's with the weights that the field
uses, and of no other network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoint_io import CheckpointError, file_hash, read_tensors

if TYPE_CHECKING:
    from mindalle.rerank import ClipReranker

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_HASH = (
    "6726825d"  # the weights' SHA-256 begins so, as their file names of pytorch-fid and others say
)
INCEPTION_SIDE, EFFLITE_SIDE = 299, 224  # pixels, of the training
CLIP_RESIZE = "CLIP's own: bicubic, antialiased, centre crop"
NAMES = {"fd": ("FID", "FD"), "kd": ("KID", "KD"), "is": ("IS", "IS"), "rfd": ("rFID", "rFD")}
"""Metric -> what it is called with Inception, and with "NETWORK-" before it with any other."""


class Features(NamedTuple):
    """What a network says of n pictures."""

    vectors: Tensor  # (n, C) float32, on the CPU
    logits: Tensor | None  # (n, classes); None where a network has no classes


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network, its weights and how pictures are made to fit it."""

    name: str  # "Inception", "EffLite", "CLIP"
    is_inception: bool = False  # with the field's weights
    weights_hash: str  # SHA-256 of the weights' file; of CLIP, of names and values
    resize: str  # the rule, in words
    num_features: int  # C
    extract: Callable[[Sequence[Image.Image]], Features]  # RGB pictures of any size
    clip: ClipReranker | None = None  # the CLIP that the features are of

    def metric_name(self, metric: str) -> str:
        """What a metric on these features is called.

        Args:
            metric: a key of `NAMES`, or a name that every network shares.
        """
        known, other = NAMES.get(metric, (metric, metric))
        return known if self.is_inception else f"{self.name}-{other}"

    def about(self) -> dict[str, str]:
        """For a record."""
        return {"name": self.name, "sha256": self.weights_hash, "resize": self.resize}


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Where weights are and how pictures are resized."""

    inception_weights: str | None = None  # file; None = torch's cache, or a download to it
    clip: str | None = None  # see `load_judge`
    resize: str = "clean"  # a key of RESIZES; CLIP has a rule of its own
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")


Resize: TypeAlias = Callable[[Image.Image, int], Tensor]  # picture, side -> (3, side, side) in [0, 255]


def resize_clean(picture: Image.Image, side: int) -> Tensor:
    """Bicubic with antialiasing, each channel in float32 and not rounded to bytes (Parmar et al. 2022)."""
    channels = [
        np.asarray(channel.convert("F").resize((side, side), Image.Resampling.BICUBIC))
        for channel in picture.convert("RGB").split()
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def resize_torch(picture: Image.Image, side: int) -> Tensor:
    """Bilinear without antialiasing, as pytorch-fid and so the originals' published statistics have it."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)[0]


RESIZES: dict[str, tuple[Resize, str]] = {
    "clean": (resize_clean, "clean: PIL bicubic, antialiased, float32"),
    "torch": (resize_torch, "torch: bilinear, not antialiased"),
}
"""Name -> how a picture becomes a square, whatever its shape, and the same in words."""


def load_inception(options: FeatureOptions) -> FeatureNetwork:
    """Inception-v3 of TensorFlow's 2015 release, by torch-fidelity; features 2048, logits without bias.

    Raises:
        ImportError: if torch-fidelity is missing.
        FileNotFoundError: if the weights cannot be had.
        CheckpointError: if they are damaged or no Inception's.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError('Inception-v3 needs torch-fidelity: pip install "mindalle[evaluation]"') from error
    path = _inception_file(options.inception_weights)
    weights = BytesIO()  # torch-fidelity would unpickle anything: it gets what was read without running code
    torch.save(read_tensors(path), weights)
    weights.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} has no weights of Inception-v3 as torch-fidelity and pytorch-fid publish them: {error}"
        ) from error
    *trunk, classifier = network.children()  # in the order of their use, without the resizing
    weights_hash = file_hash(path)
    is_standard = weights_hash.startswith(INCEPTION_HASH)
    return _classifier(
        nn.Sequential(*trunk, nn.Flatten()),
        lambda vectors: vectors @ classifier.weight.T,
        options,
        scale=lambda pixels: (pixels - 128) / 128,
        side=INCEPTION_SIDE,
        name="Inception" if is_standard else f"Inception[{weights_hash[:8]}]",
        is_inception=is_standard,
        weights_hash=weights_hash,
        num_features=2048,
    )


def load_efflite_features(options: FeatureOptions) -> FeatureNetwork:
    """EfficientNet-Lite0 (ImageNet), whose weights come in a Python package; pooled features 1280.

    Raises:
        ImportError: if the packages are missing.
    """
    from stage1_vqgan.perceptual import load_efflite

    network, path = load_efflite()

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            return network.extract_features(images).mean(dim=(2, 3))  # type: ignore[no-any-return]

    return _classifier(
        Trunk(),
        network._fc,
        options,
        scale=lambda pixels: pixels / 127.5 - 1,
        side=EFFLITE_SIDE,
        name="EffLite",
        weights_hash=file_hash(path),
        num_features=1280,
    )


def _classifier(
    trunk: nn.Module,
    classify: Callable[[Tensor], Tensor],
    options: FeatureOptions,
    *,
    scale: Callable[[Tensor], Tensor],
    side: int,
    **about: Any,
) -> FeatureNetwork:
    """A network that sees squares of one size, and its classes."""
    resize, rule = RESIZES[options.resize]
    trunk.to(options.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def extract(pictures: Sequence[Image.Image]) -> Features:
        pixels = torch.stack([resize(picture, side) for picture in pictures])  # (n, 3, side, side)
        vectors = trunk(scale(pixels.to(options.device)))
        # cloned: tensors like any other, not of inference mode
        return Features(vectors.cpu().clone(), classify(vectors).cpu().clone())

    return FeatureNetwork(extract=extract, resize=f"{rule}, {side}x{side}", **about)


def load_clip_features(options: FeatureOptions) -> FeatureNetwork:
    """The picture side of a CLIP: unit vectors, after CLIP's own resizing and centre crop.

    Raises:
        ValueError: if none is named, or it is damaged.
        FileNotFoundError: if there is none of that name, or its download fails.
    """
    if options.clip is None:
        raise ValueError("features of CLIP need a CLIP: name it (--clip NAME_OR_PATH)")
    judge = load_judge(options.clip, options.device)
    with_one = judge.encode_images([Image.new("RGB", (8, 8))])
    return FeatureNetwork(
        name="CLIP",
        weights_hash=judge.weights_hash,
        resize=CLIP_RESIZE,
        num_features=with_one.shape[1],
        extract=lambda pictures: Features(judge.encode_images(pictures), None),
        clip=judge,
    )


FEATURES: dict[str, Callable[[FeatureOptions], FeatureNetwork]] = {
    "inception": load_inception,
    "efflite": load_efflite_features,
    "clip": load_clip_features,
}
"""Feature networks by name."""


def load_judge(name: str, device: str = "cpu") -> ClipReranker:
    """A CLIP to measure with.

    Args:
        name: of OpenAI's, a file of theirs, a native checkpoint, or a training run.
        device: where it runs.

    Returns:
        The CLIP.

    Raises:
        FileNotFoundError: if there is none of that name, or its download fails.
        ValueError: if it is damaged.
    """
    from mindalle.clip_weights import OPENAI_MODELS
    from mindalle.rerank import ClipReranker
    from mindalle.run import load_own_clip

    if name in OPENAI_MODELS or (Path(name).is_file() and Path(name).suffix != ".ckpt"):
        return ClipReranker.from_pretrained(name, device=device)
    clip = load_own_clip(name)
    model: Any = clip.model.to(device).eval()
    return ClipReranker(model, clip.config.preprocess(), clip.tokenize)


def _inception_file(named: str | None) -> Path:
    """The weights' file, downloaded if need be."""
    if named is not None:
        if not Path(named).is_file():
            raise FileNotFoundError(f"no weights of Inception-v3 at {named} (--inception-weights)")
        return Path(named)
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_HASH, progress=False)
        except (OSError, RuntimeError) as error:
            others = " or ".join(name for name in FEATURES if name != "inception")
            raise FileNotFoundError(
                f"Inception-v3's weights are a download, which failed ({str(error).splitlines()[0]}): bring "
                f"{path.name} and pass --inception-weights FILE, or choose another network, whose results "
                f"have other names: --features {others}"
            ) from error
    return path
