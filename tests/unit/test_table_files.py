"""The files that define tables: rows, columns, the paper's numbers and their status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import tables as command
from scripts.reporting import spec as table_spec
from scripts.reporting.spec import PAPER, TABLES, TableSpec, load_table, read_yaml
from tests.unit.built_tables import cells_of, finish

pytestmark = pytest.mark.usefixtures("no_pictures", "outputs")


@pytest.fixture
def spec() -> TableSpec:
    return load_table("table1")


def test_every_table_file_loads() -> None:
    names = sorted(path.stem for path in TABLES.rglob("*.yaml"))
    assert names == table_spec.table_names()
    assert "table1" in names
    for name in names:
        assert load_table(name).rows


def test_optional_tables_are_in_no_command_but_their_own() -> None:
    optional = set(table_spec.table_names()) - set(table_spec.paper_table_names())
    assert optional == {"extended", "extended_e2e"}
    planned = subprocess.run(
        ["make", "-n", "reproduce-all", f"PYTHON={sys.executable}"],
        cwd=TABLES.parents[1], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    command = next(line for line in planned.splitlines() if "scripts/reproduce.py" in line)
    assert set(table_spec.paper_table_names()) <= set(command.split())
    assert not optional & set(command.split())
    own = subprocess.run(
        ["make", "-n", "reproduce-extended", f"PYTHON={sys.executable}"],
        cwd=TABLES.parents[1], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "scripts/reproduce.py extended --scale" in own


def test_a_table_that_does_not_exist_is_named_by_make_too() -> None:
    done = subprocess.run(
        ["make", "reproduce-table9", f"PYTHON={sys.executable}"],
        cwd=TABLES.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "unknown table 'table9'; did you mean" in done.stderr


def test_every_method_of_peft_is_a_row_of_an_extended_table() -> None:
    folder = TABLES.parent / "method" / "peft"
    rows = [row.overrides[0] for row in load_table("extended").rows]
    for path in folder.glob("*.yaml"):
        assert f"method=peft/{path.stem}" in rows


@pytest.mark.long
def test_an_incomplete_optional_table_is_left_alone(tmp_path: Path) -> None:
    """Its rows share runs with the paper's tables, so some of its records are always there."""
    for name in table_spec.paper_table_names():
        finish(cells_of(load_table(name)))
    arguments = ["--scale", "tiny", "--results", str(tmp_path / "results")]
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    made = tmp_path / "results" / "tiny" / "extended.json"
    made.write_text("{}")
    assert command.main(arguments) == 0
    assert made.read_text() == "{}"
    finish(cells_of(load_table("extended")))
    assert command.main(arguments) == 0
    assert json.loads(made.read_text())["table"] == "extended"
    assert not made.with_name("extended_e2e.json").exists(), "nobody has made that one"


def test_table1_has_the_papers_rows_in_order_then_the_controls(spec: TableSpec) -> None:
    assert [r.name for r in spec.rows if not r.is_control] == [
        "full", "full_frozen_embeddings", "full_query_value", "lora", "dylora", "adalora",
        "delta_lora",
    ]  # fmt: skip
    assert [r.name for r in spec.rows if r.is_control] == [
        "lora_no_dropout", "lora_scaled", "delta_lora_dropout", "lora_high_lr",
        "untrained",
    ]  # fmt: skip
    assert [r.name for r in spec.rows[:-1]] == [
        r.overrides[0].removeprefix("method=") for r in spec.rows[:-1]
    ]
    assert [c.id for c in spec.claims] == ["C1", "C8", "C9"]


@pytest.mark.parametrize("name", table_spec.table_names())
def test_columns_are_the_metrics_of_their_task(name: str) -> None:
    from hydra.utils import instantiate

    from scripts.runs.composition import compose

    spec = load_table(name)
    for run, overrides in spec.runs.items():
        task = instantiate(compose([*overrides, "scale=paper"]).task)
        metrics = {metric.name: metric for metric in task.metrics}
        for column in (c for c in spec.columns if c.run == run):
            assert column.metric is not None
            metric = metrics[column.metric]
            assert (column.scale, column.decimals) == (metric.scale, metric.decimals)
            assert column.higher_is_better == metric.higher_is_better


@pytest.mark.parametrize("number", range(1, 7))
def test_every_number_of_the_paper_has_its_status(number: int) -> None:
    paper = read_yaml(PAPER / f"table{number}.yaml")
    table_spec._check_paper(paper, f"table{number}.yaml")
    values = [v for r in paper["rows"].values() for v in r.get("metrics", {}).values()]
    assert len(values) == {1: 35, 2: 6, 3: 28, 4: 63, 5: 15, 6: 15}[number]
    assert sum(value["status"] == "text" for value in values) == (1 if number == 4 else 0)


def test_the_papers_numbers_agree_with_the_differences_in_its_text() -> None:
    claims = read_yaml(PAPER / "claims.yaml")
    assert list(claims) == [f"C{number}" for number in range(1, 10)]
    for name, number, slack in (("C1", 1, 0.011), ("C2", 2, 1e-9)):
        rows = read_yaml(PAPER / f"table{number}.yaml")["rows"]
        for column, difference in claims[name]["parts"][0]["paper"].items():
            if column in rows["lora"]["metrics"]:
                ours = rows["delta_lora"]["metrics"][column]["value"]
                theirs = rows["lora"]["metrics"][column]["value"]
                assert ours - theirs == pytest.approx(difference, abs=slack + 1e-9)


def test_average_of_glue_is_the_mean_of_its_columns() -> None:
    for name, content in read_yaml(PAPER / "table4.yaml")["rows"].items():
        values = {key: cell["value"] for key, cell in content["metrics"].items()}
        average = values.pop("average")
        assert sum(values.values()) / 8 == pytest.approx(average, abs=0.02), name


def test_end_rows_of_tables_5_and_6_are_those_of_table_1() -> None:
    first = read_yaml(PAPER / "table1.yaml")["rows"]
    for number in (5, 6):
        rows = read_yaml(PAPER / f"table{number}.yaml")["rows"]
        assert rows["lora"] == first["lora"]
        assert rows["delta_lora"] == first["delta_lora"]


@pytest.fixture
def editable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the table and paper files, read instead of the real ones."""
    for name, folder in (("TABLES", TABLES), ("PAPER", PAPER)):
        copy = tmp_path / name
        copy.mkdir()
        for path in folder.glob("*.yaml"):
            (copy / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(table_spec, name, copy)
    monkeypatch.setattr(table_spec, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title:", "titel:", "lacks title"),
        ("paper: table1.yaml", "paper: table9.yaml", "cannot read table9.yaml"),
        ("claims: [C1, C8, C9]", "claims: [C1, C88]", r"claims: unknown \['C88'\]"),
        ("claims: [C1, C8, C9]", "claims: [C7]", "C7: expect: unknown .'highest'"),
        ("{name: lora,", "{name: lara,", r"C1: rows: unknown \['lora'\]"),
        ("{name: dylora,", "{name: full,", "same name"),
        ("name: bleu,", "name: blue,", r"C1: columns: unknown \['bleu'\]"),
        ("name: lora_scaled", "name: lora_scalad", r"contrast: rows: unknown .'lora_scaled'"),
        ("better: higher", "better: more", "use higher or lower"),
        ("tuning: one", "colour: red\ntuning: one", "unknown keys .'colour'"),
        ("number: 1", "number: 1\nnumber: 2", "duplicate key"),
    ],
)
def test_a_wrong_table_file_is_explained(editable: Path, old: str, new: str, message: str) -> None:
    path = editable / "TABLES" / "table1.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=f"(?s)TABLES/table1.yaml: .*{message}"):
        load_table("table1")


def test_rows_and_columns_of_the_paper_must_be_in_the_table(editable: Path) -> None:
    path = editable / "PAPER" / "table1.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("  dylora:", "  dilora:"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"missing from the table: \['dilora'\]"):
        load_table("table1")
    path.write_text(text.replace("cider:", "spice:"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown columns in full: \['spice'\]"):
        load_table("table1")


def test_a_number_without_status_is_refused(editable: Path) -> None:
    path = editable / "PAPER" / "table1.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("{value: 70.84, status: recalled}", "{value: 70.84}"))
    with pytest.raises(ValueError, match="delta_lora, bleu lacks status"):
        load_table("table1")


def test_unknown_table_names_a_near_match() -> None:
    with pytest.raises(ValueError, match="did you mean 'table1'"):
        load_table("tabel1")
