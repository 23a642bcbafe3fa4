"""What every realiser shares: weighted choice, small grammar rules, and tokenised text."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_PUNCTUATION = re.compile(r"([.,;:!?()\-£])")
_CONTRACTION = re.compile(r"(n't|'s)\b")


class Chooser:
    """Chooses among wordings that stand in order of preference.

    Args:
        rng: source of randomness; None always takes the first wording, which gives the text that
            the grammar finds most likely.
        skew: the i-th wording (from 0) is `skew` times as likely as the one before it, in (0, 1].
    """

    def __init__(self, rng: random.Random | None, *, skew: float) -> None:
        if not 0 < skew <= 1:
            raise ValueError(f"skew={skew} must be in (0, 1]; 1 makes all wordings equally likely")
        self._rng = rng
        self._skew = skew

    def pick(self, *options: T) -> T:
        """Return one of `options`."""
        if self._rng is None:
            return options[0]
        weights = [self._skew**i for i in range(len(options))]
        return self._rng.choices(options, weights)[0]


def article(phrase: str) -> str:
    """Return `phrase` with "a" or "an" before it."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def sentence(text: str) -> str:
    """Return `text` with a capital first letter and a full stop."""
    text = text.strip()
    return text[0].upper() + text[1:] + "."


def listing(items: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def tokenise(text: str) -> str:
    """Return `text` with spaces round punctuation, hyphens and the pound sign.

    "doesn't" becomes "does n't". Removing all white space from both gives equal texts.
    """
    text = _CONTRACTION.sub(r" \1", text)
    return " ".join(_PUNCTUATION.sub(r" \1 ", text).split())
