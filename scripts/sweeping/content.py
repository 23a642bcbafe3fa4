"""The content of a sweep's view, from run records and from nothing else.

Two scores stand side by side: the one that cells are chosen on, of the validation split, and the
one that is shown, of the split that the task is scored on, which is the test split wherever its
labels are public. There the score of a chosen cell has had no part in its choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.reporting import stats
from scripts.reporting.results import Entry, facts_of
from scripts.runs.run import Run
from scripts.sweeping.spec import Axis, Experiment, Point, Refused, SweepSpec

#: the two scores of a cell.
CHOSEN_ON, SHOWN = "validation", "test"
MEASURES = (CHOSEN_ON, SHOWN)
#: corrected p value up to which a cell counts as worse than the best.
SIGNIFICANCE = 1 - stats.CONFIDENCE


def build(
    spec: SweepSpec,
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    entries: Sequence[Entry],
    refused: Refused,
) -> dict[str, Any]:
    """Return the content of ``sweep.json``; numbers are in the units of the tables.

    Args:
        spec: the sweep.
        scale: of its runs.
        seeds: that were asked for.
        extra: overrides of every run.
        entries: from `scripts.reporting.results.collect`, of the cells of `spec`.
        refused: why points without a cell have none.

    Raises:
        ValueError: the records must not stand together (scale, data, protocol, task version).
    """
    scores = {}
    for experiment in spec.experiments:
        run = next(entry.cell.run for entry in entries if entry.cell.on == experiment.name)
        scores[experiment.name] = scores_of(run, experiment.name, experiment.metric)
    points = spec.points()
    rows = [
        _row(point, experiment, scores[experiment.name], seeds, entries, refused)
        for experiment in spec.experiments
        for point in points
    ]
    return {
        "sweep": spec.name,
        **facts_of(spec.as_table(), scale, seeds, extra, entries),
        "axes": [
            {"name": a.name, "label": a.label, "key": a.key, "values": list(a.values)}
            for a in spec.axes
        ],
        "scores": scores,
        "rows": rows,
        "panels": [
            panel
            for number, e in enumerate(spec.experiments)
            for panel in _panels(spec, e, scores[e.name], points, rows, number * len(points))
        ],
    }


# ---------------------------------------------------------------------- scores


def scores_of(run: Run, on: str, metric: str | None = None) -> dict[str, dict[str, Any]]:
    """Return what a score is called and how it is printed: that of choice and that shown.

    Args:
        run: any of those whose scores they are.
        on: name of what it is trained on, for messages.
        metric: the score that is shown; None takes the first of the task.

    Raises:
        ValueError: the task has no such metric.
    """
    task = _task(run.config)
    specs = {each.name: each for each in task.metrics}
    name = metric or next(iter(specs), None)
    if name not in specs:
        raise ValueError(
            f"experiment {on}: its task has no metric {name!r}; "
            f"it has: {', '.join(specs) or 'none'}"
        )
    loss = {"name": "loss", "label": "loss", "scale": 1.0, "decimals": 3, "better": "lower"}
    chosen = task.selection_metric
    first = loss if chosen is None else _score(specs[chosen])
    return {
        CHOSEN_ON: {**first, "split": "validation"},
        SHOWN: {**_score(specs[name]), "split": task.scored_split},
        "others": {other: each.scale for other, each in specs.items()},
    }


def _task(config: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(config.task)


def _score(metric: Any) -> dict[str, Any]:
    return {
        "name": metric.name,
        "label": metric.label,
        "scale": float(metric.scale),
        "decimals": metric.decimals,
        "better": "higher" if metric.higher_is_better else "lower",
    }


def selection_name(config: Any) -> str:
    """Return the score of the validation split that a task is selected by, else ``loss``."""
    return _task(config).selection_metric or "loss"


def validation_value(record: Mapping[str, Any], name: str) -> float | None:
    """Return a score of the validation split, of the weights that the run was scored with.

    Args:
        record: of a completed run.
        name: of the score; stored value, not in the units of tables.

    Returns:
        The value; None where the run was not evaluated at its chosen step, or not with a number.
    """
    training = record["training"]
    for entry in reversed(training["validation"]):
        if entry["step"] == training["chosen_step"]:
            value = entry.get(name)
            return None if value is None or not math.isfinite(value) else float(value)
    return None


# ---------------------------------------------------------------------- rows


def _row(
    point: Point,
    experiment: Experiment,
    scores: Mapping[str, Any],
    seeds: Sequence[int],
    entries: Sequence[Entry],
    refused: Refused,
) -> dict[str, Any]:
    key = (point.name, experiment.name)
    mine = [entry for entry in entries if (entry.cell.row, entry.cell.on) == key]
    values: dict[str, dict[int, float]] = {measure: {} for measure in MEASURES}
    runs = []
    for entry in mine:
        found = values_of(entry.record, scores)
        for measure, value in found.items():
            if value is not None:
                values[measure][entry.cell.seed] = value
        runs.append(
            {
                "seed": entry.cell.seed,
                "signature": entry.cell.signature,
                "state": entry.state,
                "reason": "" if entry.record is not None else entry.reason,
                **found,
                "scores": all_scores(entry.record, scores),
            }
        )
    if not mine:  # the settings do not compose
        why = {"signature": None, "state": "refused", "reason": refused[key]}
        nothing = values_of(None, scores)
        runs = [{"seed": seed, **why, **nothing, "scores": {}} for seed in seeds]
    return {
        "point": point.name,
        "experiment": experiment.name,
        "method": point.method,
        "label": point.label,
        "values": dict(point.values),
        "overrides": list(point.overrides),
        "is_reference": point.is_reference,
        **{measure: _summary(values[measure]) for measure in MEASURES},
        "all_runs": runs,
        "runs": [run["signature"] for run in runs if run["state"] == "done"],
        "absent": [
            {
                "run": experiment.name,
                **{k: run[k] for k in ("seed", "signature", "state", "reason")},
            }
            for run in runs
            if run["state"] != "done"
        ],
    }


def values_of(
    record: Mapping[str, Any] | None, scores: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return both scores of a run in the units of tables."""
    if record is None:
        return {CHOSEN_ON: None, SHOWN: None}
    chosen, shown = scores[CHOSEN_ON], scores[SHOWN]
    raw = {
        CHOSEN_ON: validation_value(record, chosen["name"]),
        SHOWN: record["metrics"].get(shown["name"]),
    }
    return {
        measure: None if value is None else float(value) * scores[measure]["scale"]
        for measure, value in raw.items()
    }


def all_scores(record: Mapping[str, Any] | None, scores: Mapping[str, Any]) -> dict[str, float]:
    """Return every test score of a run; ``best_epoch/<metric>`` has the unit of its metric."""
    if record is None:
        return {}
    scales = scores["others"]
    return {
        name: float(value) * scales.get(name.rpartition("/")[2], 1.0)
        for name, value in record["metrics"].items()
        if value is not None
    }


def _summary(values: Mapping[int, float]) -> dict[str, Any]:
    by_seed = {str(seed): values[seed] for seed in sorted(values)}
    if not values:
        return {"mean": None, "std": None, "n": 0, "half": None, "values": by_seed}
    found = stats.summarize(by_seed.values())
    return {
        "mean": found.mean,
        "std": found.std,
        "n": found.n,
        "half": found.half_width,
        "values": by_seed,
    }


def by_seed(summary: Mapping[str, Any]) -> dict[int, float]:
    """Return the values of a row's score by seed."""
    return {int(seed): value for seed, value in summary["values"].items()}


# ---------------------------------------------------------------------- panels


def _panels(
    spec: SweepSpec,
    experiment: Experiment,
    scores: Mapping[str, Any],
    points: Sequence[Point],
    rows: Sequence[Mapping[str, Any]],
    offset: int,
) -> list[dict[str, Any]]:
    """Return the heat maps of an experiment; cells are numbers of `rows`, from `offset` on.

    With one axis there is one, a line a method. With two there is one a method, the second axis
    from top to bottom; further axes give one for each of their values.
    """
    place = {(p.method, *p.values.values()): offset + i for i, p in enumerate(points)}
    first = spec.axes[0]
    references = [
        {
            "label": method.label,
            "cells": [
                place[(method.name, value) if method.along else (method.name,)]
                for value in (first.values if method.along else ("",))
            ],
        }
        for method in spec.references
    ]
    common = {"experiment": experiment.name, "columns": list(first.values), "column": first.label}
    panels: list[dict[str, Any]] = []
    if len(spec.axes) == 1:
        grid = [[place[m.name, value] for value in first.values] for m in spec.methods]
        lines = [method.label for method in spec.methods]
        panels.append({**common, "title": "", "row": "", "lines": lines, "grid": grid})
    else:
        second, *others = spec.axes[1:]
        for method in spec.methods:
            for rest in itertools.product(*(axis.values for axis in others)):
                grid = [
                    [place[(method.name, v, w, *rest)] for v in first.values] for w in second.values
                ]
                panels.append(
                    {
                        **common,
                        "title": _title(method.label, others, rest),
                        "row": second.label,
                        "lines": list(second.values),
                        "grid": grid,
                    }
                )
    for panel in panels:
        panel["references"] = references
        cells = [cell for line in panel["grid"] for cell in line]
        panel["best"] = {m: _best(cells, rows, m, scores[m]) for m in MEASURES}
        groups = panel["grid"] if len(spec.axes) == 1 else [cells]
        panel["chosen"] = [_choose(group, references, rows, scores) for group in groups]
    return panels


def _title(label: str, axes: Sequence[Axis], values: Sequence[str]) -> str:
    setting = [f"{axis.label} = {value}" for axis, value in zip(axes, values, strict=True)]
    return ", ".join([label, *setting])


def _best(
    cells: Sequence[int], rows: Sequence[Mapping[str, Any]], measure: str, score: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the cell with the best mean, and those that cannot be told from it.

    A cell with fewer seeds than others is never the best. The others are compared with the best by
    the paired t test over common seeds, corrected for their number (Holm); a cell with fewer than
    two common seeds is not compared.
    """
    known = [cell for cell in cells if rows[cell][measure]["n"] > 0]
    most = max((rows[cell][measure]["n"] for cell in known), default=0)
    whole = [cell for cell in known if rows[cell][measure]["n"] == most]
    if not whole:
        return {"cell": None, "tied": [], "compared": 0, "p": {}}
    sign = 1.0 if score["better"] == "higher" else -1.0
    best = max(whole, key=lambda cell: sign * rows[cell][measure]["mean"])
    found = {}
    for cell in known:
        if cell != best:
            pair = (by_seed(rows[cell][measure]), by_seed(rows[best][measure]))
            found[cell] = stats.paired_p_value(*pair)
    tested = {cell: p for cell, p in found.items() if p is not None}
    corrected = dict(zip(tested, stats.holm(list(tested.values())), strict=True))
    return {
        "cell": best,
        "tied": [cell for cell, p in corrected.items() if p > SIGNIFICANCE],
        "compared": len(corrected),
        "p": {str(cell): p for cell, p in corrected.items()},
    }


def _choose(
    cells: Sequence[int],
    references: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the best cell of the validation split, and its test score beside the references."""
    found = _best(cells, rows, CHOSEN_ON, scores[CHOSEN_ON])
    best = found["cell"]
    against = []
    if best is not None:
        for reference in references:
            for cell in reference["cells"]:
                pair = (by_seed(rows[best][SHOWN]), by_seed(rows[cell][SHOWN]))
                difference = stats.paired_difference(*pair)
                if difference is not None and _belongs(rows[best], rows[cell]):
                    ends = None if difference.ci95 is None else list(difference.ci95)
                    against.append(
                        {"cell": cell, "difference": difference.mean, "ci95": ends,
                         "n": difference.n}
                    )  # fmt: skip
    return {
        "cell": best,
        "tied": found["tied"],
        "of": len(cells),
        "compared": found["compared"],
        "against": against,
    }


def _belongs(row: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """Return whether a reference has the values of a row, of the axes that it has."""
    return all(row["values"].get(axis) == value for axis, value in reference["values"].items())
