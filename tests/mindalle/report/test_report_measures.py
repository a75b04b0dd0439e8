"""What is particular to a section: decoding without a cache, curves of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from mindalle.report import learning
from mindalle.report.decoding import UncachedGPT
from mindalle.report.learning import read_curves
from stage2_transformer import GPT, SamplingParams, generate


def test_decoding_without_a_cache_gives_the_same_logits(tiny_gpt: GPT) -> None:
    text = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    codes = generate(tiny_gpt, text, SamplingParams(), seeds=[0, 1])
    uncached = UncachedGPT(tiny_gpt)
    assert torch.equal(generate(uncached, text, SamplingParams(), seeds=[0, 1]), codes)
    with torch.inference_mode():
        cache = uncached.make_cache(2)
        first = uncached.prefill(text, cache)[:, None]  # (B, 1, V)
        after = uncached.decode(codes.flatten(1)[:, :-1], cache)  # (B, T - 1, V)
        full = tiny_gpt(codes, text).logits.flatten(1, 2)  # (B, T, V)
    torch.testing.assert_close(torch.cat([first, after], dim=1), full, atol=1e-4, rtol=1e-4)


def test_curves_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was logged again after a resumption replaces what was there; long curves are averaged."""
    monkeypatch.setattr(learning, "MAX_POINTS", 3)
    for version, steps in enumerate((range(0, 40, 10), range(30, 60, 10))):
        writer = SummaryWriter(str(tmp_path / f"version_{version}"))
        for step in steps:
            writer.add_scalar("train/loss", 100 * version + step, step)
        writer.add_scalar("epoch", 1, 0)
        writer.close()
    assert read_curves(tmp_path) == {
        "train/loss": {"steps": [5, 25, 45], "values": [5.0, 75.0, 145.0], "values_per_point": 2}
    }
    with pytest.raises(FileNotFoundError, match="no TensorBoard events"):
        read_curves(tmp_path / "nothing")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "events.out.tfevents.1").write_bytes(b"\x00\x01no events at all")
    with pytest.raises(ValueError, match="hold no train/ or val/ values"):
        read_curves(tmp_path / "damaged")
