"""Jobs on small models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from set_models import PROMPTS, save_class_model, save_text_model

from mindalle.generation import SetJob
from stage1_vqgan import VQGAN
from stage2_transformer import GPT, SamplingParams


@pytest.fixture
def job(tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT) -> SetJob:
    """7 prompts in 3 parts, 2 pictures of each."""
    return SetJob(
        conditions=PROMPTS,
        directory=tmp_path / "set",
        model=save_text_model(tmp_path / "text", tiny_vqgan, tiny_gpt),
        params=SamplingParams(top_k=12, cfg_scale=1.5),
        num_images=2,
        num_candidates=2,
        seed=3,
        part_size=3,
        batch_size=4,
    )


@pytest.fixture
def ranked(job: SetJob, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT) -> SetJob:
    """The best 2 of 5 by a CLIP."""
    model = save_text_model(tmp_path / "with-clip", tiny_vqgan, tiny_gpt, has_clip=True)
    return replace(job, model=model, num_candidates=5)


@pytest.fixture
def classes(job: SetJob, tmp_path: Path, tiny_vqgan: VQGAN) -> SetJob:
    """Classes 11, 3 and 7 of 12."""
    model = save_class_model(tmp_path / "classes", tiny_vqgan)
    return replace(job, model=model, conditions=(11, 3, 7), part_size=2)
