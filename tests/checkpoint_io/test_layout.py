"""Which files of a checkpoint hold what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_io import CheckpointError, CheckpointPart, find_parts

RQ = "arch: {type: rq-vae}\n"
RQ_MODEL = "arch: {type: rq-transformer}\n"
MINDALLE = "stage1: {hparams: {ch: 128}}\nstage2: {hparams: {}}\n"
TAMING = "model: {target: taming.models.vqgan.VQModel, params: {n_embed: 8}}\n"
NET2NET = "model: {params: {first_stage_config: {params: {n_embed: 8}}}}\n"
NATIVE = "format: mindalle-1\nimage_tokenizer: {type: vqgan}\nmodel: {type: gpt}\n"

LAYOUTS: dict[str, tuple[dict[str, str], str, dict[str, tuple[str, str]]]] = {
    # files with their texts; the layout; part -> its file and the prefix of its tensors
    "native": (
        {"config.yaml": NATIVE, "image_tokenizer.safetensors": "", "model.safetensors": "", "README.md": ""},
        "native",
        {"image_tokenizer": ("image_tokenizer.safetensors", ""), "model": ("model.safetensors", "")},
    ),
    "native tokenizer": (
        {"config.yaml": "image_tokenizer: {}\n", "image_tokenizer.safetensors": "", "clip.safetensors": ""},
        "native",
        {"image_tokenizer": ("image_tokenizer.safetensors", "")},
    ),
    "minDALL-E": (
        {"config.yaml": MINDALLE, "stage1_last.ckpt": "", "stage2_last.ckpt": "", "tokenizer/vocab.json": ""},
        "minDALL-E",
        {"image_tokenizer": ("stage1_last.ckpt", ""), "model": ("stage2_last.ckpt", "")},
    ),
    "minDALL-E fine-tuned": (
        {"config.yaml": MINDALLE, "last.ckpt": "", "imagenet-clscond-gen-03.ckpt": ""},
        "minDALL-E fine-tuned",
        {"image_tokenizer": ("last.ckpt", "stage1."), "model": ("last.ckpt", "stage2.")},
    ),
    "rq-vae": (
        {
            "stage1/config.yaml": RQ,
            "stage1/model.pt": "",
            "stage2/config.yaml": RQ_MODEL,
            "stage2/model.pt": "",
        },
        "rq-vae",
        {"image_tokenizer": ("stage1/model.pt", ""), "model": ("stage2/model.pt", "")},
    ),
    "rq-vae stage 1": (
        {"config.yaml": RQ, "model.pt": ""},
        "rq-vae",
        {"image_tokenizer": ("model.pt", "")},
    ),
    "rq-vae stage 2": (
        {"config.yaml": RQ_MODEL, "model.pt": ""},
        "rq-vae",
        {"model": ("model.pt", "")},
    ),
    "taming": (
        {"model.yaml": TAMING, "last.ckpt": ""},
        "taming",
        {"image_tokenizer": ("last.ckpt", "")},
    ),
    "taming release": (
        {"configs/model.yaml": TAMING, "ckpts/last.ckpt": ""},
        "taming",
        {"image_tokenizer": ("ckpts/last.ckpt", "")},
    ),
    "taming logs": (
        {
            "configs/2020-11-09T13-31-51-lightning.yaml": "lightning: {trainer: {gpus: 1}}\n",
            "configs/2020-11-09T13-31-51-project.yaml": NET2NET,
            "checkpoints/last.ckpt": "",
            "checkpoints/epoch=000003.ckpt": "",
        },
        "taming",
        {"image_tokenizer": ("checkpoints/last.ckpt", "first_stage_model.")},
    ),
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    files, layout, expected = LAYOUTS[name]
    write(tmp_path, files)
    for path in (tmp_path, str(tmp_path)):
        parts = find_parts(path)
        assert {key: (part.file, part.prefix) for key, part in parts.items()} == {
            key: (tmp_path / file, prefix) for key, (file, prefix) in expected.items()
        }
        assert {part.layout for part in parts.values()} == {layout}
    assert find_parts(tmp_path / next(iter(expected.values()))[0]).keys() >= {next(iter(expected))}


def test_the_config_comes_along(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["rq-vae"][0])
    parts = find_parts(tmp_path)
    assert parts["image_tokenizer"].config == {"arch": {"type": "rq-vae"}}
    assert parts["model"].config == {"arch": {"type": "rq-transformer"}}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.yaml": NATIVE},
        {"config.yaml": "{}", "image_tokenizer.safetensors": ""},
        {"config.yaml": MINDALLE},
        {"config.yaml": "arch: {type: other}", "model.pt": ""},
        {"config.yaml": "arch: rq-vae", "model.pt": ""},
        {"model.yaml": TAMING},
        {"last.ckpt": ""},
        {"last.ckpt": "", "model.yaml": "model: {target: taming}"},
    ],
)
def test_unknown_layouts(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    held = ", ".join(sorted(files)) or "nothing"
    with pytest.raises(CheckpointError, match=rf"known layout: it holds {held}\. Expected one of: native"):
        find_parts(tmp_path)


def part(tmp_path: Path, content: Any, prefix: str = "") -> CheckpointPart:
    torch.save(content, tmp_path / "last.ckpt")
    return CheckpointPart(layout="taming", config={}, file=tmp_path / "last.ckpt", prefix=prefix)


class TestRead:
    ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])

    @pytest.mark.parametrize(
        ("content", "prefix"),
        [
            ({"a.weight": ONE}, ""),
            ({"state_dict": {"a.weight": ONE}, "a.weight": TWO}, ""),
            ({"state_dict": {"a.weight": ONE, "epoch": 3, 0: TWO}, "state_dict_ema": {"a.weight": TWO}}, ""),
            ({"state_dict": {"stage1.a.weight": ONE, "stage2.a.weight": TWO, "a.weight": TWO}}, "stage1."),
            ({"state_dict": {"module.a.weight": ONE}}, ""),
            ({"state_dict": {"module.stage1.a.weight": ONE, "module.a.weight": TWO}}, "stage1."),
        ],
    )
    def test_names(self, tmp_path: Path, content: Any, prefix: str) -> None:
        assert part(tmp_path, content, prefix).read() == {"a.weight": self.ONE}

    def test_a_prefix_goes_once(self, tmp_path: Path) -> None:
        assert part(tmp_path, {"stage1.stage1.a": self.ONE}, "stage1.").read() == {"stage1.a": self.ONE}

    def test_averages(self, tmp_path: Path) -> None:
        content = {"state_dict": {"a": self.ONE}, "state_dict_ema": {"a": self.TWO}}
        assert part(tmp_path, content).read(use_ema=True) == {"a": self.TWO}
        with pytest.raises(
            CheckpointError, match=r"last\.ckpt has no EMA weights \(keys: state_dict, epoch\)"
        ):
            part(tmp_path, {"state_dict": {"a": self.ONE}, "epoch": 3}).read(use_ema=True)


@dataclass(frozen=True)
class Depth:
    depth: int


class TestTranslateConfig:
    @pytest.mark.parametrize(
        ("translate", "message"),
        [
            (
                lambda yaml: yaml["arch"]["hparams"],
                r"model\.pt lacks the setting 'hparams': is it .* a rq-vae release",
            ),
            (lambda yaml: yaml["arch"]["sizes"][3], r"model\.pt is not usable: list index out of range"),
            (
                lambda yaml: yaml["arch"]["type"].items(),
                "is not usable: 'str' object has no attribute 'items'",
            ),
            (lambda yaml: tuple(yaml["arch"]["depth"]), "is not usable: 'int' object is not iterable"),
            (lambda yaml: int(yaml["arch"]["type"]), "is not usable: invalid literal for int"),
            (lambda yaml: yaml["arch"]["depth"] // 0, "is not usable: .*by zero"),
            (lambda yaml: Depth(4.0), r"is not usable: Depth: depth: Value '4\.0' of type 'float'"),
        ],
    )
    def test_errors(self, translate: Any, message: str) -> None:
        config = {"arch": {"type": "rq-vae", "sizes": [1], "depth": 4}}
        part = CheckpointPart(layout="rq-vae", config=config, file=Path("stage1/model.pt"))
        with pytest.raises(CheckpointError, match=f"the config of stage1/.*{message}"):
            part.translate_config(translate)

    def test_result(self) -> None:
        part = CheckpointPart(layout="rq-vae", config={"arch": {"depth": 4}}, file=Path("stage1/model.pt"))
        assert part.translate_config(lambda yaml: Depth(**yaml["arch"])) == Depth(4)


class TestNamedFile:
    """`last.ckpt` or `model.pt` was read in the place of another file that was named beside it."""

    @pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors"])
    @pytest.mark.parametrize(
        ("config", "beside"), [(TAMING, "last.ckpt"), (RQ, "model.pt"), (MINDALLE, "last.ckpt")]
    )
    def test_is_the_one_that_is_read(self, tmp_path: Path, config: str, beside: str, suffix: str) -> None:
        write(tmp_path, {"config.yaml": config, beside: "", f"epoch12{suffix}": ""})
        named = tmp_path / f"epoch12{suffix}"
        assert {part.file for part in find_parts(named).values()} == {named}
        assert {part.file for part in find_parts(tmp_path).values()} == {tmp_path / beside}

    @pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "last", "last.ckpt.part"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_is_no_weights(self, tmp_path: Path, layout: str, name: str) -> None:
        files, _, parts = LAYOUTS[layout]
        folder = (tmp_path / next(iter(parts.values()))[0]).parent
        write(tmp_path, files)
        (folder / name).touch()
        with pytest.raises(CheckpointError, match=rf"{name} is no file of weights .*: name one, or the dir"):
            find_parts(folder / name)

    def test_of_a_native_directory(self, tmp_path: Path) -> None:
        write(tmp_path, LAYOUTS["native"][0] | {"other.safetensors": "", "last.ckpt": ""})
        assert list(find_parts(tmp_path / "model.safetensors")) == ["model"]
        with pytest.raises(CheckpointError, match=r"other\.safetensors is no part .* image_tokenizer\.safet"):
            find_parts(tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"last\.ckpt is no checkpoint of a known layout"):
            find_parts(tmp_path / "last.ckpt")

    def test_of_a_release(self, tmp_path: Path) -> None:
        write(tmp_path, LAYOUTS["minDALL-E"][0])
        assert list(find_parts(tmp_path / "stage2_last.ckpt")) == ["model"]


class TestConfigOfAFile:
    """`b.ckpt` beside `b.yaml` was read with a.yaml, the first in the alphabet."""

    def yaml(self, path: Path) -> str:
        (yaml,) = {part.yaml for part in find_parts(path).values()}
        assert yaml is not None
        return yaml.name

    @pytest.mark.parametrize("suffix", ["yaml", "yml"])
    def test_same_name_first(self, tmp_path: Path, suffix: str) -> None:
        write(tmp_path, {"a.yaml": TAMING, f"b.{suffix}": TAMING, "b.ckpt": "", "config.yaml": TAMING})
        assert self.yaml(tmp_path / "b.ckpt") == f"b.{suffix}"

    def test_newest_of_a_run(self, tmp_path: Path) -> None:
        names = [f"configs/2020-1{month}-09T13-31-51-project.yaml" for month in (0, 2, 1)]
        write(tmp_path, {"checkpoints/last.ckpt": "", **dict.fromkeys(names, TAMING)})
        assert self.yaml(tmp_path) == "2020-12-09T13-31-51-project.yaml"

    def test_not_clear(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.yaml": TAMING, "c.yaml": TAMING, "b.ckpt": ""})
        for path in (tmp_path, tmp_path / "b.ckpt"):
            with pytest.raises(CheckpointError, match=r"not clear: a\.yaml, c\.yaml .*its own b\.yaml"):
                find_parts(path)

    @pytest.mark.parametrize("place", ["", "ckpt/", "ckpts/", "checkpoints/"])
    @pytest.mark.parametrize("name", ["config.yaml", "finetuned.yml"])
    def test_below_the_config(self, tmp_path: Path, place: str, name: str) -> None:
        write(tmp_path, {name: MINDALLE, f"{place}last.ckpt": ""})
        for path in (tmp_path, tmp_path / place, tmp_path / place / "last.ckpt"):
            assert list(find_parts(path)) == ["image_tokenizer", "model"]
            assert self.yaml(path) == name

    def test_a_broken_one_beside_it(self, tmp_path: Path) -> None:
        write(tmp_path, {"model.yaml": TAMING, "broken.yaml": "a: [", "last.ckpt": ""})
        assert self.yaml(tmp_path) == "model.yaml"


def test_a_stray_file_above_the_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["taming logs"][0] | {"features.pt": ""})
    assert find_parts(tmp_path)["image_tokenizer"].file.name == "last.ckpt"


@pytest.mark.parametrize(("config", "suffix"), [(TAMING, "ckpt"), (MINDALLE, "ckpt"), (RQ, "pt")])
def test_several_checkpoints(tmp_path: Path, config: str, suffix: str) -> None:
    write(tmp_path, {"config.yaml": config, f"epoch1_model.{suffix}": ""})
    assert find_parts(tmp_path)["image_tokenizer"].file.name == f"epoch1_model.{suffix}"
    write(tmp_path, {f"epoch2_model.{suffix}": ""})
    with pytest.raises(CheckpointError, match=rf"name one of epoch1_model\.{suffix}, epoch2_model\.{suffix}"):
        find_parts(tmp_path)


class TestWaysToSave:
    ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])

    @pytest.mark.parametrize(
        "content",
        [
            {"model": {"a.weight": ONE}, "optimizer": {}},
            {"state_dict": {"_orig_mod.a.weight": ONE}},
            {"state_dict": {"module._orig_mod.a.weight": ONE}},
            {"state_dict": {"_orig_mod.module.a.weight": ONE}},
            {"state_dict": {"a.weight": ONE, "model_ema.aweight": TWO, "model_ema.decay": TWO}},
        ],
    )
    def test_names(self, tmp_path: Path, content: Any) -> None:
        assert part(tmp_path, content).read() == {"a.weight": self.ONE}

    def test_averages_of_latent_diffusion(self, tmp_path: Path) -> None:
        content = {"a.weight": self.ONE, "model_ema.aweight": self.TWO, "model_ema.num_updates": self.ONE}
        assert part(tmp_path, {"state_dict": content}).read(use_ema=True) == {"a.weight": self.TWO}
