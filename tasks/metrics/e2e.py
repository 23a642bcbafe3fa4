r"""The five scores of the E2E NLG challenge, as tuetschek/e2e-metrics (1b9c4d8) computes them.

`score` gives the numbers of ``measure_scores.py -p``. BLEU and NIST see 13a tokens (`mteval`), the
other three Penn Treebank tokens (`ptb`). NIST and CIDEr depend on the whole set (information
weights, document frequencies), so the scores of parts never average to the score of the whole.

As a program it reads the official plain-text files (one output a line; references one a line, the
groups separated by an empty line), so that any system can be scored::

    python -m tasks.metrics.e2e --predictions outputs.txt --references references.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from delta_lora import console
from delta_lora.console import as_path
from delta_lora.protocols import ItemScores, OfSets, Scores
from tasks.metrics import items
from tasks.metrics.bleu import bleu
from tasks.metrics.bleu import from_sums as bleu_from_sums
from tasks.metrics.bleu import statistics as bleu_statistics
from tasks.metrics.cider import cider
from tasks.metrics.cider import values as cider_values
from tasks.metrics.files import read_pair, refuse, show
from tasks.metrics.java import MetricUnavailableError
from tasks.metrics.meteor import from_sums as meteor_from_sums
from tasks.metrics.meteor import meteor, shared_process
from tasks.metrics.meteor import statistics as meteor_statistics
from tasks.metrics.nist import from_sums as nist_from_sums
from tasks.metrics.nist import nist, nist_perl
from tasks.metrics.nist import statistics as nist_statistics
from tasks.metrics.ptb import tokenize
from tasks.metrics.rouge_l import rouge_l
from tasks.metrics.rouge_l import values as rouge_l_values

T = TypeVar("T")

#: names of the scores, in table order.
METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider")
#: the NIST of the challenge's Perl script: another number under another name, never in its place.
OPTIONAL_METRICS = ("nist_perl",)


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[str] = METRICS,
) -> Scores:
    """Score the outputs for a whole test set.

    A line break in a text counts as a blank, as the official files hold one text a line.

    Args:
        predictions: one output per instance; an empty one is legal.
        references: for every instance one or more texts.
        metrics: which scores, of `METRICS` and `OPTIONAL_METRICS`.

    Returns:
        BLEU, METEOR and ROUGE-L as fractions in [0, 1], NIST and CIDEr as e2e-metrics prints them;
        a score that cannot be computed here is in `missing` with the reason and the fix.

    Raises:
        ValueError: no instance, lengths that differ, an instance without references, an empty
            reference, an unknown metric, or text that is not valid Unicode.
        TypeError: a text is not a string, or an instance's references are one string.
    """
    unknown = [name for name in metrics if name not in (*METRICS, *OPTIONAL_METRICS)]
    if unknown:
        raise ValueError(
            f"unknown metric {unknown[0]!r}; allowed are {', '.join(METRICS + OPTIONAL_METRICS)}"
        )
    outputs, groups = check_texts(predictions, references)
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    if "meteor" in metrics:
        try:
            shared_process().start()  # it loads its tables while the other scores are computed
        except MetricUnavailableError as error:
            missing["meteor"] = str(error)
    for name in sorted(metrics, key=lambda name: name == "meteor"):
        if name in missing:
            continue
        try:
            values[name] = float(_SCORERS[name](outputs, groups))
        except MetricUnavailableError as error:
            missing[name] = str(error)
    return Scores({name: values[name] for name in metrics if name in values}, missing)


def item_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[str] = METRICS,
) -> ItemScores:
    """Return how the scores of `score` depend on the instances; arguments and errors as there."""
    outputs, groups = check_texts(predictions, references)
    of_sets: dict[str, OfSets] = {}
    values: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for name in metrics:
        try:
            if name in _VALUES:
                values[name] = _on_ptb_tokens(_VALUES[name])(outputs, groups)
                of_sets[name] = items.mean(values[name])
            elif name in _SUMS:
                statistics, from_sums = _SUMS[name]
                of_sets[name] = items.additive(statistics(outputs, groups), from_sums)
            else:
                missing[name] = f"how {name} depends on single instances is not written down here"
        except MetricUnavailableError as error:
            missing[name] = str(error)
    return ItemScores(len(outputs), of_sets, values, missing)


def _on_ptb_tokens(
    scorer: Callable[[Sequence[str], Sequence[Sequence[str]]], T],
) -> Callable[[list[str], list[list[str]]], T]:
    """Return `scorer` for texts that still have to be tokenised."""

    def run(predictions: list[str], references: list[list[str]]) -> T:
        tokenized = iter(tokenize(tuple(text for texts in references for text in texts)))
        groups = [[next(tokenized) for _ in texts] for texts in references]
        return scorer(tokenize(tuple(predictions)), groups)

    return run


_SCORERS: dict[str, Callable[[list[str], list[list[str]]], float]] = {
    "bleu": bleu,
    "nist": nist,
    "nist_perl": nist_perl,
    "meteor": _on_ptb_tokens(meteor),
    "rouge_l": _on_ptb_tokens(rouge_l),
    "cider": _on_ptb_tokens(cider),
}
#: scores that are means over instances.
_VALUES: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]] = {
    "rouge_l": rouge_l_values,
    "cider": cider_values,
}
#: what is summed over instances, and the score from the sums.
_SUMS: dict[str, tuple[Callable[[list[str], list[list[str]]], Any], Callable[[Any], Any]]] = {
    "bleu": (bleu_statistics, items.each(bleu_from_sums)),
    "nist": (nist_statistics, items.each(nist_from_sums)),
    "meteor": (_on_ptb_tokens(meteor_statistics), meteor_from_sums),
}


def check_texts(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return the texts, one line each, or raise at the first that cannot be scored."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("predictions and references must be lists of texts, got one string")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but {len(references)} groups of references; "
            "every instance needs one prediction and one group"
        )
    if not len(predictions):
        raise ValueError("no predictions to score; the scores of an empty set are undefined")
    outputs = [_one_line(text, f"prediction {i}") for i, text in enumerate(predictions)]
    groups = []
    for i, texts in enumerate(references):
        if isinstance(texts, str):
            raise TypeError(
                f"references of instance {i} are one string {texts!r}; pass a list of strings"
            )
        group = [_one_line(text, f"reference {j} of instance {i}") for j, text in enumerate(texts)]
        if not group:
            raise ValueError(f"instance {i} has no references; it needs at least one")
        if "" in group:
            raise ValueError(f"reference {group.index('')} of instance {i} is empty; leave it out")
        groups.append(group)
    return outputs, groups


def _one_line(text: str, name: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {type(text).__name__}: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode ({error.reason}): {text!r}") from None
    return " ".join(text.splitlines()).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores of a file of outputs; exit code 1: one is missing, 2: a file is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--predictions", type=as_path, required=True, help="one output a line")
    parser.add_argument(
        "--references",
        type=as_path,
        required=True,
        help="one a line, groups end at an empty line",
    )
    parser.add_argument("--nist-perl", action="store_true", help="also NIST of mteval-v13a.pl")
    parser.add_argument("--json", action="store_true", help="full precision, as one JSON object")
    options = parser.parse_args(arguments)
    try:
        outputs, groups = read_pair(options.predictions, options.references)
        scores = score(
            outputs,
            groups,
            metrics=METRICS + OPTIONAL_METRICS if options.nist_perl else METRICS,
        )
    except (OSError, ValueError) as error:
        return refuse(error)
    return show(scores, as_json=options.json)


if __name__ == "__main__":
    console.run(main)
