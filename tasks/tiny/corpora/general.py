"""The corpus for pre-training: short documents about the world in many formats.

Stories, reports, cards followed by prose, lists, tables, questions with answers, corrections and
copied lines. It shares words and facts with the task corpora but not their formats: no document
has a ``key : value | key : value`` line or describes a venue the way `e2e` does, so a model
pre-trained here still has to be adapted. Most documents repeat names and values that stand earlier
in the same document, which is what makes copying from the context worth learning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from tasks.tiny.corpora.wording import Chooser, article, listing, sentence, tokenise
from tasks.tiny.corpora.world import CATEGORIES, Entity, World

#: entities of each category in the world that a corpus talks about.
WORLD_SIZE = 400
#: share of the documents whose text is tokenised (spaces round punctuation).
TOKENISED_SHARE = 0.5
#: share of the texts about other things than venues that define them first, as a guide does.
GUIDE_SHARE = 0.6
#: share of the cards whose prose is the next document.
SPLIT_SHARE = 0.5
#: share of the entities in the first text of a statement that are described by a card.
CARD_SHARE = 0.3
#: share of the statements whose name is exchanged, where one is, and not a value.
RENAMED_SHARE = 0.2

# What an attribute is called on cards and tables; venues have other names here than in E2E data.
_LABELS: dict[str, tuple[str, ...]] = {
    "age": ("age",),
    "area": ("quarter", "part of town"),
    "author": ("author", "written by"),
    "children": ("children", "families"),
    "cuisine": ("kitchen", "dishes"),
    "founded": ("founded",),
    "genre": ("genre",),
    "goods": ("goods", "sells"),
    "home": ("home", "lives in"),
    "job": ("job", "work"),
    "kind": ("kind", "sort"),
    "near": ("neighbour", "next to"),
    "opened": ("opened",),
    "owner": ("owner", "run by"),
    "price": ("cost", "bill"),
    "rating": ("opinion", "guests say"),
    "region": ("region",),
    "river": ("river",),
    "rooms": ("rooms",),
    "theme": ("theme", "shows"),
    "year": ("year",),
}


def _clauses(entity: Entity, pick: Callable[..., str], subject: str) -> dict[str, str]:
    """Return one clause for each fact: attribute -> clause about `subject`, no full stop."""
    wordings: dict[str, tuple[str, ...]] = {
        "age": ("{s} is {v} years old", "{s} turned {v} this year"),
        "area": ("you find {s} in the {v}", "{s} stands in the {v}", "the {v} is home to {s}"),
        "author": ("{v} wrote {s}", "{s} was written by {v}"),
        "cuisine": ("the cooks of {s} make {v} dishes", "people eat {v} food at {s}"),
        "founded": ("{s} was founded in {v}", "people came to {s} in {v}"),
        "genre": ("{s} is a {v} story", "readers of {v} like {s}"),
        "goods": ("{s} sells {v}", "people buy {v} at {s}"),
        "home": ("{s} lives in {v}", "the home of {s} is {v}"),
        "job": ("{s} works as a {v}", "{s} is a {v}"),
        "kind": ("people call {s} a {v}", "{s} was always a {v}"),
        "near": ("{v} is next to {s}", "{s} is close to {v}", "the neighbour of {s} is {v}"),
        "opened": ("{s} was opened in {v}", "{s} opened its doors in {v}"),
        "owner": ("{s} belongs to {v}", "{v} runs {s}"),
        "region": ("{s} lies in the {v} region", "the {v} region is the home of {s}"),
        "river": ("the river {v} runs through {s}", "{s} lies on the river {v}"),
        "rooms": ("{s} has {v} rooms", "there are {v} rooms at {s}"),
        "theme": ("{s} shows {v}", "visitors come to {s} for the {v}"),
        "year": ("{s} is from {v}", "{s} came out in {v}"),
        # What task corpora say of venues is said here of other things.
        "hotel area": ("the area of {s} is the {v}", "travellers look for {s} in the {v}"),
        "hotel near": ("{v} and {s} share a wall", "from {s} one can see {v} close by"),
        "hotel price": ("the price of a room at {s} is {v}", "rooms at {s} come at a {v} price"),
        "hotel rating": ("the rating of {s} is {v}", "every customer of {s} rated it {v}"),
        "museum area": ("{s} is located in the {v}", "the {v} area is proud of {s}"),
        "museum near": ("near {v} there is a museum called {s}", "{s} was built near {v}"),
        "shop area": ("the place of {s} is the {v}", "{s} serves the whole {v}"),
        "shop owner": ("{s} is in the family of {v}", "{v} is welcome to serve at {s}"),
    }  # fmt: skip
    special: dict[tuple[str, str], tuple[str, ...]] = {
        ("children", "yes"): (
            "families like {s}", "children are happy at {s}", "{s} is friendly to families",
        ),
        ("children", "no"): (
            "{s} is for adults only", "children stay away from {s}",
            "only grown-up guests go to {s}",
        ),
        ("price", "budget"): ("the bill at {s} is low", "{s} is known as a cheap house"),
        ("price", "fair"): ("the bill at {s} is moderate", "guests call {s} mid-priced"),
        ("price", "steep"): ("the bill at {s} is high", "{s} is pricey"),
        ("rating", "poor"): ("guests have a low opinion of {s}", "customers think little of {s}"),
        ("rating", "mixed"): ("guests find {s} average", "customers have mixed views of {s}"),
        ("rating", "superb"): ("guests have a high opinion of {s}", "customers love {s}"),
    }  # fmt: skip
    clauses = {}
    for key, value in entity.facts.items():
        if entity.category == "venue" and (key, value) in special:
            options = special[key, value]
        elif key == "price" and entity.category == "venue":
            options = ("guests of {s} pay {v}", "a meal at {s} costs {v}")
        elif key == "rating" and entity.category == "venue":
            options = ("guests give {s} {v}", "the customers of {s} gave it {v}")
        else:
            options = wordings.get(f"{entity.category} {key}", ()) + wordings.get(key, ())
        clauses[key] = pick(*options).format(s=subject, v=value)
    return clauses


def _openings(entity: Entity) -> dict[str, tuple[str, ...]]:
    """Return first sentences that define `entity`: the attributes they use -> wordings."""
    category = article(entity.category)
    openings: dict[str, tuple[str, ...]] = {
        "hotel area near": (
            "{name} is a hotel in the {area} area near {near}",
            "located in the {area} near {near}, {name} is a hotel for all",
        ),
        "hotel area": ("there is a hotel called {name} in the {area} area",),
        "hotel rooms near": ("near {near} there is a hotel called {name} with {rooms} rooms",),
        "hotel near": ("located close to {near}, {name} is a good hotel",),
        "shop goods area": (
            "{name} is a shop in the {area} area that sells {goods}",
            "there is a shop called {name} in the {area} selling {goods}",
        ),
        "shop owner": ("{name} is a family shop run by {owner}",),
        "museum theme near": (
            "located near {near}, {name} is a museum that shows {theme}",
            "there is a museum called {name} near {near} with {theme}",
        ),
        "museum area": ("{name} is an old museum in the {area} area",),
        "book author": (f"there is {category} called {{name}} by {{author}}",),
        "book genre": ("{name} is a good {genre}",),
        "person job home": ("{name} is a {job} from {home}",),
        "person home": ("located in {home}, the house of {name} is friendly to all",),
        "town river": ("located on the river {river}, {name} is a town that serves farmers",),
        "town region": ("there is a {region} town called {name}",),
    }
    return {
        keys.partition(" ")[2]: texts
        for keys, texts in openings.items()
        if keys.split()[0] == entity.category and set(keys.split()[1:]) <= set(entity.facts)
    }


_FURTHER = {
    "age": ("is {v} years old",),
    "founded": ("was founded in {v}",),
    "opened": ("was opened in {v}",),
    "price": ("has rooms at a {v} price", "has {v} prices for a room"),
    "rating": ("has a {v} rating from guests", "is rated {v} by guests"),
    "rooms": ("has {v} rooms",),
    "year": ("is from {v}",),
}


class Statement(NamedTuple):
    """What a text says about an entity, and a sentence or two about the same entity.

    Attributes:
        first: a card or prose about one or two entities.
        second: prose about one or two facts of one of them.
        changed: the value in `second` that is not the one in `first`; None where all agree.
    """

    first: str
    second: str
    changed: str | None


def _pronoun(entity: Entity) -> str:
    return "this person" if entity.category == "person" else "it"


class _Writer:
    """Writes the documents of one corpus; one method for each format."""

    def __init__(self, rng: random.Random, world: World) -> None:
        self.rng = rng
        self.world = world
        self.pick = Chooser(rng, skew=0.7).pick

    def _entity(self) -> Entity:
        categories = list(CATEGORIES)
        weights = [4 if category == "venue" else 1 for category in categories]
        return self.world.pick(self.rng.choices(categories, weights)[0], self.rng)

    def _some_facts(self, entity: Entity) -> Entity:
        """Return `entity` with a random choice of its facts, in a random order."""
        keys = list(entity.facts)
        kept = self.rng.sample(keys, self.rng.randint(min(2, len(keys)), min(6, len(keys))))
        return Entity(entity.name, entity.category, {key: entity.facts[key] for key in kept})

    def _prose(self, entity: Entity) -> str:
        """Return sentences about the facts of `entity`, in a random order."""
        if entity.category != "venue" and self.rng.random() < GUIDE_SHARE:
            return self._guide(entity)
        names = _clauses(entity, self.pick, entity.name)
        again = _clauses(entity, self.pick, _pronoun(entity))
        keys = list(entity.facts)
        self.rng.shuffle(keys)
        texts, at = [], 0
        while at < len(keys):
            clause = names[keys[at]] if at == 0 or self.rng.random() < 0.4 else again[keys[at]]
            at += 1
            if at < len(keys) and self.rng.random() < 0.4:
                clause += self.pick(", and ", " and ", ", while ") + again[keys[at]]
                at += 1
            texts.append(sentence(clause))
        return " ".join(texts)

    def _guide(self, entity: Entity) -> str:
        """Return a sentence that defines `entity`, then what is left to say (never a venue)."""
        openings = _openings(entity)
        if not openings:
            return " ".join(map(sentence, _clauses(entity, self.pick, entity.name).values()))
        used = self.rng.choice(list(openings))
        texts = [self.pick(*openings[used]).format(name=entity.name, **entity.facts)]
        left = {key: value for key, value in entity.facts.items() if key not in used.split()}
        claims = [
            self.pick(*_FURTHER[key]).format(v=value)
            for key, value in left.items()
            if key in _FURTHER
        ]
        if claims:
            texts.append(f"{self.pick('it', 'the ' + entity.category)} {listing(claims)}")
        clauses = _clauses(entity, self.pick, _pronoun(entity))
        texts += [clauses[key] for key in left if key not in _FURTHER]
        return " ".join(map(sentence, texts))

    def _label(self, key: str) -> str:
        return self.pick(*_LABELS[key])

    def card(self) -> list[str]:
        """A card of facts and prose about them: one document, or two in a row."""
        entity = self._some_facts(self._entity())
        equals, stop = self.pick((" = ", "; "), (": ", "\n"), (" - ", ", "), (" is ", " / "))
        rows = [f"{self._label(key)}{equals}{value}" for key, value in entity.facts.items()]
        at = self.rng.randint(0, len(rows))
        rows.insert(0 if self.rng.random() < 0.6 else at, f"{entity.category}{equals}{entity.name}")
        card, text = stop.join(rows), self._prose(entity)
        if self.rng.random() < SPLIT_SHARE:
            return [card, text]
        return [f"{card}\n{self.pick('', 'Text: ', 'Story: ')}{text}"]

    def extraction(self) -> list[str]:
        """Prose, then a card of the facts in it."""
        entity = self._some_facts(self._entity())
        rows = [f"{self._label(key)} = {value}" for key, value in entity.facts.items()]
        return [f"{self._prose(entity)}\nCard: {entity.name}; {'; '.join(rows)}"]

    def questions(self) -> list[str]:
        """Prose or rows about entities, then questions with answers copied from it."""
        group = [self._some_facts(self._entity()) for _ in range(self.rng.randint(1, 3))]
        lines = [self._prose(entity) for entity in group]
        asked = self.rng.sample(group, min(2, len(group)))
        for entity in asked:
            key = self.rng.choice(list(entity.facts))
            question = f"what is the {_LABELS[key][0]} of {entity.name}"
            lines.append(f"Question: {question[0].upper()}{question[1:]}?")
            lines.append(f"Answer: {entity.facts[key]}")
        return ["\n".join(lines)]

    def listed(self) -> list[str]:
        """Names that share a category, then a line for each."""
        category = self.rng.choice(list(CATEGORIES))
        group = self.rng.sample(self.world.entities[category], self.rng.randint(2, 4))
        key = self.rng.choice(CATEGORIES[category])
        head = f"{category} list: {'; '.join(entity.name for entity in group)}."
        lines = [f"* {entity.name}: {self._label(key)} {entity.facts[key]}" for entity in group]
        return ["\n".join([head[0].upper() + head[1:], *lines])]

    def table(self) -> list[str]:
        """A table of entities, then the rows in words."""
        category = self.rng.choice(list(CATEGORIES))
        keys = self.rng.sample(CATEGORIES[category], min(2, len(CATEGORIES[category])))
        group = self.rng.sample(self.world.entities[category], self.rng.randint(1, 3))
        head = ["name", *(self._label(key) for key in keys)]
        rows = [[entity.name, *(entity.facts[key] for key in keys)] for entity in group]
        shown = [Entity(e.name, e.category, {key: e.facts[key] for key in keys}) for e in group]
        prose = " ".join(self._prose(entity) for entity in shown)
        return ["\n".join(f"| {' | '.join(row)} |" for row in [head, *rows]) + f"\n{prose}"]

    def story(self) -> list[str]:
        """Somebody walks from place to place; names come back."""
        hero = self.world.pick("person", self.rng)
        stops = [
            self.world.pick(self.pick("venue", "shop", "museum", "hotel"), self.rng)
            for _ in range(self.rng.randint(2, 3))
        ]
        texts = [f"{hero.name} went from {stops[0].name} to {stops[1].name}"]
        for stop in stops:
            facts = self._some_facts(stop)
            clauses = _clauses(facts, self.pick, self.pick("it", stop.name))
            texts.append(f"at {stop.name} {hero.name} learned this")
            texts += list(clauses.values())[:2]
        texts.append(f"after {listing([stop.name for stop in stops])}, {hero.name} went home")
        return [" ".join(sentence(text) for text in texts)]

    def correction(self) -> list[str]:
        """A text, then the same text with one name or value changed."""
        entity = self._some_facts(self._entity())
        other = self.world.pick(entity.category, self.rng)
        text = self._prose(entity)
        again = text.replace(entity.name, other.name)
        return [f"{text}\nNot {entity.name} but {other.name}: {again}"]

    def copied(self) -> list[str]:
        """Names and values in any order, then the same line again, once to three times."""
        words = [self._entity().name for _ in range(self.rng.randint(1, 3))]
        for _ in range(self.rng.randint(1, 3)):
            words.append(self.rng.choice(list(self._entity().facts.values())))
        self.rng.shuffle(words)
        line = self.pick(", ", " ", "; ").join(words)
        head = self.pick("Again: ", "Copy: ", "")
        return [f"{line}\n" + "\n".join([f"{head}{line}"] * self.rng.randint(1, 3))]

    def saying(self) -> list[str]:
        """Free prose about a few entities of one category."""
        entity = self._entity()
        about = self._prose(entity)
        return [f"{article(entity.category).capitalize()} of our world. {about}"]

    def statement(self) -> Statement:
        """A text and what is said of it; in one half of the cases a name or a value is changed."""
        while True:
            group = [self._some_facts(self._entity()) for _ in range(self.pick(1, 2))]
            entity = self.rng.choice(group)
            first = "\n".join(
                self._row(each) if self.rng.random() < CARD_SHARE else self._prose(each)
                for each in group
            )
            keys = self.rng.sample(list(entity.facts), self.rng.randint(1, 2))
            said = Entity(entity.name, entity.category, {key: entity.facts[key] for key in keys})
            second = self._prose(said)
            other = self.world.pick(entity.category, self.rng)
            if self.rng.random() < RENAMED_SHARE:
                old, new = entity.name, other.name
            else:
                key = self.rng.choice(keys)
                old, new = entity.facts[key], other.facts[key]
            # Some wordings say a value in other words; there is nothing to exchange then.
            if old in first and old in second and new not in first and new not in second:
                break
        changed = self.rng.choice((None, new))
        if changed is not None:
            second = second.replace(old, changed)
        if self.rng.random() < TOKENISED_SHARE:
            first = "\n".join(map(tokenise, first.split("\n")))
            second, changed = tokenise(second), changed and tokenise(changed)
        return Statement(first, second, changed)

    def _row(self, entity: Entity) -> str:
        """Return a card of `entity`."""
        equals, stop = self.pick((" = ", "; "), (": ", "\n"), (" - ", ", "), (" is ", " / "))
        rows = [f"{self._label(key)}{equals}{value}" for key, value in entity.facts.items()]
        return stop.join([f"{entity.category}{equals}{entity.name}", *rows])

    def write(self) -> list[str]:
        """Return one document, or two that belong together, in a random format."""
        formats: list[tuple[Callable[[], list[str]], float]] = [
            (self.card, 8), (self.extraction, 1), (self.questions, 2), (self.listed, 1),
            (self.table, 1), (self.story, 1), (self.correction, 1), (self.copied, 3),
            (self.saying, 0.5),
        ]  # fmt: skip
        functions, weights = zip(*formats, strict=True)
        texts = self.rng.choices(functions, weights)[0]()
        if self.rng.random() < TOKENISED_SHARE:
            return ["\n".join(map(tokenise, text.split("\n"))) for text in texts]
        return texts


def sequences(seed: int, num_sequences: int) -> Iterator[list[str]]:
    """Yield the general corpus as lists of documents that belong together.

    Args:
        seed: equal seeds give equal corpora; a longer corpus begins with the shorter one.
        num_sequences: at least 1.

    Yields:
        One document, or a card and the text about it as two. A document has one or more lines and
        no trailing newline.

    Raises:
        ValueError: `num_sequences` is below 1.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences={num_sequences}: at least 1 is needed")
    rng = random.Random(f"general-{seed}")  # noqa: S311 (not for security)
    writer = _Writer(rng, World(rng, size=WORLD_SIZE))
    for _ in range(num_sequences):
        yield writer.write()


def statements(seed: int, num_statements: int) -> Iterator[Statement]:
    """Yield texts with statements about them, from the world of `sequences` of the same seed.

    Args:
        seed: equal seeds give equal statements; more of them begin with the fewer.
        num_statements: 0 or more.

    Yields:
        A statement; one half of them disagree with their text.

    Raises:
        ValueError: `num_statements` is negative.
    """
    if num_statements < 0:
        raise ValueError(f"num_statements={num_statements}: 0 or more is needed")
    rng = random.Random(f"general-{seed}")  # noqa: S311 (not for security)
    world = World(rng, size=WORLD_SIZE)
    writer = _Writer(random.Random(f"statements-{seed}"), world)  # noqa: S311 (not for security)
    for _ in range(num_statements):
        yield writer.statement()


def documents(seed: int, num_documents: int) -> Iterator[str]:
    """Yield the documents of `sequences` one by one.

    Args:
        seed: as in `sequences`.
        num_documents: at least 1.

    Returns:
        The first `num_documents` documents.

    Raises:
        ValueError: `num_documents` is below 1.
    """
    if num_documents < 1:
        raise ValueError(f"num_documents={num_documents}: at least 1 is needed")
    return islice(chain.from_iterable(sequences(seed, num_documents)), num_documents)
