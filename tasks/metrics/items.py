"""How a score depends on the items of a test set: what a bootstrap over items needs.

A score of a set is no mean of scores of its items: BLEU is a function of counts that are summed
over the set. So of each item the summands are kept, and the score of any other set of the same
items, some of them several times and some never, follows from their sums as the official scorer
makes it.

What a scorer learns from the references of a whole set stays as it is (document frequencies of
CIDEr, information weights of NIST): it belongs to the measure. To learn it anew from every resample
would count a repeated item as evidence that its words are frequent. On the outputs of two systems
for the official E2E test set that moves the mean by up to 0.4 standard errors, and the standard
error itself by 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from delta_lora.protocols import OfSets

Array = NDArray[np.float64]


def additive(
    table: Sequence[Sequence[float]] | Array,
    from_sums: Callable[[Array], Array],
    within: Sequence[int] | None = None,
) -> OfSets:
    """Return a score that is a function of sums over the items.

    Args:
        table: (items, summands) of each item.
        from_sums: from (sets, summands) to the score of each set, (sets,).
        within: numbers of the items that the score is of; None takes all.

    Returns:
        The score of sets of items; NaN for a set without any item of `within`.
    """
    summands = np.asarray(table, dtype=np.float64)
    chosen = np.arange(len(summands)) if within is None else np.asarray(within, dtype=np.int64)
    own = summands[chosen]

    def of_sets(counts: Array) -> Array:
        counted = counts[:, chosen]
        scores = np.full(len(counts), math.nan)
        filled = counted.sum(axis=1) > 0
        if filled.any():
            scores[filled] = from_sums(counted[filled] @ own)
        return scores

    return of_sets


def mean(values: Sequence[float] | Array, within: Sequence[int] | None = None) -> OfSets:
    """Return the mean over items.

    Args:
        values: one an item.
        within: as `additive`.
    """
    table = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return additive(table, lambda sums: sums[:, 0] / sums[:, 1], within)


def each(from_sums: Callable[[Sequence[float]], float]) -> Callable[[Array], Array]:
    """Return `from_sums` of one set as a function of many."""
    return lambda sums: np.array([from_sums(row) for row in sums.tolist()], dtype=np.float64)
