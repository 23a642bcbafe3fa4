"""What several of these tests share."""

from __future__ import annotations

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
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let runs take no time, as `fake_runs` says, and return the folder of their folders."""
    folder = tmp_path / "outputs"
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(fake_runs, "OUTPUTS", folder)
    return folder
