"""The embedded GLUE-like corpora: files, labels, and what word counts make of them."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
from sklearn.metrics import matthews_corrcoef

from tasks import bag_of_words
from tasks.tiny.corpora import glue
from tasks.tiny.corpora.glue import acceptability, facts, pairs, sentiment
from tasks.tiny.corpora.world import CATEGORIES

TASKS = sorted(glue.LAYOUTS)
PAIR_CLASSES = ["mnli", "mrpc", "qnli", "qqp", "rte"]
SMALL = {"train": 60, "validation": 20}
SMALL_MNLI = {"train": 60, "validation_matched": 20, "validation_mismatched": 20}
Rows = list[tuple[str, ...]]


def small(task: str) -> dict[str, int]:
    return SMALL_MNLI if task == "mnli" else SMALL


@pytest.fixture(scope="module")
def corpora() -> dict[str, dict[str, Rows]]:
    return {task: glue.draw(task, seed=0) for task in TASKS}


def make_source(seed: int = 0, *categories: str) -> facts.Source:
    return facts.Source(random.Random(seed), categories or tuple(CATEGORIES), set())


# Files


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("cola", ["sentence", "label", "idx"]),
        ("sst2", ["sentence", "label", "idx"]),
        ("mrpc", ["sentence1", "sentence2", "label", "idx"]),
        ("stsb", ["sentence1", "sentence2", "label", "idx"]),
        ("qqp", ["question1", "question2", "label", "idx"]),
        ("mnli", ["premise", "hypothesis", "label", "idx"]),
        ("qnli", ["question", "sentence", "label", "idx"]),
        ("rte", ["sentence1", "sentence2", "label", "idx"]),
    ],
)
def test_files_have_the_columns_of_the_real_ones(task, columns, tmp_path):
    glue.write(tmp_path, task, seed=3, sizes=small(task))
    names = ["dev.tsv"] if task != "mnli" else ["dev_matched.tsv", "dev_mismatched.tsv"]
    assert sorted(p.name for p in (tmp_path / task).iterdir()) == [*names, "train.tsv"]
    for path in (tmp_path / task).iterdir():
        data = path.read_bytes().decode("utf-8")
        assert "\r" not in data
        assert data.endswith("\n")
        head, *rows = [line.split("\t") for line in data[:-1].split("\n")]
        assert head == columns
        assert [row[-1] for row in rows] == [str(i) for i in range(len(rows))]
        assert len(rows) == (60 if path.name == "train.tsv" else 20)
        assert {len(row) for row in rows} == {len(columns)}
        assert all(text.strip() for row in rows for text in row)


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_give_equal_bytes_and_other_seeds_other_rows(task, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        glue.write(tmp_path / name, task, seed=seed, sizes=small(task))
    first, again, other = ((tmp_path / n / task / "train.tsv").read_bytes() for n in "abc")
    assert first == again
    assert first != other


def test_wrong_requests_name_what_is_allowed():
    with pytest.raises(ValueError, match=r"unknown GLUE task 'wnli'.*'cola'"):
        glue.draw("wnli", seed=0)
    with pytest.raises(ValueError, match=r"'test': 5.*'train', 'validation'"):
        glue.draw("rte", seed=0, sizes={"test": 5})
    with pytest.raises(ValueError, match=r"'train': 0"):
        glue.draw("rte", seed=0, sizes={"train": 0})


# Splits and labels


@pytest.mark.parametrize("task", TASKS)
def test_no_example_occurs_twice(task, corpora):
    rows = [row[:-1] for split in corpora[task].values() for row in split]
    assert len(set(rows)) == len(rows)


def test_no_entity_is_in_two_splits(monkeypatch):
    drawn: list[set[tuple[str, ...]]] = []
    close = facts.Source.close

    def record(source: facts.Source) -> None:
        drawn.append(set(source._drawn))
        close(source)

    monkeypatch.setattr(facts.Source, "close", record)
    glue.draw("mnli", seed=0)
    assert len(drawn) == 3
    assert all(len(split) > 200 for split in drawn)
    assert not any(a & b for a, b in combinations(drawn, 2))


def test_an_entity_of_an_earlier_split_is_drawn_again_for_a_later_one():
    taken: set[tuple[str, ...]] = set()
    first = facts.Source(random.Random(0), ["venue"], taken)
    entity = first.entity()
    first.close()
    again = facts.Source(random.Random(0), ["venue"], taken).entity()
    assert again != entity
    assert facts.Source(random.Random(0), ["venue"], set()).entity() == entity


@pytest.mark.parametrize(
    ("task", "shares"),
    [
        ("cola", {"0": 0.35, "1": 0.65}),
        ("sst2", {"0": 0.45, "1": 0.55}),
        ("mrpc", {"0": 0.325, "1": 0.675}),
        ("qqp", {"0": 0.63, "1": 0.37}),
        ("mnli", {"0": 1 / 3, "1": 1 / 3, "2": 1 / 3}),
        ("qnli", {"0": 0.5, "1": 0.5}),
        ("rte", {"0": 0.5, "1": 0.5}),
    ],
)
def test_classes_are_about_as_common_as_in_the_real_sets(task, shares, corpora):
    for rows in corpora[task].values():
        counts = Counter(row[-1] for row in rows)
        assert {label: counts[label] / len(rows) for label in counts} == pytest.approx(
            shares, abs=0.08
        )


def test_similarities_are_written_as_in_the_real_set_and_spread_over_the_range(corpora):
    labels = [row[-1] for rows in corpora["stsb"].values() for row in rows]
    assert all(label == f"{float(label):.3f}" for label in labels)
    values = [float(label) for label in labels]
    assert min(values) == 0
    assert max(values) == 5
    assert 1.5 < sum(values) / len(values) < 3
    assert len(set(values)) > 6


def test_sentences_are_short(corpora):
    for task, corpus in corpora.items():
        for column in range(len(glue.LAYOUTS[task].texts)):
            lengths = [len(row[column].split()) for row in corpus["train"]]
            assert 5 <= sum(lengths) / len(lengths) <= 18, task
            assert max(lengths) <= 30, task


def test_mismatched_entities_are_of_other_categories():
    matched = set(glue._categories("mnli", "train"))
    assert matched == set(glue._categories("mnli", "validation_matched"))
    assert set(glue._categories("mnli", "validation_mismatched")) == {"shop", "museum"}
    assert matched | {"shop", "museum"} == set(CATEGORIES)
    assert not matched & {"shop", "museum"}


def test_another_value_contradicts():
    for seed in range(300):
        source = make_source(seed)
        entity = source.entity()
        for attribute, value in entity.facts.items():
            other = source.other_value(entity, attribute)
            assert other != value
            assert any(c.isdigit() for c in other) == any(c.isdigit() for c in value)


@pytest.mark.parametrize("task", ["mnli", "rte"])
def test_inference_labels_follow_from_the_facts(task, monkeypatch):
    said: list[tuple[str, list[tuple[str, str]]]] = []
    monkeypatch.setattr(
        facts.Source, "statement", lambda self, name, told: said.append((name, list(told))) or name
    )
    source = make_source(5)
    seen = Counter()
    for _ in range(300):
        said.clear()
        label = getattr(pairs, task)(source)[-1]
        (name, premise), (again, [(attribute, value)]) = said
        assert again == name
        known = dict(premise)
        if attribute not in known:
            relation = "neutral"
        else:
            relation = "entailment" if known[attribute] == value else "contradiction"
        numbers = {"entailment": "0", "neutral": "1", "contradiction": "2"}
        wanted = numbers[relation] if task == "mnli" else str(int(relation != "entailment"))
        assert label == wanted
        assert "near" not in [*known, attribute]
        seen[relation] += 1
    assert min(seen[r] for r in ("entailment", "neutral", "contradiction")) > 50


def test_a_question_is_answered_only_by_its_fact_about_its_entity(monkeypatch):
    monkeypatch.setattr(facts.Source, "question", lambda self, name, key: f"{name}|{key}")
    monkeypatch.setattr(facts.Source, "statement", lambda self, name, told: f"{name}|{told[0][0]}")
    source = make_source(6)
    kinds = Counter()
    for _ in range(300):
        question, sentence, label = pairs.qnli(source)
        assert label == str(int(question != sentence))
        (name, key), (other, other_key) = question.split("|"), sentence.split("|")
        kinds[name == other, key == other_key] += 1
        first, second, label = pairs.qqp(source)
        if label == "0":
            assert first != second
    assert set(kinds) == {(True, True), (True, False), (False, True)}
    assert min(kinds.values()) > 50


def test_duplicate_questions_ask_the_same_in_other_words():
    source = make_source(7)
    wordings = {
        text: attribute
        for attribute, texts in facts._QUESTIONS.items()
        for text in texts
    }  # fmt: skip
    assert len(wordings) == sum(len(texts) for texts in facts._QUESTIONS.values())
    for _ in range(300):
        *questions, label = pairs.qqp(source)
        asked = set()
        for question in questions:
            matches = [
                (attribute, question[len(start) : len(question) - len(end)])
                for text, attribute in wordings.items()
                for start, end in [text.split("{s}")]
                if question.startswith(start) and question.endswith(end)
            ]
            asked.add(max(matches, key=lambda match: -len(match[1])))
        assert (len(asked) == 1) == (label == "1"), questions
        assert questions[0] != questions[1]


def test_paraphrases_say_the_same_facts_in_another_text(monkeypatch):
    said: list[tuple[str, frozenset[tuple[str, str]]]] = []
    statement = facts.Source.statement

    def record(self, name, told):
        said.append((name, frozenset(told)))
        return statement(self, name, told)

    monkeypatch.setattr(facts.Source, "statement", record)
    source = make_source(8)
    labels = Counter()
    for _ in range(300):
        said.clear()
        first, second, label = pairs.mrpc(source)
        assert first != second
        assert label == str(int(said[0] == said[-1]))
        labels[label] += 1
    assert min(labels.values()) > 50


def test_similarity_is_the_share_of_facts_said_alike(monkeypatch):
    said: list[tuple[str, list[tuple[str, str]]]] = []
    monkeypatch.setattr(
        facts.Source, "statement", lambda self, name, told: said.append((name, list(told))) or name
    )
    source = make_source(9)
    for _ in range(300):
        said.clear()
        label = pairs.stsb(source)[-1]
        (name, first), (again, second) = said
        assert len(first) == len(second)
        points = 0.0
        for attribute, value in second:
            if attribute in dict(first):
                points += 1 if dict(first)[attribute] == value else 0.5
        score = 5 * points / len(first) * (1 if name == again else 0.4)
        assert float(label) == pytest.approx(score, abs=1e-3)


def test_violations_change_what_they_say_and_nothing_else():
    for seed in range(200):
        right = acceptability.write_sentence(random.Random(seed), None)
        article, agreement = (
            acceptability.write_sentence(random.Random(seed), kind)
            for kind in ("article", "agreement")
        )
        changed = [(a, b) for a, b in zip(right.split(), agreement.split(), strict=True) if a != b]
        assert len(changed) == 1
        assert {form.rstrip("s") for form in changed[0]} <= {
            "live", "i", "are", "work", "eat", "buy", "wa", "were", "ha", "have", "stand",
            "belong", "serve", "sell",
        }  # fmt: skip
        assert abs(len(article.split()) - len(right.split())) == 1
        longer, shorter = sorted((article.split(), right.split()), key=len, reverse=True)
        assert longer.count("the") == shorter.count("the") + 1
        # The order draws once more from the generator, after all else is drawn.
        order = acceptability.write_sentence(random.Random(seed), "order")
        assert sorted(order.lower().strip(".").split()) == sorted(right.lower().strip(".").split())
        assert order != right


def test_the_clause_that_counts_and_negation_decide_the_sentiment():
    good = set(sentiment._GOOD)
    source = make_source(10)
    kinds = Counter()
    for _ in range(500):
        text, label = sentiment.sst2(source)
        assert text == text.lower()
        assert text.endswith(" . ")
        words = text.split()
        if "but" in words:
            words = words[words.index("but") + 1 :]
            kinds["but"] += 1
        elif words[0] == "although":
            words = words[words.index(",") + 1 :]
            kinds["although first"] += 1
        elif "although" in words:
            words = words[: words.index("although")]
            kinds["although last"] += 1
        else:
            words = words[words.index("and") + 1 :] if "and" in words else words
            kinds["one opinion"] += 1
        qualities = [word for word in words if word in good | set(sentiment._BAD)]
        assert len(qualities) == 1
        denied = bool({"not", "never", "nobody"} & set(words))
        assert int(label) == int((qualities[0] in good) is not denied)
    assert min(kinds[k] for k in ("but", "although first", "although last", "one opinion")) > 30


# Word counts


def words_of(rows: Rows, columns: tuple[int, ...]) -> list[list[str]]:
    return [[row[column] for column in columns] for row in rows]


def gain(train: Rows, dev: Rows, columns: tuple[int, ...]) -> float:
    """Accuracy of word counts of some columns above that of the most common class."""
    predicted = bag_of_words.classify(
        words_of(train, columns), [row[-1] for row in train], words_of(dev, columns)
    )
    right = sum(p == row[-1] for p, row in zip(predicted, dev, strict=True)) / len(dev)
    return right - max(Counter(row[-1] for row in dev).values()) / len(dev)


@pytest.mark.parametrize("task", ["cola", "sst2", *PAIR_CLASSES])
def test_word_counts_do_not_solve_a_task(task, corpora):
    train, *devs = corpora[task].values()
    columns = tuple(range(len(glue.LAYOUTS[task].texts)))
    for dev in devs:
        assert gain(train, dev, columns) < (0.2 if task == "sst2" else 0.15)


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("task", PAIR_CLASSES)
def test_one_text_alone_tells_nothing(task, column, corpora):
    train, *devs = corpora[task].values()
    for dev in devs:
        assert gain(train, dev, (column,)) < 0.06


@pytest.mark.parametrize("task", PAIR_CLASSES)
def test_lengths_tell_nothing(task, corpora):
    train, *devs = corpora[task].values()

    def lengths(rows: Rows) -> Rows:
        # A word for each length: linear models of these can fit any function of one length.
        return [(*(f"n{len(text.split())}" for text in row[:-1]), row[-1]) for row in rows]

    for dev in devs:
        assert gain(lengths(train), lengths(dev), (0, 1)) < 0.1


def test_word_counts_tell_neither_acceptability_nor_similarity(corpora):
    train, dev = corpora["cola"].values()
    predicted = bag_of_words.classify(
        words_of(train, (0,)), [int(row[-1]) for row in train], words_of(dev, (0,))
    )
    assert abs(matthews_corrcoef([int(row[-1]) for row in dev], predicted)) < 0.2
    train, dev = corpora["stsb"].values()
    scores = bag_of_words.regress(
        words_of(train, (0, 1)), [float(row[-1]) for row in train], words_of(dev, (0, 1))
    )
    truth = [float(row[-1]) for row in dev]
    mean, middle = sum(scores) / len(scores), sum(truth) / len(truth)
    covariance = sum((s - mean) * (t - middle) for s, t in zip(scores, truth, strict=True))
    spread = sum((s - mean) ** 2 for s in scores) * sum((t - middle) ** 2 for t in truth)
    assert abs(covariance / spread**0.5) < 0.2


# The baseline itself


def test_word_counts_find_what_words_tell():
    train = [["good food"], ["bad food"], ["good rooms"], ["bad rooms"]] * 5
    assert bag_of_words.classify(train, ["p", "n"] * 10, [["Good view"], ["bad"]]) == ["p", "n"]
    numbers = bag_of_words.regress(train, [4.0, 1.0] * 10, [["good"], ["bad"]])
    assert numbers[0] > 3 > 2 > numbers[1]


def test_each_text_has_word_counts_of_its_own():
    train = [["a", "b"], ["b", "a"]] * 10
    assert bag_of_words.classify(train, [0, 1] * 10, [["b", "a"], ["a", "b"]]) == [1, 0]


def test_one_class_is_predicted_as_it_is():
    assert bag_of_words.classify([["a"], ["b"]], [2, 2], [["c"]]) == [2]


def test_the_baseline_rejects_what_does_not_fit_together():
    with pytest.raises(ValueError, match="1 labels for 2 training examples"):
        bag_of_words.classify([["a"], ["b"]], [0], [["a"]])
    with pytest.raises(ValueError, match="1 labels for 2 training examples"):
        bag_of_words.regress([["a"], ["b"]], [0.0], [["a"]])
    with pytest.raises(ValueError, match=r"examples have \[1, 2\] texts"):
        bag_of_words.classify([["a"], ["b"]], [0, 1], [["a", "b"]])
    with pytest.raises(ValueError, match="1 training and 0 evaluation examples"):
        bag_of_words.regress([["a"]], [0.0], [])
