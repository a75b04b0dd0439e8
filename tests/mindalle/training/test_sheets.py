"""Sheets of pictures that a run leaves behind at each validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from sequence_runs import OneBatch, batch_for
from sequence_runs import training as sequence_training
from tokenizer_runs import VAL, Pictures, draw_batch, training
from torch import Tensor

from mindalle.image import to_pil
from mindalle.training import PromptSheet, ReconstructionSheet
from stage1_vqgan import VQGAN
from stage2_transformer import GPT, SamplingParams

CELL, GAP, LINE = 64, 4, 14  # pixels, of `contact_sheet`


def fit(folder: Path, module: Any, data: Any, callback: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **{"max_epochs": 2, "logger": False, **options},
    )
    with torch.random.fork_rng(devices=[]):
        trainer.fit(module, datamodule=data)
    return trainer


def cell(sheet: Image.Image, row: int, column: int, line: int = 0) -> np.ndarray[Any, Any]:
    """A picture of the sheet (16, 16, 3), as it was before it was scaled up."""
    left, top = GAP + column * (CELL + GAP), GAP + row * (CELL + GAP + line)
    part = sheet.crop((left, top, left + CELL, top + CELL))
    return np.asarray(part)[2::4, 2::4]


class TestReconstructions:
    @pytest.mark.parametrize(("kind", "columns"), [("vqgan", 2), ("rqvae", 4)])
    def test_originals_beside_each_depth(self, tmp_path: Path, kind: str, columns: int) -> None:
        module = training(kind)
        fit(tmp_path, module, Pictures([draw_batch(0, 1)] * 2, VAL), ReconstructionSheet(num_images=3))
        files = sorted((tmp_path / "samples").iterdir())
        assert [file.name for file in files] == [f"reconstructions_000000{step}.png" for step in (2, 4)]
        sheet = Image.open(files[-1])
        assert sheet.size == (columns * (CELL + GAP) + GAP, 3 * (CELL + GAP) + GAP)
        images = VAL[0]["images"]
        with torch.no_grad():
            codes = module.model.eval().encode(images)
            depths = [codes] if kind == "vqgan" else [codes[..., :depth] for depth in (1, 2, 3)]
            expected = [images, *map(module.model.decode, depths)]
        for column, pictures in enumerate(map(to_pil, expected)):
            for row in range(3):
                difference = cell(sheet, row, column).astype(int) - np.asarray(pictures[row])
                assert abs(difference).max() <= 1  # rows of a batch of 3 or 4 differ in their last bits

    def test_only_the_first_batch_and_no_sanity_check(self, tmp_path: Path) -> None:
        sheet = ReconstructionSheet()
        options = {"num_sanity_val_steps": 2, "max_epochs": 1}
        fit(tmp_path, training("vqgan"), Pictures([draw_batch(0)], VAL), sheet, **options)
        (file,) = (tmp_path / "samples").iterdir()
        assert Image.open(file).height == 4 * (CELL + GAP) + GAP  # a batch has fewer pictures than asked for

    def test_weights_and_random_numbers_stay(self, tmp_path: Path) -> None:
        """A run learns the same with sheets and without."""
        states = []
        for callback in (pl.Callback(), ReconstructionSheet()):
            module = training("rqvae")
            fit(tmp_path, module, Pictures([draw_batch(0, 1)] * 2, VAL), callback)
            states.append(module.state_dict())
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())

    def test_tensorboard_shows_it(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path / "logs")
        data = Pictures([draw_batch(0)], VAL)
        fit(tmp_path, training("vqgan"), data, ReconstructionSheet(), logger=logger, max_epochs=1)
        content = b"".join(file.read_bytes() for file in Path(logger.log_dir).glob("events*"))
        assert b"reconstructions" in content
        assert b"\x89PNG" in content

    def test_written_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full disk in the middle of a file."""

        def save_half(image: Image.Image, file: Any, **options: Any) -> None:
            Path(file).write_bytes(b"\x89PNG")
            raise OSError("No space left on device")

        monkeypatch.setattr(Image.Image, "save", save_half)
        with pytest.raises(OSError, match="No space left"):
            fit(tmp_path, training("vqgan"), Pictures([draw_batch(0)], VAL), ReconstructionSheet())
        assert not list((tmp_path / "samples").iterdir())


class Prompts(OneBatch):
    """What a prompt sheet asks a data module for."""

    def encode_prompts(self, prompts: list[Any]) -> Tensor:
        if isinstance(prompts[0], int):
            return torch.tensor(prompts)
        return torch.tensor([[len(prompt) % 60 + 1] * 6 for prompt in prompts])


@pytest.fixture
def drawn_with(tmp_path: Path, tiny_gpt: GPT, tiny_vqgan: VQGAN) -> Any:
    """The sheet of a GPT with a condition, after one step."""

    def draw(condition: str, callback: PromptSheet, folder: str = "run") -> Image.Image:
        module = sequence_training(tiny_gpt, condition)
        batch = batch_for(tiny_gpt.code_shape, module.model.config.condition)
        data = Prompts(batch, tiny_vqgan.codebook().detach(), tokenizer=tiny_vqgan)
        fit(tmp_path / folder, module, data, callback, max_epochs=1)
        (file,) = (tmp_path / folder / "samples").iterdir()
        assert file.name == "prompts_0000001.png"
        with Image.open(file) as sheet:
            sheet.load()
        return sheet

    return draw


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReconstructionSheet(num_images=0), "num_images must be at least 1, got 0"),
        (lambda: PromptSheet(num_images=-1), "num_images must be at least 1, got -1"),
        (lambda: PromptSheet([]), "prompts must not be empty: leave them out to draw without"),
    ],
)
def test_nothing_to_draw(build: Any, message: str) -> None:
    """It is said before the first validation."""
    with pytest.raises(ValueError, match=message):
        build()


class TestPrompts:
    @pytest.mark.parametrize(
        ("condition", "prompts"),
        [("text", ["a red square", "a blue circle"]), ("class", [3, 0]), ("none", None)],
    )
    def test_a_row_for_each_prompt(self, drawn_with: Any, condition: str, prompts: Any) -> None:
        sheet = drawn_with(condition, PromptSheet(prompts, num_images=3))
        rows, line = (2, LINE) if prompts else (1, 0)
        assert sheet.size == (3 * (CELL + GAP) + GAP, rows * (CELL + GAP + line) + GAP)
        pictures = [cell(sheet, row, column, line).tobytes() for row in range(rows) for column in range(3)]
        assert len(set(pictures)) == len(pictures)

    def test_the_same_seed_draws_the_same(self, drawn_with: Any) -> None:
        sheets = [
            drawn_with("text", PromptSheet(["a red square"], num_images=2, seed=seed), folder)
            for seed, folder in ((1, "first"), (1, "again"), (2, "other"))
        ]
        assert sheets[0].tobytes() == sheets[1].tobytes() != sheets[2].tobytes()

    def test_sampling_is_the_caller_s(self, drawn_with: Any) -> None:
        """Greedily all pictures of a prompt are one."""
        callback = PromptSheet(["a red square"], num_images=2, params=SamplingParams(temperature=0.0))
        sheet = drawn_with("text", callback)
        assert cell(sheet, 0, 0, LINE).tobytes() == cell(sheet, 0, 1, LINE).tobytes()
