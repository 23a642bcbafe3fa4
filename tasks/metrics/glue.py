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

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from delta_lora.protocols import Scores

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
