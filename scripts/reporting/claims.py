"""Judge the claims of the paper from values by row, column and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.reporting import stats
from scripts.reporting.spec import Claim, Part, TableSpec

#: row -> column (or resource) -> seed -> value, in the units that the table prints.
Values = Mapping[str, Mapping[str, Mapping[int, float]]]

RESOURCE_LABELS = {
    "peak_memory_bytes": "peak memory",
    "step_time_s": "time of the training steps",
    "train_time_s": "training time",
    "predict_time_s": "decoding time",
    "tokens_per_s": "tokens per second",
}
#: what depends on the other runs of the same device.
TIMES = ("step_time_s", "train_time_s", "predict_time_s", "tokens_per_s")


@dataclass(frozen=True)
class Place:
    """Where a run was made.

    Attributes:
        device: its name.
        cells_on_device: how many runs it did at a time.
    """

    device: str
    cells_on_device: int


def judge_claims(
    spec: TableSpec, scores: Values, resources: Values, places: Mapping[str, Sequence[Place]]
) -> list[dict[str, Any]]:
    """Return the claims of a table with their verdicts, as in the results JSON.

    Args:
        spec: the table.
        scores: printed values of the columns.
        resources: bytes, seconds and rates.
        places: by row, where each of its runs was made.

    Returns:
        One mapping per claim. A claim of one part carries that part's difference and interval; with
        several parts these are null there and stand in ``parts``.
    """
    return [_judge_claim(spec, claim, scores, resources, places) for claim in spec.claims]


def compare_contrasts(spec: TableSpec, scores: Values) -> list[dict[str, Any]]:
    """Return the table's contrasts: paired differences that no claim is about."""
    contrasts = []
    for part in spec.contrasts:
        for other in part.against:
            for name in part.columns:
                difference = _difference(scores, part.row, other, name)
                reading = "undecided"
                if difference is not None and difference.ci95 is not None:
                    low, high = difference.ci95
                    reading = "above" if low > 0 else "below" if high < 0 else "no difference shown"
                comparison = _comparison(part.row, other, name, difference)
                contrasts.append({**comparison, "reading": reading})
    return contrasts


def _judge_claim(
    spec: TableSpec,
    claim: Claim,
    scores: Values,
    resources: Values,
    places: Mapping[str, Sequence[Place]],
) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in claim.parts:
        if part.expect == "comparable":
            parts += _judge_comparable(spec, part, resources, places)
        elif part.expect == "best":
            parts += [_judge_best(spec, part, name, scores) for name in part.columns]
        else:
            parts += _judge_direction(spec, part, scores)
    overall = stats.combine([stats.Judgement(p["verdict"], p["reason"]) for p in parts])
    single = parts[0] if len(parts) == 1 else {"difference": None, "ci95": None}
    return {
        "id": claim.id,
        "statement": claim.statement,
        "difference": single["difference"],
        "ci95": single["ci95"],
        "verdict": overall.verdict,
        "reason": overall.reason,
        "status": claim.status,
        "parts": parts,
    }


def _judge_direction(spec: TableSpec, part: Part, scores: Values) -> list[dict[str, Any]]:
    parts = []
    for other in part.against:
        for name in part.columns:
            column = spec.column(name)
            difference = _difference(scores, part.row, other, name)
            judgement = stats.judge_difference(
                difference, claims_positive=(part.expect == "better") == column.higher_is_better
            )
            statement = f"{_labels(spec, part.row, other)}, {column.label}"
            comparison = _comparison(part.row, other, name, difference)
            parts.append(_part(statement, comparison, judgement, part.paper.get(name)))
    return parts


def _judge_best(spec: TableSpec, part: Part, name: str, scores: Values) -> dict[str, Any]:
    """Judge "better than every other row"; the difference shown is that to the strongest one."""
    column = spec.column(name)
    sign = 1 if column.higher_is_better else -1
    differences = {other: _difference(scores, part.row, other, name) for other in part.against}
    judgement = stats.combine(
        [
            stats.judge_difference(difference, claims_positive=column.higher_is_better)
            for difference in differences.values()
        ]
    )
    margins = {other: sign * d.mean for other, d in differences.items() if d is not None}
    strongest = min(margins, key=lambda other: margins[other]) if margins else part.against[0]
    statement = (
        f"{spec.row(part.row).label} best of all rows, {column.label} "
        f"(difference to {spec.row(strongest).label})"
    )
    comparison = _comparison(part.row, strongest, name, differences[strongest])
    comparisons = [_comparison(part.row, other, name, d) for other, d in differences.items()]
    reason = f"against {len(differences)} rows: {judgement.reason}"
    judged = _part(statement, comparison, stats.Judgement(judgement.verdict, reason), None)
    return {**judged, "comparisons": comparisons}


def _judge_comparable(
    spec: TableSpec, part: Part, resources: Values, places: Mapping[str, Sequence[Place]]
) -> list[dict[str, Any]]:
    """Judge "costs at most so much more"; a time only from runs that had their device alone."""
    parts = []
    assert part.limit is not None
    for other in part.against:
        for name in part.resources:
            ours, theirs = (resources.get(row, {}) for row in (part.row, other))
            used, label = name, RESOURCE_LABELS[name]
            if name == "step_time_s" and not ours.get(name) and not theirs.get(name):
                used = "train_time_s"
                label = "whole training time, as that of the steps is not recorded"
            ratio = stats.paired_ratio(ours.get(used, {}), theirs.get(used, {}))
            judgement = stats.judge_at_most(ratio, limit=part.limit)
            together = [*places.get(part.row, ()), *places.get(other, ())]
            note = _why_not_comparable(together, is_time=used in TIMES)
            if note is not None:
                judgement = stats.Judgement(stats.UNDECIDED, note)
            statement = (
                f"{spec.row(part.row).label} relative to {spec.row(other).label}, "
                f"{label} (at most {(part.limit - 1) * 100:+.0f} %)"
            )
            comparison = _comparison(part.row, other, used, ratio, is_ratio=True)
            judged = _part(statement, comparison, judgement, None)
            parts.append(judged if note is None else {**judged, "note": note})
    return parts


def _why_not_comparable(places: Sequence[Place], *, is_time: bool) -> str | None:
    """Return why the costs of runs say nothing about one another, or None."""
    devices = sorted({place.device for place in places})
    if len(devices) > 1:
        return f"the runs were made on different devices ({'; '.join(devices)}); use one kind"
    num_shared = sum(place.cells_on_device > 1 for place in places)
    if is_time and num_shared:
        return (
            f"{num_shared} of {len(places)} runs shared their device; make the runs of "
            "these rows anew with WORKERS=number of devices (on a CPU: 1)"
        )
    return None


def _difference(scores: Values, row: str, other: str, column: str) -> stats.Summary | None:
    return stats.paired_difference(
        scores.get(row, {}).get(column, {}), scores.get(other, {}).get(column, {})
    )


def _comparison(
    row: str, other: str, column: str, summary: stats.Summary | None, *, is_ratio: bool = False
) -> dict[str, Any]:
    """Return a comparison; a ratio is given as relative difference (ratio - 1)."""
    shift = 1.0 if is_ratio else 0.0
    ends: Sequence[float] | None = None if summary is None else summary.ci95
    return {
        "row": row,
        "against": other,
        "column": column,
        "measure": "relative difference" if is_ratio else "difference",
        "difference": None if summary is None else summary.mean - shift,
        "ci95": None if ends is None else [end - shift for end in ends],
        "n": 0 if summary is None else summary.n,
    }


def _part(
    statement: str,
    comparison: Mapping[str, Any],
    judgement: stats.Judgement,
    paper_difference: float | None,
) -> dict[str, Any]:
    return {
        "statement": statement,
        **comparison,
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "paper_difference": paper_difference,
    }


def _labels(spec: TableSpec, row: str, other: str) -> str:
    return f"{spec.row(row).label} minus {spec.row(other).label}"
