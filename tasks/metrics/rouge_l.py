"""ROUGE-L as e2e-metrics (coco-caption) computes it; not the ROUGE-L of `rouge-score`.

Lin 2004: F of the longest common subsequence with beta 1.2. Against several references the largest
precision and the largest recall are taken separately, and may come from different references. The
score is the mean over instances. Text is split at single blanks, so an empty text has one empty
token, which matches another empty text.
"""

from __future__ import annotations

from collections.abc import Sequence

BETA = 1.2


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean ROUGE-L.

    Args:
        predictions: one text per instance, as `ptb.tokenize` returns it.
        references: for every instance one or more such texts.

    Returns:
        A fraction in [0, 1].
    """
    scores = [_score(p, texts) for p, texts in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores)


def _score(prediction: str, references: Sequence[str]) -> float:
    tokens = prediction.split(" ")
    options = [text.split(" ") for text in references]
    common = [longest_common_subsequence(option, tokens) for option in options]
    precision = max(common) / len(tokens)
    recall = max(n / len(option) for n, option in zip(common, options, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004): bit i of `row` is zero where the length grows at token i of `first`,
    so that one addition of big integers replaces a row of the dynamic programme.
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything
    for token in second:
        matching = row & positions.get(token, 0)
        row = (row + matching | row - matching) & everything
    return len(first) - row.bit_count()
