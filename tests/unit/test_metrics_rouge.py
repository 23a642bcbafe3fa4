"""ROUGE of summaries: equal to rouge-score called directly, edge cases, aggregation."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import evaluate
import numpy as np
import pytest
import yaml
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from tasks.metrics.rouge import METRICS, one_sentence_a_line, score

ROOT = Path(__file__).parents[2]
WORDS = [
    "the",
    "a",
    "cat",
    "cats",
    "sat",
    "sitting",
    "on",
    "mat",
    "café",
    "naïve",
    "42",
    "U.S.",
    "ran",
]


def make_texts(seed: int, count: int = 30) -> list[str]:
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        sentences = [
            " ".join(draw.choices(WORDS, k=draw.randint(1, 12))).capitalize() + "."
            for _ in range(draw.randint(1, 3))
        ]
        texts.append(" ".join(sentences))
    return texts


def direct(predictions: list[str], references: list[str]) -> dict[str, list[float]]:
    """rouge-score called on texts whose lines are its own input."""
    scorer = RougeScorer(list(METRICS.values()), use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: [s[key].fmeasure for s in scores] for name, key in METRICS.items()}


def test_scores_equal_rouge_score_called_directly() -> None:
    predictions, references = make_texts(1), make_texts(2)
    lines = [[one_sentence_a_line(text) for text in texts] for texts in (predictions, references)]
    assert any("\n" in text for text in lines[0])
    expected = {name: fmean(column) for name, column in direct(*lines).items()}
    found = score(predictions, references)
    assert list(found.values) == ["rouge_1", "rouge_2", "rouge_l", "rouge_lsum"]
    assert found.values == pytest.approx(expected, rel=0, abs=1e-15)
    assert not found.missing
    # Line breaks matter to Lsum alone.
    raw = {name: fmean(column) for name, column in direct(predictions, references).items()}
    differing = [name for name in raw if abs(raw[name] - found.values[name]) > 1e-12]
    assert differing == ["rouge_lsum"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("", "the cat", (0.0, 0.0, 0.0, 0.0)),
        (" \n ", "the cat", (0.0, 0.0, 0.0, 0.0)),
        ("cat", "cat", (1.0, 0.0, 1.0, 1.0)),  # one word has no bigram
        ("running dogs", "run dog", (1.0, 1.0, 1.0, 1.0)),  # stems
        ("ran", "run", (0.0, 0.0, 0.0, 0.0)),
        ("Café", "cafe", (0.0, 0.0, 0.0, 0.0)),  # other letters than a to z split a word
        ("猫", "cat", (0.0, 0.0, 0.0, 0.0)),
        ("THE CAT!", "the, cat", (1.0, 1.0, 1.0, 1.0)),
        ("the cat\nsat", "the cat sat", (1.0, 1.0, 1.0, 1.0)),
        ("b a", "a b", (1.0, 0.0, 0.5, 0.5)),
        ("b. a.", "a. b.", (1.0, 0.0, 0.5, 0.5)),
    ],
)
def test_edge_cases(prediction: str, reference: str, expected: tuple[float, ...]) -> None:
    assert tuple(score([prediction], [reference]).values.values()) == pytest.approx(expected)


def test_lsum_reads_sentences_and_l_the_whole_text() -> None:
    swapped = score(["The dog ran. The cat sat."], ["The cat sat. The dog ran."]).values
    assert swapped["rouge_l"] == pytest.approx(0.5)
    assert swapped["rouge_lsum"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two! Three? ", ["One.", "Two!", "Three?"]),
        ("Mr. Smith met Dr. Noh at 3.5 p.m. today.", ["Mr. Smith met Dr. Noh at 3.5 p.m. today."]),
        ("one\n\ntwo", ["one", "two"]),
        ("no end", ["no end"]),
        ("", [""]),
    ],
)
def test_sentences(text: str, lines: list[str]) -> None:
    assert one_sentence_a_line(text).split("\n") == lines


def test_the_bootstrap_is_that_of_rouge_score_with_a_seed() -> None:
    predictions, references = make_texts(3, 12), make_texts(4, 12)
    scorer = RougeScorer(list(METRICS.values()), use_stemmer=True)
    aggregator = BootstrapAggregator()
    for prediction, reference in zip(predictions, references, strict=True):
        aggregator.add_scores(
            scorer.score(one_sentence_a_line(reference), one_sentence_a_line(prediction))
        )
    state = np.random.get_state()
    try:
        np.random.seed(5)
        theirs = aggregator.aggregate()
    finally:
        np.random.set_state(state)
    found = score(predictions, references, aggregate="bootstrap", seed=5).values
    # rouge-score draws anew for each metric, so that only the first has the same resamples.
    first, *others = METRICS
    assert found[first] == pytest.approx(theirs[METRICS[first]].mid.fmeasure, rel=0, abs=1e-12)
    for name in others:
        assert found[name] == pytest.approx(theirs[METRICS[name]].mid.fmeasure, abs=0.01)
    assert score(predictions, references, aggregate="bootstrap", seed=5).values == found
    assert score(predictions, references, aggregate="bootstrap", seed=6).values != found
    mean = score(predictions, references).values
    assert all(0 < abs(mean[name] - found[name]) < 0.01 for name in METRICS)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((["a"], ["a", "b"]), {}, ValueError, "1 predictions but 2 references"),
        (([], []), {}, ValueError, "no predictions to score"),
        ((["a", "b"], ["a", " \n"]), {}, ValueError, "reference 1 is empty"),
        (("a", ["a"]), {}, TypeError, "must be lists of texts"),
        ((["a", None], ["a", "b"]), {}, TypeError, "prediction 1 must be a string, got NoneType"),
        ((["a"], ["a"]), {"metrics": ["rouge_3"]}, ValueError, "unknown metric 'rouge_3'"),
        ((["a"], ["a"]), {"aggregate": "max"}, ValueError, "aggregate='max'; allowed: mean, boo"),
    ],
)
def test_bad_input(
    arguments: tuple[Any, Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        score(*arguments, **settings)


def test_names_are_those_of_the_papers_table() -> None:
    table = yaml.safe_load((ROOT / "results" / "paper" / "table3.yaml").read_text())
    assert all(list(row["metrics"]) == list(METRICS) for row in table["rows"].values())


def test_the_evaluate_module_loads_by_path_and_gives_the_same_values(
    tmp_path: Path,
) -> None:
    folder = str(ROOT / "tasks" / "metrics" / "summary_rouge")
    predictions, references = make_texts(5, 4), make_texts(6, 4)
    suite = evaluate.load(folder, cache_dir=str(tmp_path))
    found = suite.compute(predictions=predictions, references=references)
    assert found == score(predictions, references).values
    one = evaluate.load(folder, "rouge_2", cache_dir=str(tmp_path))
    assert list(one.compute(predictions=predictions, references=references)) == ["rouge_2"]
