"""Mean and covariance of a set's features, and the `mu, sigma` files in which they are passed on."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint_io import atomic_path

MAX_FEATURES = 8192  # a covariance of 512 MB: no network here gives more, and a header can claim anything
KNOWN: dict[str, type[Any]] = {"num_images": int, "features_sha256": str, "resize": str}
"""What our files say beside mu and sigma."""
CHUNK = 4096  # pictures whose features are in memory as float64 at once
ASYMMETRY = 1e-3  # of the largest entry: float32 covariances are off by 1e-6


@dataclass(frozen=True, kw_only=True)
class Moments:
    """A Gaussian fitted to features, and what the features are of, as far as that is known."""

    mu: Tensor  # (C,) float64
    sigma: Tensor  # (C, C) float64, symmetric, divided by n - 1
    num_images: int | None = None  # None = a file that does not say
    features_hash: str | None = None  # SHA-256 of the network's weights
    resize: str | None = None  # how pictures reached the network's size


def moments_of(features: Tensor, *, features_hash: str | None = None, resize: str | None = None) -> Moments:
    """Fit a Gaussian.

    Args:
        features: (n, C), n >= 2, any float type; summed in float64.
        features_hash: see `Moments`.
        resize: see `Moments`.

    Returns:
        The moments.

    Raises:
        ValueError: if there are fewer than two.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features (n, C) with n >= 2, got {tuple(features.shape)}")
    mu = features.mean(dim=0, dtype=torch.float64)
    sigma = torch.zeros(len(mu), len(mu), dtype=torch.float64)
    for rows in torch.split(features, CHUNK):
        centred = rows.double() - mu
        sigma += centred.T @ centred
    sigma /= len(features) - 1
    return Moments(mu=mu, sigma=sigma, num_images=len(features), features_hash=features_hash, resize=resize)


def save_moments(path: str | Path, moments: Moments) -> None:
    """Write `mu` and `sigma` as pytorch-fid and rq-vae-transformer do, and beside them what they are of.

    Args:
        path: ends in .npz; replaced once the new file is whole.
        moments: to write.
    """
    known = {
        "num_images": moments.num_images,
        "features_sha256": moments.features_hash,
        "resize": moments.resize,
    }
    arrays: dict[str, Any] = {name: np.array(value) for name, value in known.items() if value is not None}
    with atomic_path(path) as temporary:
        np.savez(temporary, mu=moments.mu.numpy(), sigma=moments.sigma.numpy(), **arrays)


def load_moments(path: str | Path) -> Moments:
    """Read statistics: our own, or those that the original repositories publish. Nothing is executed.

    Args:
        path: a .npz with `mu` (C,) and `sigma` (C, C).

    Returns:
        The moments, in float64.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or its arrays are none of a Gaussian.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}: expected a .npz with mu and sigma")
    try:
        _check_headers(path)
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            known = {name: as_type(file[name].item()) for name, as_type in KNOWN.items() if name in file}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, MemoryError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as statistics: {' '.join(str(error).split())}") from error
    problem = _problem(mu, sigma)
    if problem:
        raise ValueError(f"{path} has no statistics of features: {problem}")
    return Moments(
        mu=mu,
        sigma=(sigma + sigma.T) / 2,
        num_images=known.get("num_images"),
        features_hash=known.get("features_sha256"),
        resize=known.get("resize"),
    )


def _check_headers(path: Path) -> None:
    """Shapes and types before any memory is taken: a small zip file can hold a huge array."""
    with zipfile.ZipFile(path) as archive:
        missing = [name for name in ("mu", "sigma") if f"{name}.npy" not in archive.namelist()]
        if missing:
            found = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:5]) or "nothing"
            raise ValueError(f"expected arrays mu and sigma, got {found}")
        for name in archive.namelist():
            if name.removesuffix(".npy") not in ("mu", "sigma", *KNOWN):
                continue  # other tools' arrays, which are not read
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(member)
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, which are not loaded")
            is_number = dtype.kind == "f" and max(shape, default=0) <= MAX_FEATURES and len(shape) <= 2
            if name in ("mu.npy", "sigma.npy") and not is_number:
                raise ValueError(
                    f"{name} must hold floats of at most {MAX_FEATURES} features, got {dtype} {shape}"
                )
            if name not in ("mu.npy", "sigma.npy") and (shape != () or dtype.itemsize > 4096):
                raise ValueError(f"{name} must be a single value, got {dtype} {shape}")


def _problem(mu: Tensor, sigma: Tensor) -> str | None:
    """Why two arrays are no mean and covariance; None if they are."""
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        return f"expected mu (C,) and sigma (C, C), got {tuple(mu.shape)} and {tuple(sigma.shape)}"
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        return "mu or sigma holds values that are not finite"
    if (sigma.diagonal() < 0).any() or (sigma - sigma.T).abs().max() > ASYMMETRY * sigma.abs().max():
        return "sigma is not symmetric with a diagonal of at least 0, as a covariance is"
    return None
