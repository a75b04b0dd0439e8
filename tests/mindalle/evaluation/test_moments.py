"""Files of mu and sigma: ours, the originals', and those that are up to no good."""

from __future__ import annotations

import pickle
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindalle.evaluation import load_moments, moments_of, save_moments


def test_there_and_back(tmp_path: Path) -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    moments = moments_of(features, features_hash="ab" * 32, resize="clean: PIL")
    save_moments(tmp_path / "stats.npz", moments)
    found = load_moments(tmp_path / "stats.npz")
    assert torch.equal(found.mu, moments.mu)
    assert torch.allclose(found.sigma, moments.sigma, rtol=1e-15)
    assert (found.num_images, found.features_hash, found.resize) == (30, "ab" * 32, "clean: PIL")

    with np.load(tmp_path / "stats.npz") as file:  # as the originals' tools read them
        assert np.allclose(file["mu"][:], np.mean(features.double().numpy(), axis=0))
        assert np.allclose(file["sigma"][:], np.cov(features.double().numpy(), rowvar=False))


def test_a_file_of_the_originals(tmp_path: Path) -> None:
    """Of other precision, compressed, and with other arrays, which are not touched."""
    sigma = np.diag([1.0, 2.0]).astype(np.float32)
    more = {"paths": np.array([object()], dtype=object)}
    np.savez_compressed(tmp_path / "s.npz", mu=np.ones(2, np.float32), sigma=sigma, **more)  # type: ignore[arg-type]
    found = load_moments(tmp_path / "s.npz")
    assert (found.mu.dtype, found.sigma.tolist()) == (torch.float64, [[1, 0], [0, 2]])
    assert (found.num_images, found.features_hash, found.resize) == (None, None, None)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code was run')",))


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def huge(path: Path) -> Path:
    """A header that claims terabytes over no data."""
    header = BytesIO()
    about = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    return path


def pickled(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", pickle.dumps(Evil()))
    return path


def truncated(path: Path) -> Path:
    write(path, mu=np.zeros(50), sigma=np.eye(50))
    path.write_bytes(path.read_bytes()[:-900])
    return path


ONE = {"mu": np.zeros(2), "sigma": np.eye(2)}
HOSTILE = {
    "objects": (lambda path: write(path, mu=np.array([Evil()]), sigma=np.eye(1)), "Python objects"),
    "pickle": (pickled, "cannot be read as statistics"),
    "huge": (huge, r"at most 8192 features, got float64 \(1000000, 1000000\)"),
    "truncated": (truncated, "cannot be read as statistics"),
    "text": (lambda path: path.write_text("mu") and path, "cannot be read as statistics: File is not a zip"),
    "missing": (lambda path: write(path, mu=np.zeros(2)), "expected arrays mu and sigma, got mu"),
    "shapes": (lambda path: write(path, mu=np.zeros(3), sigma=np.eye(2)), r"got \(3,\) and \(2, 2\)"),
    "matrix": (lambda path: write(path, mu=np.eye(2), sigma=np.eye(2)), r"expected mu \(C,\)"),
    "empty": (lambda path: write(path, mu=np.zeros(0), sigma=np.zeros((0, 0))), r"expected mu \(C,\)"),
    "nan": (lambda path: write(path, mu=np.array([0, np.nan]), sigma=np.eye(2)), "not finite"),
    "infinite": (lambda path: write(path, mu=np.zeros(2), sigma=np.eye(2) / 0.0), "not finite"),
    "ints": (lambda path: write(path, mu=np.zeros(2, int), sigma=np.eye(2)), "must hold floats"),
    "asymmetric": (
        lambda path: write(path, mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0, 1]])),
        "not symmetric",
    ),
    "negative": (lambda path: write(path, mu=np.zeros(2), sigma=-np.eye(2)), "not symmetric with a diagonal"),
    "count": (lambda path: write(path, **ONE, num_images=np.array([1, 2])), "must be a single value"),
    "name": (
        lambda path: write(path, **ONE, num_images=np.array("many")),
        "cannot be read as statistics: invalid literal",
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / "stats.npz"
    make(path)
    with pytest.raises(ValueError, match=message):
        load_moments(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no statistics at .*expected a \.npz with"):
        load_moments(tmp_path / "nothing.npz")
