"""The world behind every embedded corpus: entities with facts and links, and no text.

An entity has a category, facts (attribute -> value) and links (relation -> name of another entity).
`Entity.triples` gives both as (subject, property, object), the form that triple-to-text corpora
need; a corpus that holds out categories picks them from `CATEGORIES`. Sentence pairs (a fact kept,
dropped or changed) and documents (several linked entities) start from the same objects.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Parts of names. A part is used in names only, so that a name can be told from a description.
FIRST_PARTS = (
    "Amber", "Brass", "Cedar", "Clover", "Copper", "Coral", "Crimson", "Dusty", "Emerald",
    "Gilded", "Hollow", "Iron", "Ivory", "Jolly", "Linden", "Lucky", "Marble", "Merry", "Misty",
    "Olive", "Pearl", "Quiet", "Rusty", "Saffron", "Scarlet", "Silent", "Tin", "Velvet",
    "Wandering", "Willow",
)  # fmt: skip
SECOND_PARTS = (
    "Anchor", "Badger", "Barrel", "Bell", "Bridge", "Compass", "Crane", "Falcon", "Fiddle", "Gate",
    "Goose", "Hare", "Heron", "Kettle", "Ladle", "Lantern", "Magpie", "Mole", "Otter", "Owl",
    "Pigeon", "Plough", "Raven", "Rook", "Sparrow", "Stag", "Swan", "Thistle", "Trout", "Wagon",
)  # fmt: skip
GIVEN_NAMES = (
    "Ada", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Iris", "Jonas", "Karin",
    "Leon", "Mira", "Nils", "Oskar", "Paula", "Rosa", "Stefan", "Tilda", "Viktor",
)  # fmt: skip
SURNAMES = (
    "Alder", "Barrow", "Calder", "Denholm", "Eastman", "Fenwick", "Garland", "Holt", "Ingram",
    "Keller", "Lowell", "Marsh", "Norwood", "Orme", "Pascoe", "Quill", "Rowan", "Sutter", "Thorne",
    "Weaver",
)  # fmt: skip
TOWN_NAMES = (
    "Aldport", "Brackwell", "Carrow", "Dunmere", "Elsby", "Farholm", "Greywick", "Harlow Ford",
    "Kestle", "Lorne", "Medbury", "Norrel",
)  # fmt: skip
CAFE_NAMES = ("Belén", "Chloé", "Noé", "Renée", "Zoé", "Andrée")

AREAS = ("harbour", "old town", "hillside", "market quarter", "canal side", "station district")
CUISINES = (
    "Greek", "Korean", "Lebanese", "Mexican", "Moroccan", "Polish", "Spanish", "Thai", "Turkish",
    "seafood", "vegan",
)  # fmt: skip
VENUE_KINDS = ("tavern", "bistro", "tea room", "canteen")
PRICES = ("budget", "fair", "steep", "under £15", "£15-25", "over £25")
RATINGS = ("poor", "mixed", "superb", "3 out of 10", "6 out of 10", "9 out of 10")
GOODS = ("boots", "candles", "clocks", "hats", "maps", "toys", "lamps", "ropes")
THEMES = ("ships", "coins", "glass", "railways", "masks", "insects")
GENRES = ("mystery", "comedy", "history", "romance", "travel")
JOBS = ("baker", "carpenter", "doctor", "farmer", "painter", "pilot", "sailor", "teacher")
RIVERS = ("Aune", "Brill", "Corve", "Dart Water", "Esk")
REGIONS = ("northern", "southern", "eastern", "western", "coastal")

#: category -> attributes and relations of its entities, in the order in which they are built.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "town": ("river", "region", "founded"),
    "person": ("job", "age", "home"),
    "venue": ("kind", "cuisine", "price", "rating", "area", "children", "near"),
    "hotel": ("rooms", "price", "rating", "area", "near"),
    "shop": ("goods", "area", "opened", "owner"),
    "museum": ("theme", "area", "opened", "near"),
    "book": ("genre", "year", "author"),
}
#: attributes whose value is the name of another entity.
RELATIONS = frozenset({"home", "near", "owner", "author"})


@dataclass(frozen=True)
class Entity:
    """One thing of the world.

    Attributes:
        name: its name, unique within a `World`.
        category: a key of `CATEGORIES`.
        facts: attribute to value; for an attribute in `RELATIONS` the value is an entity's name.
    """

    name: str
    category: str
    facts: Mapping[str, str]

    def triples(self) -> list[tuple[str, str, str]]:
        """Return the facts as (subject, property, object), in the order of `CATEGORIES`."""
        order = CATEGORIES[self.category]
        return [(self.name, key, self.facts[key]) for key in order if key in self.facts]


def make_name(category: str, rng: random.Random) -> str:
    """Return a name that fits `category`; two calls may give the same name."""
    if category == "town":
        return rng.choice(TOWN_NAMES)
    if category == "person":
        return f"{rng.choice(GIVEN_NAMES)} {rng.choice(SURNAMES)}"
    pair = f"{rng.choice(FIRST_PARTS)} {rng.choice(SECOND_PARTS)}"
    if category == "hotel":
        return f"{pair} Hotel"
    if category == "shop":
        return f"{rng.choice(SURNAMES)} and {rng.choice(SURNAMES)}"
    if category == "museum":
        return f"{rng.choice(SURNAMES)} Museum"
    if category == "book":
        return f"Song of the {pair}"
    form = rng.random()
    if form < 0.75:
        return f"The {pair}"
    return f"Café {rng.choice(CAFE_NAMES)}" if form < 0.85 else f"{rng.choice(SURNAMES)} House"


def make_entity(
    category: str, rng: random.Random, others: Mapping[str, Sequence[str]] | None = None
) -> Entity:
    """Draw one entity.

    Args:
        category: a key of `CATEGORIES`.
        rng: source of all randomness.
        others: names of existing entities by category, for relations; where a category is missing
            a fresh name is made up.

    Returns:
        The entity, with all attributes of its category.

    Raises:
        ValueError: `category` is unknown.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; allowed: {sorted(CATEGORIES)}")
    name = make_name(category, rng)

    def another(*categories: str) -> str:
        wanted = rng.choice(categories)
        known = [other for other in (others or {}).get(wanted, ()) if other != name]
        found = rng.choice(known) if known else make_name(wanted, rng)
        while found == name:
            found = make_name(wanted, rng)
        return found

    def value(attribute: str) -> str:
        if attribute in ("founded", "opened", "year"):
            return str(rng.randrange(1700, 2000, 10))
        if attribute in ("age", "rooms"):
            return str(rng.randrange(20, 80))
        if attribute == "home":
            return another("town")
        if attribute in ("owner", "author"):
            return another("person")
        if attribute == "near":
            return another("hotel", "museum", "venue")
        return rng.choice(_VALUES[attribute])

    return Entity(name, category, {key: value(key) for key in CATEGORIES[category]})


_VALUES: dict[str, tuple[str, ...]] = {
    "area": AREAS,
    "children": ("yes", "no"),
    "cuisine": CUISINES,
    "genre": GENRES,
    "goods": GOODS,
    "job": JOBS,
    "kind": VENUE_KINDS,
    "price": PRICES,
    "rating": RATINGS,
    "region": REGIONS,
    "river": RIVERS,
    "theme": THEMES,
}


class World:
    """A set of entities with unique names, linked to each other.

    Args:
        rng: source of all randomness; equal states give equal worlds.
        size: entities of each category (towns stop at the number of town names).
    """

    def __init__(self, rng: random.Random, *, size: int) -> None:
        if size < 1:
            raise ValueError(f"size={size}: a world needs at least 1 entity of each category")
        self.entities: dict[str, list[Entity]] = {}
        names: dict[str, list[str]] = {}
        taken: set[str] = set()
        for category in CATEGORIES:
            wanted = min(size, len(TOWN_NAMES)) if category == "town" else size
            self.entities[category] = []
            names[category] = []
            for _ in range(
                50 * wanted
            ):  # names repeat by chance; a full name space ends the search
                entity = make_entity(category, rng, names)
                if entity.name not in taken:
                    taken.add(entity.name)
                    self.entities[category].append(entity)
                    names[category].append(entity.name)
                if len(names[category]) == wanted:
                    break

    def pick(self, category: str, rng: random.Random) -> Entity:
        """Return a random entity of `category`."""
        return rng.choice(self.entities[category])

    def __len__(self) -> int:
        return sum(len(group) for group in self.entities.values())
