"""Imports point one way, and a stage can be used with torch and einops alone."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "checkpoint_io": set[str](),
    "stage1_vqgan": {"checkpoint_io"},
    "stage2_transformer": {"checkpoint_io"},
    "mindalle": {"checkpoint_io", "stage1_vqgan", "stage2_transformer"},
    "tools": {"mindalle"},
}
STAGES = ["stage1_vqgan", "stage2_transformer"]
HEAVY = {"pytorch_lightning", "open_clip", "tokenizers", "omegaconf", "safetensors", "torchvision", "PIL"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports, wherever in it, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {node for body in ast.walk(tree) if isinstance(body, ast.FunctionDef) for node in ast.walk(body)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield str(node.module), node not in inside


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no files in {package}"
    return found


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_one_way(package: str) -> None:
    for path in files(package):
        for module, _ in imports(path):
            top = module.partition(".")[0]
            assert top not in BELOW or top == package or top in BELOW[package], f"{path} imports {module}"
            assert top not in ("tests", "oracle", "conftest"), f"{path} imports {module}"


@pytest.mark.parametrize("package", [*STAGES, "checkpoint_io"])
def test_what_is_imported_with_a_stage(package: str) -> None:
    """Everything else is imported inside the function that needs it, or in the training module."""
    allowed = {"torch", "einops", "checkpoint_io", package, *sys.stdlib_module_names}
    for path in files(package):
        if path.name == "training.py":
            continue
        for module, at_import in imports(path):
            assert not at_import or module.partition(".")[0] in allowed, f"{path} imports {module}"
            assert module != f"{package}.training", f"{path} imports the training module"


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stage_loads_nothing_heavy() -> None:
    loaded = json.loads(
        run("import json, sys, stage1_vqgan, stage2_transformer; print(json.dumps(sorted(sys.modules)))")
    )
    assert {module.partition(".")[0] for module in loaded} & (HEAVY | {"mindalle", "transformers"}) == set()
    assert {f"{stage}.training" for stage in STAGES} & set(loaded) == set()


BLOCKED = """
import sys
from importlib.metadata import packages_distributions, requires
import re

def needed(distribution, seen):
    seen.add(distribution.lower().replace("_", "-"))
    for line in requires(distribution) or ():
        name = re.match(r"[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-")
        if "extra ==" not in line and name not in seen:
            try:
                needed(name, seen)
            except ImportError:  # for another platform
                pass
    return seen

distributions = needed("torch", needed("einops", set())) | {"numpy"}
allowed = {
    top for top, owners in packages_distributions().items()
    if any(owner.lower().replace("_", "-") in distributions for owner in owners)
} | {"checkpoint_io", "stage1_vqgan", "stage2_transformer"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and not top.startswith("_"):
            # the kind that torch expects where a package is optional
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
for name in HEAVY:
    try:
        __import__(name)
    except ImportError as error:
        assert "blocked" in str(error)
    else:
        raise AssertionError(name)

import torch
import stage1_vqgan as s1
import stage2_transformer as s2

convnet = s1.ConvNetConfig(
    image_size=8, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=4
)
residual = s1.ResidualQuantizerConfig(codebook_sizes=(6, 6), width=4)
tokenizer = s1.RQVAE(s1.RQVAEConfig(convnet=convnet, quantizer=residual, latent_width=4)).eval()
codes = tokenizer.encode(torch.rand(1, 3, 8, 8))
assert tokenizer.decode(codes).shape == (1, 3, 8, 8)
vector = s1.VectorQuantizerConfig(codebook_size=6, width=4)
vqgan = s1.VQGAN(s1.VQGANConfig(convnet=convnet, quantizer=vector)).eval()
assert vqgan.encode(torch.rand(1, 3, 8, 8)).shape == (1, 4, 4)

stack = s2.TransformerConfig(width=8, num_layers=1, num_heads=2)
label = s2.ConditionConfig(kind="class", vocab_size=3, length=1)
config = s2.RQTransformerConfig(
    body=stack,
    head=stack,
    condition=label,
    codebook_sizes=(6, 6),
    code_shape=(4, 4, 2),
    codebook_width=4,
)
models = [
    s2.RQTransformer(config, tokenizer.codebook().detach()).eval(),
    s2.GPT(s2.GPTConfig(transformer=stack, condition=label, vocab_size=6, code_shape=(2, 2))).eval(),
]
for model in models:
    drawn = s2.generate(model, torch.tensor([1]), s2.SamplingParams(top_k=3), seeds=[0, 1])
    assert drawn.shape == (2, *model.code_shape)
"""


def test_a_stage_works_without_anything_but_torch_and_einops() -> None:
    run(f"HEAVY = {sorted(HEAVY)}\n{BLOCKED}")
