"""What is wrong with a checkpoint is said in words that help, and nothing in it is ever run."""

from __future__ import annotations

import builtins
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from oracle.make import make_mindalle, make_mindalle_finetuned, make_rq, make_taming, read_config

from checkpoint_io import CheckpointError, config_to_mapping, write_safetensors
from stage1_vqgan import load_tokenizer

# kind -> the file of the tokenizer's tensors and that of its config
FILES = {
    "mindalle": ("stage1_last.ckpt", "config.yaml"),
    "finetuned": ("last.ckpt", "config.yaml"),
    "rq": ("stage1/model.pt", "stage1/config.yaml"),
    "taming": ("last.ckpt", "model.yaml"),
    "native": ("image_tokenizer.safetensors", "config.yaml"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in FILES}
    make_mindalle(folders["mindalle"])
    make_mindalle_finetuned(folders["finetuned"])
    make_rq(folders["rq"], ema=False)
    make_taming(folders["taming"], pickled=False)
    tokenizer = load_tokenizer(folders["taming"])
    config = {"image_tokenizer": {"type": "vqgan", **config_to_mapping(tokenizer.config)}}
    OmegaConf.save(OmegaConf.create(config), folders["native"] / "config.yaml")
    write_safetensors(folders["native"] / "image_tokenizer.safetensors", tokenizer.state_dict())
    return folders


@pytest.fixture
def make(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Put a checkpoint of some kind into `tmp_path`; gives its tensors' file and its config."""

    def make(kind: str) -> tuple[Path, Path]:
        shutil.copytree(originals[kind], tmp_path, dirs_exist_ok=True)
        weights, config = FILES[kind]
        return tmp_path / weights, tmp_path / config

    return make


def edit_state(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
        edit(state)
        write_safetensors(path, state)
        return
    content = torch.load(path, weights_only=True)
    edit(content["state_dict"])
    torch.save(content, path)


def edit_config(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = read_config(path)
    edit(config)
    OmegaConf.save(OmegaConf.create(config), path)


# kind -> prefix of the tokenizer's keys in the file, a key of theirs without it, and its shape
KINDS = {
    "mindalle": ("", "encoder.mid.attn_1.k.weight", "64, 64, 1, 1"),
    "finetuned": ("stage1.", "encoder.mid.attn_1.k.weight", "64, 64, 1, 1"),
    "rq": ("", "encoder.mid.attn_1.k.weight", "64, 64, 1, 1"),
    "taming": ("", "encoder.mid.attn_1.k.weight", "64, 64, 1, 1"),
    "native": ("", "encoder.middle.attention.proj.weight", "64, 64, 1, 1"),
}


@pytest.mark.parametrize("kind", KINDS)
class TestKeys:
    def test_missing(self, make: Any, tmp_path: Path, kind: str) -> None:
        weights, _ = make(kind)
        prefix, name, _ = KINDS[kind]
        edit_state(weights, lambda state: state.pop(prefix + name))
        edit_state(weights, lambda state: state.pop(prefix + "encoder.conv_in.bias"))
        ours = "proj" if kind == "native" else "qkv"  # their q, k and v are one tensor of ours
        with pytest.raises(CheckpointError, match=r"does not fit its config, 2 keys: ") as error:
            load_tokenizer(tmp_path)
        assert str(weights) in str(error.value)
        assert "missing encoder.conv_in.bias (32,)" in str(error.value)
        assert f"missing encoder.middle.attention.{ours}.weight (" in str(error.value)
        assert "Is this config.yaml the one of these weights?" in str(error.value)

    def test_unexpected(self, make: Any, tmp_path: Path, kind: str) -> None:
        weights, _ = make(kind)
        prefix, _, _ = KINDS[kind]
        edit_state(weights, lambda state: state.update({f"{prefix}encoder.gate.weight": torch.ones(2, 3)}))
        with pytest.raises(CheckpointError, match=r"1 keys: unexpected encoder\.gate\.weight \(2, 3\)"):
            load_tokenizer(tmp_path)

    def test_wrong_shape(self, make: Any, tmp_path: Path, kind: str) -> None:
        weights, _ = make(kind)
        prefix, name, shape = KINDS[kind]
        edit_state(weights, lambda state: state.update({prefix + name: torch.ones(64, 32, 1, 1)}))
        message = rf"1 keys: {name} has shape \(64, 32, 1, 1\), expected \({shape}\)"
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)

    def test_of_another_config(self, make: Any, tmp_path: Path, kind: str) -> None:
        _, config = make(kind)
        text = config.read_text()
        changed = text.replace("num_res_blocks: 1", "num_res_blocks: 3")
        assert changed != text
        config.write_text(changed)
        with pytest.raises(
            CheckpointError, match=r"does not fit its config, \d+ keys: missing .* \.\.\.\. Is this"
        ):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        *(("taming", kept) for kept in (0, 1, 3, 4, 9, 200, 0.3, 0.9, -1)),
        *(("native", kept) for kept in (0, 1, 7, 8, 9, 200, 0.3, 0.9, -1)),
        *((kind, kept) for kind in ("mindalle", "finetuned", "rq") for kept in (0.5, -1)),
    ],
)
def test_truncated(make: Any, tmp_path: Path, kind: str, kept: float) -> None:
    weights, _ = make(kind)
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    message = (
        rf"{weights.name} \(\d+ bytes\) is not a readable (torch checkpoint|safetensors file): .*cut short\?"
    )
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 0.3, 0.9, -1])
def test_truncated_in_the_format_before_torch_1_6(make: Any, tmp_path: Path, kept: float) -> None:
    weights, _ = make("taming")
    content = torch.load(weights, weights_only=True)
    torch.save(content, weights, _use_new_zipfile_serialization=False)
    load_tokenizer(tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"last\.ckpt \(\d+ bytes\) is not a readable .*cut short\?"):
        load_tokenizer(tmp_path)


class TestNoTensors:
    def test_an_error_page_instead_of_the_file(self, make: Any, tmp_path: Path) -> None:
        """It was called dangerous code: "is refused, it may run code"."""
        weights, _ = make("taming")
        weights.write_text("<!DOCTYPE html><html>404 Not Found</html>")
        with pytest.raises(
            CheckpointError, match=r"is not a readable torch checkpoint: Unsupported operand 60"
        ):
            load_tokenizer(tmp_path)

    def test_a_whole_pickled_model(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("taming")
        torch.save([torch.ones(3)], weights)
        with pytest.raises(CheckpointError, match=r"holds a list, expected a mapping .* Save its state_dict"):
            load_tokenizer(tmp_path)
        torch.save(torch.nn.Linear(2, 2), weights)
        with pytest.raises(CheckpointError, match="holds a Linear, expected a mapping"):
            load_tokenizer(tmp_path)

    def test_a_state_dict_that_is_none(self, make: Any, tmp_path: Path) -> None:
        """It raised an AttributeError: 'list' object has no attribute 'items'."""
        weights, _ = make("taming")
        torch.save({"state_dict": [torch.ones(3)]}, weights)
        with pytest.raises(
            CheckpointError, match=r"state_dict of .*last\.ckpt is a list, expected a mapping"
        ):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        "content", [{}, {"state_dict": {}}, {"state_dict": {"epoch": 3}}, {0: torch.ones(1)}]
    )
    def test_a_mapping_without_tensors(self, make: Any, tmp_path: Path, content: Any) -> None:
        weights, _ = make("taming")
        torch.save(content, weights)
        with pytest.raises(CheckpointError, match=r"last\.ckpt holds no tensors \(keys: (none|epoch|0)\)"):
            load_tokenizer(tmp_path)

    def test_another_part_s_tensors(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("finetuned")
        torch.save({"state_dict": {"stage2.sos": torch.ones(1)}}, weights)
        with pytest.raises(CheckpointError, match=r"holds no tensors named stage1\.\* \(keys: stage2\.sos\)"):
            load_tokenizer(tmp_path)


class TestCodebooks:
    def test_shared_ones_that_differ(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("rq")

        def change(state: dict[str, Any]) -> None:
            state["quantizer.codebooks.2.weight"] = state["quantizer.codebooks.2.weight"] + 1e-3

        edit_state(weights, change)
        message = (
            r"model\.pt: quantizer\.codebooks\.2\.weight differs from depth 0 but the config shares them"
        )
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)

    def test_one_that_is_missing(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("rq")
        edit_state(weights, lambda state: state.pop("quantizer.codebooks.1.weight"))
        message = r"codebooks\.1\.weight should have 24 rows and one of padding, got no such tensor"
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)

    def test_of_another_size(self, make: Any, tmp_path: Path) -> None:
        _, config = make("rq")
        edit_config(config, lambda yaml: yaml["arch"]["hparams"].update(n_embed=25))
        with pytest.raises(
            CheckpointError, match=r"should have 25 rows and one of padding, got shape \(25, 16\)"
        ):
            load_tokenizer(tmp_path)

    def test_without_rows(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("rq")
        edit_state(weights, lambda state: state.update({"quantizer.codebooks.0.weight": torch.ones(())}))
        with pytest.raises(CheckpointError, match=r"should have 24 rows and one of padding, got shape \(\)"):
            load_tokenizer(tmp_path)

    def test_of_fewer_depths(self, make: Any, tmp_path: Path) -> None:
        _, config = make("rq")
        edit_config(config, lambda yaml: yaml["arch"]["hparams"].update(code_shape=[4, 4, 2]))
        with pytest.raises(CheckpointError, match=r"unexpected quantizer\.codebooks\.2\.weight \(25, 16\)"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("kind", ["mindalle", "finetuned", "taming", "native"])
    def test_averages_that_are_not_there(self, make: Any, tmp_path: Path, kind: str) -> None:
        weights, _ = make(kind)
        with pytest.raises(CheckpointError, match=rf"{weights.name} has no EMA weights \(keys: "):
            load_tokenizer(tmp_path, use_ema=True)


def write_mark(path: str) -> None:
    Path(path).write_text("this ran")


class TestHostilePickles:
    """A pickle may name any function and its arguments; none of them is called."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda mark: (os.system, (f"touch {mark}",)),
            lambda mark: (os.mkdir, (str(mark),)),
            lambda mark: (builtins.eval, (f"open({str(mark)!r}, 'w')",)),
            lambda mark: (builtins.exec, (f"open({str(mark)!r}, 'w')",)),
            lambda mark: (getattr, (pathlib.Path(mark), "touch")),
        ],
        ids=["os.system", "os.mkdir", "eval", "exec", "getattr"],
    )
    def test_refused(self, make: Any, tmp_path: Path, call: Any) -> None:
        weights, _ = make("taming")
        self.plant(weights, call(tmp_path / "mark"))
        with pytest.raises(CheckpointError, match=r"is refused, it asks to run (posix\.|nt\.)?\w+$"):
            load_tokenizer(tmp_path)
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize(
        "call",
        [
            lambda mark: (subprocess.Popen, (["touch", str(mark)],)),
            lambda mark: (open, (str(mark), "w")),
            lambda mark: (shutil.copy, (__file__, str(mark))),
            lambda mark: (write_mark, (str(mark),)),
        ],
        ids=["Popen", "open", "copy", "write_mark"],
    )
    def test_inert(self, make: Any, tmp_path: Path, call: Any) -> None:
        """What torch does not block by name becomes a stand-in: beside the tensors, it harms nobody."""
        weights, _ = make("taming")
        expected = load_tokenizer(tmp_path).state_dict()
        self.plant(weights, call(tmp_path / "mark"))
        loaded = load_tokenizer(tmp_path).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        assert not (tmp_path / "mark").exists()

    def test_in_the_format_before_torch_1_6(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("taming")
        self.plant(weights, (os.mkdir, (str(tmp_path / "mark"),)), legacy=True)
        with pytest.raises(CheckpointError, match=r"is refused, it asks to run (posix|nt)\.mkdir"):
            load_tokenizer(tmp_path)
        self.plant(weights, (write_mark, (str(tmp_path / "mark"),)), legacy=True)
        load_tokenizer(tmp_path)
        assert not (tmp_path / "mark").exists()

    def test_among_the_tensors(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("taming")
        content = torch.load(weights, weights_only=True)
        content["state_dict"]["quantize.embedding.weight"] = Planted((write_mark, (str(tmp_path / "mark"),)))
        torch.save(content, weights)
        with pytest.raises(CheckpointError, match=r"1 keys: missing quantizer\.codebook \(24, 12\)"):
            load_tokenizer(tmp_path)
        assert not (tmp_path / "mark").exists()

    def plant(self, weights: Path, call: tuple[Any, ...], legacy: bool = False) -> None:
        plain = weights.with_name("plain.pt")
        if not plain.exists():
            weights.rename(plain)
        weights.unlink(missing_ok=True)  # not written over: what was loaded is mapped from it
        content = {"hyper_parameters": Planted(call), **torch.load(plain, weights_only=True)}
        torch.save(content, weights, _use_new_zipfile_serialization=not legacy)


class Planted:
    """Pickled as a call of a function."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def ddconfig(kind: str, yaml: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = {
        "mindalle": lambda: yaml["stage1"]["hparams"],
        "finetuned": lambda: yaml["stage1"]["hparams"],
        "rq": lambda: yaml["arch"]["ddconfig"],
        "taming": lambda: yaml["model"]["params"]["ddconfig"],
    }[kind]()
    return section


class TestConfigs:
    @pytest.mark.parametrize("kind", ["mindalle", "finetuned", "rq", "taming"])
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"double_z": True}, "only RGB tokenizers without double_z are supported, got .* double_z True"),
            ({"in_channels": 1}, "only RGB tokenizers .* got in_channels 1, out_ch 3"),
            ({"out_ch": 4}, "only RGB tokenizers .* out_ch 4"),
            ({"ch": 48}, "not usable: channels must be a multiple of 32"),
            ({"resolution": 3}, "not usable: image_size must be a multiple of 4, got 0"),
            ({"ch_mult": 4}, "not usable: ch_mult of the ddconfig must be a list of whole numbers, got 4"),
            ({"ch": "many"}, "not usable: "),
        ],
    )
    def test_settings(self, make: Any, tmp_path: Path, kind: str, settings: Any, message: str) -> None:
        weights, config = make(kind)
        edit_config(config, lambda yaml: ddconfig(kind, yaml).update(settings))
        with pytest.raises(CheckpointError, match=message) as error:
            load_tokenizer(tmp_path)
        assert f"the config of {weights}" in str(error.value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"code_shape": [0, 4, 3]}, "not usable: .*zero"),
            (
                {"n_embed": 24.0},
                "not usable: codebook_sizes must be of whole numbers, got",
            ),
            (
                {"shared_codebook": None},
                r"not usable: RQVAEConfig: quantizer\.is_shared: .*'None' for field of type 'bool'",
            ),
        ],
    )
    def test_codes(self, make: Any, tmp_path: Path, settings: Any, message: str) -> None:
        """YAML reads 1.6384e4 as a float, of which torch knows no tensor's size."""
        weights, config = make("rq")
        edit_config(config, lambda yaml: yaml["arch"]["hparams"].update(settings))
        with pytest.raises(CheckpointError, match=message) as error:
            load_tokenizer(tmp_path)
        assert f"the config of {weights}" in str(error.value)

    @pytest.mark.parametrize(
        ("kind", "path"),
        [
            ("rq", "arch hparams latent_shape"),
            ("rq", "arch hparams shared_codebook"),
            ("rq", "arch ddconfig resolution"),
            ("taming", "model params embed_dim"),
            ("taming", "model params n_embed"),
            ("taming", "model params ddconfig ch"),
            ("taming", "model params ddconfig attn_resolutions"),
        ],
    )
    def test_a_setting_that_is_missing(self, make: Any, tmp_path: Path, kind: str, path: str) -> None:
        weights, config = make(kind)
        *parents, name = path.split()

        def remove(yaml: dict[str, Any]) -> None:
            for parent in parents:
                yaml = yaml[parent]
            del yaml[name]

        edit_config(config, remove)
        message = rf"the config of {weights} lacks the setting '{name}': is it the config\.yaml of a"
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("kind", "path", "message"),
        [
            ("rq", "arch hparams", "rq-vae arch has no section 'hparams'"),
            ("rq", "arch ddconfig", "rq-vae arch has no section 'ddconfig'"),
            ("taming", "model params ddconfig", "taming VQModel has no section 'ddconfig'"),
        ],
    )
    def test_a_section_that_is_missing(
        self, make: Any, tmp_path: Path, kind: str, path: str, message: str
    ) -> None:
        _, config = make(kind)
        *parents, name = path.split()

        def remove(yaml: dict[str, Any]) -> None:
            for parent in parents:
                yaml = yaml[parent]
            del yaml[name]

        edit_config(config, remove)
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [1, 2", "is not valid YAML"),
            ("a: 1\n b: 2: 3", "is not valid YAML"),
            ("- 1\n- 2\n", "must hold a mapping of keys to values, got list"),
        ],
    )
    def test_no_yaml_mapping(self, make: Any, tmp_path: Path, kind: str, text: str, message: str) -> None:
        _, config = make(kind)
        if kind == "rq":
            shutil.rmtree(tmp_path / "stage2")
        config.write_text(text)
        with pytest.raises(ValueError, match=rf"{config.name} {message}"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            (None, r"image_tokenizer of .* must be a mapping with a type, got None"),
            ([1], r"image_tokenizer of .* must be a mapping with a type, got \[1\]"),
            ({}, r"unknown type None in image_tokenizer of .*: known are vqgan, rqvae"),
            ({"type": "vae"}, r"unknown type 'vae' in image_tokenizer of .*: known are vqgan, rqvae"),
            (
                {"type": "vqgan", "convnets": 1},
                "unknown keys in image_tokenizer of .*: convnets; known are convnet,",
            ),
            ({"type": "vqgan", "convnet": {"chanels": 1}}, r"convnet\.chanels: .*Did you mean .*'channels'"),
            (
                {"type": "vqgan", "convnet": {"channels": "many"}},
                r"convnet\.channels: Value 'many' .* Integer",
            ),
            (
                {"type": "vqgan", "convnet": {"channels": 48}},
                "image_tokenizer of .*: channels must be a multiple",
            ),
            ({"type": "rqvae", "patch": [1, 2, 3]}, "image_tokenizer of .*: TupleConfig length 3"),
        ],
    )
    def test_native(self, make: Any, tmp_path: Path, section: Any, message: str) -> None:
        _, config = make("native")
        OmegaConf.save(OmegaConf.create({"image_tokenizer": section}), config)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


class TestLayouts:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
            load_tokenizer(tmp_path / "nowhere")

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"no checkpoint of a known layout: it holds nothing\. Expected"
        ):
            load_tokenizer(tmp_path)

    def test_an_unknown_layout(self, tmp_path: Path) -> None:
        (tmp_path / "weights.bin").touch()
        (tmp_path / "config.yaml").write_text("model_type: clip\n")
        message = r"holds config\.yaml, weights\.bin\. Expected one of: native .*minDALL-E .*rq-vae .*taming"
        for path in (tmp_path, tmp_path / "weights.bin"):
            with pytest.raises(CheckpointError, match=message):
                load_tokenizer(path)

    def test_weights_without_their_config(self, make: Any, tmp_path: Path) -> None:
        _, config = make("taming")
        config.unlink()
        with pytest.raises(
            CheckpointError, match=r"it holds last\.ckpt\. Expected .* taming \(a \.ckpt and a \.yaml\)"
        ):
            load_tokenizer(tmp_path)

    def test_several_files_to_choose_from(self, make: Any, tmp_path: Path) -> None:
        weights, _ = make("taming")
        shutil.copy(weights, tmp_path / "epoch=1.ckpt")
        shutil.move(weights, tmp_path / "epoch=2.ckpt")
        with pytest.raises(
            CheckpointError, match=r"several checkpoints .*: name one of epoch=1\.ckpt, epoch=2\.ckpt"
        ):
            load_tokenizer(tmp_path)
        load_tokenizer(tmp_path / "epoch=2.ckpt")

    def test_a_sequence_model_alone(self, make: Any, tmp_path: Path) -> None:
        make("rq")
        with pytest.raises(
            CheckpointError, match="holds no image tokenizer, only a sequence model: pass the other"
        ):
            load_tokenizer(tmp_path / "stage2")

    @pytest.mark.parametrize("kind", ["native", "mindalle"])
    def test_a_file_that_is_missing(self, make: Any, tmp_path: Path, kind: str) -> None:
        weights, _ = make(kind)
        (tmp_path / "model.safetensors").touch()
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=rf"no checkpoint file at .*{weights.name}"):
            load_tokenizer(tmp_path)
