"""How much the scores of a run would move on other test items: a bootstrap over its test set.

Of the test set, as many items as it has are drawn with replacement, `RESAMPLES` times, and every
score is recomputed for each such set as its official scorer makes it of one (`Task.item_scores`).
The draws depend on the task and the number of its items alone, so that they are the same for all
runs of a task: what two runs differ by can be told from the same draws, item by item.

It stands in ``item_spread.json`` beside the record, so that it can be added to a run that is done,
from its predictions. Readers find it in the record, under ``item_spread``.
"""

from __future__ import annotations

import base64
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scripts.runs import checksums
from scripts.runs.composition import ConfigError
from scripts.runs.folder import PREDICTIONS, lock, read_predictions, read_record
from tasks.metrics.java import MetricUnavailableError

if TYPE_CHECKING:
    from delta_lora.protocols import ItemScores

SCHEMA = 1
RESAMPLES = 1000
CONFIDENCE = 0.95
#: numbers of items that are in memory at a time.
_DRAWN_AT_ONCE = 2_000_000


def measure(task: Any, predictions: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return what ``item_spread.json`` of a run holds.

    Args:
        task: its data are loaded.
        predictions: of its scored split.
        folder: of the run; it holds the predictions as a file.

    Returns:
        As `resampled`, with ``predictions_sha256`` of that file.

    Raises:
        ValueError: as `Task.score`.
    """
    data = (folder / PREDICTIONS).read_bytes()
    found = task.item_scores(predictions, task.scored_split)
    return {
        **resampled(found, task.name),
        "predictions_sha256": hashlib.sha256(data).hexdigest(),
    }


def add(folder: Path, task: Any) -> dict[str, Any]:
    """Write ``item_spread.json`` of a run that is done, from its predictions.

    Args:
        folder: of the run.
        task: that of its configuration, its data loaded.

    Returns:
        What was written.

    Raises:
        ConfigError: there are no predictions, or they do not give the scores of the record.
        LockedError: a process works in the folder.
        ValueError: the predictions are of other data.
    """
    with lock(folder, wait=False):
        record, predictions = read_record(folder), read_predictions(folder)
        if not predictions:
            raise ConfigError(f"{folder / PREDICTIONS} is empty: there is nothing to measure")
        known = record["metrics"]
        for name, value in task.score(predictions, task.scored_split).values.items():
            before = known.get(name, value)  # of a score that could not be computed then: this one
            if not math.isclose(before, value, rel_tol=1e-9, abs_tol=1e-12):
                raise ConfigError(
                    f"{folder / PREDICTIONS} gives {name} {value}, the record says {before}: they "
                    "are not of one run; delete the folder and run it again"
                )
        found = measure(task, predictions, folder)
        checksums.write_item_spread(folder, record, found)
    return found


def resampled(found: ItemScores, task: str) -> dict[str, Any]:
    """Return how the scores of a test set spread over other test sets of the same kind.

    Args:
        found: how the scores depend on the items.
        task: name of the task, which the draws depend on.

    Returns:
        JSON values: ``schema``, ``num_items``, ``resamples``; ``scores`` by name with ``se`` (the
        bootstrap's standard error), ``ci95`` (percentiles) and ``deviations`` (of every resample
        from the score itself, see `deviations_of`), in the unit of the score; ``missing`` by name
        with the reason.
    """
    missing, of_sets = dict(found.missing), dict(found.of_sets)
    if found.num_items < 2:
        reason = f"a bootstrap needs two test items or more, here are {found.num_items}"
        missing, of_sets = missing | dict.fromkeys(of_sets, reason), {}
    scores: dict[str, dict[str, Any]] = {}
    for name, (score, result) in _bootstrap(of_sets, found.num_items, task, missing).items():
        replicates = result["replicates"]
        if (undefined := int(np.isnan(replicates).sum())) or np.isnan(score):
            missing[name] = f"{undefined} of {RESAMPLES} resamples of the test set have no {name}"
            continue
        scores[name] = {
            "se": float(result["se"]),
            "ci95": [float(end) for end in result["ci95"]],
            "deviations": _packed(replicates - score),
        }
    return {
        "schema": SCHEMA,
        "num_items": found.num_items,
        "resamples": RESAMPLES,
        "scores": scores,
        "missing": missing,
    }


def deviations_of(spread: Mapping[str, Any], name: str) -> NDArray[np.float64] | None:
    """Return by how much each resample differs from the score, or None where it is not measured.

    Args:
        spread: from `resampled`.
        name: of the score.

    Returns:
        (resamples,) float64, with the digits of a float16, in the order of the draws.

    Raises:
        ValueError: it is of another schema, or damaged.
    """
    if spread.get("schema") != SCHEMA:
        raise ValueError(
            f"the spread over test items has schema {spread.get('schema')!r}, not {SCHEMA}; "
            "measure it again: python scripts/item_spread.py --again RUN_FOLDER"
        )
    if name not in spread["scores"]:
        return None
    packed = base64.b64decode(spread["scores"][name]["deviations"], validate=True)
    values = np.frombuffer(packed, dtype="<f2").astype(np.float64)
    if len(values) != spread["resamples"] or not np.isfinite(values).all():
        raise ValueError(f"the spread of {name} over test items is damaged; measure it again")
    return values


def _bootstrap(
    of_sets: Mapping[str, Any], num_items: int, task: str, missing: dict[str, str]
) -> dict[str, tuple[float, dict[str, Any]]]:
    """Return by name the score, and what the bootstrap says of it.

    A score whose scorer fails is left out, and `missing` says why.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    names = list(of_sets)

    def scores_of(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = []
        for name in names:
            try:
                rows.append(of_sets[name](counts))
            except MetricUnavailableError as error:
                missing[name] = str(error)
                rows.append(np.full(len(counts), np.nan))
        return np.stack(rows)

    def statistic(drawn: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        return scores_of(_counts(drawn.reshape(-1, num_items)))

    if not names:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a resample without some score
        found = bootstrap(
            (np.arange(num_items),),
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, _DRAWN_AT_ONCE // num_items),
            vectorized=True,
            axis=-1,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(list(task.encode())),
        )
    whole = scores_of(np.ones((1, num_items)))
    low, high = found.confidence_interval
    return {
        name: (
            float(whole[i, 0]),
            {
                "se": found.standard_error[i],
                "ci95": (low[i], high[i]),
                "replicates": found.bootstrap_distribution[i],
            },
        )
        for i, name in enumerate(names)
        if name not in missing
    }


def _counts(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how often each item was drawn, (sets, items), from its numbers, (sets, items)."""
    num_sets, num_items = drawn.shape
    places = drawn + num_items * np.arange(num_sets)[:, None]
    counted = np.bincount(places.ravel(), minlength=num_sets * num_items)
    return counted.reshape(num_sets, num_items).astype(np.float64)


def _packed(deviations: NDArray[np.float64]) -> str:
    """Return numbers as text: base64 of little-endian float16, three digits each."""
    return base64.b64encode(deviations.astype("<f2").tobytes()).decode("ascii")
