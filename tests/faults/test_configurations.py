"""Every wrong value of every key: refused in one line before any training, or it means something.

The long form of tests/unit/test_configuration_faults.py; `tests.faults.configurations` says what is
tried, and how each is judged.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import configurations
from tests.faults.tally import Tally

pytestmark = pytest.mark.long

#: of so many values, which stand key by key, one is tried: a dozen of every key.
STEP = 3
#: tests over which they are spread, so that several processes share them.
PARTS = 24
OUTCOMES = {"clear": "clear error", "accepted": "right", "vague": "traceback"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("faults")
    configurations.write_models(found)
    return found


def report(unlike: list[str]) -> str:
    path = os.environ.get("DELTA_LORA_FAULTS_LOG")
    if path and unlike:
        with open(path, "a", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in unlike)
    return "\n".join(unlike)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_wrong_value_is_refused_or_means_something(
    part: int, folder: Path, tally: Tally
) -> None:
    cases = configurations.cases(list(configurations.bases(folder)))[::STEP]
    assert len(cases) > 10_000
    unlike, seen = [], Counter[str]()
    for case in cases[part::PARTS]:
        verdict = configurations.judge(case)
        seen[verdict.result] += 1
        tally.add("values of a configuration", OUTCOMES.get(verdict.result, verdict.result))
        if verdict.result not in ("clear", "accepted"):
            unlike.append(f"{case.override} of {' '.join(case.base)}: {verdict}")
    assert not unlike, report(unlike)
