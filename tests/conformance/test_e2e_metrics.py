"""The scorers against the official e2e-metrics on the outputs of five systems.

The outputs may not be redistributed, so they are read from ``$DELTA_LORA_DATA/e2e/conformance``
(its README says how the official values were made).
"""

import functools
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from tasks.metrics import e2e, mteval, ptb, ptb_rules
from tasks.metrics.meteor import shared_process
from tests.choices import first

DATA = os.environ.get("DELTA_LORA_DATA")
FOLDER = Path(DATA or ".") / "e2e" / "conformance"
SYSTEMS = ("tgen", "slug", "chen", "sheff2", "zhaw2")

pytestmark = pytest.mark.skipif(
    DATA is None, reason="DELTA_LORA_DATA names no folder with e2e/conformance (see CONTRIBUTING)"
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java on PATH")


@functools.cache
def _lines(name):
    return gzip.decompress((FOLDER / name).read_bytes()).decode().splitlines()


@functools.cache
def _references():
    groups = [[]]
    for line in _lines("test_refs.txt.gz"):
        if line.strip():
            groups[-1].append(line.strip())
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]


def _outputs(system):
    return [line.strip() for line in _lines(f"outputs/{system}.txt.gz")]


def _official(system):
    entry = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))["systems"][system]
    return {
        "bleu": entry["python"]["BLEU"],
        "nist": entry["python"]["NIST"],
        "meteor": entry["METEOR"],
        "rouge_l": entry["ROUGE_L"],
        "cider": entry["CIDEr"],
    }, entry["perl"]["NIST"]


@pytest.fixture(autouse=True)
def _forget_tokens():
    ptb.tokenize.cache_clear()
    yield
    ptb.tokenize.cache_clear()


def _assert_official(scores, system, missing):
    exact, nist_perl = _official(system)
    assert scores.missing.keys() == missing
    for name in exact.keys() - missing:
        assert scores.values[name] == pytest.approx(exact[name], rel=0, abs=1e-9), name
    assert scores.values["nist_perl"] == pytest.approx(nist_perl, rel=0, abs=5e-5)


@needs_java
@pytest.mark.java
@pytest.mark.slow
@pytest.mark.parametrize("system", first(SYSTEMS))
def test_scores_equal_the_official_ones(system):
    metrics = e2e.METRICS + e2e.OPTIONAL_METRICS
    scores = e2e.score(_outputs(system), _references(), metrics=metrics)
    _assert_official(scores, system, missing=set())


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_scores_equal_the_official_ones_without_java(system, monkeypatch):
    monkeypatch.setenv("PATH", "")
    shared_process().close()
    metrics = e2e.METRICS + e2e.OPTIONAL_METRICS
    scores = e2e.score(_outputs(system), _references(), metrics=metrics)
    _assert_official(scores, system, missing={"meteor"})


def test_tokens_equal_the_official_ones():
    outputs = _outputs("tgen")
    assert [" ".join(mteval.tokenize(text)) for text in outputs] == [
        line.lower() for line in _lines("mteval_tokens_tgen.txt.gz")
    ]
    tokens = [
        " ".join(token for token in line if token not in ptb.PUNCTUATION)
        for line in ptb_rules.tokenize(outputs)
    ]
    assert tokens == _lines("ptb_tgen.txt.gz")


@needs_java
@pytest.mark.java
@pytest.mark.slow
@pytest.mark.parametrize("split", first(["test", "valid", "train"]))
def test_rules_equal_the_jar_on_lora_text(split):
    path = FOLDER.parent / "lora" / f"{split}.txt.gz"
    texts = []
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        text = line.split("||", maxsplit=1)[1].strip()
        try:
            ptb_rules.tokenize([text])
        except ptb_rules.UncertainError:
            continue
        texts.append(text)
    assert len(texts) > 4600
    tokens = [
        " ".join(token for token in line if token not in ptb.PUNCTUATION)
        for line in ptb_rules.tokenize(texts)
    ]
    assert tokens == list(ptb.tokenize_with_jar(tuple(texts)))
