"""What was measured as lines of text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image


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

    Raises:
        ImportError: if matplotlib is missing.
    """
    from mindalle.report.plots import Curve, Panel, draw_panels

    rows = report["decode"]
    smallest = min(row["batch_size"] for row in rows)
    by_batch, by_place = [], []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in own]
        per_image = [row["seconds"] / row["batch_size"] for row in own]
        by_batch.append(Curve(name=variant, x=sizes, y=per_image))
        curve = own[0]["curve_seconds"]  # of the smallest batch
        scale = report["model"]["num_codes"] / max(len(curve) - 1, 1)
        places = [i * scale for i in range(len(curve))]
        by_place.append(Curve(name=variant, x=places, y=[1e3 * value for value in curve]))
    panels = [
        Panel(
            title="seconds per image",
            x_label="batch size",
            y_label="seconds",
            curves=by_batch,
            begins_at_zero=True,
        ),
        Panel(
            title=f"ms per code, batch {smallest}",
            x_label="codes drawn",
            y_label="ms",
            curves=by_place,
            begins_at_zero=True,
            is_discrete=False,
        ),
    ]
    return Image.open(BytesIO(draw_panels(panels, kind="png")))
