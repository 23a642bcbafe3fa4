"""Entities, and their facts as clauses and questions, for the sentence-pair tasks.

In this world an attribute has one value: a tavern with Greek dishes has no Thai ones. So two
different values of one attribute contradict each other, which `other_value` relies on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tasks.tiny.corpora.wording import Chooser, article
from tasks.tiny.corpora.world import CATEGORIES, Entity, make_entity

#: i-th wording is this much as likely as the one before.
SKEW = 0.8

# attribute -> what can be said of a thing that has it; {v} is the value, {a} the value after a/an.
_CLAUSES: dict[str, tuple[str, ...]] = {
    "age": ("is {v} years old", "has turned {v}"),
    "area": ("is in the {v}", "stands in the {v}"),
    "author": ("was written by {v}", "is the work of {v}"),
    "cuisine": ("serves {v} food", "has {v} dishes"),
    "founded": ("was founded in {v}", "dates from {v}"),
    "genre": ("is {a} story", "tells {a} story"),
    "goods": ("sells {v}", "trades in {v}"),
    "home": ("lives in {v}", "has a house in {v}"),
    "job": ("works as {a}", "is {a}"),
    "kind": ("is {a}", "is called {a}"),
    "near": ("is near {v}", "is next to {v}"),
    "opened": ("was opened in {v}", "has been open since {v}"),
    "owner": ("belongs to {v}", "is run by {v}"),
    "price": ("costs {v}", "has a price of {v}"),
    "rating": ("is rated {v}", "has a rating of {v}"),
    "region": ("is in the {v} region", "belongs to the {v} region"),
    "river": ("lies on the river {v}", "is on the banks of the {v}"),
    "rooms": ("has {v} rooms", "offers {v} rooms"),
    "theme": ("shows {v}", "is about {v}"),
    "year": ("came out in {v}", "is from {v}"),
}
_SPECIAL_CLAUSES: dict[tuple[str, str], tuple[str, ...]] = {
    ("children", "yes"): ("welcomes families", "is open to children"),
    ("children", "no"): ("is for adults only", "is closed to children"),
    ("price", "budget"): ("is cheap", "has low prices"),
    ("price", "fair"): ("is mid-priced", "has moderate prices"),
    ("price", "steep"): ("is pricey", "has high prices"),
    ("rating", "poor"): ("is rated poor", "has a poor rating"),
    ("rating", "mixed"): ("is rated average", "has an average rating"),
    ("rating", "superb"): ("is rated superb", "has a superb rating"),
}
# attribute -> questions about it; {s} is the name.
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "age": ("How old is {s}?", "What is the age of {s}?"),
    "area": ("In which part of town is {s}?", "What is the area of {s}?"),
    "author": ("Who wrote {s}?", "What is the name of the author of {s}?"),
    "children": ("Does {s} welcome children?", "Can families go to {s}?"),
    "cuisine": ("What food does {s} serve?", "Which dishes are there at {s}?"),
    "founded": ("When was {s} founded?", "In which year did {s} begin?"),
    "genre": ("What kind of story is {s}?", "What is the genre of {s}?"),
    "goods": ("What does {s} sell?", "What can people buy at {s}?"),
    "home": ("Where does {s} live?", "What is the home of {s}?"),
    "job": ("What is the job of {s}?", "What does {s} work as?"),
    "kind": ("What kind of place is {s}?", "What do people call {s}?"),
    "near": ("What is {s} close to?", "What is the neighbour of {s}?"),
    "opened": ("When did {s} open?", "Since which year has {s} been open?"),
    "owner": ("Who runs {s}?", "What is the name of the owner of {s}?"),
    "price": ("What does {s} cost?", "How are the prices at {s}?"),
    "rating": ("What do guests say of {s}?", "What is the rating of {s}?"),
    "region": ("In which region is {s}?", "What region does {s} belong to?"),
    "river": ("On which river is {s}?", "What is the river of {s}?"),
    "rooms": ("How many rooms does {s} have?", "What number of rooms are there at {s}?"),
    "theme": ("What does {s} show?", "What can visitors see at {s}?"),
    "year": ("When did {s} come out?", "From which year is {s}?"),
}

Facts = Sequence[tuple[str, str]]


class Source:
    """Draws entities and words them, for one split of one task.

    Args:
        rng: source of all randomness.
        categories: the categories of the entities.
        taken: entities of earlier splits, which are not drawn again; this split's are added to it
            by `close`.
    """

    def __init__(
        self, rng: random.Random, categories: Sequence[str], taken: set[tuple[str, ...]]
    ) -> None:
        self.rng = rng
        self.categories = tuple(categories)
        self._chooser = Chooser(rng, skew=SKEW)
        self._taken = taken
        self._drawn: set[tuple[str, ...]] = set()

    def close(self) -> None:
        """Keep what was drawn so far out of the splits that come later."""
        self._taken |= self._drawn

    def entity(self, *, without: frozenset[str] = frozenset()) -> Entity:
        """Draw an entity that no earlier split has, less the attributes in `without`."""
        while True:
            entity = make_entity(self.rng.choice(self.categories), self.rng)
            identity = (entity.name, *entity.facts.values())
            if identity not in self._taken:
                break
        self._drawn.add(identity)
        kept = {key: value for key, value in entity.facts.items() if key not in without}
        return Entity(entity.name, entity.category, kept)

    def facts(self, entity: Entity, number: int) -> list[tuple[str, str]]:
        """Draw `number` facts of `entity`, in a random order."""
        return self.rng.sample(list(entity.facts.items()), number)

    def other_name(self, entity: Entity) -> str:
        """Draw the name of another entity of the same category."""
        while True:
            name = make_entity(entity.category, self.rng).name
            if name != entity.name:
                return name

    def other_value(self, entity: Entity, attribute: str) -> str:
        """Draw a value of `attribute` that contradicts the one that `entity` has."""
        value = entity.facts[attribute]
        while True:
            other = make_entity(entity.category, self.rng).facts[attribute]
            # A price in words says nothing against a price in pounds, and so for ratings.
            if other != value and _has_digit(other) == _has_digit(value):
                return other

    def clause(self, attribute: str, value: str) -> str:
        """Return a fact as a clause without its subject: "serves Greek food"."""
        options = _SPECIAL_CLAUSES.get((attribute, value)) or _CLAUSES[attribute]
        return self._chooser.pick(*options).format(v=value, a=article(value))

    def statement(self, name: str, facts: Facts) -> str:
        """Return one sentence that says the one to three `facts` about `name`."""
        clauses = [self.clause(*fact) for fact in facts]
        joined = clauses[0]
        if len(clauses) > 1:
            joined = f"{', '.join(clauses[:-1])} and {clauses[-1]}"
        return f"{name} {joined}."

    def question(self, name: str, attribute: str) -> str:
        """Return a question about `attribute` of `name`."""
        return self._chooser.pick(*_QUESTIONS[attribute]).format(s=name)

    def two_wordings(self, name: str, attribute: str) -> tuple[str, str]:
        """Return two different questions about `attribute` of `name`."""
        first, second = self.rng.sample(_QUESTIONS[attribute], 2)
        return first.format(s=name), second.format(s=name)


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


assert {key for keys in CATEGORIES.values() for key in keys} == set(_QUESTIONS)
assert set(_QUESTIONS) == {*_CLAUSES, "children"}
