"""NIST (Doddington 2002), 5-grams, case-insensitive, in both variants of e2e-metrics.

Matching n-grams are weighted by their information, ``log2(count of the n-gram without its last
word / count of the n-gram)`` over all references of the set; the sum per order is divided by the
number of n-grams of that order in the output, and the whole is multiplied by a length penalty that
halves the score at 2/3 of the reference length. The variants differ in the reference length where
the number of references varies, in the tokens (`mteval`) and in short outputs:

* `nist` (option ``-p``, what the LoRA papers report): sum over instances of the mean length of the
  references. An output of L tokens counts L - n + 1 n-grams even where that is negative.
* `nist_perl` (mteval-v13a.pl, the default of the challenge): all reference tokens, divided by the
  mean number of references. Two quirks of the script are kept: n-grams that follow the single word
  "0" have the information of a unigram, and empty references are not counted as references.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

from tasks.metrics import mteval
from tasks.metrics.java import MetricUnavailableError

MAX_ORDER = 5
_BETA = -math.log(0.5) / math.log(1.5) ** 2
# A closing tag ends the text in the SGML file that the Perl script reads.
_CLOSING_TAG = re.compile(r"</(seg|doc|refset|tstset)\s*>", re.IGNORECASE)


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return NIST as e2e-metrics computes it with option ``-p``.

    Args:
        predictions: one text per instance.
        references: for every instance one or more texts.

    Returns:
        The score, at least 0 and unbounded above.

    Raises:
        MetricUnavailableError: the number of n-grams of some order in the outputs, by which the
            official scorer divides, is zero.
    """
    outputs = [mteval.tokenize(text) for text in predictions]
    options = tuple(tuple(mteval.tokenize(text) for text in texts) for texts in references)
    weights = _information(options, counts_like_perl=False)
    totals = [sum(len(t) - order + 1 for t in outputs) for order in range(1, MAX_ORDER + 1)]
    if 0 in totals:
        raise MetricUnavailableError(
            f"NIST is undefined: the outputs have no {totals.index(0) + 1}-grams "
            "(they are too short or empty) and the official scorer divides by their number"
        )
    length = sum(sum(map(len, texts)) / len(texts) for texts in options)
    return _weigh(outputs, options, weights, totals) * _length_penalty(totals[0] / length)


def nist_perl(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return NIST as the mteval-v13a.pl of e2e-metrics computes it (which prints four decimals).

    Args:
        predictions: one text per instance.
        references: for every instance one or more texts.

    Returns:
        The score, at least 0 and unbounded above.

    Raises:
        MetricUnavailableError: a text holds a tag that ends it in the script's input file, or the
            references have no token.
    """
    for text in (*predictions, *(text for texts in references for text in texts)):
        if _CLOSING_TAG.search(text):
            raise MetricUnavailableError(
                f"a text holds a closing tag of the input file of mteval-v13a.pl: {text!r}; "
                "the script would cut it there; take the tag out or use `nist`"
            )
    outputs = [mteval.tokenize_perl(text) for text in predictions]
    options = tuple(tuple(mteval.tokenize_perl(text) for text in texts) for texts in references)
    num_references = sum(1 for texts in options for tokens in texts if tokens)
    if not num_references:
        raise MetricUnavailableError(
            "NIST is undefined: no reference has a token; check the references"
        )
    weights = _information(options, counts_like_perl=True)
    totals = [
        sum(max(0, len(tokens) - order + 1) for tokens in outputs)
        for order in range(1, MAX_ORDER + 1)
    ]
    num_words = sum(len(tokens) for texts in options for tokens in texts)
    length = num_words / (num_references / len(outputs))
    score = _weigh(outputs, options, weights, [max(total, 1) for total in totals])
    return score * _length_penalty(totals[0] / length)


def statistics(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Return what of each instance goes into the sums of `nist`.

    The information of an n-gram is that in the references of the whole set.

    Args:
        predictions: one text per instance.
        references: for every instance one or more texts.

    Returns:
        (instances, 2 * `MAX_ORDER` + 1) numbers: information and n-grams by order, and the mean
        length of the references.
    """
    outputs = [mteval.tokenize(text) for text in predictions]
    options = tuple(tuple(mteval.tokenize(text) for text in texts) for texts in references)
    weights = _information(options, counts_like_perl=False)
    orders = range(1, MAX_ORDER + 1)
    columns: list[Sequence[float]] = [_informations(outputs, options, weights, o) for o in orders]
    columns += [[len(tokens) - order + 1 for tokens in outputs] for order in orders]
    columns.append([sum(map(len, texts)) / len(texts) for texts in options])
    return [list(row) for row in zip(*columns, strict=True)]


def from_sums(sums: Sequence[float]) -> float:
    """Return `nist` of a set from the sums over its instances of what `statistics` gives.

    Returns:
        The score; NaN where the outputs have no n-gram of some order.
    """
    informations, totals = sums[:MAX_ORDER], sums[MAX_ORDER : 2 * MAX_ORDER]
    if 0 in totals:
        return math.nan
    score = sum(value / total for value, total in zip(informations, totals, strict=True))
    return score * _length_penalty(totals[0] / sums[-1])


@functools.lru_cache(maxsize=4)  # the runs of a table share their references
def _information(
    references: tuple[tuple[mteval.Ngram, ...], ...], *, counts_like_perl: bool
) -> dict[mteval.Ngram, float]:
    """Return the information of every n-gram of the references, in bits."""
    counts: Counter[mteval.Ngram] = Counter()
    for texts in references:
        for tokens in texts:
            counts[()] += len(tokens)
            for order in range(1, MAX_ORDER + 1):
                counts.update(mteval.count_ngrams(tokens, order))
    weights = {}
    for ngram, count in counts.items():
        context = ngram[:-1]
        if counts_like_perl and context == ("0",):  # a false value in Perl
            context = ()
        weights[ngram] = math.log2(counts[context] / count)
    return weights


def _weigh(
    outputs: list[mteval.Ngram],
    references: tuple[tuple[mteval.Ngram, ...], ...],
    weights: dict[mteval.Ngram, float],
    totals: list[int],
) -> float:
    """Return the information of the matching n-grams over the number of n-grams, all orders."""
    score = 0.0
    for order, total in enumerate(totals, start=1):
        information = 0.0
        for value in _informations(outputs, references, weights, order):
            information += value
        score += information / total
    return score


def _informations(
    outputs: list[mteval.Ngram],
    references: tuple[tuple[mteval.Ngram, ...], ...],
    weights: dict[mteval.Ngram, float],
    order: int,
) -> list[float]:
    """Return for each instance the information of its matching n-grams of one order."""
    values = []
    for tokens, texts in zip(outputs, references, strict=True):
        hits = mteval.count_ngrams(tokens, order) & mteval.max_counts(texts, order)
        values.append(sum(weights[ngram] * count for ngram, count in hits.items()))
    return values


def _length_penalty(ratio: float) -> float:
    """Return the factor for outputs shorter than the references: 1 from `ratio` 1, 1/2 at 2/3."""
    if ratio >= 1:
        return 1.0
    if ratio <= 0:
        return 0.0
    return math.exp(-_BETA * math.log(ratio) ** 2)
