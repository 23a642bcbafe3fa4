"""The WebNLG scorers against the official ones on the outputs of three systems.

The outputs may not be redistributed, so they are read from ``$DELTA_LORA_DATA/webnlg`` (the README
of its folder conformance says how the official values were made).
"""

import functools
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from tasks.metrics import webnlg
from tasks.metrics.ter import ter
from tests.choices import first

DATA = os.environ.get("DELTA_LORA_DATA")
FOLDER = Path(DATA or ".") / "webnlg"
SYSTEMS = ("melbourne", "upf-forge", "baseline")
PARTS = ("seen", "unseen", "all")

pytestmark = pytest.mark.skipif(
    DATA is None, reason="DELTA_LORA_DATA names no folder with webnlg (see CONTRIBUTING)"
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java on PATH")


@functools.cache
def _text(name):
    return gzip.decompress((FOLDER / name).read_bytes()).decode()


@functools.cache
def _entries():
    """(seen, good texts) of every test entry."""
    lines = _text("test.jsonl.gz").removesuffix("\n").split("\n")
    return [(entry["seen"], entry["references"]) for entry in map(json.loads, lines)]


def _outputs(system):
    return _text(f"conformance/outputs/{system}.txt.gz").removesuffix("\n").split("\n")


def _score(system, protocol, metric):
    entries = _entries()
    parts = {
        "seen": [i for i, (seen, _) in enumerate(entries) if seen],
        "unseen": [i for i, (seen, _) in enumerate(entries) if not seen],
        "all": range(len(entries)),
    }
    assert [len(parts[part]) for part in PARTS] == [971, 891, 1862]
    scores = webnlg.score_parts(
        _outputs(system),
        [texts for _, texts in entries],
        parts,
        protocol=protocol,
        metrics=[metric],
    )
    assert not scores.missing
    return [scores.values[f"{metric}_{part}"] for part in PARTS]


def _official(system, protocol, metric):
    scores = json.loads((FOLDER / "conformance" / "scores.json").read_text(encoding="utf-8"))
    if protocol == "lora":
        return [scores["scores"][system][part][metric] for part in PARTS]
    return [scores[protocol]["scores"][system][part][metric.upper()] for part in PARTS]


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("protocol", ["lora", "challenge_2017"])
def test_bleu_equals_the_printed_one(system, protocol):
    found = _score(system, protocol, "bleu")
    assert [round(100 * value, 2) for value in found] == _official(system, protocol, "bleu")


@needs_java
@pytest.mark.java
@pytest.mark.long  # the same program as of E2E, whose scores `make test` compares
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("protocol", ["lora", "challenge_2017"])
def test_meteor_equals_the_official_one(system, protocol):
    found = _score(system, protocol, "meteor")
    assert found == pytest.approx(_official(system, protocol, "meteor"), rel=0, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("system", first(SYSTEMS))
def test_ter_equals_the_official_one(system):
    found = _score(system, "lora", "ter")
    assert found == pytest.approx(_official(system, "lora", "ter"), rel=0, abs=1e-6)


@pytest.mark.parametrize("system", first(SYSTEMS))
def test_ter_equals_pyter_pair_by_pair(system):
    pyter = pytest.importorskip("pyter", reason="pyter3 is not installed")
    outputs, entries = _outputs(system), _entries()
    for index in range(0, len(outputs), 60):
        output = webnlg.prepare(outputs[index]).split()
        for text in entries[index][1]:
            reference = webnlg.prepare(text).split()
            assert ter(output, reference) == pyter.ter(output, reference)
