"""ROUGE-L of e2e-metrics, which is that of coco-caption; not the ROUGE-L of `rouge-score`.

Lin 2004: F of the longest common subsequence with beta 1.2. Against several references the largest
precision and the largest recall are taken separately, and may come from different references. The
score is the mean over instances. Text is split at single blanks, so an empty text has one empty
token, which matches another empty text.
"""

from __future__ import annotations

from collections.abc import Sequence

from pycocoevalcap.rouge.rouge import Rouge


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean ROUGE-L.

    Args:
        predictions: one text per instance, as `ptb.tokenize` returns it.
        references: for every instance one or more such texts.

    Returns:
        A fraction in [0, 1].
    """
    scores = values(predictions, references)
    return float(sum(scores) / len(scores))


def values(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return ROUGE-L of each instance; arguments as `rouge_l`."""
    score = Rouge().calc_score
    return [score([p], list(texts)) for p, texts in zip(predictions, references, strict=True)]
