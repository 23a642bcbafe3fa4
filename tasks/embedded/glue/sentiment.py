"""SST-2-like sentences: opinions whose sign depends on negation and on which clause counts.

A clause says a quality, or denies the opposite one ("was not poor"). Of two clauses with opposite
opinions the main one counts, and the one after "but". So a good word is as likely as not to stand
in a bad review, and only how the words belong together tells the label.
"""

from __future__ import annotations

import random

from tasks.embedded.glue.facts import Source
from tasks.embedded.wording import tokenise

_ASPECTS = (
    "food", "kitchen", "staff", "room", "bill", "place", "area", "story", "museum", "river",
    "bread", "service", "music", "view", "garden", "guide",
)  # fmt: skip
# Words of the general corpus, so that a tiny model knows them.
_GOOD = ("superb", "happy", "friendly", "fair", "welcome", "proud")
_BAD = ("poor", "mixed", "average", "low", "steep", "pricey")
_DEGREES = ("", "", "very ", "so ", "quite ")
_PLAIN = ("the {x} was {d}{q}", "we found the {x} {d}{q}", "they call the {x} {d}{q}")
_DENIED = ("the {x} was not {q}", "we never found the {x} {q}", "nobody calls the {x} {q}")
_AGREEING = ("{a} and {b}", "{a} , and {b}")
#: the second clause ({b}) is the one that counts
_OPPOSED = (
    "{a} , but {b}",
    "although {a} , {b}",
    "{b} , although {a}",
)
#: share of the clauses that deny the opposite
DENIED_SHARE = 0.2


def _clause(rng: random.Random, aspect: str, positive: bool) -> str:
    """Return a clause that is good or bad for `aspect`."""
    denied = rng.random() < DENIED_SHARE
    qualities = _GOOD if positive is not denied else _BAD
    template = rng.choice(_DENIED if denied else _PLAIN)
    return template.format(x=aspect, d=rng.choice(_DEGREES), q=rng.choice(qualities))


def sst2(source: Source) -> tuple[str, str]:
    """A positive (1) or negative (0) opinion, lower-cased and tokenised as the real set is."""
    rng = source.rng
    positive = rng.random() < 0.55
    first, second = rng.sample(_ASPECTS, 2)
    form = rng.random()
    if form < 0.38:
        text = _clause(rng, second, positive)
    elif form < 0.66:
        text = rng.choice(_AGREEING).format(
            a=_clause(rng, first, positive), b=_clause(rng, second, positive)
        )
    else:
        text = rng.choice(_OPPOSED).format(
            a=_clause(rng, first, not positive), b=_clause(rng, second, positive)
        )
    return f"{tokenise(text)} . ", str(int(positive))
