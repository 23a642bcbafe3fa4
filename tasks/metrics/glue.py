"""The scores of GLUE, by the definitions of scikit-learn and scipy.

Wang et al., "GLUE", ICLR 2019, section 3: Matthews correlation for CoLA, Pearson and Spearman for
STS-B, accuracy and F1 (of class 1) for MRPC and QQP, accuracy for the others.

A score that is not defined is missing with its reason, never a number: a correlation with
predictions that are all equal. Matthews' correlation and F1 of a model that always predicts one
class are 0 by scikit-learn's convention, which is also what GLUE's own server gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from delta_lora.protocols import ItemScores, OfSets, Scores
from tasks.metrics import items

Values = Sequence[float]

CLASSIFICATION: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": lambda labels, predictions: accuracy_score(labels, predictions),
    "f1": lambda labels, predictions: f1_score(labels, predictions, pos_label=1, zero_division=0.0),
    "matthews": lambda labels, predictions: matthews_corrcoef(labels, predictions),
}
REGRESSION: dict[str, Callable[[Values, Values], float]] = {
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}
METRICS = (*CLASSIFICATION, *REGRESSION)


def score(
    predictions: Sequence[float], labels: Sequence[float], *, metrics: Sequence[str]
) -> Scores:
    """Score the predictions of a whole split.

    Args:
        predictions: class numbers, or real numbers for correlations.
        labels: the right ones, in the same order.
        metrics: which scores, of `METRICS`.

    Returns:
        Accuracy and F1 in [0, 1], correlations in [-1, 1]; what is undefined is in `missing`.

    Raises:
        ValueError: no predictions, different lengths, an unknown metric, a value that is not
            finite, or F1 of classes other than 0 and 1.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r}; allowed are {', '.join(METRICS)}")
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions but {len(labels)} labels")
    if not len(labels):
        raise ValueError("no predictions to score; the scores of an empty set are undefined")
    for what, given in (("prediction", predictions), ("label", labels)):
        for index, value in enumerate(given):
            if not math.isfinite(value):
                raise ValueError(f"{what} {index} is {value}; only finite numbers can be scored")
    if "f1" in metrics and (others := {*predictions, *labels} - {0, 1}):
        raise ValueError(f"f1 is of the classes 0 and 1, got {sorted(others)[:5]}")
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in metrics:
        reason = _undefined(name, predictions, labels)
        if reason is None:
            values[name] = float({**CLASSIFICATION, **REGRESSION}[name](labels, predictions))
        else:
            missing[name] = reason
    return Scores(values, missing)


def _undefined(name: str, predictions: Values, labels: Values) -> str | None:
    """Return why a correlation is undefined, or None."""
    if name not in REGRESSION:
        return None
    if len(labels) < 2:
        return f"{name} needs two examples or more, got {len(labels)}"
    for what, values in (("predictions", predictions), ("labels", labels)):
        if all(value == values[0] for value in values):
            return f"{name} is undefined: all {what} are {values[0]:g}"
    return None


def item_scores(
    predictions: Sequence[float], labels: Sequence[float], *, metrics: Sequence[str]
) -> ItemScores:
    """Return how the scores of `score` depend on the examples; arguments and errors as there."""
    missing = score(predictions, labels, metrics=metrics).missing
    pairs = np.array([labels, predictions], dtype=np.float64)
    of_sets = {name: _OF_SETS[name](*pairs) for name in metrics if name not in missing}
    values = {"accuracy": right(predictions, labels)} if "accuracy" in metrics else {}
    return ItemScores(len(labels), of_sets, values, missing)


def right(predictions: Sequence[float], labels: Sequence[float]) -> list[float]:
    """Return for every example 1 where the class is the right one, else 0."""
    return [float(p == label) for p, label in zip(predictions, labels, strict=True)]


def _accuracy(labels: items.Array, predictions: items.Array) -> OfSets:
    return items.mean(labels == predictions)


def _f1(labels: items.Array, predictions: items.Array) -> OfSets:
    def from_sums(sums: items.Array) -> items.Array:
        hits, both = sums.T
        return np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)

    return items.additive(np.stack([labels * predictions, labels + predictions], axis=1), from_sums)


def _matthews(labels: items.Array, predictions: items.Array) -> OfSets:
    """Return Matthews' correlation of any number of classes (Gorodkin 2004), as scikit-learn's."""
    classes, coded = np.unique([labels, predictions], return_inverse=True)
    size = len(classes)
    true, predicted = coded.reshape(2, -1)
    cells = np.eye(size * size)[true * size + predicted]

    def from_sums(sums: items.Array) -> items.Array:
        confusion = sums.reshape(-1, size, size)
        of_labels, of_predictions = confusion.sum(axis=2), confusion.sum(axis=1)
        total, hits = sums.sum(axis=1), np.trace(confusion, axis1=1, axis2=2)
        covariance = hits * total - (of_labels * of_predictions).sum(axis=1)
        spread = (total**2 - (of_labels**2).sum(axis=1)) * (
            total**2 - (of_predictions**2).sum(axis=1)
        )
        return np.divide(
            covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0
        )

    return items.additive(cells, from_sums)


def _pearson(labels: items.Array, predictions: items.Array) -> OfSets:
    return lambda counts: _correlation(
        counts,
        np.broadcast_to(labels - labels.mean(), counts.shape),
        np.broadcast_to(predictions - predictions.mean(), counts.shape),
    )


def _spearman(labels: items.Array, predictions: items.Array) -> OfSets:
    return lambda counts: _correlation(counts, _ranks(labels, counts), _ranks(predictions, counts))


def _ranks(values: items.Array, counts: items.Array) -> items.Array:
    """Return (sets, items): the rank of each item in each set, its mean over equal values.

    Ranks are counted from the middle of the set, so that products of them keep their digits.
    """
    _, first, place = np.unique(np.sort(values), return_index=True, return_inverse=True)
    order = np.argsort(values, kind="stable")
    same = np.add.reduceat(counts[:, order], first, axis=1)
    ranks = np.cumsum(same, axis=1) - (same - 1) / 2
    ranks -= (counts.sum(axis=1, keepdims=True) + 1) / 2
    return ranks[:, place[np.argsort(order)]]


def _correlation(counts: items.Array, x: items.Array, y: items.Array) -> items.Array:
    """Return (sets,): Pearson's correlation of items that occur `counts` times; NaN: undefined."""
    total = counts.sum(axis=1)

    def product(a: items.Array, b: items.Array) -> items.Array:
        means = (counts * a).sum(axis=1) / total * (counts * b).sum(axis=1)
        return (counts * a * b).sum(axis=1) - means

    spread = product(x, x) * product(y, y)
    whole = (counts * x**2).sum(axis=1) * (counts * y**2).sum(axis=1)
    is_defined = spread > 1e-12 * whole
    return np.divide(
        product(x, y), np.sqrt(np.abs(spread)), out=np.full(len(counts), np.nan), where=is_defined
    )


_OF_SETS: dict[str, Callable[[items.Array, items.Array], OfSets]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
