"""`generate.py`: every option does what it says, and what it writes can be found, read and drawn again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_results import Command, brightness, pixels, texts
from PIL import Image

from mindalle.cli import generate as generate_command
from mindalle.cli import progress
from mindalle.hub import bundled_models
from mindalle.image import contact_sheet, fit, open_image, to_tensor
from mindalle.pipeline import Generation, Pipeline
from mindalle.preview import Preview

PROMPT = ("--prompt", "a red apple")


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """What the pipeline returned, call by call."""
    made: list[Generation] = []
    draw = Pipeline.__call__

    def record(self: Pipeline, *args: Any, **kwargs: Any) -> Generation:
        made.append(draw(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Pipeline, "__call__", record)
    return made


def test_the_bundled_model_is_the_default(mindalle: Command, tmp_path: Path) -> None:
    """The README's first command."""
    if "emoji" not in bundled_models():
        pytest.skip("this checkout has no bundled model: mindalle/models/emoji/config.yaml")
    result = mindalle("generate", *PROMPT, "--seed", 0, "--out", tmp_path)
    assert result.code == 0
    assert texts(result.paths[0])["model"] == "emoji"


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_parser_has_every_documented_option() -> None:
    known = generate_command.build_parser("generate.py").format_help()
    for option in (
        *("prompt", "prompts-file", "class-label", "model", "num-images", "num-candidates", "top-k", "top-p"),
        *("temperature", "cfg-scale", "seed", "batch-size", "device", "precision", "out", "complete"),
        *("keep-rows", "no-rerank", "preview", "clip", "ema", "text-tokenizer", "debug"),
    ):
        assert f"--{option} " in known or f"--{option}\n" in known


@pytest.mark.usefixtures("clip_of_brightness")
def test_best_pictures_come_first(generate: Command, tmp_path: Path) -> None:
    drawn = generate(*PROMPT, "--seed", 3, "--num-images", 8, "--no-rerank", "--out", tmp_path / "drawn")
    best = generate(*PROMPT, "--seed", 3, "--num-images", 3, "--num-candidates", 8, "--clip", "ViT-B/32")
    assert (drawn.code, best.code) == (0, 0)

    expected = sorted(drawn.paths, key=lambda path: -brightness(open_image(path)))[:3]
    assert [pixels(path) for path in best.paths] == [pixels(path) for path in expected]
    assert [path.name for path in best.paths] == [f"a-red-apple-seed-3-{rank}.png" for rank in (1, 2, 3)]
    scores = [brightness(open_image(path)) for path in expected]
    assert [float(line.split("score ")[1]) for line in best.out] == pytest.approx(scores, abs=1e-3)
    assert [record["score"] for record in read_results(tmp_path / "out")] == pytest.approx(scores, abs=1e-6)
    assert not any("not reranked" in line for line in best.err)


@pytest.mark.usefixtures("clip_of_brightness")
def test_text_chunks_and_results_say_how_to_draw_it_again(
    generate: Command, text_model: Path, tmp_path: Path
) -> None:
    sampling = ("--temperature", 0.9, "--top-k", 12, "--top-p", 0.8, "--cfg-scale", 1.5)
    result = generate(
        *PROMPT, *sampling, "--seed", 5, "--num-images", 2, "--num-candidates", 4, "--clip", "x"
    )
    assert result.code == 0
    for path, record in zip(result.paths, read_results(tmp_path / "out"), strict=True):
        chunks = texts(path)
        assert chunks["prompt"] == record["prompt"] == "a red apple"
        assert int(chunks["seed"]) == record["seed"] == 5
        assert float(chunks["score"]) == record["score"]
        assert chunks["model"] == record["model"] == str(text_model)
        settings = json.loads(chunks["settings"])
        assert settings == record["settings"]
        assert settings == {
            "temperature": 0.9,
            "top_k": 12,
            "top_p": 0.8,
            "cfg_scale": 1.5,
            "window": 1,
            "precision": "fp32",
            "ema": False,
            "num_candidates": 4,
            "clip": "x",
            "judge_sha256": "b" * 64,
            "complete": None,
            "keep_rows": None,
        }
        assert record["file"] == path.name
        index = int(chunks["index"])
        assert index == record["index"]

        again = generate(*PROMPT, *sampling, "--seed", 5, "--num-images", index + 1, "--no-rerank")
        assert pixels(again.paths[index]) == pixels(path)


def test_speculative_decoding_is_recorded_and_repeats_a_picture(generate: Command) -> None:
    one, again, wide = (
        generate(*PROMPT, "--seed", 5, *option)
        for option in (("--speculative", 4), ("--speculative", 4), ("--speculative",))
    )
    assert pixels(one.paths[0]) == pixels(again.paths[0])
    assert [json.loads(texts(each.paths[0])["settings"])["window"] for each in (one, wide)] == [4, 8]


def test_the_contact_sheet_shows_all_pictures(generate: Command, tmp_path: Path) -> None:
    result = generate(*PROMPT, "--seed", 1, "--num-images", 3)
    sheet = tmp_path / "out" / "a-red-apple-seed-1-sheet.png"
    captions = ["1", "2", "3"]
    assert pixels(sheet) == contact_sheet([open_image(p) for p in result.paths], captions=captions).tobytes()
    assert texts(sheet)["prompt"] == "a red apple"

    assert generate("--prompt", "one", "--seed", 1).code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "one-seed-1-1.png" in names
    assert "one-seed-1-sheet.png" not in names  # of one picture there is nothing to compare


def test_nothing_is_overwritten(generate: Command, tmp_path: Path) -> None:
    first = generate(*PROMPT, "--seed", 0, "--num-images", 2, "--preview")
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert len(before) == 4
    second = generate(*PROMPT, "--seed", 0, "--num-images", 2, "--preview")
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in second.paths] == [f"a-red-apple-seed-0_2-{rank}.png" for rank in (1, 2)]
    assert [pixels(path) for path in second.paths] == [pixels(path) for path in first.paths]
    assert [record["file"] for record in read_results(tmp_path / "out")] == [
        path.name for path in first.paths + second.paths
    ]

    # the first picture was moved away: the second must not be replaced
    first.paths[0].unlink()
    third = generate(*PROMPT, "--seed", 0, "--num-images", 2)
    assert [path.name for path in third.paths] == [f"a-red-apple-seed-0_3-{rank}.png" for rank in (1, 2)]


def test_zero_is_a_seed_and_without_one_a_seed_is_drawn_and_printed(generate: Command) -> None:
    first, again = generate(*PROMPT, "--seed", 0), generate(*PROMPT, "--seed", 0)
    assert "seed 0" in first.err
    assert pixels(first.paths[0]) == pixels(again.paths[0])

    drawn = [generate(*PROMPT) for _ in range(2)]
    seeds = [next(line for line in run.err if line.startswith("seed ")).split()[1] for run in drawn]
    assert seeds[0] != seeds[1]
    assert pixels(drawn[0].paths[0]) != pixels(drawn[1].paths[0])
    assert pixels(generate(*PROMPT, "--seed", seeds[0]).paths[0]) == pixels(drawn[0].paths[0])
    assert generate(*PROMPT, "--seed", -1).code == 0


def test_batch_size_does_not_change_pictures(generate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    show = progress.Progress.show

    def record(self: progress.Progress, preview: Preview) -> None:
        show(self, preview)
        if preview.num_done == preview.num_codes:
            batches.append(len(preview.codes))

    monkeypatch.setattr(progress.Progress, "show", record)
    runs = [generate(*PROMPT, "--seed", 2, "--num-images", 5, "--batch-size", size) for size in (1, 3, 8)]
    assert batches == [1, 1, 1, 1, 1, 3, 2, 5]
    shown = [[pixels(path) for path in run.paths] for run in runs]
    assert shown[0] == shown[1] == shown[2]
    assert len(set(shown[0])) == 5


def test_prompts_come_from_options_and_a_file(generate: Command, tmp_path: Path) -> None:
    """With the byte order mark, line ends and blank lines of a file from Windows."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa green car\r\n\r\n  zwei rote Äpfel \r\n".encode())
    result = generate(*PROMPT, "--prompts-file", file, "--seed", 4)
    prompts = [record["prompt"] for record in read_results(tmp_path / "out")]
    assert prompts == ["a red apple", "a green car", "zwei rote Äpfel"]
    assert [path.name for path in result.paths][2] == "zwei-rote-äpfel-seed-4-1.png"
    assert texts(result.paths[2])["prompt"] == "zwei rote Äpfel"
    assert len({pixels(path) for path in result.paths}) == 3
    assert any("3/3 zwei rote Äpfel" in line for line in result.err)  # the bar says where we are


def test_a_long_prompt_has_a_name_that_fits(generate: Command) -> None:
    result = generate("--prompt", "apple / ../ " * 50, "--seed", 123456789)
    assert result.code == 0
    assert re.fullmatch(r"[a-z-]{1,40}-seed-123456789-1\.png", result.paths[0].name)


def test_lost_words_are_named_once(generate: Command) -> None:
    result = generate(
        *("--prompt", "a red apple on a green car with two red cars"),
        *("--num-images", 3, "--batch-size", 1, "--seed", 0),
    )
    assert result.code == 0
    warnings = [line for line in result.err if "lost" in line]
    assert len(warnings) == 1
    assert "two red cars" in warnings[0]
    assert len(result.paths) == 3


@pytest.mark.parametrize("name", ["mindalle-class", "rq-class"])
def test_classes(generate: Command, checkpoints: Path, name: str, tmp_path: Path) -> None:
    result = generate("--model", checkpoints / name, "--class-label", 3, "--class-label", 9, "--seed", 0)
    assert [path.name for path in result.paths] == ["class-3-seed-0-1.png", "class-9-seed-0-1.png"]
    assert texts(result.paths[0])["class_label"] == "3"
    assert "prompt" not in texts(result.paths[0])
    assert [record["class_label"] for record in read_results(tmp_path / "out")] == [3, 9]
    assert pixels(result.paths[0]) != pixels(result.paths[1])
    assert not any("not reranked" in line for line in result.err)  # nobody expects it without a prompt


@pytest.mark.parametrize("name", ["mindalle-free", "rq-free"])
def test_without_a_condition(generate: Command, checkpoints: Path, name: str) -> None:
    result = generate("--model", checkpoints / name, "--num-images", 2, "--seed", 0)
    assert [path.name for path in result.paths] == [
        "unconditional-seed-0-1.png",
        "unconditional-seed-0-2.png",
    ]
    assert "prompt" not in texts(result.paths[0])


@pytest.mark.parametrize("name", ["mindalle", "rq-text"])
def test_completion_keeps_the_rows(
    generate: Command, checkpoints: Path, name: str, photo: Path, generations: list[Generation]
) -> None:
    result = generate(
        *("--model", checkpoints / name, *PROMPT, "--seed", 0, "--num-images", 2),
        *("--complete", photo, "--keep-rows", 3),
    )
    assert result.code == 0
    tokenizer = Pipeline.from_pretrained(checkpoints / name).image_tokenizer
    with torch.inference_mode():
        codes = tokenizer.encode(to_tensor(fit(open_image(photo), (16, 16))).unsqueeze(0))
    assert torch.equal(generations[0].codes[:, :3], codes[:, :3].expand(2, *codes[:, :3].shape[1:]))
    assert not torch.equal(generations[0].codes[0, 3], generations[0].codes[1, 3])
    settings = json.loads(texts(result.paths[0])["settings"])
    assert (settings["complete"], settings["keep_rows"]) == (str(photo), 3)
    # what is kept is not counted as drawn: one row of four codes, in as many depths, of two pictures
    total = 2 * generations[0].codes[0, 3].numel()
    assert any(f"{total}/{total} [" in line for line in result.err)


def test_preview_shows_the_growing_picture(
    generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    write = progress.save_png
    monkeypatch.setattr(progress, "save_png", lambda path, *rest: (seen.append(path), write(path, *rest)))
    result = generate(*PROMPT, "--seed", 0, "--num-images", 2, "--batch-size", 1, "--preview")
    preview = tmp_path / "out" / "a-red-apple-seed-0-preview.png"
    assert seen == [preview] * 8  # once per row of codes of each batch
    assert f"preview in {preview}" in result.err
    assert pixels(preview) == contact_sheet([open_image(result.paths[1])]).tobytes()


def test_a_prompt_without_clip_says_that_nothing_was_reranked(generate: Command) -> None:
    assert any("not reranked" in line and "--clip" in line for line in generate(*PROMPT).err)
    assert not any("not reranked" in line for line in generate(*PROMPT, "--no-rerank").err)
    result = generate(*PROMPT, "--num-candidates", 4)
    assert len(result.paths) == 1
    assert any("1 candidates are drawn, not 4" in line for line in result.err)


def test_sampling_options_reach_the_model(generate: Command) -> None:
    def draw(*options: object) -> bytes:
        result = generate(*PROMPT, *options)
        assert result.code == 0
        return pixels(result.paths[0])

    greedy = draw("--temperature", 0, "--seed", 0)
    assert greedy == draw("--temperature", 0, "--seed", 1)
    assert greedy == draw("--top-k", 1, "--seed", 1) == draw("--top-p", 1e-6, "--seed", 1)
    plain = draw("--seed", 1)
    assert plain == draw("--seed", 1, "--top-p", 1, "--top-k", 24, "--cfg-scale", 1, "--temperature", 1)
    for changed in (("--temperature", 3), ("--top-k", 4), ("--top-p", 0.5), ("--cfg-scale", 6)):
        assert draw("--seed", 1, *changed) != plain
    assert draw("--seed", 1, "--precision", "bf16")  # rounding may or may not change a code


def test_one_top_k_per_depth(generate: Command, checkpoints: Path) -> None:
    model = ("--model", checkpoints / "rq-text", *PROMPT, "--top-p", 1)
    greedy = generate(*model, "--temperature", 0, "--seed", 0)
    assert pixels(generate(*model, "--top-k", 1, 1, 1, "--seed", 7).paths[0]) == pixels(greedy.paths[0])
    mixed = generate(*model, "--top-k", 24, 1, 1, "--seed", 7)
    assert pixels(mixed.paths[0]) != pixels(greedy.paths[0])
    assert json.loads(texts(mixed.paths[0])["settings"])["top_k"] == [24, 1, 1]


def test_checkpoint_options_reach_the_loader(generate: Command, checkpoints: Path, tmp_path: Path) -> None:
    model = ("--model", checkpoints / "rq-class", "--class-label", 1, "--temperature", 0)
    plain, averaged = generate(*model), generate(*model, "--ema")
    assert pixels(plain.paths[0]) != pixels(averaged.paths[0])
    assert json.loads(texts(averaged.paths[0])["settings"])["ema"] is True

    bare = tmp_path / "bare"
    bare.mkdir()
    for stage in ("stage1", "stage2"):
        (bare / stage).symlink_to(checkpoints / "rq-text" / stage)
    words = checkpoints / "rq-text" / "text_tokenizer.json"
    with_words = generate("--model", bare, *PROMPT, "--seed", 0, "--text-tokenizer", words)
    assert with_words.code == 0
    expected = generate("--model", checkpoints / "rq-text", *PROMPT, "--seed", 0)
    assert pixels(with_words.paths[0]) == pixels(expected.paths[0])
    assert not any("BPE" in line for line in with_words.err)  # no guess was needed


def test_compile_reaches_the_model(generate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generate(*PROMPT, "--seed", 0)
    compiled: list[object] = []
    monkeypatch.setattr("mindalle.pipeline.compile_steps", compiled.append)
    assert pixels(generate(*PROMPT, "--seed", 0, "--compile").paths[0]) == pixels(plain.paths[0])
    assert len(compiled) == 1
    refused = generate(*PROMPT, "--compile", "--precision", "int8")
    assert refused.code == 2
    assert "--compile is for --precision fp32, bf16 or fp16, got int8: leave one out" in refused.err[-1]


def test_the_bar_shows_codes_per_second_over_all_prompts(generate: Command) -> None:
    result = generate(*PROMPT, "--prompt", "a green car", "--num-images", 3, "--batch-size", 2, "--seed", 0)
    bars = [line for line in result.err if "codes/s" in line]
    assert re.search(r"2/2 a green car: 100%.* 96/96 \[.*[\d.]+ ?k? ?codes/s\]", bars[-1])
    assert len(bars) <= 3  # in a log the bar is a line now and then


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_interrupted_run_leaves_what_is_finished(
    generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    show = progress.Progress.show

    def interrupt(self: progress.Progress, preview: Preview) -> None:
        show(self, preview)
        if sum(len(codes) for codes in self.finished) == 8 and preview.num_done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Progress, "show", interrupt)
    result = generate(
        *("--prompt", "a green car", *PROMPT, "--seed", 0, "--num-images", 12, "--batch-size", batch_size)
    )
    assert result.code == 130
    assert result.err[-1] == "generate.py: interrupted"
    assert not any("Traceback" in line for line in result.err)
    assert len(result.paths) == 8
    assert all(texts(path)["prompt"] == "a green car" for path in result.paths)
    assert len(read_results(tmp_path / "out")) == 8
    monkeypatch.setattr(progress.Progress, "show", show)
    drawn = generate("--prompt", "a green car", "--seed", 0, "--num-images", 12, "--out", tmp_path / "green")
    assert [pixels(path) for path in result.paths] == [pixels(path) for path in drawn.paths][:8]


def test_transparent_and_rotated_pictures_are_seen_as_they_look(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)

    wide = Image.new("RGB", (8, 4), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to see it upright
    wide.save(tmp_path / "phone.jpg", exif=exif)
    assert open_image(tmp_path / "phone.jpg").size == (4, 8)

    deep = Image.fromarray(torch.full((2, 2), 32896, dtype=torch.uint16).numpy())
    deep.save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_the_device_is_chosen_and_threads_are_set(generate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model drew 6 codes a second with torch's threads on a busy machine, 40 and more with one."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    result = generate("--prompt", "a red car", "--seed", 0)
    assert result.code == 0
    assert asked == [1]
    assert result.device == ["generate.py: device cpu, chosen as the best of this machine"]
    result = generate("--prompt", "a red car", "--seed", 0, "--threads", 3, "--device", "cpu")
    assert asked == [1, 3]
    assert result.device == []
