"""Names of models and the cache: what a user types becomes a path on this machine.

A new checkpoint on the list is one row in `RELEASES`; a bundled one is a directory in `mindalle/models`.
"""

import errno
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mindalle.download import download, exclusive, extract

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Release:
    """An archive that the authors of a model published.

    Attributes:
        url: a tar.gz with one top folder.
        md5: of the archive, 32 hexadecimal digits.
        about: what it is, in one line.
        gigabytes: rough size of the archive, None where it is not known.
    """

    url: str
    md5: str
    about: str
    gigabytes: float | None = None


# The checksum is the folder's name in each URL, by the publisher's convention.
RELEASES: dict[str, Release] = {
    "minDALL-E/1.3B": Release(
        url="https://arena.kakaocdn.net/brainrepo/models/minDALL-E/57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz",
        md5="57b008f02ceaa02b779c8b7463143315",
        about="text to image: VQGAN 16x16 codes, K = 16384; GPT 1.3B",
        gigabytes=4.7,
    ),
    "rq-vae/ffhq": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/d47570aeff6ba300735606a806f54663/ffhq.tar.gz",
        md5="d47570aeff6ba300735606a806f54663",
        about="faces, unconditional: RQ-VAE 8x8x4 codes, K = 2048; RQ-Transformer 355M",
    ),
    "rq-vae/church": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/deeb3e0ac6e09923754e3e594ede7b01/church.tar.gz",
        md5="deeb3e0ac6e09923754e3e594ede7b01",
        about="LSUN churches, unconditional: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 370M",
    ),
    "rq-vae/cat": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/92b4e6a9ace09c9ab8ff9d3b3e688367/cat.tar.gz",
        md5="92b4e6a9ace09c9ab8ff9d3b3e688367",
        about="LSUN cats, unconditional: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 612M",
    ),
    "rq-vae/bedroom": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/06b72c164cd2fe64fc8ebd6b42b0040f/bedroom.tar.gz",
        md5="06b72c164cd2fe64fc8ebd6b42b0040f",
        about="LSUN bedrooms, unconditional: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 612M",
    ),
    "rq-vae/imagenet-480m": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/7518a004fe39120fcffbba76005dc6c3/imagenet_480M.tar.gz",
        md5="7518a004fe39120fcffbba76005dc6c3",
        about="ImageNet, class-conditional: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 480M",
    ),
    "rq-vae/imagenet-821m": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/dcd39292319104da5577dec3956bfdcc/imagenet_821M.tar.gz",
        md5="dcd39292319104da5577dec3956bfdcc",
        about="ImageNet, class-conditional: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 821M",
    ),
    "rq-vae/imagenet-1.4b": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/f5cf4e5f3f0b5088d52cbb5e85c1077f/imagenet_1.4B.tar.gz",
        md5="f5cf4e5f3f0b5088d52cbb5e85c1077f",
        about="ImageNet, class-conditional: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 1.4B",
    ),
    "rq-vae/imagenet-1.4b-50e": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/6714b47bb9382076923590eff08b1ee5/imagenet_1.4B_rqvae_50e.tar.gz",
        md5="6714b47bb9382076923590eff08b1ee5",
        about="ImageNet, class-conditional: RQ-VAE (50 epochs) 8x8x4 codes, K = 16384; RQ-Transformer 1.4B",
    ),
    "rq-vae/imagenet-3.8b-50e": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/e1ee2fef2928f7fd31f53a8348f08b88/imagenet_3.8B_rqvae_50e.tar.gz",
        md5="e1ee2fef2928f7fd31f53a8348f08b88",
        about="ImageNet, class-conditional: RQ-VAE (50 epochs) 8x8x4 codes, K = 16384; RQ-Transformer 3.8B",
    ),
    "rq-vae/cc3m": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/dcd95e8f08408e113aab6451fae895f5/cc3m.tar.gz",
        md5="dcd95e8f08408e113aab6451fae895f5",
        about="text to image, CC3M: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 654M",
    ),
    "rq-vae/cc3m-cc12m-yfcc": Release(
        url="https://twg.kakaocdn.net/brainrepo/models/RQVAE/3a8429cd7ec0e0f2b66fca94804c79d5/cc3m_cc12m_yfcc.tar.gz",
        md5="3a8429cd7ec0e0f2b66fca94804c79d5",
        about="text to image, 30M pairs: RQ-VAE 8x8x4 codes, K = 16384; RQ-Transformer 3.9B",
    ),
}

MODELS_DIRECTORY = Path(__file__).parent / "models"
# What a native checkpoint is made of: nothing else is taken from the hub, pickles least of all.
NATIVE_FILES = ("config.yaml", "*.safetensors", "*.json", "README.md")
CHECKPOINT_SUFFIXES = (
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
    ".safetensors",
    ".yaml",
    ".yml",
    ".tar",
    ".gz",
    ".tgz",
    ".zip",
)

# Errors of a cache that cannot be written, as opposed to a full disk.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def resolve_model(name: str | Path) -> Path:
    """Find the model a user means, downloading it if need be.

    In this order: an existing local path, a bundled model, a released one, a Hugging Face hub id.

    Args:
        name: what was given to `Pipeline.from_pretrained` or `--model`: a file or directory, a name of
            `bundled_models()`, a key of `RELEASES`, or a hub id `organisation/name`.

    Returns:
        A local file or directory: the path that was given, or a directory with a checkpoint.

    Raises:
        FileNotFoundError: if the name looks like a path that does not exist, or is a hub id that cannot
            be had.
        ValueError: if the name is nothing known, or a download is corrupt or unsafe.
        ConnectionError: if a release cannot be downloaded.
        OSError: if the cache cannot be written or its disk is full.
        ImportError: if a hub id is given and huggingface_hub is not installed.
    """
    text = str(name)
    if not text.strip():
        raise ValueError(f"the name of a model is empty; {_known_names()}")
    path = Path(os.path.expanduser(text))  # unlike Path's own, leaves the ~ of an unknown user alone
    if os.path.exists(path):  # and this one takes a name too long for a file as absent
        if text in RELEASES or text in bundled_models():
            logger.info("%s is a local path here, and taken as one rather than as the model's name", text)
        return path
    if text in bundled_models():
        return MODELS_DIRECTORY / text
    if text in RELEASES:
        return _fetch_release(text)
    if _looks_like_path(text):
        raise FileNotFoundError(f"no such file or directory: {text}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return _fetch_from_hub(text)
    raise ValueError(f"no model is called {text!r}; {_known_names()}")


def resolve_text_tokenizer(name: str | Path) -> Path:
    """Find the text tokenizer a user means.

    Args:
        name: a file, a directory with the originals' BPE-16k files, or a model that comes with one: a
            bundled name, a release or a checkpoint's directory, native or of minDALL-E.

    Returns:
        The file or directory, which may not exist.

    Raises:
        ValueError: if the download of a release is corrupt or unsafe.
        ConnectionError: if a release cannot be downloaded.
        OSError: if the cache cannot be written or its disk is full.
    """
    text = str(name)
    is_model = text in RELEASES or text in bundled_models()
    path = resolve_model(text) if is_model else Path(os.path.expanduser(text))
    inside = (path / "text_tokenizer.json", path / "tokenizer")
    return next((found for found in inside if os.path.exists(found)), path)


def bundled_models() -> tuple[str, ...]:
    """List the models that come with the package, by name."""
    return tuple(sorted(config.parent.name for config in MODELS_DIRECTORY.glob("*/config.yaml")))


def cache_dir() -> Path:
    """Return where downloaded releases are kept; it may not exist yet.

    `$MINDALLE_CACHE` if set, else `mindalle` in `$XDG_CACHE_HOME` or `~/.cache`. Models from the Hugging
    Face hub stay in that hub's own cache (`$HF_HOME`).
    """
    if own := os.environ.get("MINDALLE_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "mindalle")


def _fetch_release(name: str) -> Path:
    """Return the unpacked release from the cache, downloading it the first time."""
    release = RELEASES[name]
    directory = cache_dir() / "releases" / name
    try:
        return _fetch_archive(release, directory)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}. To use {name} without this download: get the archive elsewhere, then unpack it and "
            f"pass the directory as a local path (--model PATH), or put it as it is in {directory.parent}; "
            "or set MINDALLE_CACHE to a cache that has it"
        ) from error
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise OSError(
            f"cannot write to the cache {cache_dir()}: {error}; set MINDALLE_CACHE to a directory that you "
            "can write to"
        ) from error


def _fetch_archive(release: Release, directory: Path) -> Path:
    """Download and unpack a release, once, however many processes ask for it at the same time.

    The directory appears by one rename: if it exists it is complete. An archive already beside it, under
    the name it has in the URL, is used instead of the network if its checksum is right, and stays.
    """
    if directory.is_dir():  # before anything is written: a shared cache may be read-only
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(directory.with_name(f".{directory.name}.lock")):
        if directory.is_dir():  # made by the process we waited for
            return directory
        for leftover in directory.parent.glob(f".{directory.name}.*.unpacking"):
            shutil.rmtree(leftover)  # its process was killed: a live one would hold the lock
        size = f"about {release.gigabytes} GB" if release.gigabytes else "some gigabytes"
        logger.info("%s is not in the cache, downloading it: %s, %s", directory.name, release.about, size)
        archive = directory.with_name(PurePosixPath(release.url).name)
        was_there = archive.is_file()  # put there by the user, to whom it belongs
        download(release.url, archive, md5=release.md5, will_unpack=True)
        logger.info("unpacking %s", archive)
        extract(archive, directory)
        if not was_there:
            archive.unlink()
    return directory


def _fetch_from_hub(repo: str) -> Path:
    """Return a snapshot of a native checkpoint from the Hugging Face hub."""
    try:
        from huggingface_hub import snapshot_download  # slow to import, and needed only here
    except ImportError as error:
        raise ImportError(
            f"{repo} may be a Hugging Face hub id; for those: pip install huggingface_hub"
        ) from error
    try:
        snapshot = Path(snapshot_download(repo, allow_patterns=list(NATIVE_FILES)))
    except Exception as error:  # its HTTP library, and so its errors, differ between versions
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"{repo!r} is not a released model, and as a Hugging Face hub id it failed: {reason}; "
            f"{_known_names()}"
        ) from error
    if not (snapshot / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{repo!r} on the Hugging Face hub has no config.yaml: it is not a checkpoint of this toolkit. "
            "Convert one with tools/convert_checkpoint.py"
        )
    return snapshot


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.endswith(("/", *CHECKPOINT_SUFFIXES))
        or text.count("/") > 1
        or "\\" in text
    )


def _known_names() -> str:
    return (
        f"bundled: {', '.join(bundled_models()) or 'none'}; released: {', '.join(RELEASES)}; or pass an "
        "existing local file or directory (--model PATH)"
    )
