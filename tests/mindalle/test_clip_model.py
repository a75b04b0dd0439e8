"""Our CLIP against open_clip's: the same weights by the same names, the same numbers from them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mindalle.clip import ClipConfig, unit
from mindalle.clip_model import Clip

VIT = ClipConfig(
    embed_dim=12,
    image_size=48,
    vision_layers=2,
    vision_width=64,
    vision_patch_size=16,
    vision_head_width=32,
    text_layers=3,
    text_width=48,
    text_heads=3,
    context_length=9,
    vocab_size=40,
)
RESNET = replace(
    VIT, image_size=64, vision_patch_size=32, vision_width=8, vision_layers=6, resnet_stages=(1, 2, 1, 2)
)
CONFIGS = {
    "vit": VIT,
    "vit of exact GELU": replace(VIT, quick_gelu=False),
    "resnet": RESNET,
    "resnet of exact GELU": replace(RESNET, quick_gelu=False),
}


def build_theirs(config: ClipConfig) -> Any:
    vision = open_clip.CLIPVisionCfg(
        layers=config.resnet_stages or config.vision_layers,
        width=config.vision_width,
        head_width=config.vision_head_width,
        patch_size=config.vision_patch_size,
        image_size=config.image_size,
    )
    text = open_clip.CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
    )
    return open_clip.CLIP(config.embed_dim, vision, text, quick_gelu=config.quick_gelu)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ClipConfig:
    return CONFIGS[request.param]


@pytest.fixture
def models(config: ClipConfig) -> tuple[Clip, Any]:
    """Ours and theirs, of the same weights, as if trained: no gain is 0 or 1, no bias 0."""
    torch.manual_seed(0)
    ours, theirs = config.build(), build_theirs(config)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim < 2:  # matrices are random as they are
            tensor.add_(torch.rand_like(tensor), alpha=0.5 if "bn3" in name else 0.1)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def inputs(config: ClipConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 3, config.image_size, config.image_size, generator=generator)
    return image, torch.randint(0, config.vocab_size, (3, config.context_length), generator=generator)


def encode(model: Any, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [model.encode_image(inputs[0]), model.encode_text(inputs[1])]


def test_weights_are_open_clips(config: ClipConfig) -> None:
    """In the same order too: an optimiser's state in a checkpoint of a run goes by the order."""
    ours, theirs = config.build(), build_theirs(config)
    for part in ("state_dict", "named_parameters", "named_buffers"):
        expected, got = (
            [(name, tensor.shape, tensor.dtype) for name, tensor in dict(getattr(model, part)()).items()]
            for model in (theirs, ours)
        )
        if part == "named_buffers":  # ours makes its mask anew
            expected = [entry for entry in expected if entry[0] != "attn_mask"]
        assert got == expected
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(config.build().state_dict(), strict=True)


def test_initial_weights_are_distributed_as_open_clips(config: ClipConfig) -> None:
    config = replace(config, text_width=96, vocab_size=400, embed_dim=32)
    torch.manual_seed(0)
    ours, theirs = config.build(), build_theirs(config)
    assert ours.training
    for (name, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        got, expected = got.float(), expected.float()
        if got.unique().numel() == 1 or expected.unique().numel() == 1:
            torch.testing.assert_close(got, expected, msg=name)
            continue
        error = 5 * expected.std().item() * (2 / got.numel()) ** 0.5  # 5 standard errors of a difference
        assert got.mean().item() == pytest.approx(expected.mean().item(), abs=error), name
        assert got.std().item() == pytest.approx(expected.std().item(), abs=error), name
        if got.numel() > 1000:  # a uniform distribution ends at 1.7 standard deviations
            assert (got.abs().max() > 2.5 * got.std()) == (expected.abs().max() > 2.5 * expected.std()), name


@pytest.mark.parametrize("is_training", [True, False])
def test_features_and_gradients(
    models: tuple[Clip, Any], inputs: tuple[Tensor, Tensor], is_training: bool
) -> None:
    """In double precision, in which gradients of many layers can be compared."""
    gradients = []
    exact = (inputs[0].double(), inputs[1])
    features = [encode(model.double().train(is_training), exact) for model in models]
    for got, expected in zip(*features, strict=True):
        scale = expected.detach().abs().max().item()
        assert scale > 0.1
        torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=0)
    for model, own in zip(models, features, strict=True):
        sum((part / part.detach().abs().max()).sin().sum() for part in own).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if name != "logit_scale"})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], gradient, atol=1e-4 * gradient.abs().max().item() + 1e-9, rtol=0, msg=name
        )
    for (name, buffer), expected in zip(
        models[0].named_buffers(),
        (buffer for name, buffer in models[1].named_buffers() if name != "attn_mask"),
        strict=True,
    ):
        torch.testing.assert_close(buffer, expected, msg=name)


def test_inference(models: tuple[Clip, Any], inputs: tuple[Tensor, Tensor]) -> None:
    """Without gradients torch's attention takes another way."""
    with torch.inference_mode():
        ours, theirs = (encode(model.eval(), inputs) for model in models)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_mixed_precision(models: tuple[Clip, Any], inputs: tuple[Tensor, Tensor]) -> None:
    """As training with bf16-mixed computes: what is kept in bfloat16 is what was."""
    dtypes: list[list[torch.dtype]] = [[], []]
    for model, seen in zip(models, dtypes, strict=True):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (encode(model, inputs) for model in models)
    assert dtypes[0] == dtypes[1]
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=0.03 * expected.abs().max().item(), rtol=0)


def test_half_precision_weights(models: tuple[Clip, Any], inputs: tuple[Tensor, Tensor]) -> None:
    exact = models[0].eval()
    half = copy.deepcopy(exact).bfloat16()
    with torch.inference_mode():
        expected = encode(exact, inputs)
        got = encode(half, (inputs[0].bfloat16(), inputs[1]))
    for part, reference in zip(got, expected, strict=True):
        assert part.dtype == torch.bfloat16
        assert torch.cosine_similarity(part.float(), reference).min() > 0.99


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
def test_pixels_are_open_clips(mode: str) -> None:
    """Pictures wide, tall, small, large; margins of every remainder by 4, which rounding treats unlike."""
    random = np.random.default_rng(0)
    config = replace(VIT, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))
    for image_size in (48, 33):
        config = replace(config, image_size=image_size, vision_patch_size=image_size)
        theirs = open_clip.image_transform(
            image_size, is_train=False, mean=config.image_mean, std=config.image_std
        )
        ours = config.preprocess()
        sizes = [(image_size, image_size + more) for more in range(5)]
        sizes += [(97, 31), (31, 97), (7, 5), (3, 200), (200, 150), (64, 64), (1, 1), (59, 211)]
        for width, height in sizes:
            colours = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8))
            image = (colours if "A" in mode else colours.convert("RGB")).convert(mode)
            expected = theirs(image)
            assert (expected.shape, expected.dtype) == ((3, image_size, image_size), torch.float32)
            torch.testing.assert_close(ours(image), expected, atol=1e-6, rtol=0, msg=str(image))


def test_pixels_by_hand() -> None:
    """One picture or a batch, in [-1, 1]."""
    config = replace(VIT, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.8))
    pixels = config.normalise(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1).expand(2, 3, 1, 1))
    expected = torch.tensor([(0 - 0.1) / 0.5, (0.5 - 0.2) / 0.6, (1 - 0.3) / 0.8])
    torch.testing.assert_close(pixels.flatten(1), expected.expand(2, 3))


def test_unit_vectors() -> None:
    found = unit(torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=torch.float16))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
