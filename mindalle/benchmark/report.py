"""What was measured as lines of text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

PANEL = (480, 360)  # pixels of a diagram
MARGIN = (64, 40)  # pixels for labels, left and right, above and below
COLOURS = ("#1f5fa8", "#c44e1a", "#3a8a3a", "#7a4a9a")


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for a person.

    Args:
        report: as `mindalle.cli.benchmark` makes it.

    Returns:
        Lines.
    """
    machine, limits, model = report["machine"], report["limits"], report["model"]
    lines = [
        f"{model['name']}: {model['parameters'] / 1e6:.1f}M parameters, {model['num_codes']} codes, "
        f"{model['num_layers']} layers",
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['device']}",
        f"reads {limits['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{limits['multiply_adds_per_second'] / 1e9:.0f} G multiply-adds/s (float32)",
        "",
        f"{'decode':<18}{'batch':>6}{'prompt':>10}{'code':>10}{'first':>10}{'middle':>10}{'last':>10}"
        f"{'growth':>8}{'images':>10}{'bandw.':>8}{'mult.':>7}{'peak':>9}",
        f"{'':<18}{'':>6}" + f"{'ms':>10}" * 5 + f"{'%':>8}{'1/s':>10}{'%':>8}{'%':>7}{'MB':>9}",
    ]
    for row in report["decode"]:
        lines += _decode_lines(row)
    lines += ["", f"{'image tokenizer':<18}{'batch':>6}{'encode':>10}{'decode':>10}   ms per image"]
    lines += [
        f"{'':<18}{row['batch_size']:>6}{1e3 * row['encode_seconds_per_image']:>10.1f}"
        f"{1e3 * row['decode_seconds_per_image']:>10.1f}"
        for row in report["image_tokenizer"]
    ]
    training = report["training"]
    if training is not None:
        lines += [
            "",
            f"training ({training['dtype']}, batch {training['batch_size']}): "
            f"image tokenizer {training['stage1_images_per_second']:.2f} images/s (no perceptual loss), "
            f"sequence model {training['stage2_images_per_second']:.2f} images/s",
        ]
    return lines


def _decode_lines(row: Mapping[str, Any]) -> list[str]:
    codes = [f"{1e3 * row[f'{name}code_seconds']:>10.2f}" for name in ("", "first_", "middle_", "last_")]
    lines = [
        f"{row['variant']:<18}{row['batch_size']:>6}{1e3 * row['prefill_seconds']:>10.1f}{''.join(codes)}"
        f"{100 * row['growth']:>8.0f}{row['images_per_second']:>10.3f}{100 * row['bandwidth_share']:>8.0f}"
        f"{100 * row['multiply_add_share']:>7.0f}{row['peak_memory_bytes'] / 1e6:>9.0f}"
    ]
    if row["speedup"] is not None:
        lines.append(f"{'':<18}{'':>6}  {row['speedup']:.2f} times as fast as naive")
    whole = row["extrapolated"]
    if whole is not None:
        lines.append(
            f"{'':<18}{'':>6}  extrapolated to all {whole['num_layers']} layers by bytes read, not measured: "
            f"{1e3 * whole['code_seconds']:.2f} ms per code, {whole['images_per_second']:.4f} images/s"
        )
    return lines


def plot(report: Mapping[str, Any]) -> Image.Image:
    """Time against batch size and against the place in the sequence.

    Args:
        report: as `mindalle.cli.benchmark` makes it.

    Returns:
        Two diagrams side by side.
    """
    by_batch: dict[str, list[tuple[float, float]]] = {}
    by_place: dict[str, list[tuple[float, float]]] = {}
    smallest = min(row["batch_size"] for row in report["decode"])
    for row in report["decode"]:
        point = (row["batch_size"], row["seconds"] / row["batch_size"])
        by_batch.setdefault(row["variant"], []).append(point)
        if row["batch_size"] == smallest:
            curve = row["curve_seconds"]
            scale = report["model"]["num_codes"] / max(len(curve) - 1, 1)
            by_place[row["variant"]] = [(i * scale, 1e3 * value) for i, value in enumerate(curve)]
    sheet = Image.new("RGB", (2 * PANEL[0], PANEL[1]), "white")
    sheet.paste(_diagram("seconds per image by batch size", by_batch), (0, 0))
    title = f"ms per code by codes drawn, batch {smallest}"
    sheet.paste(_diagram(title, by_place), (PANEL[0], 0))
    return sheet


def _diagram(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Image.Image:
    """Curves over axes that begin at zero."""
    image = Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(image)
    right = max(x for points in curves.values() for x, _ in points) or 1.0
    top = 1.1 * max(y for points in curves.values() for _, y in points) or 1.0
    width, height = PANEL[0] - 2 * MARGIN[0], PANEL[1] - 2 * MARGIN[1]

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN[0] + x / right * width, PANEL[1] - MARGIN[1] - y / top * height

    draw.text((MARGIN[0], 8), title, fill="black")
    draw.line([place(0, top), place(0, 0), place(right, 0)], fill="black")
    for i in range(5):
        x, y = right * i / 4, top * i / 4
        draw.text((place(x, 0)[0], place(x, 0)[1] + 6), f"{x:.3g}", fill="black", anchor="ma")
        draw.text((place(0, y)[0] - 6, place(0, y)[1]), f"{y:.3g}", fill="black", anchor="rm")
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        corners = [place(x, y) for x, y in sorted(points)]
        draw.line(corners, fill=colour, width=2)
        for x, y in corners:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((MARGIN[0] + 12, MARGIN[1] + 16 * i), name, fill=colour)
    return image
