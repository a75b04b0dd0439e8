"""`measure_emoji.py`: which captions and colours it takes, how it counts, and what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure_emoji
import pytest
import torch
from emoji_data.held_out import concept_names, held_out_captions, read_records, sample, unseen_colours
from evaluation_sets import COLOURS, colour_judge, plain, write_clip, write_emoji_shard
from measure_emoji import colour_accuracy, concept_recall, divergence
from oracle.make import make_mindalle

from mindalle import Pipeline
from mindalle.image import fit, psnr, to_tensor
from mindalle.text import TextTokenizer
from stage1_vqgan import load_tokenizer
from stage2_transformer.int8 import has_int8


@dataclass(frozen=True)
class Result:
    """What the command did."""

    code: int
    out: str
    err: str


Measure = Callable[..., Result]


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str]) -> Measure:
    """`measure("draw", folder, "--judge", ...)` as the script does it."""

    def call(*argv: object) -> Result:
        capsys.readouterr()
        try:
            code = measure_emoji.main([str(argument) for argument in argv])
        except SystemExit as leave:  # argparse
            code = int(leave.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """minDALL-E's layout, 16x16 pixels, codes (4, 4), V = 24."""
    folder = tmp_path_factory.mktemp("model")
    TextTokenizer.train(["a red car", "a green apple"], vocab_size=40, length=6).save(
        folder / "text_tokenizer.json"
    )
    make_mindalle(folder)
    return folder


def about(name: str, style: str = "flat", **more: Any) -> dict[str, Any]:
    return {"name": name, "style": style, "captions": [name, f"a {name}, {style} style"], **more}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two concepts to train on, two held out, of which one is a copy in another colour."""
    folder = tmp_path_factory.mktemp("emoji")
    train = [(plain("red"), about("red car")), (plain("blue"), about("blue car", recolored="blue"))]
    write_emoji_shard(folder / "train-0000.tar", train)
    held_out = [
        (plain("green"), about("green apple")),
        (plain("red"), about("red car", "blob")),
        (plain("blue"), about("blue apple", recolored="blue")),
    ]
    write_emoji_shard(folder / "val_pair-0000.tar", held_out)
    colours = [
        (plain("blue"), about("blue apple", recolored="blue")),
        (plain("blue"), about("blue apple", "blob", recolored="blue")),
        (plain("red"), about("red apple", recolored="red")),
        (plain("red"), about("mauve apple", recolored="mauve")),
        (plain("red"), about("red")),
    ]
    write_emoji_shard(folder / "val_color-0000.tar", colours)
    return folder


def test_what_is_asked_for(emoji: Path) -> None:
    """Recoloured copies are no concepts; of the captions those that name a style are drawn."""
    assert concept_names(emoji) == ["green apple", "red car"]
    captions = held_out_captions(emoji, 10, seed=0)
    assert captions == {"a green apple, flat style": "green apple", "a red car, blob style": "red car"}
    assert len(held_out_captions(emoji, 1, seed=0)) == 1
    assert sorted(unseen_colours(emoji, 10, seed=0)) == [("blue", "apple"), ("red", "apple")]
    assert [record.about["name"] for record in read_records(emoji, "train")] == ["red car", "blue car"]


def test_fewer_are_a_random_sample() -> None:
    """Not the first ones, which are sorted: by colour, or by style."""
    assert sorted(sample(range(5), 9, seed=0)) == list(range(5))
    chosen = [sample(range(100), 10, seed=seed) for seed in range(20)]
    assert all(len(set(some)) == 10 for some in chosen)
    assert 40 < sum(map(sum, chosen)) / 200 < 60
    assert chosen[0] != chosen[1]
    assert chosen[0] == sample(range(100), 10, seed=0)


def test_perfect_and_wrong_recall() -> None:
    judge, names = colour_judge(), [f"{colour} car" for colour in COLOURS]
    pictures = [plain(colour) for colour in COLOURS]
    perfect = concept_recall(judge, pictures, names, names)
    assert perfect == {"recall_at_1": 1, "recall_at_5": 1, "num_pictures": 4, "num_names": 4}
    assert concept_recall(judge, pictures, names[1:] + names[:1], names)["recall_at_1"] == 0
    assert concept_recall(judge, pictures[:2], [names[0], names[0]], names)["recall_at_1"] == 0.5


def test_colour_accuracy() -> None:
    pictures, wanted = [plain("red"), plain("blue")], [("red", "car"), ("blue", "apple")]
    assert colour_accuracy(colour_judge(), pictures, wanted) == 1
    assert colour_accuracy(colour_judge(), pictures[::-1], wanted) == 0
    assert colour_accuracy(colour_judge(), [plain("red")] * 2, wanted) == 0.5


def test_reconstruct(measure: Measure, text_model: Path, emoji: Path, tmp_path: Path) -> None:
    arguments = ("reconstruct", emoji, "--model", text_model)
    result = measure(*arguments, "--out", tmp_path / "out.json")
    assert result.code == 0, result.err
    tokenizer = load_tokenizer(text_model)
    size = (tokenizer.convnet.image_size,) * 2
    images = torch.stack([to_tensor(fit(record.image, size)) for record in read_records(emoji, "val_pair")])
    with torch.no_grad():
        expected = psnr(images, tokenizer.decode(tokenizer.encode(images))).mean().item()
    measure(*arguments, "--out", tmp_path / "out.json")
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert first["results"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert first["results"]["num_images"] == 3
    assert first == second
    assert (first["measure"], first["settings"]["data"]) == ("reconstruct", str(emoji))


def test_a_judge_and_drawings(measure: Measure, text_model: Path, emoji: Path, tmp_path: Path) -> None:
    judge = write_clip(tmp_path / "judge")
    result = measure("clip", emoji, "--judge", judge)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["num_pictures"], found["num_names"], found["recall_at_5"]) == (2, 2, 1)

    options = ("--model", text_model, "--judge", judge, "--out", tmp_path / "out.json")
    result = measure("draw", emoji, *options)
    assert result.code == 0, result.err
    (entry,) = json.loads((tmp_path / "out.json").read_text())
    drawn = entry["results"]["best_of_1"]
    assert (drawn["num_pictures"], drawn["num_colours"], drawn["recall_at_5"]) == (2, 2, 1)
    assert 0 <= drawn["colour_accuracy"] <= 1
    assert "best_of_16" not in entry["results"]  # the model has no CLIP to choose with


@pytest.mark.skipif(not has_int8(), reason="needs int8 kernels")
def test_what_int8_changes(measure: Measure, text_model: Path, emoji: Path, tmp_path: Path) -> None:
    judge = write_clip(tmp_path / "judge")
    result = measure("int8", emoji, "--model", text_model, "--judge", judge)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert 0 < found["kl"] < 0.01
    assert 0.8 < found["same_likeliest_code"] <= 1
    assert found["num_drawings"] == 2
    assert found["clip_score_fp32"] == pytest.approx(found["clip_score_int8"], abs=0.5)


def test_divergence_by_hand(text_model: Path, emoji: Path) -> None:
    """A model and one whose classifier is flat: KL is log V - entropy, and nothing is agreed on."""
    exact, flat = (Pipeline.from_pretrained(text_model) for _ in range(2))
    records = list(read_records(emoji, "val_pair"))
    same = divergence(exact, exact, records)
    assert (same["kl"], same["same_likeliest_code"]) == (0, 1)
    for parameter in flat.model.parameters():
        parameter.data.zero_()
    size = (exact.image_tokenizer.convnet.image_size,) * 2
    images = torch.stack([to_tensor(fit(record.image, size)) for record in records])
    codes = exact.image_tokenizer.encode(images)
    logits = exact.model(codes, exact.encode_conditions([r.about["captions"][0] for r in records])).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    found = divergence(exact, flat, records)
    assert found["kl"] == pytest.approx((math.log(logits.shape[-1]) - entropy).item(), rel=1e-3)
    assert found["num_codes"] == codes.numel()


def test_sweep_puts_the_best_first(
    measure: Measure, text_model: Path, emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_emoji, "SWEEP", {"temperature": (0.5, 1.0), "top_k": (4, None)})
    judge = write_clip(tmp_path / "judge")
    result = measure("sweep", emoji, "--model", text_model, "--judge", judge)
    assert result.code == 0, result.err
    rows = json.loads(result.out)["rows"]
    assert {(row["temperature"], row["top_k"]) for row in rows} == {
        (0.5, 4),
        (0.5, None),
        (1.0, 4),
        (1.0, None),
    }
    scores = [row["recall_at_5"] + row["colour_accuracy"] for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_errors(measure: Measure, emoji: Path, text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    judge, empty = write_clip(tmp_path / "judge"), tmp_path / "empty"
    empty.mkdir()
    write_emoji_shard(tmp_path / "plain" / "val_pair-0000.tar", [(plain("red"), about("red car"))])
    write_emoji_shard(tmp_path / "plain" / "train-0000.tar", [(plain("red"), about("red car"))])
    write_emoji_shard(tmp_path / "plain" / "val_color-0000.tar", [(plain("red"), about("car"))])
    for arguments, code, words in (
        (("draw", emoji), 2, "draw needs a CLIP that judges: pass --judge"),
        (("reconstruct", empty, "--model", text_model), 1, "no val_pair-*.tar in"),
        (("clip", emoji, "--judge", tmp_path / "nobody"), 1, "no such file or directory"),
        (
            ("reconstruct", emoji, "--model", text_model, "--out", tmp_path / "bad.json"),
            1,
            "bad.json is no file of results",
        ),
        (("draw", tmp_path / "plain", "--model", text_model, "--judge", judge), 1, "val_color of"),
    ):
        result = measure(*arguments)
        assert result.code == code
        assert words in result.err.splitlines()[-1]
        assert "unexpected" not in result.err.splitlines()[-1]
