"""The world, the wording helpers, the general corpus and the tokenizer."""

from __future__ import annotations

import random
import re

import pytest

from tasks.tiny import bpe
from tasks.tiny.corpora import e2e, general
from tasks.tiny.corpora.wording import Chooser, article, listing, sentence, tokenise
from tasks.tiny.corpora.world import CATEGORIES, RELATIONS, World, make_entity


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(general.documents(seed=3, num_documents=3000))


def test_world_is_a_function_of_its_seed():
    def triples(seed):
        world = World(random.Random(seed), size=20)
        return [entity.triples() for group in world.entities.values() for entity in group]

    assert triples(1) == triples(1)
    assert triples(1) != triples(2)


def test_world_has_unique_names_and_whole_entities():
    world = World(random.Random(5), size=60)
    entities = [entity for group in world.entities.values() for entity in group]
    names = {entity.name for entity in entities}
    assert len(names) == len(entities) == len(world)
    assert set(world.entities) == set(CATEGORIES)
    for entity in entities:
        assert tuple(key for _, key, _ in entity.triples()) == CATEGORIES[entity.category]
        assert all(value for value in entity.facts.values())
        assert all(entity.facts[key] != entity.name for key in RELATIONS & set(entity.facts))


def test_world_relations_point_to_entities_of_the_world():
    world = World(random.Random(5), size=60)
    towns = {entity.name for entity in world.entities["town"]}
    people = {entity.name for entity in world.entities["person"]}
    assert {person.facts["home"] for person in world.entities["person"]} <= towns
    assert {book.facts["author"] for book in world.entities["book"]} <= people


def test_unknown_category_and_empty_world_are_errors():
    with pytest.raises(ValueError, match=r"'ghost'.*allowed"):
        make_entity("ghost", random.Random(0))
    with pytest.raises(ValueError, match="size=0"):
        World(random.Random(0), size=0)


def test_the_global_random_state_is_not_touched():
    random.seed(11)
    before = random.getstate()
    list(general.documents(seed=1, num_documents=20))
    e2e.splits(seed=1, sizes={"train": 5})
    assert random.getstate() == before


def test_chooser_prefers_the_first_wordings():
    chooser = Chooser(random.Random(0), skew=0.5)
    drawn = [chooser.pick("a", "b", "c") for _ in range(7000)]
    counts = [drawn.count(option) for option in "abc"]
    assert counts == pytest.approx([4000, 2000, 1000], rel=0.1)
    assert {Chooser(None, skew=0.5).pick("a", "b") for _ in range(20)} == {"a"}
    with pytest.raises(ValueError, match=r"skew=0.*\(0, 1\]"):
        Chooser(None, skew=0)


def test_wording_helpers():
    assert (article("old inn"), article("pub")) == ("an old inn", "a pub")
    assert sentence(" it is ") == "It is."
    assert [listing(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "tokenised"),
    [
        ("It's family-friendly, isn't it?", "It 's family - friendly , is n't it ?"),
        ("Meals cost £15-25.", "Meals cost £ 15 - 25 ."),
        ("(Café Noé)", "( Café Noé )"),
    ],
)
def test_tokenise(raw, tokenised):
    assert tokenise(raw) == tokenised
    assert tokenise(tokenised) == tokenised


def test_documents_are_those_of_the_sequences(corpus):
    groups = list(general.sequences(seed=3, num_sequences=500))
    flat = [document for group in groups for document in group]
    assert corpus[: len(flat)] == flat
    assert {len(group) for group in groups} == {1, 2}


def test_general_corpus_is_a_function_of_its_seed(corpus):
    assert list(general.documents(seed=3, num_documents=3000)) == corpus
    assert list(general.documents(seed=3, num_documents=100)) == corpus[:100]
    assert list(general.documents(seed=4, num_documents=100)) != corpus[:100]
    with pytest.raises(ValueError, match="num_documents=0"):
        list(general.documents(seed=3, num_documents=0))


def test_statements_are_a_function_of_their_seed():
    first = list(general.statements(3, 200))
    assert list(general.statements(3, 100)) == first[:100]
    assert list(general.statements(4, 100)) != first[:100]
    assert list(general.statements(3, 0)) == []
    with pytest.raises(ValueError, match="num_statements=-1"):
        list(general.statements(3, -1))


def test_statements_agree_with_their_text_or_not():
    found = list(general.statements(3, 300))
    changed = [statement for statement in found if statement.changed is not None]
    assert len(changed) == pytest.approx(150, abs=40)
    for first, second, value in changed:
        assert value in second
        assert value not in first
    # Names are exchanged as well as values, and both texts are tokenised or none.
    names = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")
    assert {bool(names.search(statement.changed)) for statement in changed} == {True, False}
    for statement in found:
        assert statement.second.endswith(" .") == (tokenise(statement.second) == statement.second)


def test_statements_talk_about_the_world_of_the_corpus(corpus):
    """The same entities; so a statement never contradicts a document of the same seed."""
    words = set(" ".join(corpus).split())
    unknown = [
        word
        for statement in general.statements(3, 200)
        for word in f"{statement.first} {statement.second}".split()
        if word not in words
    ]
    assert len(unknown) < 60


def test_general_corpus_never_shows_the_e2e_format(corpus):
    """No E2E context, no official MR, and no sentence that E2E references are made of."""
    keys = "|".join(re.escape(key) for slot in e2e.SLOTS for key in (slot, e2e.SLOTS[slot][0]))
    record = re.compile(rf"\b(?:{keys}) : [^|\n]+ \|")
    official = re.compile(rf"\b(?:{keys})\[")
    for text in corpus:
        assert "||" not in text
        assert not record.search(text), text
        assert not official.search(text), text


def test_general_corpus_never_holds_an_e2e_reference_sentence(corpus):
    # Every reference names its venue in a first sentence; none of these is a sentence here.
    references = e2e.splits(seed=1, sizes={"train": 500}, protocol="challenge")["train"]
    openings = {text.split(". ")[0].rstrip(".") for _, text in references}
    kinds = "|".join(("tavern", "bistro", "tea room", "canteen", "place", "venue"))
    style = re.compile(rf"\b(?:is|there is) an? (?:[\w-]+ )*?(?:{kinds})\b", re.IGNORECASE)
    assert sum(bool(style.search(text)) for text in openings) > 0.95 * len(openings)
    assert not [text for text in corpus if style.search(text.replace(" - ", "-"))]


def test_general_corpus_copies_from_its_context(corpus):
    """Most names of a document come back in it, which is what teaches copying."""
    names = re.compile(r"The [A-Z][a-z]+ [A-Z][a-z]+")
    found = [names.findall(text) for text in corpus]
    repeated = [len(items) > len(set(items)) for items in found if items]
    assert sum(repeated) > 0.5 * len(repeated)


def test_tokenizer_is_deterministic_and_small(corpus):
    first = bpe.train_tokenizer(corpus, vocab_size=1024)
    second = bpe.train_tokenizer(corpus, vocab_size=1024)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 1024
    assert first.eos_token_id == first.bos_token_id == first.pad_token_id == 0
    assert first.convert_tokens_to_ids(bpe.END_OF_TEXT) == 0


@pytest.mark.parametrize(
    "text",
    [
        "The Vaults pub near Café Adriatic has a 5 star rating .  Prices start at £ 30 .",
        " leading and trailing ",
        "tab\tnewline\n\nend",
        "日本語 русский עברית 🦉 e\u0301 \u00a0 \u200b",
        "",
    ],
)
def test_tokenizer_round_trip(corpus, tmp_path, text):
    tokenizer = bpe.train_tokenizer(corpus[:500], vocab_size=600)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert loaded(text)["input_ids"] == ids
    assert (tmp_path / "tokenizer.json").exists()
    assert tokenizer.eos_token_id not in ids


def test_tokenizer_needs_all_bytes(corpus):
    with pytest.raises(ValueError, match="vocab_size=256"):
        bpe.train_tokenizer(corpus, vocab_size=256)
    with pytest.raises(ValueError, match="vocab_size=260: at least 261"):
        bpe.train_pair_tokenizer(corpus, vocab_size=260, max_length=9, segments=True)


@pytest.mark.parametrize("segments", [True, False])
def test_pair_tokenizer(corpus, segments):
    first, second = (
        bpe.train_pair_tokenizer(corpus[:500], vocab_size=600, max_length=9, segments=segments)
        for _ in range(2)
    )
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert tuple(first.convert_ids_to_tokens(range(5))) == bpe.PAIR_TOKENS
    text = "日本語 £ 5 .\nCafé"
    decoded = first.decode(first(text)["input_ids"], skip_special_tokens=True)
    assert decoded == (f" {text}" if segments else text)
    pair = first("a", "b")
    assert first.decode(pair["input_ids"]).replace(" ", "") == "<s>a</s></s>b</s>"
    assert ("token_type_ids" in pair) == segments


def test_words_of_e2e_are_mostly_whole_tokens():
    tokenizer = bpe.train_tokenizer(general.documents(seed=1, num_documents=5000), vocab_size=1536)
    rows = e2e.splits(seed=1, sizes={"test": 30})["test"]
    words = [word for source, target in rows for word in f"{source} {target}".split()]
    num_tokens = sum(len(tokenizer(f" {word}")["input_ids"]) for word in words)
    assert num_tokens < 1.25 * len(words)
