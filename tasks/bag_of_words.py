"""The baseline that a model has to beat: linear models on word counts, blind to word order.

Each text of an example has counts of its own, so a word in the first text is not the same feature
as that word in the second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

_WORD = re.compile(r"\w+|[^\w\s]")

Texts = Sequence[Sequence[str]]
Label = TypeVar("Label", int, str)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _features(train: Texts, evaluation: Texts) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Return word counts, (examples, words of each text side by side), float64."""
    if not train or not evaluation:
        raise ValueError(
            f"{len(train)} training and {len(evaluation)} evaluation examples: at least one of "
            "each is needed"
        )
    columns = {len(texts) for texts in [*train, *evaluation]}
    if len(columns) != 1:
        raise ValueError(f"examples have {sorted(columns)} texts; all need the same number")
    pieces = []
    for column in range(columns.pop()):
        words = CountVectorizer(analyzer=_words, dtype=np.float64)
        fitted = words.fit_transform(texts[column] for texts in train)
        pieces.append((fitted, words.transform(texts[column] for texts in evaluation)))
    first, second = zip(*pieces, strict=True)
    return sparse.hstack(first, format="csr"), sparse.hstack(second, format="csr")


def classify(train: Texts, labels: Sequence[Label], evaluation: Texts) -> list[Label]:
    """Predict classes by logistic regression on word counts (L2, C = 1), deterministic.

    Args:
        train: the one or two texts of each training example.
        labels: their classes.
        evaluation: the texts of the examples to predict.

    Returns:
        One class for each example of `evaluation`.

    Raises:
        ValueError: no examples, unequal numbers of texts, or not one label for each example.
    """
    _check_labels(train, labels)
    fit, predict = _features(train, evaluation)
    if len(set(labels)) == 1:
        return [labels[0]] * len(evaluation)
    model = LogisticRegression(max_iter=2000).fit(fit, list(labels))
    predictions: list[Label] = model.predict(predict).tolist()
    return predictions


def regress(train: Texts, labels: Sequence[float], evaluation: Texts) -> list[float]:
    """Predict numbers by ridge regression on word counts (alpha = 1), deterministic.

    Args:
        train: the one or two texts of each training example.
        labels: their numbers.
        evaluation: the texts of the examples to predict.

    Returns:
        One number for each example of `evaluation`.

    Raises:
        ValueError: no examples, unequal numbers of texts, or not one label for each example.
    """
    _check_labels(train, labels)
    fit, predict = _features(train, evaluation)
    predictions: list[float] = Ridge().fit(fit, list(labels)).predict(predict).tolist()
    return predictions


def _check_labels(train: Texts, labels: Sequence[object]) -> None:
    if len(train) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(train)} training examples")
