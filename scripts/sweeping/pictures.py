"""The picture of a sweep: heat maps of both scores, and below each the same means as profiles.

Made from the content of ``sweep.json`` and of nothing else. The columns of a heat map and of the
profile under it are the same values of the first axis, one above the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.reporting.figures import math_label, picture, scale_note
from scripts.sweeping.content import CHOSEN_ON, SHOWN
from scripts.sweeping.page import BEST, cell_state, panel_title

#: the darker, the better; ends where black or white text can still be read.
COLOURS = ("#f7fbf9", "#cfe8e3", "#8fcac6", "#4a9fae", "#25708f", "#173f6b")
FAILED, INK, GREY = "#c62828", "#1b1b1b", "#8a8a8a"
#: colour-blind safe (Okabe and Ito); the lines of a profile.
LINES = (
    ("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#000000", "X"),
)  # fmt: skip
#: inches of a cell, and of the profile below.
CELL_WIDTH, CELL_HEIGHT, PROFILE_HEIGHT = 0.92, 0.46, 2.1
#: a reference stands so far below the grid, in cells.
GAP = 0.35
NOTE = (
    "Mean over seeds ± half of the 95 % interval (Student t), n: seeds. Darker is better. "
    f"{BEST} best mean; dotted frame: not distinguishable from it (paired t test, Holm);\n"
    "double frame: chosen on the validation split; hatched: no value; red frame: a run failed. "
    "Below the gap: references. Left: what cells are chosen on. Right: what is reported."
)


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a sweep to ``folder/sweep.{svg,png}``; return the files.

    Args:
        content: from `scripts.sweeping.content.build`.
        folder: exists.
    """
    panels = content["panels"]
    heights = []
    for panel in panels:
        lines = len(panel["lines"]) + len(panel["references"]) + GAP
        heights += [0.75 + CELL_HEIGHT * lines, PROFILE_HEIGHT]
    widest = max(len(panel["columns"]) for panel in panels)
    width = 2 * (0.5 + CELL_WIDTH * max(widest, 3)) + 3.4
    title = f"Sweep {content['sweep']}: {content['title']} {scale_note(content)}"
    size = (width, sum(heights) + 1.0)
    with picture(folder / "sweep", size=size, title=title) as (figure, paths):
        axes = figure.subplots(
            2 * len(panels), 2, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for number, panel in enumerate(panels):
            for place, measure in enumerate((CHOSEN_ON, SHOWN)):
                is_left = place == 0
                heat, profile = axes[2 * number][place], axes[2 * number + 1][place]
                _draw_heat(heat, content, panel, measure, has_labels=is_left)
                _draw_profile(profile, content, panel, measure)
                if not is_left:
                    _draw_legend(profile, panel)
        figure.supxlabel(NOTE, fontsize=7, x=0.01, ha="left")
    return paths


def _labels(panel: Mapping[str, Any]) -> list[str]:
    """Return how the lines of a panel are called, those of the grid first."""
    before = f"{panel['row']} = " if panel["row"] else ""
    labels = [f"{before}{line}" for line in panel["lines"]]
    labels += [reference["label"] for reference in panel["references"]]
    return [math_label(label) for label in labels]


def _draw_legend(axes: Any, panel: Mapping[str, Any]) -> None:
    """Name the lines of a profile on its right, in the order of the heat map."""
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    shown = [label for label in _labels(panel) if label in known]
    axes.legend(
        [known[label] for label in shown], shown,
        loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8,
    )  # fmt: skip


def _name(content: Mapping[str, Any], panel: Mapping[str, Any], measure: str) -> str:
    score = content["scores"][panel["experiment"]][measure]
    return f"{score['label'][:1].upper()}{score['label'][1:]}, {score['split']} split"


# ---------------------------------------------------------------------- heat map


def _draw_heat(
    axes: Any,
    content: Mapping[str, Any],
    panel: Mapping[str, Any],
    measure: str,
    *,
    has_labels: bool,
) -> None:
    """Draw the grid, and below it the references, a line each."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("sweep", COLOURS)
    score = content["scores"][panel["experiment"]][measure]
    num_columns, num_lines = len(panel["columns"]), len(panel["lines"])
    low, high = _limits(content, panel, measure)
    lines: list[tuple[float, Sequence[int]]] = list(enumerate(map(tuple, panel["grid"])))
    first = num_lines + GAP
    lines += [(first + i, ref["cells"]) for i, ref in enumerate(panel["references"])]
    for y, cells in lines:
        for x, cell in enumerate(cells):
            row = content["rows"][cell]
            width = num_columns if len(cells) == 1 and row["is_reference"] else 1
            mean = row[measure]["mean"]
            share = None
            if mean is not None:
                share = min(max((mean - low) / (high - low), 0.0), 1.0) if high > low else 0.5
                share = 1 - share if score["better"] == "lower" else share
            colour = None if share is None else colours(share)
            _draw_cell(axes, row, panel, cell, measure, (x, y, width), colour, score["decimals"])
    labels = _labels(panel)
    axes.set_yticks([y + 0.5 for y, _ in lines], labels if has_labels else [""] * len(lines))
    axes.set_xticks([x + 0.5 for x in range(num_columns)], panel["columns"])
    axes.set_xlim(0, num_columns)
    axes.set_ylim(lines[-1][0] + 1, 0)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    head = panel_title(panel) if has_labels else ""
    axes.set_title(f"{head}\n{_name(content, panel, measure)}", fontsize=9, loc="left")


def _draw_cell(
    axes: Any,
    row: Mapping[str, Any],
    panel: Mapping[str, Any],
    cell: int,
    measure: str,
    place: tuple[float, float, float],
    colour: Any,
    decimals: int,
) -> None:
    """Draw one cell: its colour, its mean and interval, its frames.

    Args:
        axes: of matplotlib.
        row: of the content.
        panel: of the content.
        cell: number of the row.
        measure: which of its scores.
        place: left, top and width, in cells.
        colour: None where there is no value.
        decimals: of the text.
    """
    x, y, width = place
    gap = 0.03
    box: Any = {"xy": (x + gap, y + gap), "width": width - 2 * gap, "height": 1 - 2 * gap}
    middle, summary = x + width / 2, row[measure]
    if colour is None:
        _patch(axes, box, facecolor="white", edgecolor="#c4c4c4", hatch="////", linewidth=0)
        axes.text(
            middle, y + 0.5, cell_state(row), ha="center", va="center", fontsize=7, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    else:
        _patch(axes, box, facecolor=colour, linewidth=0)
        red, green, blue, _ = colour
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK
        best = panel["best"][measure]
        star = f"{BEST} " if cell == best["cell"] else ""
        axes.text(
            middle, y + 0.38, f"{star}{summary['mean']:.{decimals}f}",
            ha="center", va="center", fontsize=9, color=ink, weight="bold" if star else "normal",
        )  # fmt: skip
        half = "" if summary["half"] is None else f"± {summary['half']:.{decimals}f}, "
        axes.text(
            middle, y + 0.72, f"{half}n = {summary['n']}",
            ha="center", va="center", fontsize=6.5, color=ink,
        )  # fmt: skip
        if cell in best["tied"]:
            _frame(axes, place, 0.11, edgecolor=ink, linestyle=(0, (1, 2)), linewidth=1.1)
    if any(run["state"] == "failed" for run in row["all_runs"]):
        _frame(axes, place, 0.03, edgecolor=FAILED, linewidth=2.2)
    if cell in [chosen["cell"] for chosen in panel["chosen"]]:
        _frame(axes, place, 0.03, edgecolor=INK, linewidth=2.2)
        _frame(axes, place, 0.07, edgecolor="white", linewidth=1)


def _patch(axes: Any, box: Mapping[str, Any], **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(**box, **style))


def _frame(axes: Any, place: tuple[float, float, float], inset: float, **style: Any) -> None:
    """Draw a frame, `inset` cells of height within a cell."""
    x, y, width = place
    across = inset * CELL_HEIGHT / CELL_WIDTH
    box = {"xy": (x + across, y + inset), "width": width - 2 * across, "height": 1 - 2 * inset}
    _patch(axes, box, facecolor="none", **style)


def _limits(
    content: Mapping[str, Any], panel: Mapping[str, Any], measure: str
) -> tuple[float, float]:
    """Return the means at the ends of the colours, of the grid without the references.

    A cell far worse than most must not press all others into one colour: the range is cut at three
    times the distance from the median to the best.
    """
    cells = [cell for line in panel["grid"] for cell in line]
    means = [content["rows"][cell][measure]["mean"] for cell in cells]
    known = [mean for mean in means if mean is not None]
    if not known:
        return 0.0, 1.0
    low, high, median = min(known), max(known), statistics.median(known)
    score = content["scores"][panel["experiment"]][measure]
    least = 10.0 ** -score["decimals"]
    if high - low < least:  # what is printed as the same has the same colour
        return (low + high) / 2 - 50 * least, (low + high) / 2 + 50 * least
    if score["better"] == "higher":
        return (max(low, median - 3 * (high - median)) if high > median else low), high
    return low, (min(high, median + 3 * (median - low)) if low < median else high)


# ---------------------------------------------------------------------- profiles


def _draw_profile(
    axes: Any, content: Mapping[str, Any], panel: Mapping[str, Any], measure: str
) -> None:
    """Draw a curve a line of the grid, and the references in grey."""
    num_lines, num_columns = len(panel["grid"]), len(panel["columns"])
    labels = _labels(panel)
    low, high = _profile_limits(content, panel, measure)
    for number, cells in enumerate(panel["grid"]):
        colour, marker = LINES[number % len(LINES)]
        shift = 0.5 + 0.07 * (number - (num_lines - 1) / 2)
        _curve(axes, content, cells, measure, shift, label=labels[number], color=colour,
               marker=marker, linewidth=1.3)  # fmt: skip
    for number, reference in enumerate(panel["references"]):
        cells, style = reference["cells"], ("--", ":", "-.")[number % 3]
        label = labels[num_lines + number]
        if len(cells) > 1:
            _curve(axes, content, cells, measure, 0.5, label=label, color=GREY, marker="x",
                   linestyle=style, linewidth=1.2, zorder=1)  # fmt: skip
            continue
        summary = content["rows"][cells[0]][measure]
        if summary["mean"] is None:
            continue
        axes.axhline(summary["mean"], color=GREY, linestyle=style, linewidth=1.2, label=label)
        if summary["half"] is not None:
            ends = summary["mean"] - summary["half"], summary["mean"] + summary["half"]
            axes.axhspan(*ends, color=GREY, alpha=0.12, linewidth=0)
    _draw_far(axes, content, panel, measure, low, high)
    axes.set_ylim(low, high)
    axes.set_xlim(0, num_columns)
    axes.set_xticks([x + 0.5 for x in range(num_columns)], panel["columns"])
    axes.set_xlabel(math_label(panel["column"]))
    axes.set_ylabel(_name(content, panel, measure).partition(",")[0])
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.3)


def _profile_limits(
    content: Mapping[str, Any], panel: Mapping[str, Any], measure: str
) -> tuple[float, float]:
    """Return the ends of the y axis: the grid, usual intervals, and references that are near."""
    low, high = _limits(content, panel, measure)
    width = high - low or abs(high) / 20 or 1.0
    rows = [content["rows"][cell] for line in panel["grid"] for cell in line]
    halves = [row[measure]["half"] for row in rows if row[measure]["half"] is not None]
    usual = min(statistics.median(halves), 2 * width) if halves else 0.0
    low, high = low - usual, high + usual
    near = [mean for mean in _reference_means(content, panel, measure).values() if mean is not None]
    near = [mean for mean in near if low - 2 * width <= mean <= high + 2 * width]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _reference_means(
    content: Mapping[str, Any], panel: Mapping[str, Any], measure: str
) -> dict[int, float | None]:
    """Return the means of the references, by number of the row."""
    cells = [cell for reference in panel["references"] for cell in reference["cells"]]
    return {cell: content["rows"][cell][measure]["mean"] for cell in cells}


def _draw_far(
    axes: Any,
    content: Mapping[str, Any],
    panel: Mapping[str, Any],
    measure: str,
    low: float,
    high: float,
) -> None:
    """Write the references that lie wholly outside the panel at the edge where they would be."""
    means = _reference_means(content, panel, measure)
    for is_above in (False, True):
        texts = []
        for label, reference in zip(
            _labels(panel)[len(panel["grid"]) :], panel["references"], strict=True
        ):
            known = [mean for cell in reference["cells"] if (mean := means[cell]) is not None]
            nearest = None if not known else min(known) if is_above else max(known)
            if nearest is not None and (nearest > high if is_above else nearest < low):
                score = content["scores"][panel["experiment"]][measure]
                texts.append(f"{'▴' if is_above else '▾'} {label}: {nearest:.{score['decimals']}f}")
        if texts:
            y, va = (0.97, "top") if is_above else (0.03, "bottom")
            axes.text(
                0.01, y, "\n".join(texts), transform=axes.transAxes, va=va, fontsize=7,
                color="#5f5f5f",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
            )  # fmt: skip


def _curve(
    axes: Any,
    content: Mapping[str, Any],
    cells: Sequence[int],
    measure: str,
    shift: float,
    **style: Any,
) -> None:
    """Draw the means of some cells with their intervals, what is missing left out."""
    known = [(x, content["rows"][cell][measure]) for x, cell in enumerate(cells)]
    known = [(x, summary) for x, summary in known if summary["mean"] is not None]
    axes.errorbar(
        [x + shift for x, _ in known],
        [summary["mean"] for _, summary in known],
        yerr=[summary["half"] or 0.0 for _, summary in known],
        markersize=4, capsize=2, elinewidth=0.8, **style,
    )  # fmt: skip
