"""How much of what is uncertain in a mean comes from its seeds, and how much from its test items.

A mean over n seeds has two standard errors:

* of seeds, what another n trainings would change: the sample standard deviation over seeds by the
  root of n;
* of test items, what another test set of the same size and kind would change: the standard
  deviation over resamples of the test set (`scripts.runs.item_spread`) of the mean over the seeds,
  which are all scored on the same resample.

A difference to LoRA has both as well. It is of the same seeds and the same items on both sides, so
its parts are those of the paired difference, resample by resample, and much of what an easy or a
hard test set does to both cancels. A mean over tasks resamples the test set of each by itself.

The part of items of few seeds also holds a little of how seeds and items act together, which the
part of seeds holds as well; shares are therefore rough.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scripts.reporting import stats
from scripts.reporting.spec import Column, TableSpec
from scripts.runs.item_spread import deviations_of

if TYPE_CHECKING:
    from scripts.reporting.results import Entry

#: the row that all others are compared to.
BASE = "lora"
#: column -> seed -> value in printed units.
Scores = Mapping[str, Mapping[int, float]]
#: column -> seed -> items of the test set, and deviations of its resamples in printed units.
Draws = dict[str, dict[int, tuple[int, NDArray[np.float64]]]]

WHAT_IT_IS = (
    "Two standard errors of each mean: that of its seeds, and that of its test items (a bootstrap "
    "over the test set, the same resamples for all rows); in parentheses the items' share of both "
    "variances together. The 95 % intervals over seeds do not hold the choice of test items: more "
    "seeds make the first smaller, only more test items the second. A difference compares methods "
    "on the same items, so much of their part cancels in it."
)


def spread_of(
    spec: TableSpec, scores: Mapping[str, Scores], done: Sequence[Entry]
) -> dict[str, Any]:
    """Return both standard errors of each score of a table, and of its differences to LoRA.

    Args:
        spec: the table.
        scores: by row, in printed units.
        done: its completed runs.

    Returns:
        JSON values: ``rows``, one for each row and column with a spread over items: ``method``,
        ``column``, ``num_items``, ``score`` and ``difference`` (None without LoRA), each with
        ``n``, ``seeds``, ``items`` and ``items_share`` (None where n is 1 or nothing spreads);
        ``not_measured``: why others are not in it.
    """
    reasons: dict[str, None] = {}
    draws = {row.name: _draws(spec, row.name, done, reasons) for row in spec.rows}
    rows = []
    for row in spec.rows:
        for column in spec.columns:
            own, base = (
                (scores[name][column.name], draws[name][column.name])
                for name in (row.name, BASE if BASE in scores else row.name)
            )
            score = _parts(*own)
            if score is None:
                continue
            has_difference = row.name != BASE and BASE in scores
            rows.append(
                {
                    "method": row.name,
                    "column": column.name,
                    "num_items": next(iter(own[1].values()))[0],
                    "score": score,
                    "difference": _parts(*_minus(own, base)) if has_difference else None,
                }
            )
    without = sum("item_spread" not in (entry.record or {}) for entry in done)
    if without:
        reasons[f"the records of {without} of {len(done)} runs hold no spread over test items"] = (
            None
        )
    return {"rows": rows, "not_measured": list(reasons)}


def share_words(spread: Mapping[str, Any]) -> str | None:
    """Return the usual share of test items in one sentence, or None where it is not measured."""
    words = []
    for key, name in (("score", "a score"), ("difference", "a difference to LoRA")):
        parts = [row[key] for row in spread["rows"] if row[key] is not None]
        shares = [part["items_share"] for part in parts if part["items_share"] is not None]
        if shares:
            words.append(f"{100 * statistics.median(shares):.0f} % of the variance of {name}")
    return f"Test items are {' and '.join(words)} (medians)." if words else None


def part_words(part: Mapping[str, Any] | None, decimals: int) -> str:
    """Return ``0.50 / 1.32 (87 %)``: seeds, items, the items' share; a dash for what is unknown."""
    if part is None:
        return "–"
    seeds = "–" if part["seeds"] is None else f"{part['seeds']:.{decimals}f}"
    share = "" if part["items_share"] is None else f" ({100 * part['items_share']:.0f} %)"
    return f"{seeds} / {part['items']:.{decimals}f}{share}"


def _draws(spec: TableSpec, row: str, done: Sequence[Entry], reasons: dict[str, None]) -> Draws:
    """Return what the runs of a row say of resamples; note in `reasons` why a run says nothing."""
    found: Draws = {column.name: {} for column in spec.columns}
    for entry in done:
        spread = (entry.record or {}).get("item_spread")
        if entry.cell.row != row or spread is None:
            continue
        for column in spec.columns:
            if column.run != entry.cell.on or column.metric is None:
                continue
            try:
                deviations = deviations_of(spread, column.metric)
            except (ValueError, KeyError, TypeError) as error:
                reasons[f"{entry.cell.label}: {error}"] = None
                continue
            if deviations is not None:
                drawn = (int(spread["num_items"]), deviations * column.scale)
                found[column.name][entry.cell.seed] = drawn
            elif why := spread["missing"].get(column.metric):
                reasons[f"{column.label}: {why}"] = None
    for column in spec.columns:
        if column.mean_of:
            found[column.name] = _mean_of(column, found)
    return found


def _mean_of(column: Column, found: Draws) -> dict[int, tuple[int, NDArray[np.float64]]]:
    """Return the draws of a mean of columns, for the seeds that all of them have."""
    parts = [found[name] for name in column.mean_of]
    return {
        seed: (
            sum(part[seed][0] for part in parts),
            np.mean([part[seed][1] for part in parts], axis=0),
        )
        for seed in sorted(set.intersection(*map(set, parts)))
    }


def _minus(own: Any, base: Any) -> tuple[dict[int, float], dict[int, Any]]:
    """Return values and draws of the difference of two rows, for the seeds that both have.

    Draws of other numbers of items are of other test sets, and cannot be paired.
    """
    (values, draws), (base_values, base_draws) = own, base
    seeds = sorted(values.keys() & base_values.keys())
    differences = {seed: values[seed] - base_values[seed] for seed in seeds}
    paired = {
        seed: (draws[seed][0], draws[seed][1] - base_draws[seed][1])
        for seed in seeds
        if seed in draws and seed in base_draws and draws[seed][0] == base_draws[seed][0]
    }
    return differences, paired


def _parts(
    values: Mapping[int, float], draws: Mapping[int, tuple[int, NDArray[np.float64]]]
) -> dict[str, Any] | None:
    """Return both standard errors of a mean over seeds; None where a seed has no draws."""
    if not values or set(values) != set(draws) or len({num for num, _ in draws.values()}) > 1:
        return None
    summary = stats.summarize(values.values())
    seeds = None if summary.std is None else summary.std / math.sqrt(summary.n)
    means = np.mean([deviations for _, deviations in draws.values()], axis=0)
    items = float(np.std(means, ddof=1))
    whole = None if seeds is None else seeds**2 + items**2
    share = items**2 / whole if whole else None
    return {"n": summary.n, "seeds": seeds, "items": items, "items_share": share}
