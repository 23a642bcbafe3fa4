"""CoLA-like sentences: acceptable ones, and ones with a single violation of the grammar.

Each kind of violation is a mismatch of two neighbours, so that no word tells it: a verb that does
not agree with its subject (both numbers are equally common), an article before a name or none
before a noun, and two neighbours that have changed places, which leaves the words as they were.
"""

from __future__ import annotations

import random

from tasks.tiny.corpora.glue.facts import Source
from tasks.tiny.corpora.wording import sentence
from tasks.tiny.corpora.world import (
    AREAS,
    CUISINES,
    GOODS,
    JOBS,
    TOWN_NAMES,
    VENUE_KINDS,
    make_name,
)

#: share of acceptable sentences; 70 % in the real set
ACCEPTABLE_SHARE = 0.65
VIOLATIONS = ("agreement", "article", "order")

# subject: (the nouns it may have, singular; the same, plural). {j}, {k}: a job, a kind of venue;
# {p}, {e}: the name of a person, of a place; {t}: of a town. A digit makes it another one.
_SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "person": (
        ("the {j1}", "this {j1}"),
        ("the {j1}s", "these {j1}s"),
    ),
    "place": (
        ("the {k1}", "this {k1}"),
        ("the {k1}s", "these {k1}s"),
    ),
}
# verb, singular and plural, and what follows it up to the noun phrase that _OBJECTS ends it with
_PREDICATES: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "person": (
        ("lives", "live", "in", "place"),
        ("is", "are", "from", "place"),
        ("works", "work", "for", "person"),
        ("eats", "eat", "{c} food in", "place"),
        ("buys", "buy", "{g} from", "person"),
        ("was", "were", "in", "place"),
        ("has", "have", "a letter from", "person"),
    ),
    "place": (
        ("stands", "stand", "in", "place"),
        ("is", "are", "close to", "place"),
        ("belongs", "belong", "to", "person"),
        ("serves", "serve", "{c} food to", "person"),
        ("sells", "sell", "{g} to", "person"),
        ("was", "were", "opened in", "place"),
        ("has", "have", "rooms for", "person"),
    ),
}
# last noun phrase: with the article it needs, without the article it must not have
_OBJECTS = {"person": ("the {j3}", "{p3}"), "place": ("the {a}", "{t3}")}


def _names(rng: random.Random) -> dict[str, str]:
    """Return a word or name for each mark of the templates."""
    jobs, kinds, towns = rng.sample(JOBS, 3), rng.sample(VENUE_KINDS, 2), rng.sample(TOWN_NAMES, 2)
    return {
        "a": rng.choice(AREAS),
        "c": rng.choice(CUISINES[:-2]),  # "seafood" is no adjective, "vegan food" no cuisine
        "g": rng.choice(GOODS),
        "e1": make_name("venue", rng),
        "e2": make_name("hotel", rng),
        "j1": jobs[0],
        "j2": jobs[1],
        "j3": jobs[2],
        "k1": kinds[0],
        "k2": kinds[1],
        "p1": make_name("person", rng),
        "p2": make_name("person", rng),
        "p3": make_name("person", rng),
        "t1": towns[0],
        "t3": towns[1],
    }


def write_sentence(rng: random.Random, violation: str | None) -> str:
    """Return a sentence with one violation of the grammar, or with none.

    Args:
        rng: source of all randomness.
        violation: one of `VIOLATIONS`; None for an acceptable sentence.

    Returns:
        A sentence of five to eighteen words.
    """
    kind = rng.choice(("person", "place"))
    number, needs_article = rng.randrange(2), rng.random() < 0.5
    names = _names(rng)
    subject = rng.choice(_SUBJECTS[kind][number]).format(**names)
    *forms, link, object_kind = rng.choice(_PREDICATES[kind])
    last = _OBJECTS[object_kind][0 if needs_article else 1].format(**names)
    if violation == "agreement":
        number = 1 - number
    if violation == "article":
        last = last.removeprefix("the ") if needs_article else f"the {last}"
    words = [forms[number], *link.format(**names).split(), *last.split()]
    if violation == "order":
        # The last word that moves is the first one of the name or noun at the end.
        first_of_last = len(words) - len(last.split()) + (1 if needs_article else 0)
        at = rng.randrange(first_of_last)
        words[at], words[at + 1] = words[at + 1], words[at]
    return sentence(" ".join([subject, *words]))


def cola(source: Source) -> tuple[str, str]:
    """An acceptable sentence (1), or one with a violation (0)."""
    label = int(source.rng.random() < ACCEPTABLE_SHARE)
    violation = None if label else source.rng.choice(VIOLATIONS)
    return write_sentence(source.rng, violation), str(label)
