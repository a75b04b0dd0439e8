"""The code cache: what is read is what encoding gives, killed runs go on, damage and mixtures are refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle.make import make_taming
from shard_files import draw_picture, encode_picture, write_pictures, write_shard, write_tar

from checkpoint_io import CheckpointError, file_hash
from mindalle.checkpoint import save_checkpoint
from mindalle.data import Sample, TransformConfig, open_source, transform
from mindalle.data.code_cache import CodeCache, identified_tokenizer
from mindalle.data.encoding import encode_source
from mindalle.data.part_encoder import EncodingJob
from mindalle.data.samples import seed_of
from stage1_vqgan import RQVAE, VQGAN

# line breaks and separators of every kind, which a caption may hold and a line of the cache may not
ODD = ["a\nb\r\nc", "line\u2028separator \x85 x \x0b y", "東京 ☃ 😀", '"quoted" \\']
RANDOM = TransformConfig(image_size=16, crop="random_resized", min_scale=0.3, flip_probability=0.5)


@pytest.fixture
def vqgan(tmp_path: Path, tiny_vqgan: VQGAN) -> str:
    save_checkpoint(tmp_path / "vqgan", image_tokenizer=tiny_vqgan)
    return str(tmp_path / "vqgan")


@pytest.fixture
def rqvae(tmp_path: Path, tiny_rqvae: RQVAE) -> str:
    save_checkpoint(tmp_path / "rqvae", image_tokenizer=tiny_rqvae)
    return str(tmp_path / "rqvae")


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """7 pictures in 3 parts."""
    parts = {"a": range(3), "b": range(3, 4), "c": range(4, 7)}
    return [str(write_shard(tmp_path / f"{name}.tar", indices)) for name, indices in parts.items()]


@pytest.fixture
def job(tmp_path: Path, shards: list[str], vqgan: str) -> EncodingJob:
    return EncodingJob(
        source=open_source(shards),
        image_tokenizer=vqgan,
        directory=tmp_path / "cache",
        transform=TransformConfig(image_size=16),
        batch_size=4,
    )


def hash_of(job: EncodingJob) -> str:
    return identified_tokenizer(job.image_tokenizer)[1]


def read(job: EncodingJob) -> CodeCache:
    return CodeCache(job.directory, tokenizer_hash=hash_of(job))


def samples_of(job: EncodingJob) -> list[Sample]:
    parts = (job.source.read(part) for part in range(job.source.num_parts))
    return [sample for part in parts for sample in part if isinstance(sample, Sample)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name[0] != "."}


class TestRoundTrip:
    @pytest.mark.parametrize("name", ["vqgan", "rqvae"])
    @pytest.mark.parametrize("batch_size", [1, 5, 100])
    @torch.inference_mode()
    def test_equals_direct_encoding(
        self, job: EncodingJob, request: pytest.FixtureRequest, name: str, batch_size: int
    ) -> None:
        tokenizer: VQGAN | RQVAE = request.getfixturevalue(f"tiny_{name}")
        job = replace(
            job,
            image_tokenizer=request.getfixturevalue(name),
            transform=RANDOM,
            num_crops=3,
            has_latents=True,
            seed=7,
            batch_size=batch_size,
        )
        encode_source(job)
        cache = read(job)
        samples = samples_of(job)
        assert len(cache) == len(samples) == 7
        for i, sample in enumerate(samples):
            picture = cache.picture(i)
            assert (picture.key, picture.captions, picture.label) == (sample.key, sample.captions, None)
            rngs = [None, *(random.Random(seed_of(7, sample.key, k)) for k in (1, 2))]
            for k, rng in enumerate(rngs):
                image = transform(sample.image, RANDOM, rng)[None]
                assert torch.equal(cache.codes(i, k), tokenizer.encode(image)[0])
                latents = tokenizer.encode_latents(image)[0]
                torch.testing.assert_close(cache.latents(i, k).float(), latents, atol=1e-3, rtol=1e-3)
            assert cache.codes(i, 0).dtype == torch.int64
        different = sum(not torch.equal(cache.codes(i, 1), cache.codes(i, 2)) for i in range(7))
        assert different >= 5  # the crops of a picture

    def test_header(self, job: EncodingJob) -> None:
        header = encode_source(job)
        found = json.loads((job.directory / "header.json").read_text())
        plan = found.pop("plan")
        assert found == {"count": 7, "num_unreadable": 0, "num_without_captions": 0, "num_classes": 0}
        assert plan == json.loads((job.directory / "plan.json").read_text())
        assert plan["tokenizer"] == file_hash(Path(job.image_tokenizer) / "image_tokenizer.safetensors")
        assert (plan["code_shape"], plan["codebook_size"], plan["num_parts"]) == ([4, 4], 24, 3)
        assert (header.count, header.plan.code_shape) == (7, (4, 4))
        codes = np.load(job.directory / "part-00002.npy")
        assert (codes.dtype, codes.shape) == (np.uint16, (3, 1, 4, 4))

    def test_any_caption(self, job: EncodingJob, tmp_path: Path) -> None:
        """U+2028 ends a line for str.splitlines: one such caption made a whole cache "damaged"."""
        shard = write_shard(tmp_path / "odd.tar", range(3), {0: ODD, 1: [], 2: ["a"]})
        header = encode_source(replace(job, source=open_source(str(shard))))
        cache = read(job)
        assert [list(cache.picture(i).captions) for i in range(3)] == [ODD, [], ["a"]]
        assert header.num_without_captions == 1

    def test_classes(self, job: EncodingJob, tmp_path: Path) -> None:
        write_pictures(tmp_path / "pictures", ["cat/0.png", "ant/1.png", "cat/2.png"])
        header = encode_source(replace(job, source=open_source(str(tmp_path / "pictures"))))
        assert (header.plan.classes, header.num_classes) == (("ant", "cat"), 2)
        assert [read(job).picture(i).label for i in range(3)] == [0, 1, 1]

    def test_crops_follow_from_the_picture_alone(self, job: EncodingJob, tmp_path: Path) -> None:
        """Not from its place among the others."""
        write_pictures(tmp_path / "few", ["b.png"])
        write_pictures(tmp_path / "many", ["a.png", "b.png"])
        (tmp_path / "few" / "b.png").write_bytes((tmp_path / "many" / "b.png").read_bytes())
        codes = []
        for name, index in (("few", 0), ("many", 1)):
            mine = replace(
                job,
                source=open_source(str(tmp_path / name)),
                directory=tmp_path / f"{name}-codes",
                transform=RANDOM,
                num_crops=4,
            )
            encode_source(mine)
            codes.append(torch.stack([read(mine).codes(index, crop) for crop in range(4)]))
        assert torch.equal(*codes)

    def test_no_file_stays_open(self, job: EncodingJob) -> None:
        """Two or three did of each part: of 130,000 pictures more than a process may have open."""
        encode_source(replace(job, has_latents=True))
        before = os.listdir("/dev/fd")
        cache = read(job)
        for i in range(len(cache)):
            cache.picture(i), cache.codes(i, 0), cache.latents(i, 0)
        assert os.listdir("/dev/fd") == before

    def test_reopened_in_other_processes(self, job: EncodingJob) -> None:
        encode_source(job)
        cache = read(job)
        copy = pickle.loads(pickle.dumps(cache))
        assert len(pickle.dumps(cache)) < 1000
        assert torch.equal(copy.codes(6, 0), cache.codes(6, 0))
        for index in (-1, 7):
            with pytest.raises(IndexError, match=rf"index must be in \[0, 7\), got {index}"):
                cache.codes(index, 0)

    def test_foreign_tokenizers(self, job: EncodingJob, tmp_path: Path) -> None:
        """Told apart by their weights, since their files hold other things besides."""
        make_taming(tmp_path / "taming")
        job = replace(job, image_tokenizer=str(tmp_path / "taming"))
        encode_source(job)
        assert len(read(job)) == 7
        tokenizer, before = identified_tokenizer(job.image_tokenizer)
        assert identified_tokenizer(job.image_tokenizer)[1] == before != file_hash(__file__)
        save_checkpoint(tmp_path / "native", image_tokenizer=tokenizer)
        assert identified_tokenizer(str(tmp_path / "native"))[1] != before  # stricter than need be

    def test_file_hash(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"abc")
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180-2
        assert file_hash(tmp_path / "file") == expected


class TestUnreadable:
    def broken(self, path: Path, indices: range) -> str:
        good, caption = draw_picture(0)
        files = {f"{i}.png": b"no picture" for i in indices}
        return str(write_tar(path, files | {"good.png": encode_picture(good), "good.txt": caption.encode()}))

    def test_skipped_counted_and_named(
        self, job: EncodingJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The first ten by name, all in number; also after a part was encoded by a run that was killed."""
        shards = [self.broken(tmp_path / f"{name}.tar", range(7)) for name in "xy"]
        job = replace(job, source=open_source(shards))
        header = encode_source(job)
        assert (header.count, header.num_unreadable) == (2, 14)
        assert [read(job).picture(i).key for i in range(2)] == ["x.tar/good", "y.tar/good"]
        skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        assert len(skipped) == 11
        assert skipped[0].startswith("skipped x.tar/0: not a picture of a known format")
        assert skipped[9].startswith("skipped y.tar/2: ")
        assert skipped[10] == "14 of 16 pictures could not be read and were skipped"
        reasons = (job.directory / "part-00001.unreadable").read_text().splitlines()
        assert [json.loads(line)["key"] for line in reasons] == [f"y.tar/{i}" for i in range(7)]
        (job.directory / "header.json").unlink()
        assert encode_source(job) == header

    def test_a_part_of_them_alone(self, job: EncodingJob, tmp_path: Path) -> None:
        bad = str(write_tar(tmp_path / "bad.tar", {"0.png": b"", "1.png": b"\x89PNG"}))
        good = str(write_shard(tmp_path / "good.tar", range(2)))
        job = replace(
            job, source=open_source([bad, good, bad]), num_crops=2, transform=RANDOM, has_latents=True
        )
        header = encode_source(job)
        assert (header.count, header.num_unreadable) == (2, 4)
        assert read(job).picture(1).key == "good.tar/0001"

    def test_nothing_else(self, job: EncodingJob, tmp_path: Path) -> None:
        bad = str(write_tar(tmp_path / "bad.tar", {"0.png": b"", "1.png": b"\x89PNG"}))
        with pytest.raises(
            ValueError, match=r"none of the 2 pictures of .*bad.tar can be read: the .unreadable"
        ):
            encode_source(replace(job, source=open_source(bad)))
        with pytest.raises(FileNotFoundError, match="its encoding did not finish: encode again to go on"):
            read(job)


class TestOutOfReach:
    """The rest of a shard was lost for good when its connection was, and the part counted as whole."""

    @pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_encoded_another_time(
        self, job: EncodingJob, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_processes: int
    ) -> None:
        whole = [Path(url).read_bytes() for url in job.source.urls]  # type: ignore[attr-defined]
        shards = [tmp_path / f"remote-{i}.tar" for i in range(3)]
        job = replace(job, source=open_source([f"pipe:cat {shard}" for shard in shards], allow_pipe=True))
        shards[0].write_bytes(whole[0][:2600])  # inside the second picture
        shards[1].write_bytes(whole[1])
        with pytest.raises(
            ConnectionError, match=r"2 of 3 shards of pipe:.* could not be read .*: encode again to go on"
        ):
            encode_source(job, num_processes=num_processes)
        assert f"skipped pipe:cat {shards[0]}: the shard is damaged or out of reach" in caplog.text
        assert f"skipped pipe:cat {shards[2]}: the shard is damaged or out of reach" in caplog.text
        assert [path.name for path in job.directory.glob("*.npy")] == ["part-00001.npy"]
        assert not (job.directory / "header.json").exists()

        for shard, content in zip(shards, whole, strict=True):
            shard.write_bytes(content)
        header = encode_source(job, num_processes=num_processes)
        assert (header.count, header.num_unreadable, len(read(job))) == (7, 0, 7)
        assert not list(job.directory.glob("*.unreadable"))

    def test_a_local_shard_that_is_cut(self, job: EncodingJob, caplog: pytest.LogCaptureFixture) -> None:
        """It would be no longer another time: what is readable is encoded, the rest is named."""
        first = job.source.urls[0]  # type: ignore[attr-defined]
        os.truncate(first, 2600)
        job = replace(job, source=open_source(list(job.source.urls)))  # type: ignore[attr-defined]
        header = encode_source(job)
        assert (header.count, header.num_unreadable) == (5, 1)
        assert "skipped a.tar: the shard is damaged or out of reach: unexpected end of data" in caplog.text

    def test_a_local_shard_that_is_gone(self, job: EncodingJob) -> None:
        """As those of a network drive are for a while."""
        first = Path(job.source.urls[0])  # type: ignore[attr-defined]
        assert job.source.fingerprint  # listed while it was there
        first.rename(first.with_suffix(".away"))
        with pytest.raises(ConnectionError, match=r"1 of 3 shards of .*a.tar and 2 more could not be"):
            encode_source(job)
        first.with_suffix(".away").rename(first)
        assert encode_source(job).count == 7


class TestGoingOn:
    def test_only_missing_parts_are_encoded(self, job: EncodingJob) -> None:
        header = encode_source(job)
        before = contents(job.directory)
        for name in ("header.json", "part-00001.npy"):
            (job.directory / name).unlink()
        (job.directory / ".part-00001-0123456789abcdef.npy").write_bytes(
            b"half"
        )  # of a process that was killed
        times = {path.name: path.stat().st_mtime_ns for path in job.directory.glob("part-*.npy")}
        assert encode_source(job) == header
        assert contents(job.directory) == before
        assert not (job.directory / ".part-00001-0123456789abcdef.npy").exists()
        assert {name: (job.directory / name).stat().st_mtime_ns for name in times} == times
        assert len(times) == 2

    def test_a_finished_cache_is_left_alone(self, job: EncodingJob) -> None:
        header = encode_source(job)
        before = {path: path.stat().st_mtime_ns for path in job.directory.iterdir() if path.name[0] != "."}
        assert encode_source(job) == header
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_an_interruption_leaves_whole_parts(self, job: EncodingJob) -> None:
        class Interrupted:
            def __getattr__(self, name: str) -> Any:
                return getattr(job.source, name)

            def __len__(self) -> int:
                return len(job.source)

            def read(self, part: int) -> Iterator[Any]:
                yield from job.source.read(part)
                if part == 1:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            encode_source(replace(job, source=Interrupted()))  # type: ignore[arg-type]
        assert sorted(contents(job.directory)) == ["part-00000.jsonl", "part-00000.npy", "plan.json"]
        encode_source(job)
        assert len(read(job)) == 7

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"num_crops": 2, "transform": RANDOM},
                "num_crops: 1 there, 2 wanted; transform: {.*} there, {.*",
            ),
            ({"seed": 5}, r"\(seed: 0 there, 5 wanted\): choose another directory, or remove this one to"),
            ({"has_latents": True}, r"\(has_latents: False there, True wanted\)"),
            ({"image_tokenizer": "rqvae"}, r"tokenizer: \w{12}... there, \w{12}... wanted; code_shape"),
        ],
    )
    def test_another_plan(self, job: EncodingJob, rqvae: str, changes: dict[str, Any], message: str) -> None:
        encode_source(job)
        before = contents(job.directory)
        if "image_tokenizer" in changes:
            changes = {"image_tokenizer": rqvae}
        with pytest.raises(FileExistsError, match=f"cache holds codes of another plan .*{message}"):
            encode_source(replace(job, **changes))
        assert contents(job.directory) == before

    def test_other_pictures(self, job: EncodingJob, tmp_path: Path, shards: list[str]) -> None:
        encode_source(job)
        write_shard(tmp_path / "b.tar", range(3, 4), {3: ["quite another caption"]})
        with pytest.raises(FileExistsError, match=r"another plan \(source: \w+... there, \w+... wanted\)"):
            encode_source(replace(job, source=open_source(shards)))

    def test_something_else_is_in_the_directory(self, job: EncodingJob) -> None:
        job.directory.mkdir()
        (job.directory / "thesis.tex").touch()
        with pytest.raises(
            FileExistsError, match=r"is not empty and holds no codes, it has thesis.tex: choose"
        ):
            encode_source(job)


class Crashing:
    """A source whose pictures end the process that reads them, as a full memory does."""

    name, classes, num_parts, fingerprint = "crash", (), 2, "0" * 64

    def __len__(self) -> int:
        return 2

    def read(self, part: int) -> Iterator[Any]:
        os._exit(9)


@pytest.mark.slow
class TestProcesses:
    """Each starts Python anew, which takes seconds."""

    def test_two_write_what_one_writes(self, job: EncodingJob, tmp_path: Path) -> None:
        job = replace(job, transform=RANDOM, num_crops=3, has_latents=True)
        bad = str(write_tar(tmp_path / "bad.tar", {"0.png": b""}))
        job = replace(job, source=open_source([*job.source.urls, bad]))  # type: ignore[attr-defined]
        encode_source(job)
        alone = contents(job.directory)
        job = replace(job, directory=tmp_path / "together")
        encode_source(job, num_processes=2)
        assert contents(job.directory) == alone
        assert len(alone) == 4 * 3 + 3  # three files of each part, what was unreadable, the plan, the header

    def test_one_that_dies(self, job: EncodingJob) -> None:
        with pytest.raises(ChildProcessError, match=r"was killed.*: try fewer --num-processes"):
            encode_source(replace(job, source=Crashing()), num_processes=2)  # type: ignore[arg-type]

    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_killed_and_begun_again(self, job: EncodingJob, tmp_path: Path, num_processes: int) -> None:
        """SIGKILL after the first parts: those that are there stay as they are."""
        shards = [str(write_shard(tmp_path / f"{i:03d}.tar", range(3))) for i in range(60)]
        options = (
            "--image-tokenizer",
            job.image_tokenizer,
            "--batch-size",
            4,
            "--num-processes",
            num_processes,
        )
        command = ("-m", "mindalle.cli.main", "encode", *shards, job.directory, *options)
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
            stderr=subprocess.DEVNULL,
        )
        while not (finished := list(job.directory.glob("part-*.npy"))):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = list(job.directory.glob("part-*.npy"))
        time.sleep(0.5)  # its children end by themselves
        assert len(list(job.directory.glob("part-*.npy"))) <= len(finished) + num_processes
        finished = list(job.directory.glob("part-*.npy"))
        assert 0 < len(finished) < 60
        assert not (job.directory / "header.json").exists()
        times = {path: path.stat().st_mtime_ns for path in finished}
        encode_source(replace(job, source=open_source(shards)))
        assert {path: path.stat().st_mtime_ns for path in finished} == times
        assert len(read(job)) == 180


class TestJobs:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_crops": 0}, "num_crops and batch_size must be at least 1, got 0 and 4"),
            ({"batch_size": 0}, "num_crops and batch_size must be at least 1, got 1 and 0"),
            ({"num_crops": 3}, "num_crops is 3, but all of them would be the same: set crop or flip_prob"),
        ],
    )
    def test_settings(self, job: EncodingJob, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(job, **changes)

    def test_size(self, job: EncodingJob) -> None:
        with pytest.raises(
            ValueError, match="image_size must be a multiple of 4 for this image tokenizer, got 18"
        ):
            encode_source(replace(job, transform=TransformConfig(image_size=18)))
        header = encode_source(replace(job, transform=TransformConfig(image_size=24)))
        assert header.plan.code_shape == (6, 6)
        assert read(job).codes(0, 0).shape == (6, 6)

    def test_no_tokenizer(self, job: EncodingJob) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such file or directory: \./none"):
            encode_source(replace(job, image_tokenizer="./none"))


def edit_header(**changes: Any) -> Callable[[Path], None]:
    def edit(cache: Path) -> None:
        header = json.loads((cache / "header.json").read_text())
        for section in (header, header["plan"]):
            section.update({name: value for name, value in changes.items() if name in section})
        (cache / "header.json").write_text(json.dumps(header))

    return edit


def save_codes(codes: Any) -> Callable[[Path], None]:
    return lambda cache: np.save(cache / "part-00002.npy", codes)


WHOLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another tokenizer": (
        edit_header(tokenizer="f" * 64),
        r"it was encoded by another image tokenizer \(SHA-256 ffffffffffff..., expected \w{12}...\)",
    ),
    "another format": (
        edit_header(format="codes-9"),
        "expected format mindalle-codes-2, got {'format': 'codes-9'",
    ),
    "another count": (edit_header(count=8), "8 pictures in the header, 7 in the parts"),
    "a count that is none": (edit_header(count="many"), "header.json: count: Value 'many'"),
    "an unknown key": (
        lambda cache: (cache / "header.json").write_text(
            (cache / "header.json").read_text().replace('"seed"', '"seeds"')
        ),
        "plan.seeds: Key 'seeds' not in 'CachePlan'",
    ),
    "header cut": (
        lambda cache: os.truncate(cache / "header.json", 40),
        "header.json|JSON|Unterminated|Expecting",
    ),
    "header no mapping": (lambda cache: (cache / "header.json").write_text("[]"), "expected a JSON object"),
    "header no text": (lambda cache: (cache / "header.json").write_bytes(b"\xff\xfe"), "codec can't decode"),
}
PART: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda cache: (cache / "part-00002.npy").unlink(), "No such file"),
    "cut": (lambda cache: os.truncate(cache / "part-00002.npy", 150), "part-00002.npy: "),
    "empty": (lambda cache: os.truncate(cache / "part-00002.npy", 0), "part-00002.npy: "),
    "another shape": (
        save_codes(np.zeros((3, 1, 4, 5), np.uint16)),
        r"shape \[3, 1, 4, 4\], got \[3, 1, 4, 5\]",
    ),
    "another type": (save_codes(np.zeros((3, 1, 4, 4))), r"expected uint16, got float64 \[3, 1, 4, 4\]"),
    "no array": (save_codes(np.uint16(3)), r"expected uint16, got uint16 \[\]"),
    "pickled": (save_codes(np.array([print] * 7)), "part-00002.npy: "),
    "rows too many": (save_codes(np.zeros((4, 1, 4, 4), np.uint16)), "4 rows of codes, 3 whole lines"),
    "no captions": (lambda cache: (cache / "part-00002.jsonl").unlink(), "No such file"),
    "captions cut": (lambda cache: os.truncate(cache / "part-00002.jsonl", 100), "3 rows of codes, 1 whole"),
    "captions empty": (lambda cache: os.truncate(cache / "part-00002.jsonl", 0), "3 rows of codes, 0 whole"),
}
CONTENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "codes out of range": (
        save_codes(np.full((3, 1, 4, 4), 24, np.uint16)),
        r"part-00002 is damaged: codes must be in \[0, 24\), got 24",
    ),
    "a line that is no JSON": (
        lambda cache: (cache / "part-00002.jsonl").write_text("{\n" * 3),
        "part-00002 is damaged: line 3 of its captions: JSONDecodeError",
    ),
    "a line of something else": (
        lambda cache: (cache / "part-00002.jsonl").write_text("{}\n" * 3),
        "part-00002 is damaged: line 3 of its captions: KeyError",
    ),
}


class TestRefusal:
    @pytest.mark.parametrize("name", WHOLE)
    def test_damage(self, job: EncodingJob, name: str) -> None:
        damage, message = WHOLE[name]
        encode_source(job)
        damage(job.directory)
        with pytest.raises(CheckpointError, match=message) as caught:
            read(job)
        assert str(caught.value).startswith(f"the code cache {job.directory} is not usable: ")
        assert str(caught.value).endswith("; remove it to encode again")

    @pytest.mark.parametrize("name", PART)
    def test_damaged_part_and_its_repair(self, job: EncodingJob, name: str) -> None:
        """Done as the message says, the cache is as it was."""
        damage, message = PART[name]
        encode_source(job)
        before = contents(job.directory)
        damage(job.directory)
        with pytest.raises(
            CheckpointError, match=f"not usable, part-00002 is damaged: .*{message}"
        ) as caught:
            read(job)
        assert str(caught.value).endswith("; remove part-00002.npy and header.json to encode this part again")
        for file in ("part-00002.npy", "header.json"):
            (job.directory / file).unlink(missing_ok=True)
        encode_source(job)
        assert contents(job.directory) == before

    @pytest.mark.parametrize("name", CONTENT)
    def test_damage_that_is_found_when_it_is_read(self, job: EncodingJob, name: str) -> None:
        """All of a cache that is larger than the memory is not looked at first."""
        damage, message = CONTENT[name]
        encode_source(job)
        damage(job.directory)
        cache = read(job)
        cache.codes(0, 0), cache.picture(0)
        with pytest.raises(CheckpointError, match=message):
            cache.codes(6, 0), cache.picture(6)

    @pytest.mark.parametrize("name", ["codes", "latents", "picture"])
    def test_files_cut_while_in_use(self, job: EncodingJob, name: str) -> None:
        encode_source(replace(job, has_latents=True))
        cache = read(job)
        file = {
            "codes": "part-00002.npy",
            "latents": "part-00002.latents.npy",
            "picture": "part-00002.jsonl",
        }[name]
        os.truncate(job.directory / file, 140)
        with pytest.raises(CheckpointError, match=f"part-00002 is damaged: {file} was cut while in use"):
            cache.picture(6) if name == "picture" else getattr(cache, name)(6, 0)

    @pytest.mark.parametrize("place", ["numpy.load", "numpy.fromfile", "pathlib.Path.read_text"])
    def test_what_is_no_damage(self, job: EncodingJob, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
        """With too many files open, good parts were called damaged, to be removed and encoded again."""

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        encode_source(job)
        tokenizer_hash = hash_of(job)
        monkeypatch.setattr(place, refuse)
        with pytest.raises(OSError, match="Too many open files"):
            CodeCache(job.directory, tokenizer_hash=tokenizer_hash)

    def test_latents(self, job: EncodingJob) -> None:
        encode_source(replace(job, has_latents=True))
        np.save(job.directory / "part-00000.latents.npy", np.zeros((3, 1, 8, 4, 3), np.float16))
        with pytest.raises(
            CheckpointError, match=r"part-00000 .* shape \[3, 1, 8, 4, 4\], got \[3, 1, 8, 4, 3\]"
        ):
            read(job)

    def test_nothing_there(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(FileNotFoundError, match=r"no code cache at .*: it has no header.json"):
                CodeCache(path, tokenizer_hash="0" * 64)


def test_wide_codebooks(job: EncodingJob, monkeypatch: pytest.MonkeyPatch, tiny_vqgan: VQGAN) -> None:
    tiny_vqgan.quantizer.codebook_size = 65537
    monkeypatch.setattr("mindalle.data.encoding.identified_tokenizer", lambda name: (tiny_vqgan, "0" * 64))
    with pytest.raises(ValueError, match="codes are stored as uint16, so V must be at most 65536, got 65537"):
        encode_source(job)
    assert not (job.directory / "plan.json").exists()
