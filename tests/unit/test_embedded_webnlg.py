"""The embedded WebNLG corpus: format, splits, unseen categories, texts."""

from __future__ import annotations

import json
import random
import re

import pytest

from tasks.tiny.corpora import general, webnlg
from tasks.tiny.corpora.wording import Chooser
from tasks.tiny.corpora.world import CATEGORIES, RELATIONS, World

SIZES = {"train": 120, "validation": 12, "test": 60}
SPLITS = list(SIZES)


@pytest.fixture(scope="module")
def corpus():
    return webnlg.draw(seed=7, sizes=SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("webnlg") / "corpus"
    webnlg.write(path, seed=7, sizes=SIZES)
    return path


def good(entry):
    return [text for comment, text in entry.texts if comment == "good"]


@pytest.mark.parametrize("split", SPLITS)
def test_files_have_the_official_layout(folder, corpus, split):
    content = json.loads((folder / webnlg.FILES[split]).read_text(encoding="utf-8"))
    assert list(content) == ["entries"]
    assert len(content["entries"]) == SIZES[split]
    for number, (wrapped, entry) in enumerate(
        zip(content["entries"], corpus[split], strict=True), start=1
    ):
        ((key, value),) = wrapped.items()
        assert key == str(number)
        assert set(value) == {
            "category", "dbpedialinks", "lexicalisations", "links", "modifiedtripleset",
            "originaltriplesets", "shape", "shape_type", "size", "xml_id",
        }  # fmt: skip
        triples = [(t["subject"], t["property"], t["object"]) for t in value["modifiedtripleset"]]
        assert triples == entry.triples()
        assert value["size"] == str(len(triples))
        texts = [(item["comment"], item["lex"]) for item in value["lexicalisations"]]
        assert texts == list(entry.texts)


def test_half_of_the_test_entries_are_of_categories_that_train_never_has(corpus):
    categories = {split: [e.category for e in corpus[split]] for split in SPLITS}
    assert set(categories["train"]) == set(categories["validation"]) | set(webnlg.SEEN)
    assert set(categories["train"]) == set(webnlg.SEEN)
    unseen = [c for c in categories["test"] if c in webnlg.UNSEEN]
    assert len(unseen) == SIZES["test"] // 2
    assert set(unseen) == set(webnlg.UNSEEN)
    assert {*webnlg.SEEN, *webnlg.UNSEEN} == set(CATEGORIES)
    # No entity of an unseen category has a triple of its own in train.
    assert {e.category for entry in corpus["train"] for e, _ in entry.facts} <= set(webnlg.SEEN)


def test_unseen_entries_share_some_properties_with_train(corpus):
    train = {key for entry in corpus["train"] for _, key in entry.facts}
    unseen = {
        key for entry in corpus["test"] for _, key in entry.facts
        if entry.category in webnlg.UNSEEN
    }  # fmt: skip
    assert {"area", "near"} <= train & unseen
    assert {"price", "rating"} <= unseen - train


def test_no_set_of_triples_occurs_twice(corpus):
    sets = [frozenset(e.triples()) for split in SPLITS for e in corpus[split]]
    assert len(sets) == len(set(sets)) == sum(SIZES.values())


def test_sets_are_connected_and_have_one_to_five_triples(corpus):
    sizes = set()
    linked = 0
    for entry in (e for split in SPLITS for e in corpus[split]):
        sizes.add(len(entry.facts))
        known = {entry.facts[0][0].name}
        for entity, key in entry.facts:
            assert entity.name in known
            if key in RELATIONS:
                known.add(entity.facts[key])
        linked += len({entity.name for entity, _ in entry.facts}) > 1
    assert sizes == {1, 2, 3, 4, 5}
    assert linked > 20


def test_triples_name_values_as_the_official_data_do():
    assert webnlg.literal("area", "old town") == '"old town"'
    assert webnlg.literal("price", "under £15") == '"under £15"'
    assert webnlg.literal("goods", "boots") == "boots"
    assert webnlg.literal("author", "Ada Holt") == "Ada Holt"
    keys = {key for attributes in CATEGORIES.values() for key in attributes}
    assert set(webnlg.PROPERTIES) == keys
    assert len(set(webnlg.PROPERTIES.values())) == len(keys)


def test_corpus_is_a_function_of_its_seed(corpus):
    assert webnlg.draw(seed=7, sizes=SIZES) == corpus
    assert webnlg.draw(seed=8, sizes=SIZES) != corpus


def test_default_corpus_has_the_stated_sizes():
    corpus = webnlg.draw(seed=0)
    assert {split: len(entries) for split, entries in corpus.items()} == webnlg.DEFAULT_SIZES
    texts = {split: [len(good(entry)) for entry in corpus[split]] for split in corpus}
    assert 0 < texts["train"].count(0) < 0.05 * len(texts["train"])
    assert min(texts["test"]) == 1
    assert max(texts["test"]) > 6, "more references than the recipe keeps"
    rejected = [t for e in corpus["train"] for t in e.texts if t[0] != "good"]
    assert len(rejected) > 20


@pytest.mark.parametrize("seed", range(40))
def test_a_text_says_every_fact(seed):
    rng = random.Random(seed)
    world = World(rng, size=30)
    allowed = webnlg.UNSEEN if seed % 2 else webnlg.SEEN
    facts = webnlg.draw_facts(rng.choice(allowed), world, rng, allowed)
    text = webnlg.realise(facts, Chooser(rng, skew=1.0))
    for entity, key in facts:
        assert entity.name in text
        if key != "children":
            assert entity.facts[key] in text
    says_families = "famil" in text
    assert says_families == any(key == "children" for _, key in facts)
    assert re.fullmatch(r"[^.]+\.( [^.]+\.)*", text)
    assert not re.search(r"[a-z][A-Z]", text), "a property that is no word"


def test_rejected_texts_leave_a_fact_out_or_tell_another(corpus):
    rejected = [
        (entry, text)
        for entry in (*corpus["train"], *corpus["validation"])
        for comment, text in entry.texts
        if comment != "good"
    ]
    assert len(rejected) > 5
    for entry, text in rejected:
        assert not all(entity.facts[key] in text for entity, key in entry.facts)
    assert all(comment == "good" for entry in corpus["test"] for comment, _ in entry.texts)


def test_texts_vary_but_agree(corpus):
    def overlap(text, others):
        words = set(text.split())
        return max(len(words & set(o.split())) / len(words | set(o.split())) for o in others)

    entries = [e for e in corpus["test"] if len(e.facts) > 1]
    likeliest = [webnlg.realise(e.facts, Chooser(None, skew=webnlg.SKEW)) for e in entries]
    own = [overlap(text, good(e)) for text, e in zip(likeliest, entries, strict=True)]
    others = [*entries[1:], entries[0]]
    other = [overlap(text, good(e)) for text, e in zip(likeliest, others, strict=True)]
    assert sum(own) / len(own) > 0.75
    assert sum(other) / len(other) < 0.3
    distinct = [len(set(good(e))) / len(good(e)) for e in entries]
    assert 0.8 < sum(distinct) / len(distinct) <= 1.0


def test_general_corpus_never_shows_the_triple_format():
    names = "|".join(set(webnlg.PROPERTIES.values()))
    triple = re.compile(rf" : (?:{names}) : ")
    for text in general.documents(seed=3, num_documents=2000):
        assert not triple.search(text), text


@pytest.mark.parametrize("sizes", [{"train": 0}, {"dev": 3}])
def test_bad_sizes_are_errors(sizes):
    with pytest.raises(ValueError, match="allowed are sizes of at least 1"):
        webnlg.draw(seed=1, sizes=sizes)
