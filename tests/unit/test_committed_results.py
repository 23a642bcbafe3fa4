"""The committed tables, figures and pages follow from the committed records, byte for byte."""

from __future__ import annotations

import pytest

from scripts import tables


def test_tiny_results_follow_from_their_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--scale", "tiny", "--check"]) == 0, capsys.readouterr().out
