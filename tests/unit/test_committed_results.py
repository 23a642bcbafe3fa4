"""The committed tables, figures and pages follow from the committed records, byte for byte."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from scripts import tables
from scripts.reporting.page import write_page
from scripts.reporting.results import RESULTS
from scripts.reporting.spec import load_table, table_names
from tests.choices import first

TINY = RESULTS / "tiny"
#: an optional table is committed or not; the others must be.
COMMITTED = [
    name
    for name in table_names()
    if (TINY / f"{name}.json").exists() or not load_table(name).is_optional
]


@pytest.mark.parametrize(
    "name", first(sorted(COMMITTED, key=lambda name: name.startswith("table4")), len(COMMITTED) - 2)
)
def test_tiny_results_follow_from_their_records(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables.main([name, "--scale", "tiny", "--check"]) == 0, capsys.readouterr().out


def test_the_tiny_page_follows_from_its_tables(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    pages = ("README.md", "key_rows.md")
    for name in pages:
        (tmp_path / "tiny" / name).unlink()
    write_page(tmp_path / "tiny", has_pictures=False)
    for name in pages:
        assert (tmp_path / "tiny" / name).read_bytes() == (TINY / name).read_bytes()


def test_every_link_of_a_page_leads_somewhere() -> None:
    for page in (RESULTS / "README.md", TINY / "README.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#][^)#]*)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_table_has_its_picture() -> None:
    for name in COMMITTED:
        assert (TINY / f"{name}.png").exists(), f"python scripts/tables.py {name} --scale tiny"
