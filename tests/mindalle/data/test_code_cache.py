"""The code cache: what is read is what encoding gives, and a damaged or foreign cache is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import write_shard

import mindalle.data.code_cache
from checkpoint_io import CheckpointError
from mindalle.data.code_cache import CodeCache, file_hash, write_code_cache
from mindalle.data.shards import shard_dataset
from stage1_vqgan import RQVAE, VQGAN

HASH = "0123456789abcdef" * 4
# line breaks and separators of every kind, which a caption may hold and a line of the cache may not
ODD = ["a\nb\r\nc", "line\u2028separator \x85 \x1c \x0b", "東京 ☃ 😀", '"quoted" \\', ""]


def make_samples(count: int, captions: list[str] | None = None) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    return [
        {"images": image, "captions": captions if captions is not None else [f"picture {i}", "a picture"]}
        for i, image in enumerate(images)
    ]


@pytest.fixture
def cache_dir(tmp_path: Path, tiny_vqgan: VQGAN) -> Path:
    write_code_cache(tmp_path / "cache", make_samples(7), tiny_vqgan, tokenizer_hash=HASH, batch_size=3)
    return tmp_path / "cache"


class TestRoundTrip:
    @pytest.mark.parametrize("name", ["tiny_vqgan", "tiny_rqvae"])
    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_equals_direct_encoding(
        self, tmp_path: Path, request: pytest.FixtureRequest, name: str, batch_size: int
    ) -> None:
        tokenizer: VQGAN | RQVAE = request.getfixturevalue(name)
        samples = make_samples(7)
        write_code_cache(tmp_path / "cache", samples, tokenizer, tokenizer_hash=HASH, batch_size=batch_size)
        cache = CodeCache(tmp_path / "cache", tokenizer_hash=HASH)
        assert len(cache) == 7
        for i, sample in enumerate(samples):
            with torch.no_grad():
                codes = tokenizer.encode(sample["images"].unsqueeze(0))[0]
            assert torch.equal(cache[i]["codes"], codes)
            assert cache[i]["codes"].dtype == torch.int64
            assert cache[i]["captions"] == sample["captions"]
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    def test_header(self, cache_dir: Path) -> None:
        assert json.loads((cache_dir / "header.json").read_text()) == {
            "format": "mindalle-codes-1",
            "tokenizer": HASH,
            "codebook_size": 24,
            "code_shape": [4, 4],
            "count": 7,
        }
        (file,) = cache_dir.glob("codes-*.npy")
        codes = np.load(file)
        assert (codes.dtype, codes.shape) == (np.uint16, (7, 4, 4))

    def test_several_files(
        self, tmp_path: Path, tiny_vqgan: VQGAN, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
    ) -> None:
        monkeypatch.setattr(mindalle.data.code_cache, "ROWS_PER_FILE", 4)
        write_code_cache(tmp_path / "parts", make_samples(7), tiny_vqgan, tokenizer_hash=HASH, batch_size=2)
        assert len(list((tmp_path / "parts").glob("codes-*.npy"))) == 2
        parts, whole = (CodeCache(tmp_path / name, tokenizer_hash=HASH) for name in ("parts", "cache"))
        assert np.array_equal(parts.codes, whole.codes)

    def test_any_caption(self, tmp_path: Path, tiny_vqgan: VQGAN) -> None:
        """U+2028 ends a line for str.splitlines: one such caption made the whole cache "damaged"."""
        write_code_cache(tmp_path / "cache", make_samples(2, ODD), tiny_vqgan, tokenizer_hash=HASH)
        cache = CodeCache(tmp_path / "cache", tokenizer_hash=HASH)
        assert cache.captions == [ODD, ODD]

    def test_captions_that_were_not_escaped(self, cache_dir: Path) -> None:
        """As the first version wrote them."""
        lines = [json.dumps(ODD[1:3], ensure_ascii=False)] * 7
        (cache_dir / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert CodeCache(cache_dir, tokenizer_hash=HASH).captions == [ODD[1:3]] * 7

    def test_samples_of_any_iterable(self, tmp_path: Path, tiny_vqgan: VQGAN) -> None:
        """A generator has no length; a WebDataset is an IterableDataset."""
        shard = write_shard(tmp_path / "0.tar", range(5))
        sources = {
            "generator": iter(make_samples(5)),
            "webdataset": shard_dataset([str(shard)], 16, shuffle=0),
        }
        for name, samples in sources.items():
            write_code_cache(tmp_path / name, samples, tiny_vqgan, tokenizer_hash=HASH, batch_size=2)
            assert len(CodeCache(tmp_path / name, tokenizer_hash=HASH)) == 5

    def test_file_hash(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"abc")
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180-2
        assert file_hash(tmp_path / "file") == expected


class TestWriting:
    def test_an_existing_directory_is_refused(self, cache_dir: Path, tiny_vqgan: VQGAN) -> None:
        before = {path.name: path.read_bytes() for path in cache_dir.iterdir()}
        with pytest.raises(FileExistsError, match="cache exists: remove it to encode again"):
            write_code_cache(cache_dir, make_samples(2), tiny_vqgan, tokenizer_hash=HASH)
        assert {path.name: path.read_bytes() for path in cache_dir.iterdir()} == before

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_an_interruption_leaves_nothing(
        self, tmp_path: Path, tiny_vqgan: VQGAN, error: BaseException
    ) -> None:
        def interrupted() -> Iterator[dict[str, Any]]:
            yield from make_samples(5)
            raise error

        with pytest.raises(type(error)):
            write_code_cache(tmp_path / "cache", interrupted(), tiny_vqgan, tokenizer_hash=HASH, batch_size=2)
        assert list(tmp_path.iterdir()) == []

    def test_a_killed_process(self, tmp_path: Path, tiny_vqgan: VQGAN) -> None:
        """What it left beside the cache neither loads nor stands in the way."""
        write_code_cache(tmp_path / "cache", make_samples(3), tiny_vqgan, tokenizer_hash=HASH)
        (tmp_path / "cache").rename(tmp_path / "cache.building")
        (tmp_path / "cache.building" / "codes-00007.npy").write_bytes(b"half")
        with pytest.raises(FileNotFoundError, match="no code cache at"):
            CodeCache(tmp_path / "cache", tokenizer_hash=HASH)
        write_code_cache(tmp_path / "cache", make_samples(3), tiny_vqgan, tokenizer_hash=HASH)
        assert len(CodeCache(tmp_path / "cache", tokenizer_hash=HASH)) == 3
        assert not (tmp_path / "cache.building").exists()

    def test_nothing_to_encode(self, tmp_path: Path, tiny_vqgan: VQGAN) -> None:
        with pytest.raises(ValueError, match=r"no samples to encode into .*cache: are the shards readable\?"):
            write_code_cache(tmp_path / "cache", [], tiny_vqgan, tokenizer_hash=HASH)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("size", [65536, 65537])
    def test_codes_must_fit_in_uint16(self, tmp_path: Path, size: int) -> None:
        class Wide:
            codebook_size = size
            code_shape = (1, 1)

            def encode(self, images: torch.Tensor) -> torch.Tensor:
                return torch.full((len(images), 1, 1), size - 1)

        if size > 65536:
            with pytest.raises(ValueError, match="as uint16, so V must be at most 65536, got 65537"):
                write_code_cache(tmp_path / "cache", make_samples(1), Wide(), tokenizer_hash=HASH)  # type: ignore[arg-type]
            assert not (tmp_path / "cache").exists()
        else:
            write_code_cache(tmp_path / "cache", make_samples(1), Wide(), tokenizer_hash=HASH)  # type: ignore[arg-type]
            assert CodeCache(tmp_path / "cache", tokenizer_hash=HASH)[0]["codes"].item() == 65535


def edit_header(**changes: Any) -> Callable[[Path], None]:
    def edit(cache_dir: Path) -> None:
        header = json.loads((cache_dir / "header.json").read_text()) | changes
        header = {key: value for key, value in header.items() if value is not None}
        (cache_dir / "header.json").write_text(json.dumps(header))

    return edit


def save_codes(codes: Any) -> Callable[[Path], None]:
    return lambda cache_dir: np.save(cache_dir / "codes-00000.npy", codes)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another tokenizer": (
        edit_header(tokenizer="f" * 64),
        r"it was encoded by another image tokenizer \(SHA-256 ffffffffffff..., expected 0123456789ab...\)",
    ),
    "another format": (edit_header(format="codes-9"), "expected format mindalle-codes-1, got 'codes-9'"),
    "no format": (edit_header(format=None), "it lacks 'format'"),
    "no count": (edit_header(count=None), "it lacks 'count'"),
    "another count": (edit_header(count=8), "8 images in the header, 7 rows of codes, 7 of captions"),
    "another shape": (edit_header(code_shape=[4, 5]), r"uint16 codes of shape \[4, 5\], got uint16 \[4, 4\]"),
    "codes out of range": (edit_header(codebook_size=5), r"codes must be in \[0, 5\), got \d+"),
    "header cut": (lambda path: os.truncate(path / "header.json", 40), "not usable: "),
    "header no mapping": (lambda path: (path / "header.json").write_text("[]"), "not usable: "),
    "no codes": (lambda path: (path / "codes-00000.npy").unlink(), "it has no codes-"),
    "codes cut": (lambda path: os.truncate(path / "codes-00000.npy", 200), "not usable: "),
    "codes empty": (lambda path: os.truncate(path / "codes-00000.npy", 0), "not usable: "),
    "a file of codes twice": (
        lambda path: shutil.copy(path / "codes-00000.npy", path / "codes-00001.npy"),
        "7 images in the header, 14 rows of codes",
    ),
    "codes of another type": (save_codes(np.zeros((7, 4, 4))), r"expected uint16 codes .* got float64"),
    "pickled codes": (save_codes(np.array([print] * 7)), "not usable: .*allow_pickle=False"),
    "no captions": (lambda path: (path / "captions.jsonl").unlink(), "not usable: .*captions.jsonl"),
    "captions cut": (lambda path: os.truncate(path / "captions.jsonl", 100), "not usable: "),
    "a caption too many": (
        lambda path: (path / "captions.jsonl").open("a").write("[]\n"),
        "7 rows of codes, 8 of captions",
    ),
}


class TestRefusal:
    @pytest.mark.parametrize("name", DAMAGE)
    def test_damage(self, cache_dir: Path, name: str) -> None:
        damage, message = DAMAGE[name]
        CodeCache(cache_dir, tokenizer_hash=HASH)
        damage(cache_dir)
        with pytest.raises(CheckpointError, match=message) as caught:
            CodeCache(cache_dir, tokenizer_hash=HASH)
        assert str(caught.value).startswith(f"the code cache {cache_dir} is not usable: ")
        assert str(caught.value).endswith("; remove it to encode again")

    def test_nothing_there(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(FileNotFoundError, match=r"no code cache at .*: it has no header.json"):
                CodeCache(path, tokenizer_hash=HASH)
