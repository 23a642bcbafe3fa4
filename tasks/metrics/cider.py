"""CIDEr as e2e-metrics computes it.

Vedantam et al. 2015: cosine of tf-idf vectors of 1- to 4-grams, document frequencies counted in the
references of this very set (one document an instance), mean over references and orders, times 10,
mean over instances. Details of the scorer, not of the paper:

1. The weight in the output is clipped to that in the reference.
2. Each cosine is multiplied by ``exp(-(difference in the number of bigrams)^2 / (2 * 6^2))``.
3. An n-gram that no reference has is weighted as if one had it.
4. With one instance all weights are log(1) = 0 and so is the score.

`pycocoevalcap`'s own class gives the same to some 1e-15. It is written out here because committed
scores keep their last bits, and because the weights of the references are kept for the next run of
a table, which makes it about three times as fast.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4
SIGMA = 6.0

Ngram = tuple[str, ...]


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean CIDEr.

    Args:
        predictions: one text per instance, as `ptb.tokenize` returns it.
        references: for every instance one or more such texts.

    Returns:
        The score in [0, 10], as e2e-metrics prints it.
    """
    scores = _scores(predictions, references)
    return 10.0 * sum(scores) / len(scores)


def values(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr of each instance, the n-grams weighted as in the whole set.

    Args:
        predictions: as `cider`.
        references: as `cider`.

    Returns:
        Scores in [0, 10], whose mean is `cider`.
    """
    return [10.0 * score for score in _scores(predictions, references)]


def _scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the score of each instance, in [0, 1]."""
    frequencies, groups = _weigh_references(tuple(tuple(texts) for texts in references))
    scores = []
    for prediction, vectors in zip(predictions, groups, strict=True):
        output = _Vector(_count(prediction), frequencies, len(groups))
        scores.append(sum(_similarity(output, vector) for vector in vectors) / len(vectors))
    return scores


@functools.lru_cache(maxsize=4)  # the runs of a table share their references
def _weigh_references(
    references: tuple[tuple[str, ...], ...],
) -> tuple[Counter[Ngram], list[list[_Vector]]]:
    """Return in how many instances each n-gram is, and the vectors of all references."""
    counts = [[_count(text) for text in texts] for texts in references]
    frequencies: Counter[Ngram] = Counter()
    for options in counts:
        frequencies.update(set().union(*options))
    vectors = [
        [_Vector(option, frequencies, len(counts)) for option in options] for options in counts
    ]
    return frequencies, vectors


def _count(text: str) -> Counter[Ngram]:
    words = text.split()
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


class _Vector:
    """The tf-idf weights of one text, their norm per order, and its number of bigrams."""

    def __init__(
        self, counts: Counter[Ngram], frequencies: Counter[Ngram], num_instances: int
    ) -> None:
        log_instances = math.log(num_instances)
        self.weights = {
            ngram: count * (log_instances - math.log(max(1, frequencies[ngram])))
            for ngram, count in counts.items()
        }
        squares = [0.0] * MAX_ORDER
        for ngram, weight in self.weights.items():
            squares[len(ngram) - 1] += weight**2
        self.norms = [math.sqrt(square) for square in squares]
        self.num_bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(output: _Vector, reference: _Vector) -> float:
    """Return the clipped, length-penalised cosine, mean over the orders."""
    products = [0.0] * MAX_ORDER
    for ngram, weight in output.weights.items():
        other = reference.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    cosines = (
        product / (first * second)
        for product, first, second in zip(products, output.norms, reference.norms, strict=True)
        if first and second
    )
    difference = output.num_bigrams - reference.num_bigrams
    penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
    return penalty * sum(cosines) / MAX_ORDER
