"""CLIP reranking: every file format against models built by hand, scores against arithmetic by hand."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from checkpoint_io import CheckpointError, config_to_mapping, read_tensors, write_safetensors
from checkpoint_io.torchscript import read_torchscript
from mindalle.clip import ClipConfig, ClipTokenizer
from mindalle.clip_weights import OPENAI_MODELS, infer_config
from mindalle.rerank import ClipReranker

NATIVE = ClipConfig(
    embed_dim=16,
    image_size=16,
    vision_layers=1,
    vision_width=32,
    vision_patch_size=8,
    vision_head_width=16,
    text_layers=1,
    text_width=32,
    text_heads=2,
    context_length=6,
    vocab_size=7,
)
WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "apple": 4}  # V = 5: start is 5, end is 6


@pytest.fixture(scope="module", params=["vit", "resnet"])
def openai_model(request: pytest.FixtureRequest) -> nn.Module:
    """A small model with OpenAI's names, vocabulary, head width and activation; two heads in each tower."""
    import open_clip

    torch.manual_seed(0)
    if request.param == "vit":
        vision = open_clip.CLIPVisionCfg(layers=2, width=128, patch_size=8, image_size=24)
        text = open_clip.CLIPTextCfg(width=128, heads=2, layers=1)
    else:
        vision = open_clip.CLIPVisionCfg(layers=(1, 2, 1, 1), width=4, image_size=64)
        text = open_clip.CLIPTextCfg(width=64, heads=1, layers=2)
    model = open_clip.CLIP(24, vision, text, quick_gelu=True).eval()
    for (
        name,
        buffer,
    ) in model.named_buffers():  # as if trained: a BatchNorm's initial buffers would hide a lost one
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


@pytest.fixture
def native(tmp_path: Path, word_tokenizer: Tokenizer) -> Path:
    """A complete native directory."""
    torch.manual_seed(0)
    word_tokenizer.save(str(tmp_path / "text_tokenizer.json"))
    write_config(tmp_path, {"clip": config_to_mapping(NATIVE), "model": {"of": "someone else"}})
    write_safetensors(tmp_path / "clip.safetensors", NATIVE.build().state_dict())
    return tmp_path


@pytest.fixture
def images() -> list[Image.Image]:
    """Five pictures of different sizes and modes."""
    random = np.random.default_rng(0)
    shapes = [(16, 16, 3), (40, 20, 3), (24, 24, 4), (9, 30), (64, 64, 3)]
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def write_config(directory: Path, content: dict[str, object]) -> None:
    (directory / "config.yaml").write_text(yaml.safe_dump(content))


def count_heads(model: nn.Module) -> list[int]:
    return [module.num_heads for module in model.modules() if hasattr(module, "num_heads")]


def save_state_dict(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def save_script(model: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(model), path)
    return path


def save_trace(model: nn.Module, path: Path) -> Path:
    """The way OpenAI made its archives."""
    size = 64 if hasattr(model.visual, "layer1") else 24
    inputs = {
        "encode_image": torch.zeros(1, 3, size, size),
        "encode_text": torch.zeros(1, 77, dtype=torch.long),
    }
    torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), path)
    return path


WRITERS = {"state dict": save_state_dict, "script": save_script, "trace": save_trace}


@pytest.fixture(scope="module")
def openai_files(openai_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as each kind of file; tests that damage one copy it first."""
    directory = tmp_path_factory.mktemp("openai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of each constant
        return {kind: write(openai_model, directory / f"{kind}.pt") for kind, write in WRITERS.items()}


class TestOpenAIFile:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_equals_the_model_it_came_from(
        self, openai_model: nn.Module, openai_files: dict[str, Path], kind: str, images: list[Image.Image]
    ) -> None:
        """Heads, layers, patches, activation and running statistics were all read off the file."""
        reranker = ClipReranker.from_pretrained(openai_files[kind])
        pixels = torch.stack([reranker.preprocess(image) for image in images])
        ids = reranker.tokenize(["a red apple", "☃ 東京"])
        with torch.no_grad():
            for part, inputs in (("encode_image", pixels), ("encode_text", ids)):
                got, expected = (getattr(model, part)(inputs) for model in (reranker.model, openai_model))
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert not reranker.model.training

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    @pytest.mark.parametrize("kind", ["state dict", "script"])
    def test_half_precision_file_computes_in_float32(
        self, openai_model: nn.Module, kind: str, tmp_path: Path
    ) -> None:
        """OpenAI's files hold some tensors in float16: they are widened, nothing else is narrowed."""
        mixed = copy.deepcopy(openai_model)
        mixed.visual.conv1.half()
        expected = {name: tensor.float() for name, tensor in mixed.state_dict().items()}
        loaded = ClipReranker.from_pretrained(WRITERS[kind](mixed, tmp_path / "clip.pt")).model.state_dict()
        assert {tensor.dtype for name, tensor in loaded.items() if "num_batches" not in name} == {
            torch.float32
        }
        assert expected.keys() == loaded.keys()
        assert all(torch.equal(loaded[name].float(), expected[name]) for name in expected)

    def test_ids_and_pixels_are_openais(self, openai_model: nn.Module, openai_files: dict[str, Path]) -> None:
        """Ids: 49406 starts, 320 is "a</w>", 49407 ends, 77 in all. Pixels: white is (1 - mean) / std."""
        reranker = ClipReranker.from_pretrained(openai_files["state dict"])
        ids = reranker.tokenize(["A"])
        assert ids.shape == (1, 77)
        assert ids[0, :4].tolist() == [49406, 320, 49407, 0]
        pixels = reranker.preprocess(Image.new("L", (200, 100), 255))
        size = openai_model.visual.image_size
        size = size if isinstance(size, int) else size[0]
        assert pixels.shape == (3, size, size)
        white = (1 - torch.tensor(NATIVE.image_mean)) / torch.tensor(NATIVE.image_std)
        torch.testing.assert_close(pixels.mean((1, 2)), white)

    def test_extra_entries_of_openais_archives_are_dropped(
        self, openai_model: nn.Module, tmp_path: Path
    ) -> None:
        sizes = {"input_resolution": 24, "context_length": 77, "vocab_size": 49408}
        tensors = openai_model.state_dict() | {name: torch.tensor(size) for name, size in sizes.items()}
        torch.save(tensors, tmp_path / "clip.pt")
        ClipReranker.from_pretrained(tmp_path / "clip.pt")

    @pytest.mark.parametrize("name", OPENAI_MODELS)
    def test_infers_the_released_architectures(self, name: str) -> None:
        """On the meta device, so that the real sizes cost nothing."""
        import open_clip

        architecture = open_clip.get_model_config(OPENAI_MODELS[name])
        vision, text = architecture["vision_cfg"], architecture["text_cfg"]
        with torch.device("meta"):
            model = open_clip.CLIP(**architecture)
            config = infer_config(model.state_dict(), source=name)
            rebuilt = config.build()
        is_vit = isinstance(vision["layers"], int)
        assert config.resnet_stages == (None if is_vit else tuple(vision["layers"]))
        assert config.vision_patch_size == (vision["patch_size"] if is_vit else 32)
        assert (config.image_size, config.vision_width) == (vision["image_size"], vision["width"])
        assert (config.text_heads, config.text_layers) == (text["heads"], text["layers"])
        assert (config.context_length, config.vocab_size) == (77, 49408)
        theirs = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == theirs
        assert count_heads(rebuilt) == count_heads(model)
        assert config.quick_gelu

    def test_names_are_openais_with_their_activation(self) -> None:
        import open_clip

        assert {name.replace("/", "-").replace("@336px", "-336") for name in OPENAI_MODELS} == {
            name for name in open_clip.list_openai_models() if "quickgelu" not in name
        }
        for name in OPENAI_MODELS.values():
            assert open_clip.get_model_config(name)["quick_gelu"]
            assert open_clip.get_pretrained_url(name, "openai")

    def test_missing_tensor(self, tmp_path: Path) -> None:
        torch.save({"model.weight": torch.ones(2)}, tmp_path / "clip.pt")
        with pytest.raises(ValueError, match=r"expected a tensor visual\.conv1\.weight, found model\.w"):
            ClipReranker.from_pretrained(tmp_path / "clip.pt")

    @pytest.mark.parametrize("extra", [{"epoch": 3}, {0: torch.ones(2)}, {"epoch": 3, "state_dict": {}}])
    def test_not_only_tensors(self, openai_model: nn.Module, tmp_path: Path, extra: dict[Any, Any]) -> None:
        """They were asked for the shape that they do not have."""
        weights = {} if "state_dict" in extra else openai_model.state_dict()
        torch.save(weights | extra, tmp_path / "clip.pt")
        found = ", ".join(map(str, extra))
        message = f"expected nothing but tensors by name, found {found}: is it a training checkpoint"
        with pytest.raises(CheckpointError, match=message):
            ClipReranker.from_pretrained(tmp_path / "clip.pt")

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("text_projection", (32, 24), "no CLIP of OpenAI's format: text_heads must be positive, got 0"),
            ("text_projection", (24,), "no CLIP of OpenAI's format: not enough values"),
            ("ln_final.weight", (3,), r"ln_final.weight has shape \(3,\), expected"),
            ("surplus", (3,), "unexpected surplus"),
        ],
    )
    def test_wrong_shape(
        self, openai_model: nn.Module, tmp_path: Path, name: str, shape: tuple[int, ...], message: str
    ) -> None:
        torch.save(openai_model.state_dict() | {name: torch.zeros(shape)}, tmp_path / "clip.pt")
        with pytest.raises(ValueError, match=message):
            ClipReranker.from_pretrained(tmp_path / "clip.pt")

    def test_other_vocabulary(self, tmp_path: Path) -> None:
        model = replace(NATIVE, vision_width=64, vision_head_width=64, text_width=64, text_heads=1).build()
        with pytest.raises(ValueError, match="has 7 text ids, expected 49408 for OpenAI's tokenizer"):
            ClipReranker.from_pretrained(save_state_dict(model, tmp_path / "clip.pt"))

    def test_unreachable_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import open_clip  # noqa: F401  (before its downloader is switched off)

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"weights of RN50: .*load it by its path: ClipReranker"):
            ClipReranker.from_pretrained("RN50")

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"no CLIP 'ViT-B/33': .*ViT-B/32.*ViT-L/14@336px"):
            ClipReranker.from_pretrained("ViT-B/33")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
class TestTorchScriptArchive:
    @pytest.mark.parametrize("kind", ["script", "trace"])
    def test_equals_torch_jit_load(self, openai_files: dict[str, Path], kind: str) -> None:
        expected, got = torch.jit.load(openai_files[kind]).state_dict(), read_torchscript(openai_files[kind])
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)

    def test_code_stays_unread(self, openai_files: dict[str, Path], tmp_path: Path) -> None:
        """With its code replaced by garbage torch cannot load an archive; its tensors are all there."""
        whole, garbled = openai_files["script"], tmp_path / "garbled.pt"
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(garbled, "w") as new:
            for name in old.namelist():
                new.writestr(name, b"garbage" if "/code/" in name else old.read(name))
        with pytest.raises(RuntimeError):
            torch.jit.load(garbled)
        expected, got = read_torchscript(whole), read_torchscript(garbled)
        assert all(torch.equal(got[name], expected[name]) for name in expected)

    def test_refuses_to_run_code(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
            archive.writestr("clip/data.pkl", pickle.dumps(Attack(), protocol=2))
            archive.writestr("clip/constants.pkl", b"")
        with pytest.raises(
            ValueError, match=r"is refused: it asks for (posix|nt)\.system, which may run code"
        ):
            ClipReranker.from_pretrained(tmp_path / "clip.pt")
        assert not (tmp_path / "ran").exists()

    def test_tensor_beyond_its_storage(self, tmp_path: Path) -> None:
        """A hostile archive cannot read memory that is not its own."""

        storage = object()

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: object) -> object:
                return ("storage", torch.FloatStorage, "0", "cpu", 4) if obj is storage else None

        class Tree:
            def __reduce__(self) -> tuple[object, ...]:
                return torch._utils._rebuild_tensor_v2, (storage, 0, (1000,), (1,), False, None)

        with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
            with archive.open("clip/data.pkl", "w") as file:
                Pickler(file, protocol=2).dump(Tree())
            archive.writestr("clip/data/0", bytes(16))
            archive.writestr("clip/constants.pkl", b"")
        with pytest.raises(ValueError, match=r"not a readable TorchScript archive: .*out of bounds"):
            ClipReranker.from_pretrained(tmp_path / "clip.pt")

    def test_flipped_byte(self, openai_files: dict[str, Path], tmp_path: Path) -> None:
        path = Path(shutil.copy(openai_files["script"], tmp_path / "clip.pt"))
        with zipfile.ZipFile(path) as archive:
            entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = bytearray(path.read_bytes())
        content[entry.header_offset + 1000] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a readable TorchScript archive: Bad CRC-32.* cut short\?"):
            ClipReranker.from_pretrained(path)

    def test_damaged_directory(self, openai_files: dict[str, Path], tmp_path: Path) -> None:
        path = tmp_path / "clip.pt"
        path.write_bytes(openai_files["script"].read_bytes().replace(b"PK\x01\x02", b"PK\x00\x00"))
        with pytest.raises(ValueError, match=r"clip.pt.* is not a readable torch checkpoint: .*cut short\?"):
            ClipReranker.from_pretrained(path)

    @pytest.mark.parametrize("kind", ["state dict", "script"])
    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
    def test_truncated_file(
        self, openai_files: dict[str, Path], kind: str, kept: float, tmp_path: Path
    ) -> None:
        path = Path(shutil.copy(openai_files[kind], tmp_path / "clip.pt"))
        os.truncate(path, int(path.stat().st_size * kept))
        with pytest.raises(ValueError, match=r"clip.pt.* is not a readable torch checkpoint: .*cut short\?"):
            ClipReranker.from_pretrained(path)


class TestNativeDirectory:
    def test_round_trip(self, native: Path, word_tokenizer: Tokenizer, images: list[Image.Image]) -> None:
        torch.manual_seed(0)
        built = ClipReranker(NATIVE.build().eval(), NATIVE.preprocess(), ClipTokenizer(word_tokenizer, 6))
        loaded = ClipReranker.from_pretrained(native)
        assert torch.equal(loaded.score(images, "a red apple"), built.score(images, "a red apple"))
        assert {path.name for path in native.iterdir()} == {
            "clip.safetensors",
            "config.yaml",
            "text_tokenizer.json",
        }

    def test_in_the_home_directory(self, native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(native.parent))
        ClipReranker.from_pretrained(f"~/{native.name}")

    def test_float16_storage_computes_in_float32(self, native: Path) -> None:
        model = NATIVE.build()
        write_safetensors(native / "clip.safetensors", model.state_dict(), dtype=torch.float16)
        assert {tensor.dtype for tensor in read_tensors(native / "clip.safetensors").values()} == {
            torch.float16
        }
        loaded = ClipReranker.from_pretrained(native).model.state_dict()
        for name, tensor in model.state_dict().items():
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], tensor.half().float())

    def test_resnet_round_trip(self, native: Path, images: list[Image.Image]) -> None:
        sizes = {"image_size": 32, "vision_patch_size": 32, "vision_layers": 4, "vision_width": 2}
        config = replace(NATIVE, resnet_stages=(1, 1, 1, 1), **sizes)
        write_config(native, {"clip": config_to_mapping(config)})
        write_safetensors(native / "clip.safetensors", config.build().state_dict())
        assert ClipReranker.from_pretrained(native).score(images, "a").shape == (5,)

    def test_defaults_may_be_left_out(self, native: Path) -> None:
        short = {name: value for name, value in config_to_mapping(NATIVE).items() if "image_" not in name}
        write_config(native, {"clip": short | {"image_size": 16}})
        ClipReranker.from_pretrained(native)

    def test_vocabulary_mismatch(self, native: Path) -> None:
        write_config(native, {"clip": config_to_mapping(NATIVE) | {"vocab_size": 9}})
        with pytest.raises(
            ValueError, match=r"vocab_size must be 7 \(ids of .*text_tokenizer.json \+ 2\), got 9: was"
        ):
            ClipReranker.from_pretrained(native)

    def test_unknown_key(self, native: Path) -> None:
        write_config(native, {"clip": config_to_mapping(NATIVE) | {"vision_depth": 9}})
        with pytest.raises(
            ValueError, match=r"clip section of .*config.yaml: vision_depth; known are embed_dim"
        ):
            ClipReranker.from_pretrained(native)

    def test_no_clip_section(self, native: Path) -> None:
        write_config(native, {"model": {}})
        with pytest.raises(
            ValueError, match=r"clip section of .* must be a mapping, got None: name another CLIP"
        ):
            ClipReranker.from_pretrained(native)

    def test_weights_of_another_config(self, native: Path) -> None:
        write_config(native, {"clip": config_to_mapping(NATIVE) | {"text_layers": 2}})
        with pytest.raises(
            ValueError, match=r"clip.safetensors does not fit .*missing transformer.resblocks.1"
        ):
            ClipReranker.from_pretrained(native)

    @pytest.mark.parametrize("name", ["config.yaml", "clip.safetensors", "text_tokenizer.json"])
    def test_missing_file(self, native: Path, name: str) -> None:
        (native / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            ClipReranker.from_pretrained(native)

    @pytest.mark.parametrize("name", ["clip.safetensors", "text_tokenizer.json"])
    def test_truncated_file(self, native: Path, name: str) -> None:
        os.truncate(native / name, 100)
        with pytest.raises(ValueError, match=rf"{name}.* is not a "):
            ClipReranker.from_pretrained(native)


class TestClipTokenizer:
    def test_ids_by_hand(self, word_tokenizer: Tokenizer) -> None:
        ids = ClipTokenizer(word_tokenizer, 6)(["a red apple", "", "a red red red red red", "a pear"])
        assert ids.tolist() == [
            [5, 2, 3, 4, 6, 0],
            [5, 6, 0, 0, 0, 0],
            [5, 2, 3, 3, 3, 6],
            [5, 2, 1, 6, 0, 0],
        ]
        assert ids.dtype == torch.int64

    def test_settings_of_the_sequence_model_are_not_used(self, word_tokenizer: Tokenizer) -> None:
        """The same file serves the image model, which pads, truncates and may add special tokens."""
        expected = ClipTokenizer(word_tokenizer, 6)(["a red apple"])
        word_tokenizer.enable_padding(length=64)
        word_tokenizer.enable_truncation(max_length=2)
        word_tokenizer.post_processor = TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 1)])
        assert torch.equal(ClipTokenizer(word_tokenizer, 6)(["a red apple"]), expected)
        assert len(word_tokenizer.encode("a").ids) == 64  # still: the caller's tokenizer was copied

    def test_what_follows_the_end_does_not_matter(self, word_tokenizer: Tokenizer) -> None:
        model, ids = NATIVE.build().eval(), ClipTokenizer(word_tokenizer, 6)(["a red"])
        other_padding, other_text = ids.clone(), ids.clone()
        other_padding[0, 4:] = 3
        other_text[0, 2] = 4
        with torch.no_grad():
            features = model.encode_text(ids)
            torch.testing.assert_close(model.encode_text(other_padding), features)
            assert not torch.allclose(model.encode_text(other_text), features)


class ColourClip:
    """Mean colour against a named colour; no parameters."""

    colours = ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])

    def __init__(self) -> None:
        self.image_batches: list[int] = []
        self.num_texts = 0

    def encode_image(self, image: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.image_batches.append(len(image))
        return 7 * image.mean((2, 3))

    def encode_text(self, text: Tensor) -> Tensor:
        self.num_texts += len(text)
        return 3 * torch.tensor(self.colours)[text[:, 0]]


def to_signed_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def to_colour_id(texts: list[str]) -> Tensor:
    return torch.tensor([[["red", "green"].index(text)] for text in texts])


class HalfPrecisionClip(nn.Module):
    """The shape of what `clip.load` gives on CUDA: float16 convolutions, some parameters in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(77, 3))
        self.conv1 = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.conv1.weight)
        self.conv1.half()

    def encode_image(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.float16
        return 300 * self.conv1(image).mean((2, 3))

    def encode_text(self, text: Tensor) -> Tensor:
        assert text.dtype == torch.int32
        return 300 * torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float16)


class TestScore:
    def test_order_known_by_arithmetic(self) -> None:
        """Pixels in [-1, 1] against (1, 0, 0): white (1, 1, 1) has 3**-0.5, cyan (-1, 1, 1) its negative."""
        colours = ["cyan", "white", (255, 128, 128), "black", "blue"]
        images = [Image.new("RGB", (4, 4), colour) for colour in colours]
        signed = [(-1, 1, 1), (1, 1, 1), (1, 1 / 255, 1 / 255), (-1, -1, -1), (-1, -1, 1)]
        expected = torch.tensor([red / (red**2 + green**2 + blue**2) ** 0.5 for red, green, blue in signed])
        scores = ClipReranker(ColourClip(), to_signed_pixels, to_colour_id).score(images, "red")
        torch.testing.assert_close(scores, expected)
        assert int(scores.argmax()) == 2
        assert (scores.dtype, scores.shape, scores.is_inference()) == (torch.float32, (5,), False)

    def test_text_once_and_images_in_batches(self) -> None:
        model = ColourClip()
        images = [Image.new("RGB", (4, 4), "red")] * 5
        ClipReranker(model, to_signed_pixels, to_colour_id, batch_size=2).score(images, "green")
        assert (model.num_texts, model.image_batches) == (1, [2, 2, 1])

    def test_half_precision_model_of_openais_shape(self) -> None:
        """Squares of its features, 300**2, are beyond float16: they are normalised in float32."""
        images = [Image.new("RGB", (4, 4), colour) for colour in ("white", "cyan", (255, 128, 128))]
        reranker = ClipReranker(HalfPrecisionClip(), to_signed_pixels, lambda texts: torch.zeros(1, 77).int())
        scores = reranker.score(images, "red")
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, torch.tensor([3**-0.5, -(3**-0.5), 1.0]), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_batch_size_does_not_matter(
        self, native: Path, images: list[Image.Image], batch_size: int
    ) -> None:
        reranker = ClipReranker.from_pretrained(native)
        expected = reranker.score(images, "a red apple")
        reranker.batch_size = batch_size
        torch.testing.assert_close(reranker.score(images, "a red apple"), expected, atol=1e-6, rtol=0)
        assert expected.unique().numel() == 5

    def test_identical_features_score_at_most_one(self) -> None:
        """Rounding gives 1 + 1e-7 for many vectors."""
        features = torch.randn(40, 1, 3, generator=torch.Generator().manual_seed(0))

        class Echo:
            def encode_image(self, image: Tensor) -> Tensor:
                return self.encode_text(text)

            def encode_text(self, text: Tensor) -> Tensor:
                return features[text[0, 0]]

        for row in range(len(features)):
            text = torch.tensor([[row]])
            reranker = ClipReranker(Echo(), to_signed_pixels, lambda texts, text=text: text)
            score = reranker.score([Image.new("RGB", (1, 1))], "").item()
            assert 0.9999 < score <= 1

    def test_no_images(self) -> None:
        with pytest.raises(ValueError, match="at least one picture, got none"):
            ClipReranker(ColourClip(), to_signed_pixels, to_colour_id).score([], "red")

    def test_batch_size_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
            ClipReranker(ColourClip(), to_signed_pixels, to_colour_id, batch_size=0)


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text_layers": 0}, "text_layers must be positive, got 0"),
            ({"context_length": 2}, r"context_length must be > 2 \(start, text, end\), got 2"),
            ({"image_std": (1.0, 0.0, 1.0)}, "image_std must be positive"),
            ({"image_size": 20}, "image_size must be a multiple of vision_patch_size, got 20 and 8"),
            ({"vision_width": 40}, "vision_width must be a multiple of vision_head_width, got 40 and 16"),
            ({"text_heads": 5}, "text_width must be a multiple of text_heads, got 32 and 5"),
            ({"resnet_stages": (1, 1)}, r"resnet_stages must be 4 numbers with the sum 1 .*, got \(1, 1\)"),
            ({"resnet_stages": (1, 0, 0, 0)}, "vision_patch_size must be 32, got 8"),
        ],
    )
    def test_ranges(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(NATIVE, **changes)

    def test_activation(self) -> None:
        assert "QuickGELU" in str(NATIVE.build())
        assert "QuickGELU" not in str(replace(NATIVE, quick_gelu=False).build())


class TestImport:
    def test_open_clip_is_imported_late(self) -> None:
        code = "import sys, mindalle.rerank; sys.exit('open_clip' in sys.modules)"
        root = Path(__file__).resolve().parents[2]
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True)

    def test_open_clip_is_missing(
        self,
        native: Path,
        openai_files: dict[str, Path],
        images: list[Image.Image],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """OpenAI's models need it, for the tokenizer; a native one does not."""
        monkeypatch.setitem(sys.modules, "open_clip", None)
        for name in ("RN50", openai_files["state dict"]):
            with pytest.raises(
                ImportError, match="OpenAI's CLIP models need open_clip: pip install open-clip"
            ):
                ClipReranker.from_pretrained(name)
        assert ClipReranker.from_pretrained(native).score(images, "a").shape == (5,)
