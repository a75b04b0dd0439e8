"""Sets through Ray: the bytes of a set drawn without it, errors in one line. A real Ray, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_picture_sets import contents, draw

from mindalle.generation import SetJob, draw_set, plan_set

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_ends() -> Iterator[None]:
    """Ray's processes end with the tests; each test finds those of the one before it."""
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "mindalle[ray]"')
    yield
    ray.shutdown()


@pytest.mark.parametrize("file_format", ["folder", "shards"])
def test_the_same_bytes(ranked: SetJob, tmp_path: Path, file_format: str) -> None:
    """Of parts that are missing; what is there is kept."""
    ranked = replace(ranked, file_format=file_format)
    draw(ranked)
    plan = plan_set(ranked, ranked.load())
    on_ray = replace(ranked, directory=tmp_path / "ray", batch_size=3)
    assert draw_set(on_ray, plan, use_ray=True).count == 14
    assert contents(on_ray.directory) == contents(ranked.directory)


def test_more_than_the_machine_has(job: SetJob) -> None:
    """Ray would wait for it without end and without a word."""
    many = replace(job, num_threads=10_000)
    with pytest.raises(
        ValueError, match=r"--threads must be at most \d+, as many CPUs as Ray has, got 10000"
    ):
        draw_set(many, plan_set(many, many.load()), use_ray=True)


def test_an_error_in_a_worker_is_one_line(job: SetJob) -> None:
    plan = plan_set(job, job.load())
    with pytest.raises(
        ChildProcessError, match=r"Ray gave up: .*no such file or directory: \./none.*is kept"
    ) as e:
        draw_set(replace(job, model="./none"), plan, use_ray=True)
    assert "\n" not in str(e.value)
