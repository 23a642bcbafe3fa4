"""A table as a picture: a panel a score, a line a method with its mean and interval.

Made from the content of ``table<N>.json`` and of nothing else: ``table<N>.svg`` and ``.png``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.reporting.figures import math_label, picture, scale_note

#: colour-blind safe (Okabe and Ito); all other rows are black.
DELTA_LORA, LORA, OTHER = "#D55E00", "#0072B2", "#000000"
COLOURS = {"delta_lora": DELTA_LORA, "lora": LORA}
#: how far, in widths of the range of the methods, a control may lie outside it.
FAR = 0.25
NOTE = (
    "Mean over seeds, small dots: the seeds, bars: 95 % interval (Student t); band: that of "
    "Delta-LoRA; open marks: controls;\n"
    "an arrow with a number: far outside the panel. Overlapping bars decide nothing: the claims "
    "compare the same seeds."
)


def draw_forest(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a table to ``folder/<table>.{svg,png}``; return the files.

    Args:
        results: from `scripts.reporting.results.build_results`.
        folder: exists.
    """
    specs, rows = results["column_specs"], results["rows"]
    num_across = 2 if len(specs) == 4 else min(3, len(specs))
    num_down = -(-len(specs) // num_across)
    title = f"Table {results['number']}: {results['title']} {scale_note(results)}"
    size = (2.6 + 2.3 * num_across, 1.0 + num_down * (0.5 + 0.19 * len(rows)))
    with picture(folder / results["table"], size=size, title=title) as (figure, paths):
        panels = figure.subplots(num_down, num_across, squeeze=False).flat
        for number, panel in enumerate(panels):
            if number >= len(specs):
                panel.set_axis_off()
                continue
            draw_panel(panel, rows, specs[number], has_labels=number % num_across == 0)
        figure.supxlabel(NOTE, fontsize=7, x=0.01, ha="left")
    return paths


def draw_panel(
    panel: Any,
    rows: Sequence[Mapping[str, Any]],
    spec: Mapping[str, Any],
    *,
    has_labels: bool,
    far: float = FAR,
) -> None:
    """Draw one score of all `rows`, the first on top.

    Args:
        panel: of matplotlib.
        rows: of a table's content.
        spec: the score, of its ``column_specs``.
        has_labels: whether the methods are named on the left.
        far: a control that lies so many widths of the methods' range outside it becomes an arrow.
    """
    places = _places(rows)
    cells = [row["metrics"][spec["name"]] for row in rows]
    low, high = _limits(rows, cells, far)
    for row, cell, place in zip(rows, cells, places, strict=True):
        if cell["n"] == 0:
            continue
        if not low <= cell["mean"] <= high:
            _arrow(panel, cell["mean"], place, low, high, spec["decimals"])
            continue
        colour = COLOURS.get(row["method"], OTHER)
        if row["method"] == "delta_lora" and cell["ci95"]:
            panel.axvspan(*cell["ci95"], color=colour, alpha=0.12, lw=0)
        seeds = list(cell["values"].values())
        panel.plot(seeds, [place + 0.27] * len(seeds), ".", color=colour, ms=2.5, alpha=0.6)
        panel.errorbar(
            [cell["mean"]], [place],
            xerr=[cell["ci95"][1] - cell["mean"] if cell["ci95"] else 0.0],
            color=colour, marker="o", ms=4.5, mfc="white" if row["is_control"] else colour,
            lw=1.2, capsize=2,
        )  # fmt: skip
    panel.set_xlim(low, high)
    panel.set_ylim(places[-1] + 0.7, -0.7)
    lower = " (lower is better)" if spec["better"] == "lower" else ""
    panel.set_title(spec["label"] + lower, fontsize=9)
    labels = [math_label(row["label"]) for row in rows] if has_labels else [""] * len(rows)
    panel.set_yticks(places, labels, fontsize=8)
    for tick, row in zip(panel.get_yticklabels(), rows, strict=True):
        tick.set_color(COLOURS.get(row["method"], OTHER))
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.3)


def _places(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the height of each row; the controls stand apart."""
    return [number + 0.5 * row["is_control"] for number, row in enumerate(rows)]


def _limits(
    rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], far: float
) -> tuple[float, float]:
    """Return the ends of the x axis: all methods, and the controls that are not far from them.

    An interval is drawn as far as half a width beyond the means, so that one wild row does not
    press the others together. The width: that of the methods' means, or four usual half intervals.
    """
    known = [(r, c) for r, c in zip(rows, cells, strict=True) if c["n"] > 0]
    methods = [cell["mean"] for row, cell in known if not row["is_control"]]
    if not methods:
        methods = [cell["mean"] for _, cell in known] or [0.0]
    halves = [cell["ci95"][1] - cell["mean"] for _, cell in known if cell["ci95"]]
    usual = statistics.median(halves) if halves else 0.0
    width = max(max(methods) - min(methods), 4 * usual) or abs(methods[0]) or 1.0
    nearest, farthest = min(methods) - far * width, max(methods) + far * width
    near = [cell for _, cell in known if nearest <= cell["mean"] <= farthest]
    low = min((cell["mean"] for cell in near), default=0.0)
    high = max((cell["mean"] for cell in near), default=1.0)
    ends = [end for cell in near for end in cell["ci95"] or ()]
    low, high = (
        min([low, *(max(end, low - width / 2) for end in ends)]),
        max([high, *(min(end, high + width / 2) for end in ends)]),
    )
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _arrow(panel: Any, mean: float, place: float, low: float, high: float, decimals: int) -> None:
    """Write a mean that lies outside the panel at the edge where it would be."""
    is_left = mean < low
    text = f"◂ {mean:.{decimals}f}" if is_left else f"{mean:.{decimals}f} ▸"
    panel.text(
        low if is_left else high, place, text,
        fontsize=7, va="center", ha="left" if is_left else "right", color="grey",
    )  # fmt: skip
