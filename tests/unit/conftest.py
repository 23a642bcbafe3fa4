"""What several of these tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes a second each; tests/unit/test_figures.py draws them."""
    monkeypatch.setattr("scripts.tables.draw_forest", lambda *_: [])
    monkeypatch.setattr("scripts.tables.draw_figure", lambda *_: [])
    monkeypatch.setattr("scripts.reporting.key_rows.draw_key_rows", lambda *_: [])
