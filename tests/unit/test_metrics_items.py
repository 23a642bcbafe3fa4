"""Scores of sets of items: what the official scorers say of the same items, written out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from delta_lora.protocols import ItemScores, OfSets
from tasks.metrics import e2e, glue, items, rouge, webnlg
from tasks.metrics.meteor import shared_process

WORDS = (
    "the", "a", "blue", "red", "pub", "cafe", "near", "river", "serves", "cheap", "good", "food",
    ",", ".", "in", "area", "Clowns", "3",
)  # fmt: skip
NUM_ITEMS = 30
rng = np.random.default_rng(5)


def _text(low: int = 3, high: int = 14) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))


def _near(text: str) -> str:
    words = text.split()
    words[rng.integers(len(words))] = str(rng.choice(WORDS))
    return " ".join(words[: rng.integers(2, len(words) + 1)])


REFERENCES = [[_text() for _ in range(rng.integers(1, 4))] for _ in range(NUM_ITEMS)]
OUTPUTS = [_near(texts[0]) for texts in REFERENCES]
OUTPUTS[3], OUTPUTS[4] = "", REFERENCES[4][0]  # nothing, and all in its place
#: (sets, items): how often each item occurs, in random resamples.
COUNTS = rng.multinomial(NUM_ITEMS, [1 / NUM_ITEMS] * NUM_ITEMS, size=6).astype(float)
SETS = [np.repeat(np.arange(NUM_ITEMS), row.astype(int)) for row in COUNTS]
WHOLE = np.ones((1, NUM_ITEMS))


def _take(values: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
    return [values[index] for index in chosen]


def _check(of_sets: Mapping[str, OfSets], official: Sequence[Mapping[str, float]]) -> None:
    """Compare the scores of `COUNTS` with those of the official scorer for the same sets."""
    for name, score in of_sets.items():
        expected = [values[name] for values in official]
        assert score(COUNTS) == pytest.approx(expected, rel=1e-12, abs=1e-14), name


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of these texts need none, and starting it for every set takes a second."""
    monkeypatch.setenv("PATH", "/nonexistent")
    shared_process().close()


@pytest.mark.usefixtures("no_java")
def test_e2e_scores_of_resampled_sets_are_those_of_the_official_scorer() -> None:
    names = ("bleu", "rouge_l")
    found = e2e.item_scores(OUTPUTS, REFERENCES, metrics=names)
    official = [
        e2e.score(_take(OUTPUTS, chosen), _take(REFERENCES, chosen), metrics=names).values
        for chosen in SETS
    ]
    _check(found.of_sets, official)
    assert np.mean(found.values["rouge_l"]) == pytest.approx(found.of_sets["rouge_l"](WHOLE)[0])
    assert "bleu" not in found.values, "BLEU is no mean over items"


@pytest.mark.usefixtures("no_java")
def test_weights_of_n_grams_are_those_of_the_whole_set() -> None:
    """NIST and CIDEr of the set, and NIST of the set twice, whose weights are the same."""
    names = ("nist", "cider")
    found = e2e.item_scores(OUTPUTS, REFERENCES, metrics=names)
    whole = e2e.score(OUTPUTS, REFERENCES, metrics=names).values
    for name in names:
        assert found.of_sets[name](WHOLE)[0] == pytest.approx(whole[name], rel=1e-12)
    twice = e2e.score(OUTPUTS * 2, REFERENCES * 2, metrics=("nist",)).values["nist"]
    assert found.of_sets["nist"](2 * WHOLE)[0] == pytest.approx(twice, rel=1e-12)
    # The official scorer weighs a repeated item's words as frequent; that moves it a little.
    anew = [e2e.score(_take(OUTPUTS, s), _take(REFERENCES, s), metrics=names).values for s in SETS]
    for name in names:
        assert found.of_sets[name](COUNTS) == pytest.approx([v[name] for v in anew], rel=0.15)


def test_nist_of_outputs_without_long_n_grams_is_undefined() -> None:
    outputs, references = ["one two three four five", "one"], [["one two three four five"]] * 2
    found = e2e.item_scores(outputs, references, metrics=("nist",)).of_sets["nist"]
    long, both = found(np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert math.isfinite(long)
    assert math.isnan(both), "2 n-grams of order 4, and minus 2"


def test_a_score_that_nobody_wrote_down_is_missing_with_its_reason() -> None:
    found = e2e.item_scores(OUTPUTS, REFERENCES, metrics=("bleu", "nist_perl"))
    assert set(found.of_sets) == {"bleu"}
    assert "nist_perl" in found.missing["nist_perl"]


@pytest.mark.usefixtures("no_java")
def test_meteor_without_java_is_missing_with_its_reason() -> None:
    found = e2e.item_scores(OUTPUTS, REFERENCES, metrics=("bleu", "meteor"))
    assert "Java not found" in found.missing["meteor"]
    assert set(found.of_sets) == {"bleu"}


@pytest.mark.long
@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java on PATH")
def test_meteor_of_resampled_sets_is_that_of_the_jar() -> None:
    found = e2e.item_scores(OUTPUTS, REFERENCES, metrics=("meteor",))
    official = [
        e2e.score(_take(OUTPUTS, s), _take(REFERENCES, s), metrics=("meteor",)).values for s in SETS
    ]
    _check(found.of_sets, official)


@pytest.mark.parametrize("protocol", ["lora", "challenge_2017"])
def test_webnlg_scores_of_parts_of_resampled_sets_are_the_official_ones(protocol: str) -> None:
    names = [name for name in webnlg.METRICS[protocol] if name != "meteor"]
    parts = {"seen": range(12), "unseen": range(12, NUM_ITEMS), "all": range(NUM_ITEMS)}
    found = webnlg.item_scores(OUTPUTS, REFERENCES, parts, protocol=protocol, metrics=names)
    official = []
    for chosen in SETS:
        places = {
            name: [place for place, item in enumerate(chosen) if item in part]
            for name, part in parts.items()
        }
        texts = _take(OUTPUTS, chosen), _take(REFERENCES, chosen)
        scores = webnlg.score_parts(*texts, places, protocol=protocol, metrics=names)
        official.append(scores.values)
    assert set(found.of_sets) == {f"{name}_{part}" for name in names for part in parts}
    _check(found.of_sets, official)
    assert set(found.values) == ({"ter_all"} if protocol == "lora" else set())


def test_a_part_without_items_is_missing_and_a_set_without_them_undefined() -> None:
    parts = {"seen": [0, 1], "unseen": []}
    found = webnlg.item_scores(OUTPUTS, REFERENCES, parts, metrics=["ter"])
    assert found.missing == {"ter_unseen": "no instance is of this part"}
    without = np.ones((2, NUM_ITEMS))
    without[1, :2] = 0
    known, unknown = found.of_sets["ter_seen"](without)
    assert math.isfinite(known)
    assert math.isnan(unknown)


def test_rouge_of_resampled_sets_is_the_mean_of_their_summaries() -> None:
    summaries = [texts[0] for texts in REFERENCES]
    found = rouge.item_scores(OUTPUTS, summaries)
    official = [rouge.score(_take(OUTPUTS, s), _take(summaries, s)).values for s in SETS]
    _check(found.of_sets, official)
    assert set(found.values) == set(rouge.METRICS)


@pytest.mark.parametrize("classes", [2, 3])
def test_glue_scores_of_classes_are_the_official_ones(classes: int) -> None:
    names = ("accuracy", "f1", "matthews") if classes == 2 else ("accuracy", "matthews")
    labels = rng.integers(0, classes, NUM_ITEMS)
    guesses = np.where(rng.random(NUM_ITEMS) < 0.6, labels, rng.integers(0, classes, NUM_ITEMS))
    found = glue.item_scores(guesses, labels, metrics=names)
    _check(found.of_sets, [glue.score(guesses[s], labels[s], metrics=names).values for s in SETS])
    assert found.values["accuracy"] == [float(x) for x in guesses == labels]


@pytest.mark.filterwarnings("ignore:A single label was found")
def test_one_class_has_no_correlation_by_the_official_convention() -> None:
    names = ("f1", "matthews")
    labels, guesses = np.array([1, 0, 0]), np.array([1, 0, 0])
    found = glue.item_scores(guesses, labels, metrics=names)
    zeros = np.array([[0.0, 2.0, 1.0]])
    for name in names:
        expected = glue.score([0, 0, 0], [0, 0, 0], metrics=[name]).values[name]
        assert found.of_sets[name](zeros)[0] == expected == 0.0


def test_correlations_of_resampled_sets_are_the_official_ones() -> None:
    names = ("pearson", "spearman")
    labels = np.round(rng.normal(size=NUM_ITEMS) * 2) / 2 + 100  # with ties, far from zero
    guesses = np.round((labels + rng.normal(size=NUM_ITEMS)) * 2) / 2
    found = glue.item_scores(guesses, labels, metrics=names)
    official = [glue.score(guesses[s], labels[s], metrics=names).values for s in SETS]
    for name, score in found.of_sets.items():
        assert score(COUNTS) == pytest.approx([v[name] for v in official], rel=1e-9), name


def test_a_correlation_with_equal_numbers_is_undefined() -> None:
    found = glue.item_scores([1.0, 2.0, 3.3], [0.1, 0.1, 2.0], metrics=("pearson", "spearman"))
    sets = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    for score in found.of_sets.values():
        assert np.isnan(score(sets)).tolist() == [False, True, True]
    same = glue.item_scores([1.0, 1.0], [0.0, 1.0], metrics=("pearson",))
    assert "all predictions are 1" in same.missing["pearson"]


def test_wrong_input_is_refused_as_by_the_score() -> None:
    with pytest.raises(ValueError, match="2 predictions but 1"):
        e2e.item_scores(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="prediction 1 is nan"):
        glue.item_scores([0.0, math.nan], [0.0, 1.0], metrics=("accuracy",))
    with pytest.raises(ValueError, match="reference 0 is empty"):
        rouge.item_scores(["a"], [" "])


def test_a_mean_takes_the_items_of_its_part_alone() -> None:
    score = items.mean([1.0, 0.0, 5.0], within=[0, 1])
    assert score(np.array([[1.0, 1.0, 1.0], [3.0, 1.0, 9.0]])).tolist() == [0.5, 0.75]


def test_a_task_that_says_nothing_of_its_items_has_reasons() -> None:
    from tests.toy import ToyTask

    found = ToyTask().item_scores([{"id": "a"}], "test")
    assert isinstance(found, ItemScores)
    assert not found.of_sets
    assert set(found.missing) == {spec.name for spec in ToyTask.metrics}
