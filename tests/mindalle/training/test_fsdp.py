"""Two processes on the CPU learn what one learns from the joined batch, with and without sharding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import train_in_processes
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from train_in_processes import GPT_CONFIG, NUM_STEPS, train

from mindalle.run import open_run
from mindalle.training import PromptSheet
from mindalle.training.fsdp import BlockFSDPStrategy

ROOT = Path(__file__).resolve().parents[3]


def train_in_two_processes(folder: Path, **arguments: Any) -> list[float]:
    """What `train` returns in the first of them."""
    command = [sys.executable, str(Path(train_in_processes.__file__)), str(folder), json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), [("gpt", "ddp"), ("rq", "fsdp_blocks")])
def test_two_processes_learn_as_one(tmp_path: Path, kind: str, strategy: str) -> None:
    expected = train(tmp_path, kind)
    assert expected[-1] < 0.9 * expected[0]
    found = train_in_two_processes(tmp_path, kind=kind, strategy=strategy, gradient_checkpointing=True)
    assert found == pytest.approx(expected, abs=1e-5)
    alone = weights(tmp_path / f"{kind}_auto_{NUM_STEPS}.ckpt")
    together = weights(tmp_path / f"{kind}_{strategy}_{NUM_STEPS}.ckpt")
    assert list(together) == list(alone)
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_sharded_run_resumes_and_is_exported(tmp_path: Path) -> None:
    """Its checkpoint is one whole file, that one process goes on from as well as two."""
    expected = train(tmp_path, "gpt")
    first = train_in_two_processes(tmp_path, kind="gpt", strategy="fsdp_blocks", max_steps=4)
    file = tmp_path / "gpt_fsdp_blocks_4.ckpt"
    run = open_run(file)
    assert (run.kind, run.config, run.num_steps) == ("gpt", GPT_CONFIG, 4)
    assert sum(p.numel() for p in run.build(torch.zeros(0)).parameters()) == sum(
        tensor.numel() for tensor in weights(file).values()
    )
    sharded = train_in_two_processes(tmp_path, kind="gpt", strategy="fsdp_blocks", ckpt_path=str(file))
    alone = train(tmp_path, "gpt", ckpt_path=file)
    for rest in (sharded, alone):
        assert first + rest == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("callback", "what"),
    [(EMAWeightAveraging(), r"averaged weights \(EMA\)"), (PromptSheet(), "a PromptSheet")],
)
def test_callbacks_that_need_whole_models_are_refused(callback: pl.Callback, what: str) -> None:
    """Averages would be of one process's parts; a run hung where one process drew and the others did not."""
    strategy = BlockFSDPStrategy()
    module = pl.LightningModule()
    module.model = nn.Linear(2, 2)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback])
    strategy._lightning_module = module
    message = f"{what} cannot be had with fsdp_blocks: remove the callback, or use ddp"
    with pytest.raises(ValueError, match=message), strategy.model_sharded_context():
        pass
