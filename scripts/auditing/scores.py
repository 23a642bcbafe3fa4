"""Scores of ordinary runs by seed, and the differences of two of them over paired seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.auditing.limits import Judged
from scripts.auditing.words import Content
from scripts.reporting import stats

#: seed -> score in printed units.
BySeed = Mapping[int, float]
#: value on the x axis -> seed -> score.
Scores = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Difference:
    """A mean difference over paired seeds, and whether it is told from 0.

    Attributes:
        mean: over the seeds.
        ci95: its interval; None with one seed.
        direction: ``above``, ``below`` or ``not distinguishable`` by the interval; one seed has
            none: ``not judged``.
        end: the end of the interval that is nearest 0, against 0; None with one seed.
    """

    mean: float
    ci95: tuple[float, float] | None
    direction: str
    end: Judged | None


def difference(a: BySeed, b: BySeed, near_share: float) -> Difference | None:
    """Judge ``a - b`` over the seeds that both have; None: they share none.

    Args:
        a: scores by seed.
        b: scores by seed.
        near_share: the verdict is near its limit if an end of the interval is no farther from 0
            than this share of half its width.
    """
    gaps = minus(a, b)
    if not gaps:
        return None
    summary = stats.summarize(gaps.values())
    if summary.ci95 is None:
        return Difference(summary.mean, None, "not judged", None)
    low, high = summary.ci95
    end = min(low, high, key=abs)
    is_near = abs(end) <= near_share * (high - low) / 2
    if low <= 0 <= high:
        direction = "not distinguishable"
    else:
        direction = "above" if summary.mean > 0 else "below"
    return Difference(summary.mean, (low, high), direction, Judged(end, 0.0, is_near))


def minus(a: BySeed, b: BySeed) -> dict[int, float]:
    """Return ``a - b`` for every seed that both have."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def read_scores(runs: Content, part: str, row: str, settings: Content) -> Scores:
    """Return the scores of a row of ``dropout`` or ``low_resource``.

    Args:
        runs: ``<part>/<row>/<x>`` -> seed -> record.
        part: the first of these names.
        row: the second.
        settings: of the audit.
    """
    score = settings["score"]
    found: Scores = {}
    for name, by_seed in runs.items():
        which, _, rest = name.partition("/")
        mine, _, x = rest.partition("/")
        if (which, mine) == (part, row):
            found[x] = {
                seed: float(record["metrics"][score["metric"]]) * score["scale"]
                for seed, record in by_seed.items()
                if record["metrics"].get(score["metric"]) is not None
            }
    return {x: values for x, values in found.items() if values}


def positions(scores: Sequence[Scores]) -> list[str]:
    """Return the values on the x axis, ascending."""
    return sorted({x for by in scores for x in by}, key=float)


@dataclass(frozen=True)
class Point:
    """Mean score at one place of the x axis.

    Attributes:
        x: the place.
        mean: over the seeds.
        half: half of the 95 % interval; None with one seed.
        seeds: how many.
    """

    x: str
    mean: float
    half: float | None
    seeds: int


def curve(values: Scores) -> tuple[Point, ...]:
    """Return the points of a row, by ascending x."""
    points = []
    for x in sorted(values, key=float):
        summary = stats.summarize(values[x][seed] for seed in sorted(values[x]))
        points.append(Point(x, summary.mean, summary.half_width, summary.n))
    return tuple(points)


# ---------------------------------------------------------------------- words


def interval(found: Difference) -> str:
    """Return mean and interval with the sign, and a note where the verdict is near its limit."""
    if found.ci95 is None or found.end is None:
        return f"{found.mean:+.2f}, one seed"
    text = f"{found.mean:+.2f} [{found.ci95[0]:+.2f}, {found.ci95[1]:+.2f}]"
    if found.end.is_near:
        text += f", near the limit: {found.end.value:+.2f} against 0"
    return text


def cells(points: Sequence[Point], xs: Sequence[str]) -> list[str]:
    """Return the cells of a row of the table; nothing where there is no run."""
    by_x = {point.x: point for point in points}
    return [_cell(by_x[x]) if x in by_x else "" for x in xs]


def _cell(point: Point) -> str:
    half = "" if point.half is None else f" ± {point.half:.2f}"
    return f"{point.mean:.2f}{half} ({point.seeds})"


def drawn(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the data of a curve of a picture."""
    return [{"x": float(point.x), "mean": point.mean, "half": point.half} for point in points]
