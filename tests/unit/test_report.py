"""README shows the tables that stand in results/, and nothing typed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.report import ROOT, fill


def test_readme_holds_the_generated_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- results/tiny/verdicts.md -->" in text
    assert fill(text) == text, "run `make report`"


def test_a_block_is_replaced_by_its_table(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.md").write_text("# Table\n\n| x |\n")
    text = "before\n<!-- results/a.md -->\nold\n<!-- end -->\nafter"
    expected = "before\n<!-- results/a.md -->\n\n### Table\n\n| x |\n\n<!-- end -->\nafter"
    assert fill(text, tmp_path) == expected
    assert fill(expected, tmp_path) == expected


def test_a_missing_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fill("<!-- results/none.md -->\n<!-- end -->", tmp_path)
