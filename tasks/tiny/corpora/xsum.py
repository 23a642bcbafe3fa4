"""XSum-like data: articles of several sentences, each with a summary of one sentence.

An article tells about two places that stand next to each other, sometimes about a guest too. One
thing in it is the news: what happens to one of the places this week. A thing of the same kind
happened to the other place long ago, so the words of an event alone do not say which one counts;
the time does.

The summary says the news about its place and describes the place by facts that other sentences
hold, in words of its own: it joins facts of three or four sentences, leaves out all the rest and is
no sentence of the article. What the article gives as two values ("from fair to budget prices") is a
judgement in the summary ("has lowered its prices"). The news is never the first sentence.

Files have the format of the real sets: ``<split>.jsonl`` with ``document``, ``summary`` and ``id``.
The places come from `world`; every sentence is worded here and nowhere else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.tiny.corpora.wording import Chooser, article, sentence
from tasks.tiny.corpora.world import (
    AREAS,
    CUISINES,
    GOODS,
    JOBS,
    PRICES,
    RATINGS,
    THEMES,
    TOWN_NAMES,
    Entity,
    make_entity,
    make_name,
)

SPLITS = ("train", "validation", "test")
#: numbers of articles of the corpus that scale=tiny uses.
DEFAULT_SIZES: dict[str, int] = {"train": 700, "validation": 30, "test": 100}
#: the i-th wording is this much as likely as the one before.
SKEW = 0.5
#: things that have an area and can have news, and how often they do.
PLACES = {"venue": 3, "hotel": 1, "shop": 1, "museum": 1}

NOW = ("this week", "on Monday", "since Friday", "as of today")
THEN = ("many years ago", "back in 1950", "in the last century", "long before the war")


@dataclass(frozen=True)
class Event:
    """Something that happens to a place.

    Attributes:
        past: what the article says of it, without a time; ``{s}`` is the place.
        summary: what the summary says, behind the place.
        replaced: the attribute that it changes; the article does not tell its old value elsewhere.
    """

    past: tuple[str, ...]
    summary: tuple[str, ...]
    replaced: str


def _change(entity: Entity, key: str, values: tuple[str, ...], rng: random.Random) -> str:
    return rng.choice([value for value in values if value != entity.facts[key]])


def _sold(entity: Entity, rng: random.Random) -> Event:
    new = make_name("person", rng)
    return Event(
        past=(f"{new} bought {{s}}", f"the keys of {{s}} went to {new}"),
        summary=(f"has been sold to {new}", f"has a new owner, {new}"),
        replaced="owner",
    )


def _moved(entity: Entity, rng: random.Random) -> Event:
    old, new = entity.facts["area"], _change(entity, "area", AREAS, rng)
    return Event(
        past=(
            f"{{s}} packed its things in the {old} and opened again in the {new}",
            f"{{s}} changed its place from the {old} to the {new}",
        ),
        summary=(f"has moved to the {new}", f"has left the {old} for the {new}"),
        replaced="area",
    )


def _closed(entity: Entity, rng: random.Random) -> Event:
    reason = rng.choice(("a fire", "a flood", "bad debts", "a quarrel"))
    return Event(
        past=(
            f"the doors of {{s}} stayed shut after {reason}",
            f"{reason} was the end of {{s}}",
        ),
        summary=(f"has closed because of {reason}", f"has been closed by {reason}"),
        replaced="",
    )


def _priced(entity: Entity, rng: random.Random) -> Event:
    levels = PRICES[:3] if entity.facts["price"] in PRICES[:3] else PRICES[3:]
    old, new = entity.facts["price"], _change(entity, "price", levels, rng)
    up = levels.index(new) > levels.index(old)
    return Event(
        past=(
            f"{{s}} went from {old} to {new} on its price list",
            f"{{s}} wrote {new} in place of {old} on its price list",
        ),
        summary=("has raised its prices", "has become more expensive")
        if up
        else ("has lowered its prices", "has become cheaper"),
        replaced="price",
    )


def _rated(entity: Entity, rng: random.Random) -> Event:
    levels = RATINGS[:3] if entity.facts["rating"] in RATINGS[:3] else RATINGS[3:]
    old, new = entity.facts["rating"], _change(entity, "rating", levels, rng)
    up = levels.index(new) > levels.index(old)
    return Event(
        past=(
            f"guests changed their opinion of {{s}} from {old} to {new}",
            f"the guide wrote {new} where {{s}} used to be {old}",
        ),
        summary=("is doing better with its guests", "has won over its guests")
        if up
        else ("is doing worse with its guests", "has disappointed its guests"),
        replaced="rating",
    )


def _families(entity: Entity, rng: random.Random) -> Event:
    if entity.facts["children"] == "no":
        return Event(
            past=("{s} took down its sign for adults only", "{s} bought high chairs for families"),
            summary=("now welcomes children", "has opened its doors to families"),
            replaced="children",
        )
    return Event(
        past=("{s} put up a sign for adults only", "{s} sold the high chairs of its families"),
        summary=("no longer welcomes children", "has closed its doors to families"),
        replaced="children",
    )


def _offers(key: str, values: tuple[str, ...]) -> Callable[[Entity, random.Random], Event]:
    def make(entity: Entity, rng: random.Random) -> Event:
        old, new = entity.facts[key], _change(entity, key, values, rng)
        return Event(
            past=(
                f"{{s}} gave up {old} and turned to {new}",
                f"{{s}} put {new} in the place of {old}",
            ),
            summary=(f"has changed from {old} to {new}", f"has given up {old} for {new}"),
            replaced=key,
        )

    return make


_EVENTS: dict[str, tuple[Callable[[Entity, random.Random], Event], ...]] = {
    "venue": (_sold, _moved, _closed, _priced, _rated, _families, _offers("cuisine", CUISINES)),
    "hotel": (_sold, _moved, _closed, _priced, _rated),
    "shop": (_sold, _moved, _closed, _offers("goods", GOODS)),
    "museum": (_sold, _moved, _closed, _offers("theme", THEMES)),
}


def _noun(entity: Entity) -> str:
    return entity.facts.get("kind", entity.category)


#: category and attribute -> sentences of the article and the summary's words before and behind the
#: noun ("{v}" is the value, "{s}" the place).
_FACTS: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    ("venue", "cuisine"): (
        ("the cooks of {s} make {v} dishes", "{v} food is served at {s}"), "{v} {n}",
    ),
    ("hotel", "rooms"): (("{s} has {v} rooms", "there are {v} rooms at {s}"), "{n} of {v} rooms"),
    ("shop", "goods"): (("{s} sells {v}", "people buy {v} at {s}"), "{n} for {v}"),
    ("museum", "theme"): (("{s} shows {v}", "visitors come to {s} for the {v}"), "{n} of {v}"),
    ("", "area"): (("{s} stands in the {v}", "you find {s} in the {v}"), "{n} in the {v}"),
    ("", "opened"): (("{s} was opened in {v}", "{s} opened its doors in {v}"), "{n} from {v}"),
}  # fmt: skip


def _background(entity: Entity, hidden: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the facts that the article tells of `entity`: attribute -> wordings, description."""
    return {
        key: (tuple(text.replace("{v}", entity.facts[key]) for text in texts), description)
        for (category, key), (texts, description) in _FACTS.items()
        if category in ("", entity.category) and key in entity.facts and key != hidden
    }


def _write(rng: random.Random) -> tuple[str, str]:
    """Draw one article and its summary."""
    pick = Chooser(rng, skew=SKEW).pick
    categories = rng.choices(list(PLACES), list(PLACES.values()), k=2)
    subject, other = (make_entity(category, rng) for category in categories)
    while other.name == subject.name or _noun(other) == _noun(subject):
        other = make_entity(rng.choice(list(PLACES)), rng)
    guest, job, home = make_name("person", rng), rng.choice(JOBS), rng.choice(TOWN_NAMES)

    events = {e.name: rng.choice(_EVENTS[e.category])(e, rng) for e in (subject, other)}
    facts = {e.name: _background(e, events[e.name].replaced) for e in (subject, other)}

    def told(entity: Entity) -> list[str]:
        """Return what the article says of an entity; of what no summary needs, a part."""
        name = entity.name
        texts = [f"{name} is {article(_noun(entity))}"]
        needed = entity is subject
        keys = [key for key in facts[name] if (needed and key != "opened") or rng.random() < 0.5]
        rng.shuffle(keys)
        texts += [
            pick(*facts[name][key][0]).format(s=pick(f"the {_noun(entity)}", name)) for key in keys
        ]
        return texts

    places = [subject, other]
    rng.shuffle(places)
    first, second = map(told, places)
    second[0] += f" {pick('next to', 'close to')} {places[0].name}"
    texts = first + second
    news = f"{rng.choice(NOW)} " + pick(*events[subject.name].past).format(s=subject.name)
    history = f"{rng.choice(THEN)} " + pick(*events[other.name].past).format(s=other.name)
    voice = pick(
        f"{guest}, {article(job)} from {home}, comes here every day",
        f"all of this was told by {guest}, who is {article(job)} in {home}",
    )
    for text in (news, history, *[voice] * rng.randint(0, 1)):
        texts.insert(rng.randint(1, len(texts)), text)
    return " ".join(map(sentence, texts)), _summary(subject, facts[subject.name], events, rng)


def _summary(
    subject: Entity,
    facts: Mapping[str, tuple[tuple[str, ...], str]],
    events: Mapping[str, Event],
    rng: random.Random,
) -> str:
    pick = Chooser(rng, skew=SKEW).pick
    description = _noun(subject)
    for key, (_, pattern) in facts.items():  # in the order of `_FACTS`, whatever the article's
        if key != "opened":
            description = pattern.format(n=description, v=subject.facts[key])
    claim = pick(*events[subject.name].summary)
    return sentence(
        pick(
            f"{article(description)}, {subject.name}, {claim}",
            f"{subject.name}, {article(description)}, {claim}",
        )
    )


def draw(*, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, list[tuple[str, str]]]:
    """Draw all splits as (document, summary).

    Args:
        seed: equal seeds give equal corpora.
        sizes: split -> number of articles; None takes `DEFAULT_SIZES`.

    Returns:
        The splits; no document occurs twice.

    Raises:
        ValueError: an unknown split or a size below 1.
    """
    sizes = DEFAULT_SIZES if sizes is None else sizes
    for split, size in sizes.items():
        if split not in SPLITS or size < 1:
            raise ValueError(
                f"sizes has {split!r}: {size}; allowed are sizes of at least 1 for {list(SPLITS)}"
            )
    rng = random.Random(f"xsum-{seed}")  # noqa: S311 (not for security)
    seen: set[str] = set()
    corpus: dict[str, list[tuple[str, str]]] = {}
    for split, size in sizes.items():
        corpus[split] = []
        while len(corpus[split]) < size:
            document, summary = _write(rng)
            if document not in seen:
                seen.add(document)
                corpus[split].append((document, summary))
    return corpus


def write(folder: Path, *, seed: int, sizes: Mapping[str, int] | None = None) -> None:
    """Write the corpus as ``<split>.jsonl``.

    Args:
        folder: made if missing.
        seed: equal seeds give equal bytes.
        sizes: split -> number of articles; None takes `DEFAULT_SIZES`.

    Raises:
        ValueError: an unknown split or a size below 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, rows in draw(seed=seed, sizes=sizes).items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="") as file:
            for document, summary in rows:
                number += 1
                row = {"document": document, "summary": summary, "id": f"{number:08d}"}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
