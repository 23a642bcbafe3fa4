"""BLEU as e2e-metrics computes it with option ``-p`` (its Perl scorer prints the same number).

Papineni et al. 2002, corpus level, 4-grams, case-insensitive, counts clipped by the largest count
in any reference, closest reference length (the shorter on a tie). Details in which the official
scorer departs from sacrebleu, which is why this is not sacrebleu (equal to 2e-16 elsewhere):

1. A text of L tokens counts L - n + 1 n-grams even where that is negative, so a very short output
   takes away from the denominator of the others.
2. A zero count is floored (matches at 1e-15, n-grams at 1e-9), so BLEU is tiny instead of zero.
3. The brevity penalty applies at equal length too, where it is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tasks.metrics import mteval

MAX_ORDER = 4
_SMALLEST_MATCHES = 1e-15
_SMALLEST_TOTAL = 1e-9


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU.

    Args:
        predictions: one text per instance.
        references: for every instance one or more texts.

    Returns:
        A fraction in [0, 1].
    """
    return from_sums(
        [sum(column) for column in zip(*statistics(predictions, references), strict=True)]
    )


def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return what of each instance goes into the sums: matches and n-grams by order, length.

    Args:
        predictions: one text per instance.
        references: for every instance one or more texts.

    Returns:
        (instances, 2 * `MAX_ORDER` + 1) numbers; the last is the closest reference length.
    """
    rows = []
    for prediction, texts in zip(predictions, references, strict=True):
        tokens = mteval.tokenize(prediction)
        options = tuple(mteval.tokenize(text) for text in texts)
        matches = [
            (mteval.count_ngrams(tokens, order) & mteval.max_counts(options, order)).total()
            for order in range(1, MAX_ORDER + 1)
        ]
        totals = [len(tokens) - order + 1 for order in range(1, MAX_ORDER + 1)]
        length = min(
            (len(option) for option in options),
            key=lambda length: (abs(length - len(tokens)), length),
        )
        rows.append([*matches, *totals, length])
    return rows


def from_sums(sums: Sequence[float]) -> float:
    """Return BLEU of a set from the sums over its instances of what `statistics` gives."""
    matches, totals = sums[:MAX_ORDER], sums[MAX_ORDER : 2 * MAX_ORDER]
    log_precision = sum(
        math.log(max(hits, _SMALLEST_MATCHES) / max(total, _SMALLEST_TOTAL))
        for hits, total in zip(matches, totals, strict=True)
    )
    penalty = min(0.0, 1.0 - sums[-1] / totals[0])
    return math.exp(penalty) * math.exp(log_precision / MAX_ORDER)
