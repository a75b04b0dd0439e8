"""What is not imported before it is needed: a picture should not wait for a compiler, or for a trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clip_models import clip_config

import mindalle
from mindalle.checkpoint import save_checkpoint
from mindalle.clip import NativeClip, read_clip_tokenizer

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
RANK = """
import sys
from mindalle import Pipeline
for clip in sys.argv[1:]:
    drawn = Pipeline.from_pretrained("emoji", clip=clip)("a red apple", num_candidates=2)
    assert len(drawn.scores) == 1
    report("rank")
"""


def run(code: str, *arguments: str) -> list[list[object]]:
    """What the code reports: steps, and what they had imported of the above."""
    command = [sys.executable, "-c", REPORT + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


READ_PICTURES = """
import mindalle.generation.painter
assert not [name for name in sys.modules if "lightning" in name]
"""


def test_lightning_is_for_training() -> None:
    """Drawing sets and evaluating used to import it, with the data modules."""
    assert run(READ_PICTURES) == []


@pytest.mark.parametrize(
    ("code", "steps"),
    [(IMPORT, ["import"]), (DRAW, ["draw", "load in int8", "build without storage"])],
    ids=["import", "draw"],
)
def test_nothing_heavy_is_imported(code: str, steps: list[str]) -> None:
    """Models on the meta device used to import sympy and torch's compiler: a second, and 130 MB."""
    assert run(code) == [[step, []] for step in steps]


def test_nothing_heavy_is_imported_to_rank(tmp_path: Path) -> None:
    """CLIPs used to be open_clip's, which imports torchvision, timm and the compiler: seconds."""
    words = Path(mindalle.__file__).parent / "models" / "emoji" / "text_tokenizer.json"
    for name, resnet_stages in (("vit", None), ("resnet", (1, 1, 1, 1))):
        config = clip_config(
            words,
            image_size=32,
            vision_layers=4,
            vision_patch_size=32,
            vision_head_width=32,
            resnet_stages=resnet_stages,
            context_length=26,
        )
        tokenize = read_clip_tokenizer(words, config, where="a test")
        clip = NativeClip(model=config.build(), config=config, tokenize=tokenize)
        save_checkpoint(tmp_path / name, clip=clip, dtype=torch.float16)
    assert run(RANK, str(tmp_path / "vit"), str(tmp_path / "resnet")) == [["rank", []]] * 2
