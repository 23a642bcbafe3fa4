"""README shows the rows that stand in results/, and no score typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.readme import ROOT, fill
from scripts.reporting.page import _command


def test_readme_holds_the_generated_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- results/tiny/key_rows.md -->" in text
    assert fill(text) == text, "run `make readme`"


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


def test_the_page_names_one_command_only_where_one_made_it() -> None:
    one: dict[str, Any] = {"seeds": [1, 2], "overrides": []}
    assert _command({"a": one, "b": one}, "tiny") == "`make reproduce-all SCALE=tiny SEEDS=1,2`"
    for other in ({"seeds": [7]}, {"overrides": ["recipe.rank=8"]}):
        assert "several commands" in _command({"a": one, "b": {**one, **other}}, "tiny")
