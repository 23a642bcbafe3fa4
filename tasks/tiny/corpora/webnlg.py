"""WebNLG-like data: sets of one to five triples, each with several texts, in the official JSON.

The entities come from `world`; every sentence is worded here and nowhere else. As in the real data

- properties are words or camelCase compounds, and values that are no name are quoted where they
  have several words (``"under £15"``); names have blanks, not underscores, since a model of a
  million parameters does not learn in a short run to spell all of them anew;
- a set starts at one entity, which gives the entry its category, and may go on along a relation;
- the categories of `UNSEEN` occur in the test set only, where half of the entries are theirs. Their
  names have the parts of other names, and some of their properties occur in training too;
- some texts are not marked ``good``: they leave a triple out or tell another one. A few entries of
  train have no other text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.tiny.corpora.wording import Chooser, article
from tasks.tiny.corpora.world import CATEGORIES, RELATIONS, Entity, World

FILES = {"train": "train.json", "validation": "dev.json", "test": "test.json"}
#: categories of train and of one half of test, and those of the other half.
SEEN = ("town", "person", "shop", "museum", "book")
UNSEEN = ("hotel", "venue")
#: attribute of the world -> property of a triple.
PROPERTIES: dict[str, str] = {
    "age": "age",
    "area": "quarter",
    "author": "author",
    "children": "familyFriendly",
    "cuisine": "cuisine",
    "founded": "founded",
    "genre": "genre",
    "goods": "goods",
    "home": "home",
    "job": "job",
    "kind": "kind",
    "near": "neighbour",
    "opened": "opened",
    "owner": "owner",
    "price": "priceRange",
    "rating": "customerRating",
    "region": "region",
    "river": "river",
    "rooms": "rooms",
    "theme": "theme",
    "year": "year",
}
#: entries of the corpus that scale=tiny uses.
DEFAULT_SIZES: dict[str, int] = {"train": 500, "validation": 30, "test": 100}
#: entities of each category in the world.
WORLD_SIZE = 150
#: i-th wording is this much as likely as the one before: texts differ, but not wildly.
SKEW = 0.45
#: share of the sets with 1, 2, ... triples.
_NUM_TRIPLES = (10, 30, 30, 20, 10)
#: share of the test entries with 1, 2, ... good texts.
_NUM_TEST_TEXTS = (6, 25, 60, 3, 2, 2, 2)
#: draws of a text that no other text of the entry equals; the last one stays in any case.
_NUM_TRIES = 3
#: share of the texts that come with a further one that is not good, and of train entries with no
#: good one.
REJECTED_SHARE = 0.05
NONE_GOOD_SHARE = 0.01

Fact = tuple[Entity, str]


@dataclass(frozen=True)
class Entry:
    """A set of facts with its texts.

    Attributes:
        facts: pairs of an entity and one of its attributes; the first entity is the root.
        texts: pairs of comment (``good`` or ``toFix``) and text.
    """

    facts: tuple[Fact, ...]
    texts: tuple[tuple[str, str], ...]

    @property
    def category(self) -> str:
        """Category of the root."""
        return self.facts[0][0].category

    def triples(self) -> list[tuple[str, str, str]]:
        """Return the facts as (subject, property, object) in the form of the official data."""
        return [
            (entity.name, PROPERTIES[key], literal(key, entity.facts[key]))
            for entity, key in self.facts
        ]


def literal(key: str, value: str) -> str:
    """Return the object of a triple: names and single words as they are, other values quoted."""
    return value if key in RELATIONS or " " not in value else f'"{value}"'


def draw_facts(
    category: str, world: World, rng: random.Random, allowed: Sequence[str]
) -> tuple[Fact, ...]:
    """Draw one to five facts that start at an entity of `category`.

    Args:
        category: that of the root.
        world: where the entities come from.
        rng: source of all randomness.
        allowed: categories of the entities that a relation may lead to.

    Returns:
        The facts of the root, then those of the entities that its facts lead to.
    """
    by_name = {e.name: e for name in allowed for e in world.entities[name]}
    while True:  # not every entity has, or leads to, as many facts as were asked for
        (size,) = rng.choices(range(1, len(_NUM_TRIPLES) + 1), _NUM_TRIPLES)
        entity: Entity | None = world.pick(category, rng)
        facts: list[Fact] = []
        while entity is not None and len(facts) < size:
            keys = [key for key in CATEGORIES[entity.category] if key in entity.facts]
            room = size - len(facts)
            kept = rng.sample(keys, rng.randint(min(room, 2, len(keys)), min(room, len(keys))))
            facts += [(entity, key) for key in keys if key in kept]
            links = [by_name.get(entity.facts[key]) for key in kept if key in RELATIONS]
            known = {subject.name for subject, _ in facts}
            entity = next((link for link in links if link and link.name not in known), None)
        if len(facts) == size:
            return tuple(facts)


def realise(facts: Sequence[Fact], chooser: Chooser) -> str:
    """Return one text that tells every fact once.

    Args:
        facts: as `draw_facts` returns them.
        chooser: picks the wordings; one without randomness gives the likeliest text.

    Returns:
        One or more sentences.
    """
    pick = chooser.pick
    subjects = list(dict.fromkeys(entity.name for entity, _ in facts))
    entities = {entity.name: entity for entity, _ in facts}
    sentences: list[str] = []
    for name in subjects:
        entity = entities[name]
        claims = [_claim(entity, key, chooser) for subject, key in facts if subject.name == name]
        subject = name
        if len(claims) > 1 and pick(False, False, True):
            who = "who" if entity.category == "person" else "which"
            subject = f"{name}, {who} {claims.pop(0)},"
        while claims:
            together = claims[:1] if len(claims) == 1 or pick(False, False, True) else claims[:2]
            claims = claims[len(together) :]
            sentences.append(f"{subject} {' and '.join(together)}.")
            subject = pick("This person", name) if entity.category == "person" else pick("It", name)
    return " ".join(sentences)


_CLAIMS: dict[str, tuple[str, ...]] = {
    "age": ("is {v} years old", "is aged {v}"),
    "area": ("is located in the {v}", "is in the {v} area"),
    "author": ("was written by {v}", "is by {v}"),
    "children yes": ("is family-friendly", "welcomes families"),
    "children no": ("is not family-friendly", "does not welcome families"),
    "cuisine": ("serves {v} food", "has {v} food"),
    "founded": ("was founded in {v}", "dates from {v}"),
    "genre": ("is {a} book", "belongs to the {v} genre"),
    "goods": ("sells {v}", "is a shop that sells {v}"),
    "home": ("lives in {v}", "comes from {v}"),
    "job": ("works as {a}", "is {a}"),
    "kind": ("is {a}",),
    "near": ("is near {v}", "stands close to {v}"),
    "opened": ("was opened in {v}", "opened in {v}"),
    "owner": ("is owned by {v}", "belongs to {v}"),
    "price": ("has prices in the {v} range", "is in the {v} price range"),
    "price £": ("has prices {v}", "charges {v}"),
    "rating": ("is rated {v} by customers", "has a customer rating of {v}"),
    "region": ("is in the {v} region", "is {a} town"),
    "river": ("lies on the river {v}", "is on the {v} river"),
    "rooms": ("has {v} rooms", "is a hotel with {v} rooms"),
    "theme": ("has a collection of {v}", "shows {v}"),
    "year": ("was published in {v}", "came out in {v}"),
}


def _claim(entity: Entity, key: str, chooser: Chooser) -> str:
    value = entity.facts[key]
    if key == "children":
        wordings = _CLAIMS[f"children {value}"]
    elif key == "price" and "£" in value:
        wordings = _CLAIMS["price £"]
        value = f"of {value}" if value.startswith("£") else value
    else:
        wordings = _CLAIMS[key]
    return chooser.pick(*wordings).format(v=value, a=article(value))


def draw(*, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, list[Entry]]:
    """Draw all splits.

    Args:
        seed: equal seeds give equal corpora.
        sizes: split (``train``, ``validation``, ``test``) -> number of entries; None takes
            `DEFAULT_SIZES`.

    Returns:
        The splits; no set of triples occurs twice.

    Raises:
        ValueError: an unknown split or a size below 1.
    """
    sizes = DEFAULT_SIZES if sizes is None else sizes
    for split, size in sizes.items():
        if split not in FILES or size < 1:
            raise ValueError(
                f"sizes has {split!r}: {size}; allowed are sizes of at least 1 for {sorted(FILES)}"
            )
    rng = random.Random(f"webnlg-{seed}")  # noqa: S311 (not for security)
    world = World(rng, size=WORLD_SIZE)
    chooser = Chooser(rng, skew=SKEW)
    drawn: set[frozenset[tuple[str, str, str]]] = set()
    corpus: dict[str, list[Entry]] = {}
    for split, size in sizes.items():
        corpus[split] = []
        while len(corpus[split]) < size:
            is_unseen = split == "test" and len(corpus[split]) % 2 == 1
            allowed = UNSEEN if is_unseen else SEEN
            facts = draw_facts(rng.choice(allowed), world, rng, allowed)
            entry = Entry(facts, _draw_texts(facts, split, chooser, rng))
            if (triples := frozenset(entry.triples())) not in drawn:
                drawn.add(triples)
                corpus[split].append(entry)
    return corpus


def _draw_texts(
    facts: Sequence[Fact], split: str, chooser: Chooser, rng: random.Random
) -> tuple[tuple[str, str], ...]:
    if split == "test":
        (num_good,) = rng.choices(range(1, len(_NUM_TEST_TEXTS) + 1), _NUM_TEST_TEXTS)
    else:
        num_good = 0 if rng.random() < NONE_GOOD_SHARE else rng.randint(2, 3)
    texts: list[tuple[str, str]] = []
    for _ in range(num_good):
        for _ in range(_NUM_TRIES):
            text = ("good", realise(facts, chooser))
            if text not in texts:
                break
        texts.append(text)
    if not num_good or (split != "test" and rng.random() < REJECTED_SHARE * num_good):
        texts.append(("toFix", _spoil(facts, chooser, rng)))
    return tuple(texts)


def _spoil(facts: Sequence[Fact], chooser: Chooser, rng: random.Random) -> str:
    """Return a text that leaves the last fact out, or tells another one where there is only one."""
    if len(facts) > 1:
        return realise(facts[:-1], chooser)
    ((entity, key),) = facts
    other = rng.choice([k for k in CATEGORIES[entity.category] if k != key])
    return realise([(entity, other)], chooser)


def official(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return `entries` as the official JSON files hold them."""
    return {
        "entries": [
            {
                str(number): {
                    "category": entry.category.capitalize(),
                    "dbpedialinks": [],
                    "lexicalisations": [
                        {"comment": comment, "lang": "", "lex": text, "xml_id": f"Id{place}"}
                        for place, (comment, text) in enumerate(entry.texts, start=1)
                    ],
                    "links": [],
                    "modifiedtripleset": _triples(entry),
                    "originaltriplesets": {"originaltripleset": [_triples(entry)]},
                    "shape": "NA",
                    "shape_type": "NA",
                    "size": str(len(entry.facts)),
                    "xml_id": f"Id{number}",
                }
            }
            for number, entry in enumerate(entries, start=1)
        ]
    }


def _triples(entry: Entry) -> list[dict[str, str]]:
    return [
        {"object": value, "property": name, "subject": subject}
        for subject, name, value in entry.triples()
    ]


def write(folder: Path, *, seed: int, sizes: Mapping[str, int] | None = None) -> None:
    """Write the corpus as ``train.json``, ``dev.json`` and ``test.json``.

    Args:
        folder: made if missing.
        seed: equal seeds give equal bytes.
        sizes: split -> number of entries; None takes `DEFAULT_SIZES`.

    Raises:
        ValueError: an unknown split or a size below 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, entries in draw(seed=seed, sizes=sizes).items():
        text = json.dumps(official(entries), indent=4, ensure_ascii=False)
        (folder / FILES[split]).write_text(text, encoding="utf-8", newline="")
