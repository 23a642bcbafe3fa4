"""E2E-like data: meaning representations of places to eat, each with several references.

The files have the formats of the real sets: microsoft/LoRA's ``context||completion`` text
(tokenised) and the official CSV with columns ``mr,ref`` (raw text). Both hold the same references
in the same order. The places come from `world`; every sentence is worded here and nowhere else.
"""

from __future__ import annotations

import csv
import functools
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from tasks.tiny.corpora.wording import Chooser, article, listing, sentence, tokenise
from tasks.tiny.corpora.world import Entity, make_entity

#: official slot -> (key in microsoft/LoRA's contexts, attribute of a venue), in the order of both.
SLOTS: dict[str, tuple[str, str]] = {
    "name": ("name", "name"),
    "eatType": ("Type", "kind"),
    "food": ("food", "cuisine"),
    "priceRange": ("price", "price"),
    "customer rating": ("customer rating", "rating"),
    "area": ("area", "area"),
    "familyFriendly": ("family friendly", "children"),
    "near": ("near", "near"),
}
TEXT_FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
CSV_FILES = {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"}
#: numbers of meaning representations of the corpus that scale=tiny uses.
DEFAULT_SIZES: dict[str, int] = {"train": 800, "validation": 30, "test": 100}
#: i-th wording is this much as likely as the one before: references differ, but not wildly.
SKEW = 0.45

MR = dict[str, str]


def draw_mr(rng: random.Random) -> MR:
    """Return a meaning representation: official slot -> value, three to eight slots with a name."""
    venue: Entity = make_entity("venue", rng)
    values = {"name": venue.name, **venue.facts}
    optional = [slot for slot in SLOTS if slot != "name"]
    kept = set(rng.sample(optional, rng.choice((2, 3, 3, 4, 4, 5, 5, 6, 7))))
    return {
        slot: values[attribute]
        for slot, (_, attribute) in SLOTS.items()
        if slot == "name" or slot in kept
    }


def realise(mr: Mapping[str, str], chooser: Chooser) -> str:
    """Return one reference for `mr` in raw text, with every slot of `mr` said once.

    Args:
        mr: official slot -> value; `name` must be there.
        chooser: picks the wordings; one without randomness gives the likeliest text.

    Returns:
        One to four sentences.
    """
    pick = chooser.pick
    left = dict(mr)
    name = left.pop("name")
    place = left.pop("eatType", None) or pick("place", "venue")
    area, near = left.pop("area", None), left.pop("near", None)

    where = ""
    if area and near:
        where = pick(f"in the {area} area near {near}", f"near {near} in the {area}")
    elif area:
        where = pick(f"in the {area} area", f"in the {area}")
    elif near:
        where = pick(f"near {near}", f"close to {near}")

    # Short descriptions put one quality before the noun, and what is left becomes sentences.
    qualities = []
    if "familyFriendly" in left and pick(True, False):
        qualities.append(
            pick("family-friendly", "child-friendly")
            if left.pop("familyFriendly") == "yes"
            else pick("adults-only", "grown-up")
        )
    if left.get("priceRange") in _PRICE_ADJECTIVES and "food" in left and pick(False, True):
        qualities.append(_PRICE_ADJECTIVES[left.pop("priceRange")])
    food = left.pop("food", None)

    opening = pick("is", "there", "located") if where else pick("is", "there")
    serving = ""
    if food:
        if opening == "is":
            serving = pick(f" that serves {food} food", f" serving {food} dishes")
        else:
            serving = pick(f" serving {food} food", f" with {food} food")
    noun = " ".join([*qualities, place])
    where_ = f" {where}" if where else ""
    sentences = [
        {
            "is": f"{name} is {article(noun)}{where_}{serving}",
            "there": f"there is {article(noun)} called {name}{where_}{serving}",
            "located": f"located {where}, {name} is {article(noun)}{serving}",
        }[opening]
    ]

    it = pick("it", "the " + place)
    claims = []
    if "priceRange" in left:
        claims.append(_price_claim(left.pop("priceRange"), chooser))
    if "customer rating" in left:
        claims.append(_rating_claim(left.pop("customer rating"), chooser))
    if len(claims) == 2 and pick(False, True):
        claims.reverse()
    if len(claims) == 2 and pick(False, True):
        sentences += [f"{it} {claims[0]}", f"it {claims[1]}"]
    elif claims:
        sentences.append(f"{it} {listing(claims)}")
    if "familyFriendly" in left:
        sentences.append(
            pick("families are welcome", "it is good for families")
            if left.pop("familyFriendly") == "yes"
            else pick("it is not for families", "children are not allowed")
        )
    assert not left, f"slots not said: {left}"
    return " ".join(sentence(text) for text in sentences)


_PRICE_ADJECTIVES = {"budget": "cheap", "fair": "mid-priced", "steep": "pricey"}


def _price_claim(price: str, chooser: Chooser) -> str:
    if price in _PRICE_ADJECTIVES:
        level = {"budget": "low", "fair": "moderate", "steep": "high"}[price]
        return chooser.pick(f"has {level} prices", f"is {_PRICE_ADJECTIVES[price]}")
    return chooser.pick(f"has prices {_preposition(price)}", f"costs {price}")


def _preposition(price: str) -> str:
    return f"of {price}" if price[0] == "£" else price


def _rating_claim(rating: str, chooser: Chooser) -> str:
    if rating[0].isdigit():
        return chooser.pick(f"is rated {rating} by customers", f"has a customer rating of {rating}")
    level = {"poor": "low", "mixed": "average", "superb": "high"}[rating]
    return chooser.pick(f"has {article(level)} customer rating", f"is rated {level} by customers")


def context(mr: Mapping[str, str]) -> str:
    """Return `mr` as microsoft/LoRA writes it: ``name : X | Type : Y | ...``, tokenised."""
    return " | ".join(f"{SLOTS[slot][0]} : {tokenise(value)}" for slot, value in mr.items())


def official(mr: Mapping[str, str]) -> str:
    """Return `mr` as the official CSV writes it: ``name[X], eatType[Y], ...``."""
    return ", ".join(f"{slot}[{value}]" for slot, value in mr.items())


def draw(*, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, list[tuple[MR, str]]]:
    """Draw all splits as (meaning representation, raw reference).

    Args:
        seed: equal seeds give equal corpora.
        sizes: split -> number of meaning representations; None takes `DEFAULT_SIZES`.

    Returns:
        The splits. No meaning representation is in two of them; the references of one stand
        together in all splits but ``train``, which is shuffled. A reference may occur twice.

    Raises:
        ValueError: an unknown split or a size below 1.
    """
    sizes = DEFAULT_SIZES if sizes is None else sizes
    for split, size in sizes.items():
        if split not in TEXT_FILES or size < 1:
            raise ValueError(
                f"sizes has {split!r}: {size}; allowed are sizes of at least 1 for "
                f"{sorted(TEXT_FILES)}"
            )
    rng = random.Random(f"e2e-{seed}")  # noqa: S311 (not for security)
    chooser = Chooser(rng, skew=SKEW)
    seen: set[str] = set()
    corpus: dict[str, list[tuple[MR, str]]] = {}
    for split, size in sizes.items():
        rows: list[tuple[MR, str]] = []
        for _ in range(size):
            mr = draw_mr(rng)
            while official(mr) in seen:
                mr = draw_mr(rng)
            seen.add(official(mr))
            num_references = rng.randint(2, 5) if split == "train" else rng.randint(4, 8)
            rows += [(mr, realise(mr, chooser)) for _ in range(num_references)]
        if split == "train":
            rng.shuffle(rows)
        corpus[split] = rows
    return corpus


@functools.lru_cache(maxsize=4)
def _drawn(seed: int, sizes: tuple[tuple[str, int], ...] | None) -> dict[str, list[tuple[MR, str]]]:
    """Draw once for both formats, and once for all runs of a worker."""
    return draw(seed=seed, sizes=None if sizes is None else dict(sizes))


def splits(
    *, seed: int, sizes: Mapping[str, int] | None = None, protocol: str = "lora"
) -> dict[str, list[tuple[str, str]]]:
    """Return all splits as the rows that the real files hold.

    Args:
        seed: equal seeds give equal corpora.
        sizes: split (``train``, ``validation``, ``test``) -> number of meaning representations.
        protocol: ``lora`` for (context, completion), tokenised; ``challenge`` for the official
            (mr, ref), raw.

    Returns:
        Split -> rows; the same references in the same order for both protocols.

    Raises:
        ValueError: an unknown protocol or split, or a size below 1.
    """
    if protocol not in ("lora", "challenge"):
        raise ValueError(f"protocol={protocol!r}; allowed: 'lora' (tokenised), 'challenge' (raw)")
    corpus = _drawn(seed, None if sizes is None else tuple(sizes.items()))
    if protocol == "lora":
        return {
            split: [(context(mr), tokenise(text)) for mr, text in rows]
            for split, rows in corpus.items()
        }
    return {split: [(official(mr), text) for mr, text in rows] for split, rows in corpus.items()}


def write(folder: Path, *, seed: int, sizes: Mapping[str, int] | None = None) -> None:
    """Write the corpus in both file formats.

    Args:
        folder: made if missing; gets ``train.txt``, ``valid.txt``, ``test.txt`` and
            ``trainset.csv``, ``devset.csv``, ``testset_w_refs.csv``.
        seed: equal seeds give equal bytes.
        sizes: split -> number of meaning representations; None takes `DEFAULT_SIZES`.

    Raises:
        ValueError: an unknown split or a size below 1.
    """
    texts = splits(seed=seed, sizes=sizes, protocol="lora")
    tables = splits(seed=seed, sizes=sizes, protocol="challenge")
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in texts.items():
        # The real text files end every line with a space, which readers strip.
        lines = "".join(f"{source}||{target} \n" for source, target in rows)
        (folder / TEXT_FILES[split]).write_text(lines, encoding="utf-8", newline="")
    for split, rows in tables.items():
        _write_csv(folder / CSV_FILES[split], rows, is_test=split == "test")


def _write_csv(path: Path, rows: Iterable[tuple[str, str]], *, is_test: bool) -> None:
    """Write `rows` as the official release does: its test set quotes all and ends lines with LF."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(
            file,
            quoting=csv.QUOTE_ALL if is_test else csv.QUOTE_MINIMAL,
            lineterminator="\n" if is_test else "\r\n",
        )
        writer.writerow(("mr", "ref"))
        writer.writerows(rows)
