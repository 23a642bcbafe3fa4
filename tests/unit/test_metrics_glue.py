"""GLUE scores against scikit-learn and scipy called directly, and where a score is undefined."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from tasks.metrics.glue import METRICS, score

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seed", range(5))
def test_classification_equals_scikit_learn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels, predictions = draw.integers(2, size=200), draw.integers(2, size=200)
    got = score(predictions, labels, metrics=["accuracy", "f1", "matthews"]).values
    assert got == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(labels, predictions), abs=0),
        "f1": pytest.approx(sklearn.metrics.f1_score(labels, predictions), abs=0),
        "matthews": pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions), abs=0),
    }


@pytest.mark.parametrize("seed", range(5))
def test_regression_equals_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = np.round(draw.uniform(0, 5, size=100), 1)  # with ties
    predictions = labels + draw.normal(size=100)
    got = score(predictions, labels, metrics=["pearson", "spearman"]).values
    assert got["pearson"] == scipy.stats.pearsonr(labels, predictions)[0]
    assert got["spearman"] == scipy.stats.spearmanr(labels, predictions)[0]


def test_three_classes() -> None:
    assert score([0, 1, 2, 2], [0, 1, 1, 2], metrics=["accuracy"]).values == {"accuracy": 0.75}


@pytest.mark.parametrize("constant", [0, 1])
def test_one_class_predicted(constant: int) -> None:
    labels = [0, 1, 1, 1, 0]
    values = score([constant] * 5, labels, metrics=["accuracy", "f1", "matthews"]).values
    assert values["matthews"] == 0.0
    assert values["accuracy"] == (0.6 if constant else 0.4)
    assert values["f1"] == (pytest.approx(0.75) if constant else 0.0)


def test_matthews_by_hand() -> None:
    predictions, labels = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]
    tp, tn, fp, fn = 2, 2, 1, 1
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    got = score(predictions, labels, metrics=["matthews"]).values["matthews"]
    assert got == pytest.approx(expected, abs=1e-15)


@pytest.mark.filterwarnings("error")
def test_a_constant_regression_has_no_correlation() -> None:
    scores = score([2.5, 2.5, 2.5], [1.0, 2.0, 3.0], metrics=["pearson", "spearman"])
    assert scores.values == {}
    assert scores.missing["pearson"] == "pearson is undefined: all predictions are 2.5"
    assert "all labels are 3" in score([1, 2], [3, 3], metrics=["spearman"]).missing["spearman"]
    assert "two examples" in score([1.0], [3.0], metrics=["pearson"]).missing["pearson"]


@pytest.mark.parametrize(
    ("predictions", "labels", "metrics", "message"),
    [
        ([], [], ["accuracy"], "no predictions to score"),
        ([1], [1, 0], ["accuracy"], "1 predictions but 2 labels"),
        ([1], [1], ["f2"], "unknown metric 'f2'; allowed are accuracy, f1"),
        ([float("nan"), 1], [1, 0], ["pearson"], "prediction 0 is nan"),
        ([2, 1], [1, 0], ["f1"], "f1 is of the classes 0 and 1, got .2"),
    ],
)
def test_wrong_input_is_refused(
    predictions: list[float], labels: list[float], metrics: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(predictions, labels, metrics=metrics)


def test_every_metric_has_a_label() -> None:
    from tasks.glue import METRIC_LABELS

    assert set(METRIC_LABELS) == set(METRICS)


def test_the_evaluate_module_needs_no_network() -> None:
    suite = evaluate.load(str(ROOT / "tasks" / "metrics" / "glue_scores"), "mrpc")
    got = suite.compute(predictions=[1, 0, 1], references=[1, 0, 0])
    assert got == {"accuracy": 2 / 3, "f1": 2 / 3, "missing": {}}
    suite = evaluate.load(str(ROOT / "tasks" / "metrics" / "glue_scores"), "stsb")
    got = suite.compute(predictions=[1.0, 1.0], references=[0.5, 2.0])
    assert got["pearson"] is None
    assert "undefined" in got["missing"]["pearson"]
    with pytest.raises(ValueError, match="unknown task 'wnli'"):
        evaluate.load(str(ROOT / "tasks" / "metrics" / "glue_scores"), "wnli")
