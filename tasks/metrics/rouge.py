"""ROUGE-1, -2, -L and -Lsum of summaries: rouge-score with the settings of the BART recipes.

F1 of PyPI `rouge-score` (Google's rewrite of Lin, "ROUGE", 2004; not the Perl ROUGE-1.5.5, whose
numbers differ), Porter stemmer on, one reference a summary. Details that a number depends on:

1. Texts are stripped and get a line break between sentences. Only ROUGE-Lsum reads those: it takes
   the longest common subsequences line by line, ROUGE-L of the whole text. For summaries of one
   sentence both are the same number.
2. The recipes find sentences by nltk's Punkt with its English model, a download. Here Punkt runs
   with the abbreviations of `ABBREVIATIONS` instead of the model, so that a score never depends on
   what is installed. Where the two split differently, ROUGE-Lsum alone is touched.
3. rouge-score keeps the letters a to z and digits only: other letters split a word.
4. A set's value is the plain mean over its summaries, as `evaluate`'s module gives it today. The
   one of 2021 gave the middle value of a bootstrap, which differs in the second decimal of a per
   cent; it is `aggregate="bootstrap"` here, with a seed, which the old one did not have.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from delta_lora.protocols import ItemScores, Scores
from tasks.metrics import items

#: our name -> name in rouge-score, in table order.
METRICS: dict[str, str] = {
    "rouge_1": "rouge1",
    "rouge_2": "rouge2",
    "rouge_l": "rougeL",
    "rouge_lsum": "rougeLsum",
}
AGGREGATES = ("mean", "bootstrap")
#: resamples of rouge-score's own bootstrap.
NUM_RESAMPLES = 1000
#: words that do not end a sentence with their full stop, lower-case, without it.
ABBREVIATIONS = frozenset({
    "a.m", "co", "corp", "dr", "e.g", "etc", "gen", "gov", "i.e", "inc", "jr", "lt", "ltd", "mr",
    "mrs", "ms", "p.m", "prof", "rev", "sen", "sgt", "sr", "st", "u.k", "u.n", "u.s", "vs",
})  # fmt: skip


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    metrics: Sequence[str] = tuple(METRICS),
    aggregate: str = "mean",
    seed: int = 0,
) -> Scores:
    """Score summaries, each against its one reference.

    Args:
        predictions: one summary per document; an empty one is legal and scores 0.
        references: one text per document.
        metrics: which scores, of `METRICS`.
        aggregate: ``mean``, or ``bootstrap`` for the median of `NUM_RESAMPLES` means of resamples.
        seed: of the resamples; equal seeds give equal values.

    Returns:
        Fractions in [0, 1].

    Raises:
        ValueError: no summary, lengths that differ, an empty reference, or an unknown metric or
            aggregate.
        TypeError: a text is not a string.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r}; allowed are {', '.join(METRICS)}")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate={aggregate!r}; allowed: {', '.join(AGGREGATES)}")
    _check(predictions, references)
    values = _values(tuple(predictions), tuple(references), tuple(metrics))
    if aggregate == "mean":
        return Scores({name: fmean(column) for name, column in values.items()})
    return Scores(_bootstrap(values, seed))


def item_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    metrics: Sequence[str] = tuple(METRICS),
) -> ItemScores:
    """Return how the scores of `score` depend on the summaries; arguments and errors as there.

    They are the means, whatever `aggregate` is.
    """
    _check(predictions, references)
    values = _values(tuple(predictions), tuple(references), tuple(metrics))
    of_sets = {name: items.mean(column) for name, column in values.items()}
    return ItemScores(len(predictions), of_sets, values)


@functools.lru_cache(maxsize=1)  # a set's score, and what its summaries add to it
def _values(
    predictions: tuple[str, ...], references: tuple[str, ...], metrics: tuple[str, ...]
) -> dict[str, list[float]]:
    """Return by metric the value of every summary; not to be changed."""
    scorer = RougeScorer(
        [METRICS[name] for name in metrics], tokenizer=DefaultTokenizer(use_stemmer=True)
    )
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(one_sentence_a_line(reference), one_sentence_a_line(prediction))
        for name in metrics:
            values[name].append(scores[METRICS[name]].fmeasure)
    return values


def one_sentence_a_line(text: str) -> str:
    """Return `text` stripped, with a line break between its sentences (and where it had one)."""
    lines = (_sentences().tokenize(line.strip()) for line in text.strip().splitlines())
    return "\n".join(sentence for line in lines for sentence in line)


@functools.cache
def _sentences() -> PunktSentenceTokenizer:
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


def _bootstrap(values: dict[str, list[float]], seed: int) -> dict[str, float]:
    """Return the median over resamples of the mean, the same resamples for all metrics."""
    table = np.array(list(values.values()))
    draw = np.random.RandomState(seed)  # the generator of rouge-score's bootstrap
    indices = np.arange(table.shape[1])
    means = np.stack(
        [
            table[:, draw.choice(indices, size=len(indices))].mean(axis=1)
            for _ in range(NUM_RESAMPLES)
        ]
    )
    middle = np.percentile(means, 50, axis=0)
    return {name: float(value) for name, value in zip(values, middle, strict=True)}


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("predictions and references must be lists of texts, got one string")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but {len(references)} references; every document "
            "needs one of each"
        )
    if not len(predictions):
        raise ValueError("no predictions to score; the scores of an empty set are undefined")
    for kind, texts in (("prediction", predictions), ("reference", references)):
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"{kind} {index} must be a string, got {type(text).__name__}: {text!r}"
                )
            if kind == "reference" and not text.strip():
                raise ValueError(f"reference {index} is empty; leave the document out")
