"""Single sentences for pre-training: sound ones, how they are damaged, and opinions.

The sound ones have the grammar of `glue.acceptability` or are taken from the general corpus. An
opinion is of one mind, in one clause or two; that a clause may count more than another one is left
to `glue.sentiment`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tasks.tiny.corpora.general import sequences
from tasks.tiny.corpora.glue.acceptability import write_sentence
from tasks.tiny.corpora.glue.sentiment import write_opinion

#: kind of sentence -> share.
SHARES = {"grammar": 0.45, "opinion": 0.4, "document": 0.15}
MOODS = ("poor", "good")
#: what may happen to a sentence.
DAMAGES = ("order", "missing", "doubled", "ending")


class Sentence(NamedTuple):
    """One sentence.

    Attributes:
        text: as it is written.
        mood: ``good`` or ``poor`` where it is an opinion; None where it is not.
    """

    text: str
    mood: str | None = None


def sentences(seed: int, num_sentences: int) -> Iterator[Sentence]:
    """Yield single sentences.

    Args:
        seed: equal seeds give equal sentences; more of them begin with the fewer.
        num_sentences: 0 or more.

    Yields:
        A sentence of one word or more.

    Raises:
        ValueError: `num_sentences` is negative.
    """
    if num_sentences < 0:
        raise ValueError(f"num_sentences={num_sentences}: 0 or more is needed")
    if not num_sentences:
        return
    rng = random.Random(f"sentences-{seed}")  # noqa: S311 (not for security)
    documents = sequences(seed + 1, num_sentences)  # another world than the documents'
    for _ in range(num_sentences):
        kind = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
        if kind == "grammar":
            yield Sentence(write_sentence(rng, None))
        elif kind == "opinion":
            good = rng.random() < 0.5
            yield Sentence(write_opinion(rng, good, opposed_share=0.0), MOODS[good])
        else:
            line = rng.choice(rng.choice(next(documents)).split("\n"))
            yield Sentence(rng.choice(re.split(r"(?<=[.!?]) +", line)))


def damage(words: Sequence[str], rng: random.Random) -> tuple[list[str], frozenset[int]]:
    """Return `words` with one thing wrong, and the positions of the words that are out of place.

    Two neighbours change places, a word is missing (the one behind it is out of place), a word of
    the sentence stands a second time somewhere, or a final "s" is taken from a word or added to it.

    Args:
        words: of a sentence; what has fewer than three stays as it is.
        rng: source of all randomness.

    Returns:
        Words and positions; no position where nothing was changed.
    """
    words = list(words)
    if len(words) < 3:
        return words, frozenset()
    kind = rng.choice(DAMAGES)
    at = rng.randrange(len(words) - 2)
    if kind == "order":
        if words[at] == words[at + 1]:
            return words, frozenset()
        words[at], words[at + 1] = words[at + 1], words[at]
        return words, frozenset((at, at + 1))
    if kind == "missing":
        del words[at]
    elif kind == "doubled":
        words.insert(at, rng.choice(words))
    else:
        words[at] = words[at][:-1] if words[at].endswith("s") else f"{words[at]}s"
    return words, frozenset((at,))
