"""The picture of a study: scores by number of the trial and by each setting, a panel each.

Made from the content of ``study.json`` and of nothing else.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.reporting.figures import math_label, picture, scale_note
from scripts.sweeping.content import CHOSEN_ON, SHOWN

#: colour-blind safe (Okabe and Ito).
DONE, BEST, PRUNED, ABSENT, LINE = "#0072B2", "#D55E00", "#8a8a8a", "#c62828", "#009E73"
#: panels beside each other.
ACROSS = 4
NOTE = (
    "One run with one seed a mark. Star: best on the validation split. Grey triangles: pruned, at "
    "the validation score where they were given up;\n"
    "red crosses: no score (failed, refused, held or not run). Marks at the upper or lower edge "
    "lie beyond it. The best of many looks better than it is."
)


def draw_study(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a study to ``folder/study.{svg,png}``; return the files.

    Args:
        content: from `scripts.sweeping.study_view.build_study`.
        folder: exists.
    """
    places: list[Mapping[str, Any] | None] = [None, *content["axes"]]
    across = min(ACROSS, len(places))
    bands = -(-len(places) // across)
    title = f"{content['sweep']}: {content['title']} {scale_note(content)}"
    size = (max(1.0 + 2.6 * across, 7.4), 0.9 + bands * 4.2)
    with picture(folder / "study", size=size, title=title) as (figure, paths):
        panels = figure.subplots(2 * bands, across, squeeze=False)
        for number, (band, column) in enumerate(itertools.product(range(bands), range(across))):
            for row, measure in enumerate((CHOSEN_ON, SHOWN)):
                panel = panels[2 * band + row][column]
                if number >= len(places):
                    panel.set_axis_off()
                    continue
                _draw_panel(panel, content, places[number], measure)
                if column == 0:
                    panel.set_ylabel(_name(content, measure))
        figure.supxlabel(NOTE, fontsize=7, x=0.01, ha="left")
    return paths


def _name(content: Mapping[str, Any], measure: str) -> str:
    score = content["scores"][content["experiment"]][measure]
    return f"{score['label'][:1].upper()}{score['label'][1:]}, {score['split']} split"


def _draw_panel(
    panel: Any, content: Mapping[str, Any], axis: Mapping[str, Any] | None, measure: str
) -> None:
    """Draw one score against one setting, or against the number of the trial (`axis` None)."""
    low, high = _limits(content, measure)
    trials = content["trials"]
    for place, trial in zip(_places(trials, axis), trials, strict=True):
        is_pruned = trial["state"] == "pruned" and measure == CHOSEN_ON
        value = trial["last"] if is_pruned else trial[measure]
        if value is None:
            if trial["state"] not in ("done", "pruned"):
                panel.plot(place, low, "x", color=ABSENT, markersize=5, clip_on=False, zorder=4)
            continue
        y = min(max(value, low), high)
        if trial["trial"] == content["best"]:
            panel.plot(place, y, "*", color=BEST, markersize=13, zorder=5, clip_on=False)
        elif is_pruned:
            panel.plot(place, y, "v", color=PRUNED, fillstyle="none", markersize=5, clip_on=False)
        else:
            panel.plot(place, y, "o", color=DONE, alpha=0.75, markersize=5, clip_on=False)
    if axis is None:
        panel.set_xlabel("trial")
        panel.xaxis.get_major_locator().set_params(integer=True)
        if measure == CHOSEN_ON and (steps := list(_best_so_far(content))):
            xs, ys = zip(*steps, strict=True)
            clipped = [min(max(y, low), high) for y in ys]
            panel.step(xs, clipped, where="post", color=LINE, linewidth=1.2, zorder=1)
            panel.set_title("green: best so far", fontsize=8, loc="left")
    else:
        panel.set_xlabel(math_label(axis["label"]))
        if axis["kind"] == "choice":
            panel.set_xticks(range(len(axis["choices"])), axis["choices"], rotation=20)
            panel.set_xlim(-0.5, len(axis["choices"]) - 0.5)
        elif axis["is_log"]:
            panel.set_xscale("log")
            panel.set_xlim(axis["low"], axis["high"])
    panel.set_ylim(low, high)
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", alpha=0.3)


def _places(trials: Sequence[Mapping[str, Any]], axis: Mapping[str, Any] | None) -> Iterator[float]:
    for trial in trials:
        if axis is None:
            yield trial["trial"]
        elif axis["kind"] == "choice":
            yield axis["choices"].index(trial["params"][axis["key"]])
        else:
            yield trial["params"][axis["key"]]


def _best_so_far(content: Mapping[str, Any]) -> Iterator[tuple[int, float]]:
    """Yield number and best score up to there, from the first finished trial to the last trial."""
    score = content["scores"][content["experiment"]][CHOSEN_ON]
    better = max if score["better"] == "higher" else min
    best: float | None = None
    for trial in content["trials"]:
        value = trial[CHOSEN_ON]
        if value is not None:
            best = value if best is None else better(best, value)
        if best is not None:
            yield trial["trial"], best


def _limits(content: Mapping[str, Any], measure: str) -> tuple[float, float]:
    """Return the ends of the y axis: finished trials, the far worst left out.

    A trial far worse than most must not press all others into one line: the range is cut at three
    times the distance from the median to the best.
    """
    known = [trial[measure] for trial in content["trials"] if trial[measure] is not None]
    if not known:
        return 0.0, 1.0
    low, high, median = min(known), max(known), statistics.median(known)
    score = content["scores"][content["experiment"]][measure]
    if score["better"] == "higher" and high > median:
        low = max(low, median - 3 * (high - median))
    elif score["better"] == "lower" and low < median:
        high = min(high, median + 3 * (median - low))
    width = max(high - low, 10.0 ** -score["decimals"])
    return low - 0.08 * width, high + 0.08 * width
