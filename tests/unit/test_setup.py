"""`make setup` says one line a phase, keeps the rest in a log, and says what to do where it fails.

With a python3 that is a few lines of shell, so that nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

PYTHON3 = """#!/bin/sh
case "$1" in
  --version) echo "Python 3.11.0" ;;
  -c) exit 0 ;;
  -m) mkdir -p .venv/bin; cp "$PIP" .venv/bin/python ;;
esac
"""
PIP = """#!/bin/sh
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo "pip line $i of $*"; done
case "$*" in *requirements.lock*) exit $PIP_FAILS ;; esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "configs" / "table", tmp_path / "configs" / "table")
    (tmp_path / "requirements.lock").write_text("# made for:\na==1\nb==2\n")
    (tmp_path / "requirements-ray.lock").write_text("c==3\n")
    (tmp_path / "pyproject.toml").write_text("")
    for name, text in (("python3", PYTHON3), ("pip", PIP)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str, pip_fails: int = 0) -> subprocess.CompletedProcess[str]:
    own = {
        "PIP": str(folder / "pip"),
        "PIP_FAILS": str(pip_fails),
        "MAKEFLAGS": "",
        "LAUNCHER": "local",
    }
    return subprocess.run(
        ["make", "setup", f"PYTHON3={folder / 'python3'}", *arguments],
        cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_one_line_a_phase_and_nothing_new_the_second_time(folder: Path) -> None:
    done = make(folder)
    assert done.stdout.splitlines() == [
        "environment: creating .venv with Python 3.11.0",
        "environment: installing 2 packages, some minutes (log: .venv/setup.log)",
        "environment: adding delta_lora itself",
        "environment: ready (.venv/bin/python)",
    ]
    assert done.stderr == ""
    log = (folder / ".venv" / "setup.log").read_text()
    assert log.count("pip line 1 of") == 2
    assert make(folder).stdout == "environment: ready (.venv/bin/python)\n"


def test_ray_is_added_where_it_is_asked_for(folder: Path) -> None:
    make(folder)
    log = folder / ".venv" / "setup.log"
    assert "requirements-ray.lock" not in log.read_text()
    assert make(folder, "LAUNCHER=ray").stdout.splitlines() == [
        "environment: adding ray (log: .venv/setup.log)",
        "environment: ready (.venv/bin/python)",
    ]
    assert "--no-deps -r requirements-ray.lock" in log.read_text()
    assert make(folder, "LAUNCHER=ray").stdout == "environment: ready (.venv/bin/python)\n"


def test_a_failure_shows_the_end_of_the_log_and_what_to_do(folder: Path) -> None:
    done = make(folder, pip_fails=1)
    assert done.returncode != 0
    assert "pip line 12 of" in done.stderr
    assert "pip line 1 of" not in done.stderr
    assert "error: installing failed" in done.stderr
    assert "PYTHON=/path/to/python" in done.stderr
    assert "ready" not in done.stdout
    assert make(folder).returncode == 0, "the same command again mends it"
