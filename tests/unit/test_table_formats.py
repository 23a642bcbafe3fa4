"""The formats of a table, the committed records that stand in for runs, and the command."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from scripts import tables as command
from scripts.reporting import results as tables
from scripts.reporting.formats import to_csv, to_json, to_latex, to_markdown
from scripts.reporting.spec import TableSpec, load_table
from tests.unit.built_tables import SEEDS, build, cells_of, finish, row

pytestmark = pytest.mark.usefixtures("no_pictures", "outputs")


@pytest.fixture
def spec() -> TableSpec:
    return load_table("table1")


def test_same_records_give_the_same_bytes(spec: TableSpec, tmp_path: Path) -> None:
    cells = cells_of(spec)
    finish(cells[:-1])
    contents = []
    for name in ("one", "two"):
        paths = tables.write_results(build(spec), tmp_path / name)
        contents.append({path.name: path.read_bytes() for path in paths})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["table1.csv", "table1.json", "table1.md", "table1.tex"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(contents[0])


def test_json_is_strict_and_complete(spec: TableSpec) -> None:
    finish(cells_of(spec)[:5])
    results = build(spec)
    assert json.loads(to_json(results), parse_constant=pytest.fail) == results
    assert {
        "method",
        "trainable_parameters",
        "updatable_parameters",
        "metrics",
        "paper",
        "runs",
    } <= (results["rows"][0].keys())


def test_csv_has_one_line_per_row_and_column(spec: TableSpec) -> None:
    finish(cells_of(spec))
    lines = list(csv.DictReader(io.StringIO(to_csv(build(spec)))))
    assert len(lines) == 12 * (5 + 4)
    line = next(x for x in lines if x["method"] == "delta_lora" and x["column"] == "bleu")
    assert float(line["mean"]) == pytest.approx(70.2333, abs=1e-3)
    assert (line["paper_value"], line["paper_status"]) == ("70.84", "recalled")


def test_markdown_and_latex_tables_are_rectangular(spec: TableSpec) -> None:
    finish(cells_of(spec)[:20])
    results = build(spec)
    block: list[int] = []
    for line in [*to_markdown(results).splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        elif block:
            assert len(set(block)) == 1
            block = []
    latex = to_latex(results)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {9}
    assert len(rows) == 1 + 12 + 7
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2
    assert r"W\_Q" in latex
    assert r"$\times$ (1 + $\lambda$)" in latex
    assert not re.search(r"[^\x00-\x7f]", latex)


# ---------------------------------------------------------------------- accepted records, command


def test_accepted_records_stand_in_for_run_folders(spec: TableSpec, tmp_path: Path) -> None:
    cells = cells_of(spec)
    finish(cells)
    entries = tables.collect(cells)
    folder = tmp_path / "results" / "runs" / "tiny" / "table1"
    assert len(tables.accept(entries, folder)) == 36
    before = to_json(tables.build_results(spec, "tiny", SEEDS, (), entries))
    for cell in cells:
        for path in cell.run.folder.iterdir():
            path.unlink()
    accepted = tables.read_accepted(tmp_path / "results" / "runs")
    again = tables.collect(cells, accepted=accepted)
    assert to_json(tables.build_results(spec, "tiny", SEEDS, (), again)) == before


def test_records_of_uncommitted_code_are_not_accepted(spec: TableSpec, tmp_path: Path) -> None:
    cells = cells_of(spec)
    git = {"commit": "0123456789abcdef", "dirty": True}
    finish(cells, provenance={"git": git, "device": {"name": "test CPU"}})
    with pytest.raises(ValueError, match="36 of 36 records come from uncommitted"):
        tables.accept(tables.collect(cells), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("abc.json", "{", "is no run record"),
        ("abc.json", "[]", "is no run record"),
        ("abc.json", '{"signature": "def"}', "name it def.json"),
    ],
)
def test_a_wrong_accepted_file_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tables.read_accepted(tmp_path)


def test_the_record_of_another_run_costs_its_cell_only(spec: TableSpec) -> None:
    cells = cells_of(spec)
    finish(cells)
    finish(cells[-1:], signature="0" * 12)
    *others, last = tables.collect(cells)
    assert all(entry.state == "done" for entry in others)
    assert (last.record, last.state) == (None, "damaged")
    assert f"{last.cell.run.folder}/record.json is damaged" in last.reason
    assert "it is the record of another run, 000000000000" in last.reason


def test_command_regenerates_from_records(
    spec: TableSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["1", "--scale", "tiny", "--results", str(tmp_path / "results")]
    assert command.main(arguments) == 2
    assert "no finished run at scale tiny" in capsys.readouterr().err
    finish(cells_of(spec))
    assert command.main([*arguments, "--accept"]) == 0
    assert "table1.{md,csv,tex,json}" in capsys.readouterr().out
    assert len(list((tmp_path / "results" / "runs").rglob("*.json"))) == 36
    assert command.main([*arguments, "--check"]) == 0
    path = tmp_path / "results" / "tiny" / "table1.csv"
    path.write_text(path.read_text().replace("bleu", "blue", 1))
    assert command.main([*arguments, "--check"]) == 1
    assert "table1.csv differs from what its records give" in capsys.readouterr().out


def test_scores_without_a_model_and_the_start_of_a_run_stand_above_the_table(
    spec: TableSpec,
) -> None:
    scores = {"bag of words": {"bleu": 0.5, "nist": 2.0}}
    start = {"task": "glue_mnli", "signature": "0" * 12, "adapter_sha256": "0" * 64}
    finish(cells_of(spec), reference_metrics=scores, init_from=start)
    results = build(spec)
    assert results["references"] == {"bag of words": {"bleu": 50.0, "nist": 2.0}}
    text = to_markdown(results)
    assert "- Bag of words: BLEU 50.00, NIST 2.00\n" in text
    assert "starts from glue_mnli" in text


def test_the_head_is_counted_and_said(spec: TableSpec) -> None:
    counts = {"trainable": 1000, "updatable": 0, "head": 600, "total": 5000}
    finish(cells_of(spec), parameters=counts)
    results = build(spec)
    assert row(results, "lora")["head_parameters"] == 600
    assert "include the new head of the task (600)" in to_markdown(results)
