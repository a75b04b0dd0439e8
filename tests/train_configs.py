"""Small trainings for the command line: their data, configs, and a diary of what each step did."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from shard_files import draw_picture, write_pictures

from mindalle.checkpoint import save_checkpoint
from mindalle.text import TextTokenizer
from stage1_vqgan import VQGAN

Config = dict[str, Any]
NUM_PICTURES = 8
CLASSES = {
    "vqgan": "mindalle.training.VQGANTraining",
    "gpt": "mindalle.training.GPTTraining",
    "clip": "mindalle.training.ClipTraining",
}


class Diary(pl.Callback):
    """Writes a line for each step: its number, its pictures, and its loss, exactly.

    Args:
        file: to add to.
        kill_at: step after which the process is killed, as the system does when memory is short.
        interrupt_at: step after which Ctrl-C is pressed.
    """

    def __init__(self, file: str, kill_at: int | None = None, interrupt_at: int | None = None) -> None:
        self.file = Path(file)
        self.kill_at = kill_at
        self.interrupt_at = interrupt_at

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # the mean over the processes, of equally large shares of the batch
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step, "loss": float(loss), "keys": batch["keys"]}) + "\n")
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.interrupt_at:
            raise KeyboardInterrupt


def read_diary(file: Path) -> dict[int, dict[str, Any]]:
    """What was written for each step; of a step that was done twice, the last time."""
    return {line["step"]: line for line in map(json.loads, file.read_text().splitlines())}


def write_data(folder: Path, vqgan: VQGAN) -> Path:
    """Pictures with two captions each, a text tokenizer and an image tokenizer; returns the folder."""
    names = [f"{index}.png" for index in range(NUM_PICTURES)]
    write_pictures(folder / "pictures", names)
    captions = [draw_picture(index)[1] for index in range(NUM_PICTURES)]
    for name, caption in zip(names, captions, strict=True):
        text = f"{caption}\n{caption} on white\n"
        (folder / "pictures" / name).with_suffix(".txt").write_text(text)
    TextTokenizer.train([*captions, "on white"], vocab_size=64, length=6).save(folder / "text_tokenizer.json")
    save_checkpoint(folder / "tokenizer", image_tokenizer=vqgan)
    return folder


def make_config(kind: str, folder: Path, run: Path, **trainer: Any) -> Config:
    """The config of a training with everything that is random, which ends within the third epoch.

    Args:
        kind: "vqgan", "gpt" or "clip".
        folder: that `write_data` filled.
        run: the run's folder.
        trainer: more arguments of the Trainer.
    """
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.01}
    sizes: Config = {"train": str(folder / "pictures"), "val": str(folder / "pictures"), "batch_size": 2}
    data: Config = {"class_path": "mindalle.data.ImageData", "init_args": sizes | {"num_workers": 0}}
    data["init_args"]["transform"] = {
        "image_size": 16,
        "crop": "random_resized",
        "flip_probability": 0.5,
    }
    model = {"optimizer": optimizer, **MODELS[kind]}
    if kind == "gpt":
        data = {"class_path": "mindalle.data.CodeData", "init_args": sizes | {"num_workers": 0}}
        data["init_args"] |= {
            "image_tokenizer": str(folder / "tokenizer"),
            "cache_dir": str(folder / "codes"),
            "text_tokenizer": str(folder / "text_tokenizer.json"),
            "transform": {"image_size": 16, "crop": "random_resized"},
            "num_crops": 3,
            "text_length": 6,
            "bpe_dropout": 0.5,
        }
    if kind == "clip":
        text_tokenizer = folder / "text_tokenizer.json"
        num_ids = TextTokenizer.from_file(text_tokenizer, length=6).vocab_size + 2  # start and end
        model["config"] = model["config"] | {"vocab_size": num_ids}
        model["text_tokenizer"] = str(text_tokenizer)
    return {
        "seed_everything": 3,
        "model": {"class_path": CLASSES[kind], "init_args": model},
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 11,
            "default_root_dir": str(run),
            "logger": False,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": AVERAGES if kind == "gpt" else [],
            **trainer,
        },
        "checkpoint": {"every_n_train_steps": 3},
    }


AVERAGES = [{"class_path": "pytorch_lightning.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}]
MODELS: dict[str, Config] = {
    "vqgan": {
        "config": {
            "convnet": {
                "image_size": 16,
                "channels": 32,
                "channel_multipliers": [1, 1, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [],
                "latent_channels": 8,
            },
            "quantizer": {"codebook_size": 24, "width": 8},
        },
        "loss": {
            "perceptual": "none",
            "adversarial_weight": 0.5,
            "adversarial_start": 5,
            "discriminator": {"width": 8, "num_layers": 1},
        },
        "codebook": {"restart_after": 3},
    },
    "gpt": {
        "config": {
            "vocab_size": 24,
            "code_shape": [4, 4],
            "transformer": {"width": 32, "num_layers": 2, "num_heads": 2, "residual_dropout": 0.2},
            "condition": {"kind": "text", "vocab_size": 64, "length": 6},
        },
        "null_probability": 0.3,
    },
    "clip": {
        "config": {
            "embed_dim": 16,
            "image_size": 16,
            "vision_layers": 1,
            "vision_width": 32,
            "vision_patch_size": 8,
            "vision_head_width": 16,
            "text_layers": 1,
            "text_width": 32,
            "text_heads": 2,
            "context_length": 8,
        },
    },
}


def write_config(file: Path, config: Mapping[str, Any]) -> Path:
    """As YAML; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(config)))
    return file


def read_weights(run: Path) -> Mapping[str, Any]:
    """What matters of a run's last checkpoint: weights, averages, optimiser, step."""
    content = torch.load(run / "last.ckpt", weights_only=True)
    names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "global_step")
    return {name: content[name] for name in (*names, "epoch", "lr_schedulers") if name in content}
