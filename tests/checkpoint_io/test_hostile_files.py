"""Files made to hang a reader, to fill its memory, or to give what no parameter can be made of."""

from __future__ import annotations

import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_io import CheckpointError, read_tensors, write_safetensors
from checkpoint_io.pickles import MAX_CLASSES
from checkpoint_io.torchscript import read_torchscript


def write_legacy(path: Path, code: bytes) -> None:
    """A file of torch's older format around a pickle of the object."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    raw = b"".join(pickle.dumps(part, protocol=2) for part in parts) + code + pickle.dumps([], protocol=2)
    path.write_bytes(raw)


def repack(path: Path, compression: int, contents: dict[str, bytes]) -> None:
    """Write an archive's entries anew, some with other contents."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, contents.get(name.rpartition("/")[2], content))


@pytest.mark.parametrize("count", [MAX_CLASSES - 10, 20_000])
@pytest.mark.parametrize("is_zip", [True, False])
def test_many_classes_are_read_at_once_or_refused(tmp_path: Path, count: int, is_zip: bool) -> None:
    """The file was read anew for each class: 42 kB took an hour."""
    path = tmp_path / "last.ckpt"
    names = b"".join(b"cplanted%d\nThing\n)\x81" % number for number in range(count))  # NEWOBJ
    code = b"\x80\x02" + names + b"}."
    if is_zip:
        torch.save({}, path)
        repack(path, zipfile.ZIP_STORED, {"data.pkl": code})
    else:
        write_legacy(path, code)
    begin = time.perf_counter()
    if count < MAX_CLASSES:
        assert read_tensors(path) == {}
    else:
        with pytest.raises(CheckpointError, match=rf"names more than {MAX_CLASSES} classes"):
            read_tensors(path)
    assert time.perf_counter() - begin < 5


def test_many_classes_that_are_filled_are_refused(tmp_path: Path) -> None:
    things = b"".join(b"cplanted%d\nThing\n)\x81K\x01K\x02s" % number for number in range(100))  # SETITEM
    write_legacy(tmp_path / "last.ckpt", b"\x80\x02" + things + b"}.")
    with pytest.raises(CheckpointError, match="fills objects of more than 15 classes"):
        read_tensors(tmp_path / "last.ckpt")


def test_an_archive_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    """An archive of kilobytes could hold a pickle or weights of gigabytes."""
    path = tmp_path / "last.ckpt"
    torch.save({"zeros": torch.zeros(1 << 20)}, path)
    repack(path, zipfile.ZIP_DEFLATED, {})
    with pytest.raises(CheckpointError, match=r"is refused: its \S+ is compressed, to \d+ of \d+ bytes"):
        read_tensors(path)


class Shared(torch.nn.Module):
    """What a TorchScript archive is written of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(8.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Anything."""
        return x * self.weight


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "clip.pt"
    torch.jit.save(torch.jit.script(Shared()), str(path))  # type: ignore[no-untyped-call]
    return path


def test_a_torchscript_archive_larger_than_its_file_is_refused(script: Path) -> None:
    assert read_torchscript(script)["weight"].tolist() == list(range(8))  # its code is compressed
    repack(script, zipfile.ZIP_DEFLATED, {})
    with pytest.raises(CheckpointError, match="is compressed"):
        read_torchscript(script)


@pytest.mark.parametrize("is_deep", [True, False])
def test_modules_of_a_torchscript_archive_are_visited_once(script: Path, is_deep: bool) -> None:
    """A tree whose every module holds the next one twice took for ever, a deep one all of the stack."""
    code = b"\x80\x02c__torch__\nM\n)\x81q\x00"
    for number in range(3000 if is_deep else 60):
        inner = b"j" + number.to_bytes(4, "little")
        outer = b"r" + (number + 1).to_bytes(4, "little")
        pair = b"}(X\x01\x00\x00\x00a" + inner + b"X\x01\x00\x00\x00b" + (b"N" if is_deep else inner) + b"ub"
        code += b"c__torch__\nM\n)\x81" + pair + outer
    repack(script, zipfile.ZIP_STORED, {"data.pkl": code + b"."})
    assert read_torchscript(script) == {}


UNUSUAL: dict[str, Any] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.empty(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "repeated": lambda: torch.ones(1).expand(1 << 40),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore")
def test_unusual_tensors_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    """They were "unexpected" errors; complex ones lost their imaginary part without a word."""
    torch.save({"state_dict": {"fine": torch.ones(2), "odd": UNUSUAL[kind]()}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt.*(odd is a .*tensor|torch\.nested)"):
        read_tensors(tmp_path / "last.ckpt")


def test_unusual_tensors_of_safetensors_are_refused_by_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"odd": torch.ones(3, dtype=torch.complex64)})
    with pytest.raises(CheckpointError, match="odd is a tensor of complex numbers"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_mapping_that_holds_itself_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.ones(2)}
    content["self"] = content
    torch.save(content, tmp_path / "last.ckpt")
    assert read_tensors(tmp_path / "last.ckpt")["a"].tolist() == [1, 1]
