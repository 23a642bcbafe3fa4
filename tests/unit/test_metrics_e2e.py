"""The suite: what it refuses, what it leaves empty and why, its program, its `evaluate` module."""

import json
import math
import shutil
from pathlib import Path

import evaluate
import pytest

from tasks.metrics import e2e, files, java, ptb
from tasks.metrics.java import MetricUnavailableError
from tasks.metrics.meteor import shared_process

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ["Blue Lagoon is a cheap pub.", "It isn't near The Old Mill, sadly."]
GROUPS = [
    ["Blue Lagoon is a cheap pub near the river.", "A cheap pub is Blue Lagoon."],
    ["It is not near The Old Mill."],
]


@pytest.fixture(autouse=True)
def _forget_tokens():
    ptb.tokenize.cache_clear()
    yield
    ptb.tokenize.cache_clear()


@pytest.fixture
def _no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert shutil.which("java") is None
    shared_process().close()  # one that an earlier test started needs no PATH


@pytest.mark.usefixtures("_no_java")
def test_without_java_only_meteor_is_missing():
    scores = e2e.score(OUTPUTS, GROUPS, metrics=(*e2e.METRICS, "nist_perl"))
    assert list(scores.values) == ["bleu", "nist", "rouge_l", "cider", "nist_perl"]
    assert scores.missing.keys() == {"meteor"}
    assert "Java not found on PATH; install OpenJDK 8 or later" in scores.missing["meteor"]
    # 6 of 6 and of 9 tokens; "it is near the old mill" of 8 and of 7
    f_scores = [2.44 * p * r / (r + 1.44 * p) for p, r in ((1, 6 / 9), (6 / 8, 6 / 7))]
    assert scores.values["rouge_l"] == pytest.approx(sum(f_scores) / 2)


@pytest.mark.usefixtures("_no_java")
def test_without_java_uncertain_tokens_leave_their_scores_empty():
    scores = e2e.score([OUTPUTS[0] + " (Good)", OUTPUTS[1]], GROUPS)
    assert list(scores.values) == ["bleu", "nist"]
    for name in ("rouge_l", "cider"):
        assert "Java not found" in scores.missing[name]
        assert "character '('" in scores.missing[name]


def test_without_the_package_the_reason_is_named(monkeypatch):
    java.find_file.cache_clear()
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MetricUnavailableError, match="pip install pycocoevalcap"):
        java.find_file("meteor/meteor-1.5.jar")
    java.find_file.cache_clear()


def test_another_file_is_not_taken_for_the_official_one(monkeypatch):
    java.find_file.cache_clear()
    name = "tokenizer/stanford-corenlp-3.4.1.jar"
    monkeypatch.setitem(java.FILES, name, "0" * 64)
    with pytest.raises(MetricUnavailableError, match="not the official file"):
        java.find_file(name)
    java.find_file.cache_clear()


@pytest.mark.parametrize("metrics", [("bleu", "nist", "nist_perl", "rouge_l", "cider")])
def test_line_breaks_count_as_blanks(metrics):
    broken = [" " + OUTPUTS[0].replace(" is ", " is\n"), OUTPUTS[1] + "\r\n"]
    assert e2e.score(broken, GROUPS, metrics=metrics) == e2e.score(OUTPUTS, GROUPS, metrics=metrics)


def test_empty_outputs_are_legal():
    scores = e2e.score(["", ""], GROUPS, metrics=("bleu", "rouge_l", "cider", "nist_perl"))
    assert not scores.missing
    assert scores.values.pop("bleu") == pytest.approx(0.0, abs=1e-3)
    assert set(scores.values.values()) == {0.0}


@pytest.mark.parametrize(
    ("outputs", "groups", "error", "message"),
    [
        ([], [], ValueError, "no predictions"),
        (["a"], [["a"], ["b"]], ValueError, "1 predictions but 2 groups"),
        (["a", "b"], [["a"], []], ValueError, "instance 1 has no references"),
        (["a"], [["a", " "]], ValueError, "reference 1 of instance 0 is empty"),
        (["a", "\ud800"], [["a"], ["b"]], ValueError, "prediction 1 is not valid Unicode"),
        (["a", None], [["a"], ["b"]], TypeError, "prediction 1 must be a string, got NoneType"),
        (["a"], ["a"], TypeError, "references of instance 0 are one string"),
        ("a", [["a"]], TypeError, "got one string"),
    ],
)
def test_bad_input_is_named(outputs, groups, error, message):
    with pytest.raises(error, match=message):
        e2e.score(outputs, groups)


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match="unknown metric 'rogue'; allowed are bleu, nist"):
        e2e.score(["a"], [["a"]], metrics=["rogue"])


@pytest.mark.usefixtures("_no_java")
def test_program_reads_official_files(tmp_path, capsys):
    predictions, references = tmp_path / "outputs.txt", tmp_path / "references.txt"
    predictions.write_text("\n".join(OUTPUTS) + "\n", encoding="utf-8")
    references.write_text("\n\n".join("\n".join(g) for g in GROUPS) + "\n", encoding="utf-8")
    arguments = ["--predictions", str(predictions), "--references", str(references)]
    expected = e2e.score(OUTPUTS, GROUPS)
    assert e2e.main([*arguments, "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {**expected.values, "missing": expected.missing}
    assert "meteor: missing: Java not found" in printed.err
    assert e2e.main(arguments) == 1
    assert f"bleu: {expected.values['bleu']:.4f}\n" in capsys.readouterr().out


def test_reference_files(tmp_path):
    path = tmp_path / "references.txt"
    path.write_text("a \nb\n\nc\n", encoding="utf-8")
    assert files.read_references(path) == [["a", "b"], ["c"]]
    path.write_text("a\nb\n", encoding="utf-8")
    assert files.read_references(path) == [["a"], ["b"]]
    path.write_text("\ufeffa\u2028b\r\nc\n", encoding="utf-8", newline="")
    assert files.read_references(path) == [["a\u2028b"], ["c"]]
    assert files.read_predictions(path) == ["a\u2028b", "c"]
    path.write_text("a\n\n\nb\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        files.read_references(path)


@pytest.mark.usefixtures("_no_java")
@pytest.mark.parametrize("name", ["default", *e2e.METRICS, *e2e.OPTIONAL_METRICS])
def test_evaluate_module(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    module = evaluate.load(str(ROOT / "tasks/metrics/e2e_nlg"), name, cache_dir=str(tmp_path))
    metrics = e2e.METRICS if name == "default" else (name,)
    computed = module.compute(predictions=OUTPUTS, references=GROUPS)
    expected = e2e.score(OUTPUTS, GROUPS, metrics=metrics)
    assert computed.pop("missing") == expected.missing
    assert computed.keys() == set(metrics)
    for metric, value in computed.items():
        if metric in expected.missing:
            assert value is None
        else:
            assert math.isclose(value, expected.values[metric], abs_tol=1e-12)


def test_evaluate_module_refuses_an_unknown_metric():
    with pytest.raises(ValueError, match="unknown metric 'rogue'"):
        evaluate.load(str(ROOT / "tasks/metrics/e2e_nlg"), "rogue")
