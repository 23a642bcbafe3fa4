"""The pictures of the audit, from the content of its page; SVG and PNG.

With the same matplotlib the same content gives the same bytes. Legends stand beside the panels and
marks of one place side by side, so that nothing hides anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from delta_lora.writing import whole
from scripts.auditing.sections.memory import MIB, largest_point
from scripts.auditing.sections.precision import FORM_LABELS
from scripts.reporting.figures import STYLES

#: more than `STYLES` has, colour-blind safe (Okabe and Ito).
COLOURS = (*(colour for colour, _ in STYLES), "#56B4E9", "#E69F00", "#CC79A7", "#666666")
MARKERS = "os^vDPX*"
#: what replaces a value of 0 on a logarithmic axis.
FLOOR = 1e-18
#: inches; a wide page. Rows of names need more height.
WIDTH, HEIGHT, TALL = 7.2, 3.4, 7.0


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw one picture a section to ``folder/audit_<key>.{svg,png}``; return the files.

    Args:
        content: from `scripts.auditing.page.build`.
        folder: exists.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    paths = []
    for section in content["sections"]:
        with mpl.rc_context({"svg.hashsalt": "delta_lora", "svg.fonttype": "none", "font.size": 9}):
            height = TALL if section["key"] == "equivalence" else HEIGHT
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            PICTURES[section["key"]](figure, section["picture"])
            title = as_mathematics(f"{section['title']} (scale: {content['scale']})")
            figure.suptitle(title, fontsize=9)
            for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                path = folder / f"audit_{section['key']}.{suffix}"
                with whole(path) as temporary:
                    figure.savefig(temporary, metadata=metadata, dpi=150, format=suffix)
                paths.append(path)
    return paths


def as_mathematics(text: str) -> str:
    """Return a text with its matrices (``W``, ``W_Q``, ``BA``) and powers as mathematics."""
    text = re.sub(r"\b(W_[QV]|W|BA)\b", r"$\1$", text)
    return re.sub(r"\b1e-0?(\d+)\b", r"$10^{-\1}$", text)


def power_of_ten(value: float) -> str:
    """Return 2e-05 as two times ten to the minus five, in mathematics."""
    digits, _, exponent = f"{value:.0e}".partition("e")
    return rf"${digits}\times10^{{{int(exponent)}}}$"


def side_by_side(number: int, count: int, width: float) -> float:
    """Return the offset of the mark `number` of `count` that share a place `width` wide."""
    return width * ((number + 0.5) / count - 0.5)


def _legend(figure: Any, panel: Any, columns: int) -> None:
    """Put the legend of a panel below all panels."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def _rank(figure: Any, data: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    for (label, values), (colour, marker) in zip(data["curves"].items(), STYLES, strict=False):
        count = len(values)
        # On a logarithmic axis the marks of large numbers would be one thick line.
        marked = {*range(1, 17), *(round(2 ** (k / 4)) for k in range(16, 4 * count.bit_length()))}
        panel.plot(
            range(1, count + 1), values, color=colour, marker=marker, markersize=4, lw=1,
            markevery=sorted(number - 1 for number in marked if number <= count),
            label=as_mathematics(label),
        )  # fmt: skip
    panel.axhline(data["tolerance"], color="grey", lw=1, ls="--", label="tolerance")
    panel.set_yscale("log")
    panel.set_xscale("log", base=2)
    longest = max(map(len, data["curves"].values()))
    ticks = [2**power for power in range(longest.bit_length())]
    panel.set_xticks(ticks, list(map(str, ticks)))
    panel.set_xlabel("Number of the singular value")
    panel.set_ylabel("Singular value of $W_T + sBA - W_0$")
    panel.grid(alpha=0.3)
    _legend(figure, panel, len(data["curves"]) + 1)


def _gradients(figure: Any, data: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    gaps = data["gaps"]
    for number, (label, by) in enumerate(gaps.items()):
        style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 4.5}
        left.plot([max(by["0"], FLOOR)], [number], ls="", **style)
        xs = sorted(float(x) for x in by if float(x) > 0)
        shift = side_by_side(number, len(gaps), _smallest_step(xs) / 2)
        values = [100 * by[f"{x:g}"] for x in xs]
        right.plot([x + shift for x in xs], values, lw=1, label=label, **style)
    left.axvline(data["limit"], color="grey", lw=1, ls="--")
    left.set_xscale("log")
    left.set_xlim(right=data["limit"] * 10)
    left.set_yticks([])
    left.minorticks_off()
    left.set_ylim(len(gaps) - 0.5, -0.5)
    left.text(
        data["limit"] / 2, len(gaps) / 2 - 0.5, "equal below", color="grey", fontsize=8,
        rotation=90, ha="right", va="center",
    )  # fmt: skip
    left.set_title("without dropout", fontsize=9)
    left.set_xlabel("Relative difference of gradients")
    right.set_ylim(bottom=0)
    right.set_title("with dropout in the branch", fontsize=9)
    right.set_xlabel("Dropout")
    right.set_ylabel("Relative difference, %")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    _legend(figure, right, 3)


def _equivalence(figure: Any, data: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    grid = data["grid"]
    cases = list(dict.fromkeys(case for by in grid.values() for case in by))
    for number, case in enumerate(cases):
        points = [
            (max(by[case], FLOOR), row + side_by_side(number, len(cases), 0.8))
            for row, by in enumerate(grid.values())
            if case in by
        ]
        panel.plot(
            [x for x, _ in points], [y for _, y in points], ls="", ms=4.2, label=case,
            color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
        )  # fmt: skip
    for row in range(1, len(grid), 2):
        panel.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, lw=0)
    panel.set_xscale("log")
    panel.set_yticks(range(len(grid)), list(map(as_mathematics, grid)))
    panel.set_ylim(len(grid) - 0.5, -0.5)
    low, high = panel.get_xlim()
    limits = [low, data["exact_below"], data["close_below"], high]
    for limit in limits[1:-1]:
        panel.axvline(limit, color="grey", lw=1, ls="--")
    for name, a, b in zip(("equal", "close", "different"), limits, limits[1:], strict=False):
        panel.text(
            math.sqrt(a * b), 1.01, name, transform=panel.get_xaxis_transform(), ha="center",
            va="bottom", color="dimgrey", fontsize=8,
        )  # fmt: skip
    panel.set_xlim(low, high)
    panel.set_xlabel("Relative difference of the merged weights")
    panel.grid(alpha=0.3, axis="x")
    panel.tick_params(axis="y", length=0)
    _legend(figure, panel, 4)


def _scores(figure: Any, data: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    curves = data["curves"]
    xs = sorted({point["x"] for curve in curves.values() for point in curve})
    for number, (label, curve) in enumerate(curves.items()):
        colour, marker = STYLES[number % len(STYLES)]
        panel.errorbar(
            [_beside(point["x"], number, len(curves), xs, data["log"]) for point in curve],
            [point["mean"] for point in curve],
            yerr=[point["half"] or 0.0 for point in curve],
            color=colour, marker=marker, markersize=4, linewidth=1, capsize=2, label=label,
        )  # fmt: skip
    if data["log"]:
        panel.set_xscale("log")
        panel.set_xticks(xs, [f"{100 * x:g} %" for x in xs])
        panel.minorticks_off()
    else:
        panel.set_xticks(xs)
    panel.set_xlabel(data["x"])
    panel.set_ylabel(f"{data['y']} (bars: 95 % interval)")
    panel.grid(alpha=0.3)
    _legend(figure, panel, len(curves))


def _beside(x: float, number: int, count: int, xs: Sequence[float], is_log: bool) -> float:
    """Return where the mark of a curve stands at `x`, which all curves share."""
    if is_log:
        return float(x * math.exp(side_by_side(number, count, 0.25)))
    return x + side_by_side(number, count, _smallest_step(xs) / 4)


def _smallest_step(xs: Sequence[float]) -> float:
    return min((b - a for a, b in pairwise(xs)), default=1.0)


def _precision(figure: Any, data: Mapping[str, Any]) -> None:
    rates = sorted(data["curves"], key=float)
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, rates, strict=True):
        curves = data["curves"][rate]
        for (form, points), (colour, marker) in zip(curves.items(), STYLES, strict=False):
            marked = [round(part * (len(points) - 1) / 5) for part in range(6)]
            panel.plot(
                [step for step, _ in points], [max(value, FLOOR) for _, value in points],
                color=colour, marker=marker, markersize=4, markevery=marked,
                lw=1, label=as_mathematics(FORM_LABELS[form]),
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_xlabel("Steps")
        panel.set_title(f"learning rate {power_of_ten(float(rate))}", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("Relative error of the change of $W$")
    _legend(figure, panels[0], 3)


def _memory(figure: Any, data: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    grids = data["grids"]
    labels = list(grids)
    largest = [largest_point(grid)["measured"] for grid in grids.values()]
    bottoms = [0.0] * len(labels)
    for category, colour in zip(data["categories"], COLOURS, strict=False):
        sizes = [measured[category] / MIB for measured in largest]
        left.barh(labels, sizes, left=bottoms, color=colour, label=category)
        bottoms = [a + b for a, b in zip(bottoms, sizes, strict=True)]
    left.plot([m["peak"] / MIB for m in largest], labels, "k|", ms=10, mew=1.5, label="peak")
    left.invert_yaxis()
    left.set_xlabel(f"MiB, {data['at']}")
    left.set_title("one step", fontsize=9)
    for row, grid in enumerate(grids.values()):
        peaks = [(point["measured"]["peak"], point["expected"]["peak"]) for point in grid]
        right.plot(
            [100 * (expected - measured) / measured for measured, expected in peaks],
            [row + side_by_side(number, len(grid), 0.7) for number in range(len(grid))],
            "o", ms=3, color=COLOURS[1],
        )  # fmt: skip
    right.axvline(0, color="grey", lw=1)
    right.set_xlabel("%, every batch and length")
    right.set_title("peak: formula minus count", fontsize=9)
    right.tick_params(axis="y", length=0)
    right.grid(alpha=0.3)
    _legend(figure, left, 6)


PICTURES: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "rank": _rank,
    "gradients": _gradients,
    "equivalence": _equivalence,
    "dropout": _scores,
    "low_resource": _scores,
    "precision": _precision,
    "memory": _memory,
}
