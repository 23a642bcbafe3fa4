"""SST-2-like sentences: opinions whose sign depends on negation and on which clause counts.

A clause says a quality, or denies the opposite one ("was not poor"). Of two clauses with opposite
opinions the main one counts, and the one after "but". So a good word is as likely as not to stand
in a bad review, and only how the words belong together tells the label.
"""

from __future__ import annotations

import random

from tasks.tiny.corpora.glue.facts import Source
from tasks.tiny.corpora.wording import tokenise

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
#: share of the texts with two opposite opinions, and of the others' that have two clauses
OPPOSED_SHARE = 0.34
AGREEING_SHARE = 0.42
#: share of the clauses that deny the opposite
DENIED_SHARE = 0.2


def _clause(rng: random.Random, aspect: str, positive: bool) -> str:
    """Return a clause that is good or bad for `aspect`."""
    denied = rng.random() < DENIED_SHARE
    qualities = _GOOD if positive is not denied else _BAD
    template = rng.choice(_DENIED if denied else _PLAIN)
    return template.format(x=aspect, d=rng.choice(_DEGREES), q=rng.choice(qualities))


def write_opinion(rng: random.Random, positive: bool, *, opposed_share: float) -> str:
    """Return an opinion of one or two clauses, lower-cased and tokenised as the real set is.

    Args:
        rng: source of all randomness.
        positive: the opinion of the clause that counts.
        opposed_share: share of the texts whose other clause says the opposite, in [0, 1].
    """
    first, second = rng.sample(_ASPECTS, 2)
    form = rng.random()
    if form < opposed_share:
        text = rng.choice(_OPPOSED).format(
            a=_clause(rng, first, not positive), b=_clause(rng, second, positive)
        )
    elif form < opposed_share + (1 - opposed_share) * AGREEING_SHARE:
        text = rng.choice(_AGREEING).format(
            a=_clause(rng, first, positive), b=_clause(rng, second, positive)
        )
    else:
        text = _clause(rng, second, positive)
    return f"{tokenise(text)} . "


def sst2(source: Source) -> tuple[str, str]:
    """A positive (1) or negative (0) opinion."""
    positive = source.rng.random() < 0.55
    text = write_opinion(source.rng, positive, opposed_share=OPPOSED_SHARE)
    return text, str(int(positive))
