"""ImageData: the batches a model is trained on, and that a killed run sees the very same ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from shard_files import draw_picture, write_pictures, write_shard, write_tar

from mindalle.data import ImageData, TransformConfig
from mindalle.image import to_tensor

TINY = TransformConfig(image_size=16, crop="random_resized", min_scale=0.3, flip_probability=0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures, of which picture i has i captions."""
    names = [f"{i}.png" for i in range(8)]
    write_pictures(tmp_path / "train", names, size=20)
    for i, name in enumerate(names):
        if i:
            (tmp_path / "train" / name).with_suffix(".txt").write_text(
                "\n".join(f"{i}{c}" for c in "abcdefgh"[:i])
            )
    return tmp_path / "train"


def image_data(train: Any, **settings: Any) -> ImageData:
    data = ImageData(
        **{
            "train": str(train) if isinstance(train, Path) else train,
            "transform": TINY,
            "batch_size": 4,
            "num_workers": 0,
            **settings,
        }
    )
    data.setup("fit")
    return data


def by_key(batches: Any) -> dict[str, tuple[torch.Tensor, str]]:
    found = {}
    for batch in batches:
        found |= {key: (batch["images"][i], batch["captions"][i]) for i, key in enumerate(batch["keys"])}
    return found


def is_same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key][0], second[key][0]) and first[key][1] == second[key][1] for key in first
    )


class TestBatches:
    def test_contents(self, folder: Path) -> None:
        for batch in image_data(folder).train_dataloader():
            assert set(batch) == {"images", "captions", "keys", "num_skipped"}
            assert batch["images"].shape == (4, 3, 16, 16)
            assert batch["images"].dtype == torch.float32
            assert -1 <= batch["images"].min() < batch["images"].max() <= 1
            assert batch["num_skipped"] == 0
            for key, caption in zip(batch["keys"], batch["captions"], strict=True):
                assert caption[:1] == ("" if key == "0.png" else key[0])

    def test_drawn_anew_in_each_epoch(self, folder: Path) -> None:
        """Crop, flip and caption are functions of seed, epoch and key, not of batch or worker."""
        loader = image_data(folder).train_dataloader()
        epochs = [by_key(loader) for _ in range(3)]
        assert all(set(epoch) == {f"{i}.png" for i in range(8)} for epoch in epochs)
        for key in epochs[0]:
            images = [epoch[key][0] for epoch in epochs]
            assert not torch.equal(images[0], images[1]) or not torch.equal(images[1], images[2])
        assert len({epoch["7.png"][1] for epoch in epochs}) > 1
        other = image_data(folder, batch_size=2, num_workers=2).train_dataloader()
        assert is_same(by_key(other), epochs[0])
        assert not is_same(by_key(image_data(folder, seed=1).train_dataloader()), epochs[0])

    def test_all_captions_are_drawn(self, folder: Path) -> None:
        loader = image_data(folder).train_dataloader()
        drawn = {by_key(loader)["7.png"][1] for _ in range(40)}
        assert drawn == {f"7{letter}" for letter in "abcdefg"}

    def test_validation(self, folder: Path) -> None:
        """In order, the first caption, the centre, and the same every time."""
        data = image_data(folder, val=str(folder), transform=TransformConfig(image_size=20), batch_size=5)
        for _ in range(2):
            first, second = data.val_dataloader()
            assert first["keys"] + second["keys"] == [f"{i}.png" for i in range(8)]
            assert first["captions"] == ["", "1a", "2a", "3a", "4a"]
            assert torch.equal(second["images"][0], to_tensor(draw_picture(5, 20)[0]))

    @pytest.mark.parametrize("kind", ["folder", "shards"])
    def test_a_model_that_needs_captions(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        """CLIP's training died at the first batch without captions, though most pictures had one."""
        captions = {i: [] if i < 6 else [f"picture {i}"] for i in range(10)}
        write_shard(tmp_path / "shards/0.tar", range(10), captions)
        for path in write_pictures(tmp_path / "folder", [f"{i}.png" for i in range(10)]):
            if captions[int(path.stem)]:
                path.with_suffix(".txt").write_text(f"picture {path.stem}")
        write_pictures(tmp_path / "none", ["1.png"])
        model = Recorder()
        model.needs_captions = True
        where = str(tmp_path / kind)
        data = ImageData(where, where, TransformConfig(image_size=16), batch_size=2, num_workers=0)
        data.trainer = pl.Trainer(barebones=True, accelerator="cpu")
        data.trainer.strategy.connect(model)
        data.setup("fit")
        assert "6 of 10 pictures have no caption and are left out" in caplog.text
        for loader in (data.train_dataloader(), data.val_dataloader()):
            drawn = sorted(caption for batch in loader for caption in batch["captions"])
            assert drawn == [f"picture {i}" for i in range(6, 10)]
        data.train, data.train_source = str(tmp_path / "none"), None
        with pytest.raises(ValueError, match=r"no picture of .*none has a caption, none of 1: this model"):
            data.setup("fit")

    def test_no_validation(self, folder: Path) -> None:
        assert image_data(folder).val_dataloader() == []

    def test_labels(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["b/1.png", "a/0.png", "c/2.png"])
        (batch,) = image_data(tmp_path, val=str(tmp_path)).val_dataloader()
        assert batch["labels"].tolist() == [0, 1, 2]
        assert batch["labels"].dtype == torch.int64

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_shards(self, tmp_path: Path, num_workers: int) -> None:
        for i in range(3):
            write_shard(tmp_path / f"{i}.tar", range(4 * i, 4 * i + 4))
        shards = [str(tmp_path / f"{i}.tar") for i in range(3)]
        loader = image_data(shards, num_workers=num_workers).train_dataloader()
        found = by_key(chain(*(loader for _ in range(4))))
        assert len(found) == 12
        assert found["1.tar/0005"][1] == draw_picture(5)[1]

    def test_broken_pictures(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        (folder / "3.png").write_bytes(b"broken")
        loader = image_data(folder).train_dataloader()
        assert sum(batch["num_skipped"] for _ in range(2) for batch in loader) == 2
        assert caplog.text.count("skipped 3.png: not a picture") == 1
        assert "(1 so far)" in caplog.text


class TestRemote:
    @pytest.fixture
    def address(self, tmp_path: Path) -> Iterator[str]:
        for i in range(2):
            write_shard(tmp_path / f"{i}.tar", [2 * i, 2 * i + 1])
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar"
            server.shutdown()

    def test_size_of_an_epoch(self, address: str) -> None:
        data = image_data(address, epoch_size=6, batch_size=2, val=address, val_size=4)
        loader = data.train_dataloader()
        assert len(loader) == len([*loader]) == 3
        assert list(by_key(data.val_dataloader())) == ["0.tar/0000", "0.tar/0001", "1.tar/0002", "1.tar/0003"]

    def test_unknown_size(self, address: str) -> None:
        with pytest.raises(ValueError, match=r"is not known before they are read: set data.epoch_size, the"):
            image_data(address)
        with pytest.raises(ValueError, match=r"is not known before they are read: set data.val_size, the"):
            image_data(address, epoch_size=4, val=address)


class TestErrors:
    @pytest.mark.parametrize("numbers", [{"batch_size": 0}, {"num_workers": -1}])
    def test_numbers(self, folder: Path, numbers: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"must be at least 1 and num_workers at least 0, got .*(0|-1)"):
            ImageData(str(folder), **numbers)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("size", "message"),
        [(0, "epoch_size must be at least 1, got 0"), (5, "epoch_size is for shards, but")],
    )
    def test_epoch_size(self, folder: Path, size: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            image_data(folder, epoch_size=size)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_nothing_readable(self, folder: Path, tmp_path: Path, split: str) -> None:
        broken = write_tar(tmp_path / "broken.tar", {"0.txt": b"no picture"})
        with pytest.raises(
            ValueError, match=r"no readable picture in .*broken.tar: broken.tar/0: it has no pic"
        ):
            image_data(**{"train": folder, split: str(broken)})

    def test_other_classes(self, tmp_path: Path) -> None:
        """Their labels would be numbers of other classes."""
        write_pictures(tmp_path / "train", ["a/0.png", "b/1.png", "c/2.png"])
        write_pictures(tmp_path / "val", ["a/0.png", "c/2.png"])
        with pytest.raises(
            ValueError, match=r"val must have the classes of .*train, .* has b: make that folder"
        ):
            image_data(tmp_path / "train", val=str(tmp_path / "val"))
        (tmp_path / "val/b").mkdir()
        (batch,) = image_data(tmp_path / "train", val=str(tmp_path / "val")).val_dataloader()
        assert batch["labels"].tolist() == [0, 2]

    def test_validation_without_classes(self, tmp_path: Path) -> None:
        write_pictures(tmp_path / "train", ["a/0.png", "b/1.png"])
        write_pictures(tmp_path / "val", ["0.png"])
        image_data(tmp_path / "train", val=str(tmp_path / "val"))


class Recorder(pl.LightningModule):
    """Notes which pictures it is shown, and their pixels."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_after = stop_after
        self.seen: list[tuple[str, float]] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> torch.Tensor:
        self.seen += zip(batch["keys"], batch["images"].sum(dim=(1, 2, 3)).tolist(), strict=True)
        return self.weight * batch["images"].mean()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.stop_after:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/killed.ckpt")
            raise KeyboardInterrupt

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        _ = self.trainer.estimated_stepping_batches  # as schedules do: Lightning makes the loader for it
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, directory: Path, *, stop_after: int | None = None, resume: str | None = None, **flags: Any
) -> Any:
    model = Recorder(stop_after)
    trainer = pl.Trainer(
        default_root_dir=directory, logger=False, enable_checkpointing=False, accelerator="cpu", devices=1,
        enable_progress_bar=False, enable_model_summary=False, **{"max_epochs": 3, **flags},
    )  # fmt: skip
    data = ImageData(str(folder), val=str(folder), transform=TINY, batch_size=2, num_workers=0)
    try:
        trainer.fit(model, data, ckpt_path=resume)
    except (KeyboardInterrupt, SystemExit):
        assert stop_after is not None
    return model.seen


class TestWithLightning:
    @pytest.mark.parametrize("stop_after", [1, 4, 6])
    @pytest.mark.parametrize("flags", [{}, {"max_steps": 12, "max_epochs": -1}, {"limit_train_batches": 3}])
    def test_resuming(self, folder: Path, tmp_path: Path, stop_after: int, flags: dict[str, int]) -> None:
        """After a whole epoch, and wherever a schedule asks for the steps, Lightning alone began anew."""
        whole = fit(folder, tmp_path, **flags)
        killed = fit(folder, tmp_path, stop_after=stop_after, **flags)
        resumed = fit(folder, tmp_path, resume=str(tmp_path / "killed.ckpt"), **flags)
        assert killed + resumed == whole
        assert len(whole) == (18 if "limit_train_batches" in flags else 24)

    def test_overfitting(self, folder: Path, tmp_path: Path) -> None:
        seen = fit(folder, tmp_path, overfit_batches=1)
        assert len(seen) == 6
        assert seen[:2] == seen[2:4] == seen[4:]

    def test_from_a_config(self, folder: Path, tmp_path: Path) -> None:
        from pytorch_lightning.cli import LightningCLI

        args = {
            "data": {
                "class_path": "mindalle.data.ImageData",
                "init_args": {
                    "train": str(folder),
                    "transform": {"image_size": 8, "crop": "dalle"},
                    "batch_size": 3,
                },
            }
        }
        cli = LightningCLI(
            Recorder, pl.LightningDataModule, subclass_mode_data=True, run=False, save_config_callback=None,
            args=args, parser_kwargs={"parser_mode": "omegaconf"},
        )  # fmt: skip
        assert isinstance(cli.datamodule, ImageData)
        cli.datamodule.setup("fit")
        (batch,) = islice(cli.datamodule.train_dataloader(), 1)
        assert batch["images"].shape == (3, 3, 8, 8)


@pytest.fixture(autouse=True)
def _log_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
