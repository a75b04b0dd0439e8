"""Files of tensors: read without running anything, written whole or not at all."""

from __future__ import annotations

import collections
import enum
import os
import pickle
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from checkpoint_io import CheckpointError, atomic_path, read_tensors, write_safetensors
from checkpoint_io.tensors import release_pages

TENSORS = {
    "float32": torch.tensor([[1.0, -2.5], [0.0, 3.0]]),
    "float16": torch.tensor([0.5, 2.0]).half(),
    "bfloat16": torch.tensor([0.5, 2.0]).bfloat16(),
    "int64": torch.tensor([1, -(2**40)]),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "none": torch.zeros(0, 3),
}


def assert_same(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


class TestRead:
    @pytest.mark.parametrize("is_zip", [True, False])
    def test_torch(self, tmp_path: Path, is_zip: bool) -> None:
        path = tmp_path / "model.pt"
        torch.save(TENSORS, path, _use_new_zipfile_serialization=is_zip)
        assert_same(read_tensors(path), TENSORS)
        assert_same(read_tensors(str(path)), TENSORS)

    def test_a_training_checkpoint(self, tmp_path: Path) -> None:
        state = collections.OrderedDict(TENSORS)
        torch.save({"epoch": 3, "state_dict": state, "lr": [1e-3], "optimizer": None}, tmp_path / "last.ckpt")
        content = read_tensors(tmp_path / "last.ckpt")
        assert content["epoch"] == 3
        assert_same(content["state_dict"], TENSORS)

    def test_tied_tensors_stay_tied(self, tmp_path: Path) -> None:
        tensor = torch.arange(6.0)
        torch.save({"a": tensor, "b": tensor, "tail": tensor[3:]}, tmp_path / "model.pt")
        content = read_tensors(tmp_path / "model.pt")
        assert content["a"].data_ptr() == content["b"].data_ptr()
        assert content["tail"].tolist() == [3, 4, 5]

    def test_nothing_there(self, tmp_path: Path) -> None:
        for path in (tmp_path / "model.pt", tmp_path):
            with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
                read_tensors(path)

    @pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
    @pytest.mark.parametrize(
        "content", [b"", b"\x80", b"not a checkpoint", bytes(range(256)) * 20, b"PK\x03\x04"]
    )
    def test_garbage(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        message = rf"{name} \({len(content)} bytes\) is not a readable .*cut short\?"
        with pytest.raises(CheckpointError, match=message):
            read_tensors(tmp_path / name)


class Colour(enum.Enum):
    RED = 1


class Words(list[str]):
    """A list with attributes."""


class Settings(dict[str, Any]):
    """A dict with attributes, such as Lightning's AttributeDict."""


class Callback:
    def __init__(self) -> None:
        self.best = torch.tensor(0.5)
        self.history = {1: [0.25]}


def settings_with_attributes() -> Settings:
    settings = Settings(rate=0.1)
    settings.frozen = True  # type: ignore[attr-defined]
    return settings


class TestPickledObjects:
    """What a trainer leaves beside the tensors is of classes that may not even exist any more."""

    @pytest.mark.parametrize(
        "extra",
        [
            Callback(),
            Callback,
            {Callback: {"best": torch.tensor(1.0)}},
            {Callback(): 1},
            Settings(rate=0.1, nested=Settings(callback=Callback())),
            settings_with_attributes(),
            Words(["a", "b"]),
            Words(),
            Colour.RED,
            Path("somewhere/else.ckpt"),
            np.float64(0.5),
            np.arange(3),
            collections.defaultdict(list, a=[1, 2]),
            collections.defaultdict(dict),
            collections.deque([1, 2]),
            OmegaConf.create({"model": {"widths": [1, 2], "name": None}}),
            OmegaConf.create([1, {"a": 2}]),
            slice(1, 2),
            range(3),
            frozenset([1]),
            1 + 2j,
        ],
        ids=lambda extra: extra.__name__ if isinstance(extra, type) else type(extra).__name__,
    )
    @pytest.mark.parametrize("is_zip", [True, False])
    def test_become_stand_ins(self, tmp_path: Path, extra: Any, is_zip: bool) -> None:
        """Dicts, lists and builtin classes among them got the whole file refused: "it may run code"."""
        content = {"extra": extra, "state_dict": TENSORS, "more": [extra, extra]}
        torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=is_zip)
        assert_same(read_tensors(tmp_path / "last.ckpt")["state_dict"], TENSORS)

    def test_are_never_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "noisy_module.py").write_text("import pathlib\npathlib.Path(__file__ + '.ran').touch()\n")
        module = ModuleType("noisy_module")
        module.Thing = type("Thing", (), {"__module__": "noisy_module"})  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "noisy_module", module)
            torch.save({"thing": module.Thing(), **TENSORS}, tmp_path / "last.ckpt")
        monkeypatch.syspath_prepend(tmp_path)
        content = read_tensors(tmp_path / "last.ckpt")
        assert "noisy_module" not in sys.modules
        assert not list(tmp_path.glob("*.ran"))
        thing = content.pop("thing")
        assert (type(thing).__module__, type(thing).__name__) == ("noisy_module", "Thing")
        assert not isinstance(thing, module.Thing)
        assert_same(content, TENSORS)

    def test_do_nothing_when_they_are_filled(self, tmp_path: Path) -> None:
        torch.save({"callback": Callback(), **TENSORS}, tmp_path / "last.ckpt")
        callback = read_tensors(tmp_path / "last.ckpt")["callback"]
        assert vars(callback) == {}

    def test_leave_torch_s_list_of_safe_classes_as_it_was(self, tmp_path: Path) -> None:
        before = set(torch.serialization.get_safe_globals())
        torch.save({"callback": Callback(), **TENSORS}, tmp_path / "last.ckpt")
        read_tensors(tmp_path / "last.ckpt")
        assert set(torch.serialization.get_safe_globals()) == before

    def test_a_class_filled_both_ways_ends(self, tmp_path: Path) -> None:
        """A stand-in that is first a dict and then a list could be swapped for ever."""
        code = b"\x80\x02cplanted\nThing\n)\x81q\x00K\x01K\x02sK\x03a."  # NEWOBJ, SETITEM, APPEND
        # the frame of torch's older format: magic number, protocol, machine, object, storages
        parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        raw = b"".join(pickle.dumps(part, protocol=2) for part in parts) + code + pickle.dumps([], protocol=2)
        (tmp_path / "last.ckpt").write_bytes(raw)
        with pytest.raises(
            CheckpointError, match="not a readable torch checkpoint: Can only append to lists"
        ):
            read_tensors(tmp_path / "last.ckpt")


class TestWriteSafetensors:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "model.safetensors"
        write_safetensors(path, TENSORS)
        assert_same(read_tensors(path), TENSORS)
        assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]

    def test_who_may_read_it(self, tmp_path: Path) -> None:
        """Whoever may read any other new file: safetensors alone writes for the owner only."""
        path, other = tmp_path / "model.safetensors", tmp_path / "other"
        write_safetensors(path, TENSORS)
        other.touch()
        assert path.stat().st_mode == other.stat().st_mode

    def test_dtype_is_for_floating_point(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        write_safetensors(path, TENSORS, dtype=torch.float16)
        expected = {
            key: value.half() if value.is_floating_point() else value for key, value in TENSORS.items()
        }
        assert_same(read_tensors(path), expected)

    def test_views_and_parameters(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).view(3, 4)
        tensors = {"columns": base.T, "rows": base[:-1].clone(), "head": torch.nn.Parameter(base[:1] * 2)}
        write_safetensors(tmp_path / "model.safetensors", tensors)
        assert_same(read_tensors(tmp_path / "model.safetensors"), {k: v.detach() for k, v in tensors.items()})

    def test_a_part_of_a_mapped_file(self, tmp_path: Path) -> None:
        """The codebook of an RQ-VAE is all rows but the last of a tensor that is mapped from the release."""
        torch.save({"table": torch.arange(12.0).view(4, 3), "other": torch.ones(5)}, tmp_path / "model.pt")
        content = read_tensors(tmp_path / "model.pt")
        write_safetensors(tmp_path / "model.safetensors", {**content, "table": content["table"][:-1]})
        expected = {"table": torch.arange(9.0).view(3, 3), "other": torch.ones(5)}
        assert_same(read_tensors(tmp_path / "model.safetensors"), expected)

    def test_a_failure_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "model.safetensors"
        write_safetensors(path, TENSORS)

        def fail(*args: Any, **kwargs: Any) -> None:
            Path(args[1]).write_bytes(b"half of i")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            write_safetensors(path, {"other": torch.ones(3)})
        assert_same(read_tensors(path), TENSORS)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


class TestAtomicPath:
    def test_appears_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "file.txt"
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".txt"
            assert temporary.parent == path.parent  # another disk could not be renamed from
            temporary.write_text("new")
            assert not path.exists()
        assert path.read_text() == "new"
        assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("old", ["old", None])
    def test_a_crash_leaves_nothing(
        self, tmp_path: Path, error: type[BaseException], old: str | None
    ) -> None:
        path = tmp_path / "file.txt"
        if old:
            path.write_text(old)

        def crash() -> None:
            with atomic_path(path) as temporary:
                temporary.write_text("half of the n")
                raise error("stop")

        with pytest.raises(error, match="stop"):
            crash()
        assert (path.read_text() if path.exists() else None) == old
        assert [entry.name for entry in tmp_path.iterdir()] == (["file.txt"] if old else [])

    @pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_permissions_are_those_of_any_new_file(self, tmp_path: Path, mask: int, mode: int) -> None:
        before = os.umask(mask)
        try:
            with atomic_path(tmp_path / "file.txt") as temporary:
                temporary.write_text("new")
            assert os.umask(mask) == mask  # asking for it must not change it
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == mode

    def test_replaces_whole(self, tmp_path: Path) -> None:
        """Whoever reads the old file, or has it mapped, goes on reading the old one."""
        path = tmp_path / "file.txt"
        path.write_text("old")
        with path.open() as reader:
            with atomic_path(path) as temporary:
                temporary.write_text("new")
            assert reader.read() == "old"
        assert path.read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux only")
class TestReleasePages:
    @pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
    def test_memory_shrinks_and_values_stay(self, tmp_path: Path, suffix: str) -> None:
        file, written = tmp_path / f"x.{suffix}", {"a": torch.randn(4, 1 << 20), "b": torch.randn(1 << 20)}
        if suffix == "safetensors":
            write_safetensors(file, written)
        else:
            torch.save(written, file)
        tensors = read_tensors(file)
        assert torch.equal(tensors["a"], written["a"])  # reads it: now it is in memory
        before = mapped_bytes(file)
        assert before > written["a"].nbytes * 0.9
        release_pages(tensors["a"])
        assert mapped_bytes(file) < before - written["a"].nbytes * 0.9
        assert_same(tensors, written)

    def test_memory_without_a_file_is_left_alone(self) -> None:
        tensor = torch.ones(1 << 20)
        release_pages(tensor)
        release_pages(tensor.view(1024, 1024).T)
        release_pages(torch.empty(1 << 20, device="meta"))
        assert bool((tensor == 1).all())


def mapped_bytes(file: Path) -> int:
    """How much of a mapped file is in this process's memory."""
    total, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            is_file = fields[-1] == str(file)
        elif is_file and fields[0] == "Rss:":
            total += 1024 * int(fields[1])
    return total
