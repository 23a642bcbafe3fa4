"""Synthetic sequences as long as those of E2E NLG, and articles as long as XSum's.

`PAIRS` are (context, target) lengths in tokens of GPT-2's vocabulary. The 42,061 training examples
(microsoft/LoRA's text, separator and end token counted) were put in the order of their whole
length and cut into hundredths; each gives its middle example. Mean 29.0 + 24.4 (all: 28.5 + 24.8).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

# fmt: off
PAIRS: tuple[tuple[int, int], ...] = (
    (15, 10), (14, 13), (17, 12), (21, 10), (19, 13), (19, 14), (21, 13), (17, 17), (19, 16),
    (21, 15), (25, 12), (20, 17), (23, 15), (19, 19), (23, 16), (19, 20), (23, 17), (21, 19),
    (25, 16), (22, 19), (27, 15), (23, 19), (21, 21), (25, 18), (22, 21), (27, 17), (24, 20),
    (21, 23), (26, 19), (24, 21), (31, 15), (26, 20), (23, 23), (28, 19), (25, 22), (22, 25),
    (27, 21), (25, 23), (21, 27), (28, 21), (25, 24), (33, 17), (28, 22), (25, 25), (32, 19),
    (28, 23), (25, 26), (31, 21), (27, 25), (25, 27), (30, 23), (27, 26), (37, 17), (30, 24),
    (27, 27), (33, 22), (29, 26), (26, 29), (32, 24), (29, 27), (39, 18), (31, 26), (28, 29),
    (33, 25), (30, 28), (37, 22), (32, 27), (28, 31), (33, 27), (29, 31), (34, 27), (31, 30),
    (36, 26), (32, 30), (38, 25), (33, 30), (41, 23), (33, 31), (39, 26), (33, 32), (39, 27),
    (33, 33), (37, 30), (32, 35), (36, 32), (41, 28), (33, 36), (37, 33), (39, 32), (34, 37),
    (36, 36), (38, 35), (39, 35), (39, 36), (39, 37), (39, 38), (39, 39), (41, 39), (40, 42),
    (39, 47),
)
# fmt: on


def draw(count: int, seed: int) -> list[tuple[int, int]]:
    """Return `count` pairs, each of `PAIRS` as often as every other, in an order set by `seed`."""
    order = random.Random(seed)  # noqa: S311 - no secret
    drawn: list[tuple[int, int]] = []
    while len(drawn) < count:
        drawn += order.sample(PAIRS, len(PAIRS))
    return drawn[:count]


def fill(total: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return the whole lengths of `pairs` from the first on, the last one cut, that sum to `total`.

    Raises:
        ValueError: they do not reach `total`.
    """
    lengths: list[int] = []
    for context, target in pairs:
        left = total - sum(lengths)
        if left <= context + target:
            return [*lengths, left] if left else lengths
        lengths.append(context + target)
    raise ValueError(f"{len(pairs)} sequences have fewer than {total} tokens")


#: tokens of XSum's articles, cut at 768, at these shares of the sorted training articles.
ARTICLE_SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
ARTICLE_TOKENS = (14, 93, 124, 245, 398, 630, 768, 768)


def sorted_articles(number: int) -> list[int]:
    """Return the longest article of each of `number` micro-batches of a step sorted by length."""
    ends = [(index + 1) / number for index in range(number)]
    return [round(float(x)) for x in np.interp(ends, ARTICLE_SHARES, ARTICLE_TOKENS)]
