"""Every script in examples/ runs as it is, in an empty folder, without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example printed, by its name."""
    assert EXAMPLES
    return {path.stem: run(path, tmp_path_factory.mktemp(path.stem)) for path in EXAMPLES}


@pytest.mark.long
def test_each_runs_and_reports(outputs: dict[str, str]) -> None:
    assert all(text.strip() for text in outputs.values())


def check_accuracies(out: str) -> None:
    before, after, exported = (
        float(re.search(pattern + r"\s*([\d.]+)", out)[1])  # type: ignore[index]
        for pattern in ("before:", "after:", "loaded again:")
    )
    assert after > before + 0.1
    assert exported == after


@pytest.mark.long
def test_the_callback_learns_and_its_export_is_what_it_learned(outputs: dict[str, str]) -> None:
    check_accuracies(outputs["trainer_callback"])


@pytest.mark.long
def test_the_loop_learns_and_saves_what_it_learned(outputs: dict[str, str]) -> None:
    out = outputs["own_loop"]
    before, after, loaded = (
        float(re.search(pattern + r"\s*([\d.]+)", out)[1])  # type: ignore[index]
        for pattern in ("before:", "after:", "loaded again:")
    )
    assert after < before / 10
    assert loaded == after
    assert "ranks [8]" in out, "twice the rank, on the untouched base"


@pytest.mark.slow
def test_writing_w_does_so_too(tmp_path: Path) -> None:
    script = ROOT / "examples" / "trainer_callback.py"
    check_accuracies(run(script, tmp_path, "--form", "in_place"))
