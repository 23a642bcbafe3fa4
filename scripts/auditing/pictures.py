"""The pictures of the audit, from the content of its page; SVG and PNG.

With the same matplotlib the same content gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.reporting.figures import STYLES

#: more than `STYLES` has, colour-blind safe (Okabe and Ito).
COLOURS = (*(colour for colour, _ in STYLES), "#56B4E9", "#E69F00", "#CC79A7", "#F0E442")
#: what replaces a value of 0 on a logarithmic axis.
FLOOR = 1e-18
#: ticks of a logarithmic axis of memory.
TICKS_MIB = tuple(2**power for power in range(20))


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
            figure = Figure(figsize=(7.2, 3.2), layout="constrained")
            PICTURES[section["key"]](figure, section["picture"])
            figure.suptitle(f"{section['title']} (scale: {content['scale']})", fontsize=9)
            for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                path = folder / f"audit_{section['key']}.{suffix}"
                figure.savefig(path, metadata=metadata, dpi=150)
                paths.append(path)
    return paths


def _rank(figure: Any, data: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    for (label, values), (colour, marker) in zip(data["curves"].items(), STYLES, strict=False):
        numbers = range(1, len(values) + 1)
        panel.plot(numbers, values, color=colour, marker=marker, markersize=3, lw=1, label=label)
    panel.axhline(data["tolerance"], color="grey", lw=1, ls="--", label="tolerance")
    panel.set_yscale("log")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("Number of the singular value")
    panel.set_ylabel("Singular value of $W_T + sBA - W_0$")
    _finish(panel)


def _gradients(figure: Any, data: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    for (label, by), colour in zip(data["gaps"].items(), COLOURS, strict=False):
        xs = sorted(by, key=float)
        values = [max(by[x], FLOOR) for x in xs]
        panel.plot([float(x) for x in xs], values, "o-", color=colour, ms=4, lw=1, label=label)
    panel.axhline(data["limit"], color="grey", lw=1, ls="--", label="counts as equal below")
    panel.set_yscale("log")
    panel.set_xlabel("Dropout in the branch")
    panel.set_ylabel("Relative difference of gradients")
    _finish(panel)


def _equivalence(figure: Any, data: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    labels = list(data["grid"])
    cases = list(dict.fromkeys(case for by in data["grid"].values() for case in by))
    markers = "os^vDPX*"
    for number, case in enumerate(cases):
        points = [
            (max(by[case], FLOOR), position)
            for position, by in enumerate(data["grid"].values())
            if case in by
        ]
        panel.scatter(
            [x for x, _ in points], [y for _, y in points], s=22, label=case,
            color=COLOURS[number % len(COLOURS)], marker=markers[number % len(markers)],
        )  # fmt: skip
    for limit in ("exact_below", "close_below"):
        panel.axvline(data[limit], color="grey", lw=1, ls="--")
    panel.set_xscale("log")
    panel.set_yticks(range(len(labels)), labels)
    panel.invert_yaxis()
    panel.set_xlabel("Relative difference of the merged weights (dashed: equal, close)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _scores(figure: Any, data: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    for number, (label, curve) in enumerate(data["curves"].items()):
        colour, marker = STYLES[number % len(STYLES)]
        panel.errorbar(
            [point["x"] for point in curve],
            [point["mean"] for point in curve],
            yerr=[point["half"] or 0.0 for point in curve],
            color=colour, marker=marker, markersize=4, linewidth=1, capsize=2, label=label,
        )  # fmt: skip
    if data["log"]:
        panel.set_xscale("log")
        xs = sorted({point["x"] for curve in data["curves"].values() for point in curve})
        panel.set_xticks(xs, [f"{100 * x:g} %" for x in xs])
        panel.minorticks_off()
    panel.set_xlabel(data["x"])
    panel.set_ylabel(f"{data['y']} (bars: 95 % interval)")
    _finish(panel)


def _precision(figure: Any, data: Mapping[str, Any]) -> None:
    rates = sorted(data["curves"], key=float)
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, rates, strict=True):
        for (form, points), (colour, _) in zip(data["curves"][rate].items(), STYLES, strict=False):
            values = [max(value, FLOOR) for _, value in points]
            panel.plot([step for step, _ in points], values, color=colour, lw=1, label=form)
        panel.set_yscale("log")
        panel.set_xlabel("Steps")
        panel.set_title(f"learning rate {rate}", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("Relative error of the change of W")
    panels[0].legend(fontsize=8)


def _memory(figure: Any, data: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    labels = list(data["grids"])
    bottoms = [0.0] * len(labels)
    largest = [
        max(grid, key=lambda p: (p["batch"] * p["length"], p["length"]))
        for grid in data["grids"].values()
    ]
    for category, colour in zip(data["categories"], COLOURS, strict=False):
        sizes = [point["measured"][category] / 2**20 for point in largest]
        left.barh(labels, sizes, left=bottoms, color=colour, label=category)
        bottoms = [a + b for a, b in zip(bottoms, sizes, strict=True)]
    peaks = [point["measured"]["peak"] / 2**20 for point in largest]
    left.plot(peaks, labels, "k|", ms=10, label="peak")
    left.invert_yaxis()
    left.set_xlabel(f"MiB, {data['at']}")
    left.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.3, -0.18))
    for (label, grid), colour in zip(data["grids"].items(), COLOURS, strict=False):
        right.plot(
            [point["expected"]["peak"] / 2**20 for point in grid],
            [point["measured"]["peak"] / 2**20 for point in grid],
            "o", ms=4, color=colour, label=label,
        )  # fmt: skip
    every = [p["measured"]["peak"] / 2**20 for grid in data["grids"].values() for p in grid]
    right.plot([min(every), max(every)], [min(every), max(every)], color="grey", lw=1)
    right.set_xscale("log")
    right.set_yscale("log")
    ticks = [size for size in TICKS_MIB if min(every) / 2 < size < max(every) * 2]
    right.set_xticks(ticks, list(map(str, ticks)))
    right.set_yticks(ticks, list(map(str, ticks)))
    right.minorticks_off()
    right.set_xlabel("Peak by the formula, MiB")
    right.set_ylabel("Peak measured, MiB")
    right.grid(alpha=0.3)


def _finish(panel: Any) -> None:
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


PICTURES: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "rank": _rank,
    "gradients": _gradients,
    "equivalence": _equivalence,
    "dropout": _scores,
    "low_resource": _scores,
    "precision": _precision,
    "memory": _memory,
}
