"""The geometry of the report's charts: where everything stands. The templates only draw it.

A strip has places in per cent of its width, so that it keeps its proportions at any width. A panel
has places in units of its view box.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.htmlreport.comparisons import Difference, number, signed

#: half of the width of a strip that its axis takes, in per cent; the rest is for arrows.
_HALF = 45.0
#: how far, in axes, a row may lie outside before it becomes an arrow.
_STRETCH = 1.15
#: labels of points: columns closer than this share theirs; distance of two labels.
_LABEL = (18, 10)
#: a curve of fewer points says nothing.
NUM_STEPS = 3
#: view box of a panel, and the room around its axes (left, top, right, bottom).
PANEL = (360, 226)
_LEFT, _TOP, _RIGHT, _BOTTOM = 44, 8, 12, 32


@dataclass(frozen=True)
class Strip:
    """A row of a forest plot, in per cent of the width.

    `side` is ``left`` or ``right`` where the mean lies outside; then there is no `mean`.
    """

    mean: float | None
    low: float | None
    high: float | None
    side: str | None
    paper: float | None


@dataclass(frozen=True)
class Forest:
    """A forest plot of one column.

    Attributes:
        strips: one a row; None for LoRA and for rows without a value.
        ticks: place in per cent, and label.
        better: side of zero on which a method is better than LoRA.
    """

    strips: list[Strip | None]
    ticks: list[tuple[float, str]]
    better: str


@dataclass(frozen=True)
class Line:
    """A curve of a panel: one path a seed, and one of their mean where there are several."""

    key: str
    label: str
    seeds: tuple[str, ...]
    mean: str
    last: str


@dataclass(frozen=True)
class Panel:
    """Curves over one axis, or points.

    Attributes:
        title: what it shows.
        x_label: the quantity of the x axis.
        x_ticks: place and label.
        y_ticks: place and label.
        lines: the curves, what matters most last.
        points: the points.
        clipped: whether curves leave the panel at the top.
    """

    title: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: tuple[Line, ...] = ()
    points: tuple[Mapping[str, Any], ...] = ()
    clipped: bool = False


def forest(differences: Sequence[Difference | None], column: Mapping[str, Any]) -> Forest | None:
    """Return the forest plot of a column, or None where nothing can be compared.

    The axis has zero in its middle. It holds the paper's differences, and the rows that do not lie
    far outside; the others become arrows.
    """
    known = [d for d in differences if d is not None and d.mean is not None]
    if not known:
        return None
    limit = _limit(known)
    step = _few_steps(limit)
    counts = range(-int(limit / step), int(limit / step) + 1)
    decimals = _decimals(step)
    return Forest(
        strips=[None if d is None or d.mean is None else _strip(d, limit) for d in differences],
        ticks=[(_place(i * step, limit), signed(i * step, decimals)) for i in counts],
        better="right" if column["better"] == "higher" else "left",
    )


def _limit(known: Sequence[Difference]) -> float:
    """Return the end of the axis: the paper's differences, and the usual row with its interval."""
    reach = [
        max(abs(value) for value in (d.mean, d.low, d.high) if value is not None) for d in known
    ]
    means = [abs(d.mean or 0.0) for d in known]
    papers = [abs(d.paper) for d in known if d.paper is not None]
    usual = max([statistics.median(reach), statistics.median(means) * 1.5, *papers])
    return min(usual, max([*reach, *papers])) * 1.08 or 1.0


def _place(value: float, limit: float) -> float:
    return round(50 + _HALF * value / limit, 2)


def _strip(difference: Difference, limit: float) -> Strip:
    def inside(value: float | None) -> float | None:
        reach = limit * _STRETCH / 1.08
        return None if value is None else _place(max(-reach, min(reach, value)), limit)

    assert difference.mean is not None
    paper = inside(difference.paper)
    if abs(difference.mean) > limit:
        return Strip(None, None, None, "right" if difference.mean > 0 else "left", paper)
    low, high = inside(difference.low), inside(difference.high)
    return Strip(inside(difference.mean), low, high, None, paper)


def curves(
    title: str, series: Sequence[tuple[str, str, Mapping[int, Mapping[float, float]]]]
) -> Panel | None:
    """Return curves over steps, or None where no curve has `NUM_STEPS` points.

    Args:
        title: of the panel.
        series: key of the style, label, and by seed the value at each step.
    """
    kept = [(key, label, _drawable(seeds)) for key, label, seeds in series]
    kept = [item for item in kept if item[2]]
    values = [v for _, _, seeds in kept for curve in seeds.values() for v in curve.values()]
    if not values:
        return None
    steps = [s for _, _, seeds in kept for curve in seeds.values() for s in curve]
    top = _top([_mean_curve(seeds) for _, _, seeds in kept], values)
    x, x_ticks = _axis(min(steps), max(steps), _LEFT, PANEL[0] - _RIGHT, 4)
    y, y_ticks = _axis(min(values), top, PANEL[1] - _BOTTOM, _TOP, 4)
    lines = []
    for key, label, seeds in kept:
        mean = _mean_curve(seeds)
        lines.append(
            Line(
                key=key,
                label=label,
                seeds=tuple(_path(c, x, y) for c in seeds.values()) if len(seeds) > 1 else (),
                mean=_path(mean, x, y),
                last=number(mean[max(mean)], 3),
            )
        )
    return Panel(title, "step", x_ticks, y_ticks, tuple(lines), clipped=max(values) > top)


def _drawable(seeds: Mapping[int, Mapping[float, float]]) -> dict[int, Mapping[float, float]]:
    finite = {
        seed: {s: v for s, v in curve.items() if math.isfinite(v)} for seed, curve in seeds.items()
    }
    return {seed: curve for seed, curve in finite.items() if len(curve) >= NUM_STEPS}


def _mean_curve(seeds: Mapping[int, Mapping[float, float]]) -> dict[float, float]:
    """Return the mean over the seeds at the steps that all have, else the first seed."""
    common = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
    if len(common) < 2:
        return dict(next(iter(seeds.values())))
    return {s: math.fsum(c[s] for c in seeds.values()) / len(seeds) for s in common}


def _top(means: Sequence[Mapping[float, float]], values: Sequence[float]) -> float:
    """Return the upper end of the axis; a row that is far above the usual ones is cut."""
    highest = [max(curve.values()) for curve in means]
    lowest = min(min(curve.values()) for curve in means)
    usual = lowest + 1.6 * (statistics.median(highest) - lowest)
    return min(max(values), usual) if usual > lowest else max(values)


def scatter(
    title: str, x_label: str, points: Sequence[Mapping[str, Any]], decimals: int
) -> Panel | None:
    """Return points over a logarithmic axis, or None where there are fewer than two.

    Args:
        title: of the panel.
        x_label: of its x axis.
        points: each with ``x`` (positive), ``y``, ``low``, ``high`` (or None), and what is shown.
        decimals: of the y axis.
    """
    kept = [p for p in points if p["x"] and p["y"] is not None]
    if len(kept) < 2:
        return None
    logs = [math.log10(p["x"]) for p in kept]
    pad = max(0.08 * (max(logs) - min(logs)), 0.15)
    ends = [end for p in kept for end in (p["low"], p["y"], p["high"]) if end is not None]
    start, stop = min(logs) - pad, max(logs) + pad
    x = _linear(start, stop, _LEFT, PANEL[0] - 2 * _RIGHT)
    y, y_ticks = _axis(min(ends), max(ends), PANEL[1] - _BOTTOM - 6, _TOP + 6, 4)
    powers = range(math.ceil(start), math.floor(stop) + 1)
    x_ticks = [(x(power), _power(power)) for power in powers]
    placed = [
        {
            **p,
            "cx": x(math.log10(p["x"])),
            "cy": y(p["y"]),
            "top": None if p["high"] is None else y(p["high"]),
            "bottom": None if p["low"] is None else y(p["low"]),
        }
        for p in kept
    ]
    return Panel(title, x_label, x_ticks, y_ticks, points=tuple(_labelled(placed)))


def _labelled(points: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield the points with the places of their labels: to the right, none on another."""
    columns: list[list[dict[str, Any]]] = []
    for point in sorted(points, key=lambda p: (p["cx"], p["cy"])):
        if not columns or point["cx"] - columns[-1][0]["cx"] > _LABEL[0]:
            columns.append([])
        columns[-1].append(point)
    for column in columns:
        right = max(point["cx"] for point in column) + 9
        column.sort(key=lambda p: (p["cy"], p["number"]))
        places = _spread([point["cy"] for point in column], _LABEL[1])
        for point, place in zip(column, places, strict=True):
            yield {**point, "label_x": round(right, 1), "label_y": place}


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Return rising places moved as little as needs be, so that two are `gap` apart."""
    blocks: list[list[float]] = []  # sum of the wished places, count
    for place in places:
        blocks.append([place, 1])
        while len(blocks) > 1:
            (low, n), (high, m) = blocks[-2], blocks[-1]
            if high / m - low / n >= gap * (n + m) / 2:
                break
            blocks[-2:] = [[low + high, n + m]]
    spread: list[float] = []
    for total, count in blocks:
        start = total / count - gap * (count - 1) / 2
        spread += [round(start + gap * i, 1) for i in range(int(count))]
    return spread


def _axis(
    low: float, high: float, start: float, stop: float, num: int
) -> tuple[Any, list[tuple[float, str]]]:
    """Return the map from values to places, and about `num` ticks."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    to = _linear(low, high, start, stop)
    step = _step(high - low, num)
    decimals = _decimals(step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return to, [(to(i * step), number(i * step, decimals)) for i in range(first, last + 1)]


def _linear(low: float, high: float, start: float, stop: float) -> Any:
    def place(value: float) -> float:
        share = (min(value, high) - low) / (high - low)
        return round(start + share * (stop - start), 1)

    return place


def _path(curve: Mapping[float, float], x: Any, y: Any) -> str:
    places = [f"{x(step):g} {y(curve[step]):g}" for step in sorted(curve)]
    return "M" + "L".join(places)


def _step(length: float, num: int) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that fits `num` times or more."""
    raw = length / num
    power = 10.0 ** math.floor(math.log10(raw))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= raw * (1 + 1e-9))


def _few_steps(limit: float) -> float:
    """Return the least step of 1, 2 or 5 times a power of ten of which one or two fit `limit`."""
    power = 10.0 ** math.floor(math.log10(limit))
    return min(f * power for f in (0.5, 1, 2, 5) if limit / (f * power) < 3)


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _power(power: int) -> str:
    units = {3: "1 k", 4: "10 k", 5: "100 k", 6: "1 M", 7: "10 M", 8: "100 M", 9: "1 G"}
    return units.get(power, f"1e{power}")
