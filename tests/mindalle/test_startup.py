"""What is not imported before it is needed: a picture should not wait for a compiler, or for a trainer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COMPILER = ("torch._dynamo", "torch._inductor", "sympy", "torch.fx.experimental.symbolic_shapes")
TRAINING = ("pytorch_lightning", "torchmetrics", "jsonargparse", "tensorboard", "webdataset", "scipy")
OTHERS = ("open_clip", "torchvision", "transformers", "huggingface_hub", "requests", "matplotlib", "pandas")

REPORT = f"""
import json, sys
def report(step):
    print(json.dumps([step, [name for name in {(*COMPILER, *TRAINING, *OTHERS)} if name in sys.modules]]))
"""
IMPORT = """
import mindalle
report("import")
assert "torch" not in sys.modules
"""
DRAW = """
from mindalle import Pipeline
assert len(Pipeline.from_pretrained("emoji")("a red apple").images) == 1
report("draw")
from stage2_transformer.int8 import has_int8
Pipeline.from_pretrained("emoji", precision="int8" if has_int8() else "bf16")
report("load in int8")
import torch
from mindalle.benchmark.shapes import RQVAE_8X8X4
from checkpoint_io import without_storage
from stage1_vqgan import RQVAE
from stage2_transformer import RQTransformer, RQTransformerConfig
with without_storage():
    models = [RQVAE(RQVAE_8X8X4), RQTransformer(RQTransformerConfig(), torch.empty(4, 16384, 256))]
assert all(parameter.is_meta for model in models for parameter in model.parameters())
report("build without storage")
"""


@pytest.mark.parametrize(
    ("code", "steps"),
    [(IMPORT, ["import"]), (DRAW, ["draw", "load in int8", "build without storage"])],
    ids=["import", "draw"],
)
def test_nothing_heavy_is_imported(code: str, steps: list[str]) -> None:
    """Models on the meta device used to import sympy and torch's compiler: a second, and 130 MB."""
    command = [sys.executable, "-c", REPORT + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[step, []] for step in steps]
