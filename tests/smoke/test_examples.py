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


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    assert run(script, tmp_path).strip()


@pytest.mark.parametrize("form", ["in_place", "closed_form"])
def test_the_callback_learns_and_its_export_is_what_it_learned(form: str, tmp_path: Path) -> None:
    out = run(ROOT / "examples" / "trainer_callback.py", tmp_path, "--form", form)
    before, after, exported = (
        float(re.search(pattern + r"\s*([\d.]+)", out)[1])  # type: ignore[index]
        for pattern in ("before:", "after:", "loaded again:")
    )
    assert after > before + 0.2
    assert exported == after
