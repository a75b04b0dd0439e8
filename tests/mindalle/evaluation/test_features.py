"""Feature networks: the same features as torch-fidelity's, safe weights, honest names, resize rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shard_files import draw_picture

from checkpoint_io import file_hash
from mindalle.cli import evaluate
from mindalle.evaluation import features
from mindalle.evaluation.features import FEATURES, RESIZES, FeatureOptions, load_judge


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """torch-fidelity's network and a file of its random weights."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    patch = pytest.MonkeyPatch()
    patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    patch.undo()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.fill_(1.0)
        elif tensor.is_floating_point():
            scale = 1.4 / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    for name, tensor in network.state_dict().items():
        if name.endswith("bn.weight"):
            tensor.fill_(1.0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_is_torch_fidelitys(inception: tuple[Any, Path]) -> None:
    """Pictures of 299 pixels, which no rule resizes."""
    theirs, path = inception
    pictures = [noise((299, 299), seed) for seed in range(2)]
    ours = FEATURES["inception"](FeatureOptions(inception_weights=str(path)))
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    with torch.no_grad():
        vectors, logits = theirs(pixels)
    found = ours.extract(pictures)
    assert found.logits is not None
    assert torch.allclose(found.vectors, vectors, atol=1e-4)
    assert torch.allclose(found.logits, logits, atol=1e-4)
    assert (found.vectors.shape, found.logits.shape) == ((2, 2048), (2, 1008))
    assert vectors.std() > 0.01
    assert found.vectors.requires_grad is False


def test_only_the_fields_weights_give_an_fid(
    inception: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = inception
    sha256 = file_hash(path)
    other = FEATURES["inception"](FeatureOptions(inception_weights=str(path)))
    assert other.weights_hash == sha256
    assert other.metric_name("fd") == f"Inception[{sha256[:8]}]-FD"
    assert other.metric_name("rfd") == f"Inception[{sha256[:8]}]-rFD"
    monkeypatch.setattr(features, "INCEPTION_HASH", sha256[:8])
    standard = FEATURES["inception"](FeatureOptions(inception_weights=str(path), resize="torch"))
    names = [standard.metric_name(metric) for metric in ("fd", "kd", "is", "rfd", "precision")]
    assert names == ["FID", "KID", "IS", "rFID", "precision"]
    assert standard.resize == "torch: bilinear, not antialiased, 299x299"


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code was run')",))


def test_weights_never_run_code(tmp_path: Path) -> None:
    """torch-fidelity loads with weights_only=False."""
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:200])
    for name, message in (
        ("evil", "refused, it asks to run exec"),
        ("other", "has no weights of Inception-v3 as torch-fidelity and pytorch-fid publish them"),
        ("cut", "is not a readable torch checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            FEATURES["inception"](FeatureOptions(inception_weights=str(tmp_path / f"{name}.pth")))
    with pytest.raises(FileNotFoundError, match=r"no weights of Inception-v3 at .*nothing"):
        FEATURES["inception"](FeatureOptions(inception_weights=str(tmp_path / "nothing")))


def test_a_download_that_fails_names_the_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    message = r"failed \(no route to host\): bring weights-inception-.* --features efflite or clip"
    with pytest.raises(FileNotFoundError, match=message):
        FEATURES["inception"](FeatureOptions())


def test_efflite() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    network = FEATURES["efflite"](FeatureOptions())
    pictures = [draw_picture(0, 64)[0], noise((40, 70))]
    found = network.extract(pictures)
    assert found.logits is not None
    assert (found.vectors.shape, found.logits.shape) == ((2, 1280), (2, 1000))
    assert torch.allclose(network.extract(pictures[1:]).vectors, found.vectors[1:], atol=1e-4)
    assert [network.metric_name(name) for name in ("fd", "is", "recall")] == [
        "EffLite-FD",
        "EffLite-IS",
        "EffLite-recall",
    ]
    with pytest.raises(ValueError, match="resize must be one of clean, torch, got 'nearest'"):
        FeatureOptions(resize="nearest")


def test_resize_rules() -> None:
    """`clean` averages what it shrinks; `torch` picks, and of these stripes it picks the black of eight."""
    stripe = np.array([255, 0, 0, 0, 0, 0, 0, 255], np.uint8)
    stripes = Image.fromarray(np.tile(stripe, (256, 32)))
    clean, plain = (resize(stripes, 32) for resize, _ in (RESIZES["clean"], RESIZES["torch"]))
    assert clean.shape == plain.shape == (3, 32, 32)
    assert clean.mean().item() == pytest.approx(255 / 4, abs=2)
    assert plain.max() == 0

    picture = noise((50, 70))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    expected = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)[0]
    assert torch.equal(RESIZES["torch"][0](picture, 32), expected)
    averaged = F.interpolate(pixels, size=(32, 32), mode="bicubic", align_corners=False, antialias=True)[0]
    # torch's bicubic has another coefficient (-0.75, Pillow's -0.5)
    assert (RESIZES["clean"][0](picture, 32) - averaged.clamp(0, 255)).abs().mean() < 8
    for resize, _ in RESIZES.values():
        same = resize(picture.resize((32, 32)), 32)
        assert torch.equal(
            same, torch.from_numpy(np.array(picture.resize((32, 32)))).permute(2, 0, 1).float()
        )


def test_the_command_knows_the_networks() -> None:
    from mindalle.evaluation.comparison import METRICS

    help_text = evaluate.build_images_parser("evaluate.py images").format_help()
    for names in (FEATURES, RESIZES, METRICS):
        assert f"{{{','.join(names)}}}" in help_text.replace("\n", "")


def test_no_such_clip(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_judge(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="need a CLIP: name it"):
        FEATURES["clip"](FeatureOptions())
