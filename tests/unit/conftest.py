"""What several of these tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit import fake_runs


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes a second each; tests/unit/test_figures.py draws them."""
    monkeypatch.setattr("scripts.tables.draw_forest", lambda *_: [])
    monkeypatch.setattr("scripts.tables.draw_figure", lambda *_: [])
    monkeypatch.setattr("scripts.reporting.key_rows.draw_key_rows", lambda *_: [])


@pytest.fixture
def outputs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Let runs take no time, as `fake_runs` says, and give the folder of their folders.

    It is the same for all tests of a process, so that their runs are composed once, and empty.
    """
    folder = tmp_path_factory.getbasetemp() / "outputs"
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(fake_runs, "OUTPUTS", folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
