"""The embedded E2E corpus: formats, splits, references."""

from __future__ import annotations

import csv
import io
import itertools
import random
import re

import pytest

from tasks.tiny.corpora import e2e
from tasks.tiny.corpora.wording import Chooser, tokenise

SIZES = {"train": 60, "validation": 12, "test": 20}
SPLITS = list(SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("e2e") / "corpus"
    e2e.write(path, seed=7, sizes=SIZES)
    return path


def read_text(path) -> list[tuple[str, str]]:
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        assert line.endswith(" "), "every line of the real files ends with a space"
        source, separator, target = line.rstrip(" ").partition("||")
        assert separator == "||"
        assert "||" not in target
        rows.append((source, target))
    return rows


def read_csv(path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["mr", "ref"]
    return [(mr, ref) for mr, ref in rows]


def parse_context(text: str) -> dict[str, str]:
    slots = {}
    for part in text.split(" | "):
        key, separator, value = part.partition(" : ")
        assert separator
        assert value
        slots[key] = value
    return slots


def parse_official(text: str) -> dict[str, str]:
    pieces = re.findall(r"([A-Za-z ]+)\[([^\]]*)\](?:, |$)", text)
    assert ", ".join(f"{key}[{value}]" for key, value in pieces) == text
    return dict(pieces)


def by_source(rows):
    groups: dict[str, list[str]] = {}
    for source, target in rows:
        groups.setdefault(source, []).append(target)
    return groups


@pytest.mark.parametrize("split", SPLITS)
def test_files_hold_what_splits_returns(folder, split):
    assert read_text(folder / e2e.TEXT_FILES[split]) == e2e.splits(seed=7, sizes=SIZES)[split]
    challenge = e2e.splits(seed=7, sizes=SIZES, protocol="challenge")[split]
    assert read_csv(folder / e2e.CSV_FILES[split]) == challenge


@pytest.mark.parametrize("split", SPLITS)
def test_both_formats_hold_the_same_records(folder, split):
    texts, table = (
        read_text(folder / e2e.TEXT_FILES[split]),
        read_csv(folder / e2e.CSV_FILES[split]),
    )
    assert len(texts) == len(table)
    keys = {official: key for official, (key, _) in e2e.SLOTS.items()}
    for (source, target), (mr, ref) in zip(texts, table, strict=True):
        slots = parse_official(mr)
        assert list(slots) == [slot for slot in e2e.SLOTS if slot in slots], "official slot order"
        assert 3 <= len(slots) <= 8
        assert "name" in slots
        renamed = {keys[slot]: tokenise(value) for slot, value in slots.items()}
        assert list(parse_context(source).items()) == list(renamed.items())
        assert "".join(target.split()) == "".join(ref.split())
        assert target == tokenise(ref)


def test_csv_dialects_are_those_of_the_release(folder):
    train = (folder / "trainset.csv").read_bytes()
    test = (folder / "testset_w_refs.csv").read_bytes()
    assert train.startswith(b"mr,ref\r\n")
    assert train.count(b"\r\n") == train.count(b"\n")
    assert test.startswith(b'"mr","ref"\n')
    assert b"\r" not in test
    rows = list(csv.reader(io.StringIO(test.decode()), quoting=csv.QUOTE_ALL))
    assert all(len(row) == 2 for row in rows)


def test_no_record_is_in_two_splits():
    rows = e2e.splits(seed=7, sizes=SIZES)
    sources = {split: set(by_source(rows[split])) for split in SPLITS}
    assert {split: len(found) for split, found in sources.items()} == SIZES
    assert not sources["train"] & sources["validation"]
    assert not (sources["train"] | sources["validation"]) & sources["test"]


def test_references_are_grouped_in_all_splits_but_train():
    rows = e2e.splits(seed=7, sizes=SIZES)

    def num_runs(split):
        sources = [source for source, _ in rows[split]]
        return 1 + sum(a != b for a, b in itertools.pairwise(sources))

    assert num_runs("validation") == SIZES["validation"]
    assert num_runs("test") == SIZES["test"]
    assert num_runs("train") > 2 * SIZES["train"]
    assert all(4 <= len(refs) <= 8 for refs in by_source(rows["test"]).values())


def test_corpus_is_a_function_of_its_seed():
    assert e2e.splits(seed=7, sizes=SIZES) == e2e.splits(seed=7, sizes=SIZES)
    assert e2e.splits(seed=8, sizes=SIZES) != e2e.splits(seed=7, sizes=SIZES)


def test_default_corpus_has_the_stated_sizes():
    rows = e2e.splits(seed=0)
    assert {split: len(by_source(rows[split])) for split in rows} == e2e.DEFAULT_SIZES
    assert all(len(f"{source} {target}".split()) < 120 for source, target in rows["train"])


@pytest.mark.parametrize("seed", range(40))
def test_every_slot_is_said(seed):
    """Names and values that are copied stand in the text; the other slots have their own words."""
    rng = random.Random(seed)
    mr = e2e.draw_mr(rng)
    text = e2e.realise(mr, Chooser(rng, skew=1.0))
    copied = ("name", "eatType", "food", "area", "near")
    assert all(mr[slot] in text for slot in copied if slot in mr)
    for slot in ("priceRange", "customer rating"):
        if slot in mr and any(char.isdigit() for char in mr[slot]):
            assert mr[slot] in text
    family = re.search(r"famil|child|adults|grown", text, re.IGNORECASE)
    assert bool(family) == ("familyFriendly" in mr)
    price = re.search(r"price|cheap|pricey|costs", text)
    assert bool(price) == ("priceRange" in mr)
    assert bool(re.search(r"rat", text.replace(mr["name"], ""))) >= ("customer rating" in mr)
    assert text.endswith(".")
    assert text[0].isupper()


def test_references_vary_but_agree():
    """The likeliest text is a good system: far above another record's text, below a perfect score.

    Unigram overlap stands in for the official scores, which have their own tests.
    """
    corpus = e2e.draw(seed=7, sizes={"test": 40})["test"]
    groups: dict[str, list[str]] = {}
    likeliest: dict[str, str] = {}
    for mr, ref in corpus:
        groups.setdefault(e2e.official(mr), []).append(ref)
        likeliest[e2e.official(mr)] = e2e.realise(mr, Chooser(None, skew=e2e.SKEW))

    def overlap(text, refs):
        words = set(text.split())
        return max(len(words & set(ref.split())) / len(words | set(ref.split())) for ref in refs)

    sources = list(groups)
    own = [overlap(likeliest[s], groups[s]) for s in sources]
    other = [
        overlap(likeliest[s], groups[t])
        for s, t in zip(sources, [*sources[1:], sources[0]], strict=True)
    ]
    assert sum(own) / len(own) > 0.8
    assert sum(other) / len(other) < 0.45
    distinct = [len(set(refs)) / len(refs) for refs in groups.values()]
    assert 0.6 < sum(distinct) / len(distinct) < 1.0


@pytest.mark.parametrize("sizes", [{"train": 0}, {"dev": 3}])
def test_bad_sizes_are_errors(sizes):
    with pytest.raises(ValueError, match="allowed are sizes of at least 1"):
        e2e.draw(seed=1, sizes=sizes)


def test_unknown_protocol_is_an_error():
    with pytest.raises(ValueError, match=r"protocol='raw'.*'lora'"):
        e2e.splits(seed=1, protocol="raw")
