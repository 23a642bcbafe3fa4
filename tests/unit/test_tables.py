"""Tables from records: content, honesty, formats, determinism, and the files that define them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts import tables as command
from scripts.reporting import results as tables
from scripts.reporting import spec as table_spec
from scripts.reporting.formats import to_csv, to_json, to_latex, to_markdown
from scripts.reporting.spec import PAPER, TABLES, TableSpec, load_table, read_yaml
from scripts.runs.cells import Cell
from scripts.runs.jobs import Job, Outcome
from tests.unit import fake_runs

pytestmark = pytest.mark.usefixtures("no_pictures")

SEEDS = (1, 2, 3)


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "outputs"
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(fake_runs, "OUTPUTS", folder)
    return folder


@pytest.fixture
def spec() -> TableSpec:
    return load_table("table1")


def cells_of(spec: TableSpec, seeds: Sequence[int] = SEEDS, scale: str = "tiny") -> list[Cell]:
    return spec.cells(scale=scale, seeds=seeds, extra=())


def finish(cells: Sequence[Cell], **changes: Any) -> None:
    for cell in cells:
        record = fake_runs.record(cell.run, **changes)
        fake_runs.write(cell.run, record, fake_runs.resources(cell.run))


def build(spec: TableSpec, seeds: Sequence[int] = SEEDS, scale: str = "tiny") -> dict[str, Any]:
    entries = tables.collect(cells_of(spec, seeds, scale))
    return tables.build_results(spec, scale, seeds, (), entries)


def row(results: dict[str, Any], method: str) -> dict[str, Any]:
    return next(item for item in results["rows"] if item["method"] == method)


def claim(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in results["claims"] if item["id"] == name)


# ---------------------------------------------------------------------- the defining files


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


# ---------------------------------------------------------------------- numbers


def test_numbers_are_the_records_numbers_in_printed_units(spec: TableSpec) -> None:
    cells = cells_of(spec)
    finish(cells)
    results = build(spec)
    assert (results["table"], results["scale"]) == ("table1", "tiny")
    assert results["columns"] == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    lora = row(results, "lora")
    scores = [fake_runs.record(c.run)["metrics"] for c in cells if c.row == "lora"]
    bleu = lora["metrics"]["bleu"]
    assert bleu["mean"] == pytest.approx(100 * sum(s["bleu"] for s in scores) / 3)
    assert lora["metrics"]["nist"]["mean"] == pytest.approx(sum(s["nist"] for s in scores) / 3)
    assert bleu["n"] == 3
    assert bleu["ci95"][0] < bleu["mean"] < bleu["ci95"][1]
    assert bleu["values"]["2"] == pytest.approx(100 * scores[1]["bleu"])
    assert lora["paper"]["bleu"] == {"value": 69.60, "status": "recalled"}
    assert lora["trainable_parameters"] == 393216
    assert lora["updatable_parameters"] == 50331648
    assert lora["runs"] == [c.signature for c in cells if c.row == "lora"]
    assert lora["resources"]["peak_memory_bytes"]["mean"] == pytest.approx(7e8)
    assert row(results, "lora_scaled")["paper"] == {}


def test_claims_follow_the_numbers(spec: TableSpec) -> None:
    finish(cells_of(spec))
    results = build(spec)
    for name in ("C1", "C8", "C9"):
        entry = claim(results, name)
        assert {"id", "statement", "difference", "ci95", "verdict"} <= entry.keys()
        assert entry["verdict"] == "reproduced", entry["reason"]
    c1 = claim(results, "C1")["parts"]
    assert len(c1) == 10
    assert c1[0]["difference"] == pytest.approx(20.0)
    assert c1[0]["paper_difference"] == 1.24
    best = c1[5]
    assert (best["against"], len(best["comparisons"])) == ("full", 6)
    assert best["difference"] == pytest.approx(10.0)
    c8 = claim(results, "C8")["parts"]
    assert [p["column"] for p in c8] == ["peak_memory_bytes", "train_time_s"]
    assert c8[0]["difference"] == pytest.approx(0.05, abs=1e-6)
    assert len(claim(results, "C9")["parts"]) == 10
    assert {item["against"] for item in results["contrasts"]} == {
        "lora_no_dropout", "lora_scaled", "delta_lora_dropout", "lora_high_lr",
    }  # fmt: skip


def test_not_the_best_row_is_not_reproduced(
    spec: TableSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fake_runs.BASE, "full", 0.9)
    finish(cells_of(spec))
    c1 = claim(build(spec), "C1")
    assert [part["verdict"] for part in c1["parts"]] == ["reproduced"] * 5 + ["not reproduced"] * 5
    assert c1["verdict"] == "not reproduced"
    assert c1["parts"][5]["difference"] == pytest.approx(-20.0)


def test_a_control_above_delta_lora_does_not_touch_the_claim(
    spec: TableSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fake_runs.BASE, "lora_scaled", 0.99)
    finish(cells_of(spec))
    results = build(spec)
    assert claim(results, "C1")["verdict"] == "reproduced"
    readings = {c["reading"] for c in results["contrasts"] if c["against"] == "lora_scaled"}
    assert readings == {"below"}


def test_dearer_than_the_limit_is_not_comparable(spec: TableSpec) -> None:
    for cell in cells_of(spec):
        measured = fake_runs.resources(cell.run)
        if cell.row == "delta_lora":
            measured["train_time_s"] *= 1.2
        fake_runs.write(cell.run, fake_runs.record(cell.run), measured)
    c8 = claim(build(spec), "C8")
    assert [part["verdict"] for part in c8["parts"]] == ["reproduced", "not reproduced"]
    assert c8["verdict"] == "not reproduced"


def finish_measured(spec: TableSpec, **changes: Any) -> None:
    """Write all runs; `changes` to the resources are functions of the cell."""
    for cell in cells_of(spec):
        measured = fake_runs.resources(cell.run)
        measured |= {name: value(cell) for name, value in changes.items()}
        fake_runs.write(cell.run, fake_runs.record(cell.run), measured)


def test_time_is_judged_by_the_steps_where_they_were_measured(spec: TableSpec) -> None:
    finish_measured(spec)
    part = claim(build(spec), "C8")["parts"][1]
    assert "whole training time, as that of the steps is not recorded" in part["statement"]
    assert "step_time_s" not in row(build(spec), "lora")["resources"]
    finish_measured(spec, step_time_s=lambda c: 10.0 if c.row == "lora" else 12.0 + 0.1 * c.seed)
    results = build(spec)
    part = claim(results, "C8")["parts"][1]
    assert (part["column"], part["verdict"]) == ("step_time_s", "not reproduced")
    assert part["statement"] == (
        "Delta-LoRA relative to LoRA, time of the training steps (at most +10 %)"
    )
    assert row(results, "lora")["resources"]["step_time_s"]["mean"] == 10.0


def test_time_is_not_judged_where_runs_shared_a_device(spec: TableSpec) -> None:
    shared = {"lora": 4, "delta_lora": 1}
    finish_measured(
        spec,
        step_time_s=lambda c: 10.0,
        cells_on_device=lambda c: shared.get(c.row, 2) if c.seed > 1 else 1,
    )
    results = build(spec)
    memory, time = claim(results, "C8")["parts"]
    assert memory["verdict"] == "reproduced"
    assert time["verdict"] == "undecided"
    assert time["difference"] == pytest.approx(0.0)
    assert time["reason"].startswith("2 of 6 runs shared their device; make the runs of these rows")
    text = to_markdown(results)
    assert f"undecided ({time['reason']})" in text
    assert "test CPU; up to 4 runs at a time on one, so their times say little" in text

    finish_measured(spec, step_time_s=lambda c: 10.0, cells_on_device=lambda c: 1)
    results = build(spec)
    assert claim(results, "C8")["verdict"] == "reproduced"
    assert "runs at a time" not in to_markdown(results)


def test_costs_on_different_devices_are_not_compared(
    spec: TableSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_measured(spec, step_time_s=lambda c: 10.0)
    monkeypatch.setattr(
        tables, "device_of",
        lambda record: "NVIDIA H100" if record["method"] == "lora" else "a CPU",
    )  # fmt: skip
    parts = claim(build(spec), "C8")["parts"]
    assert [part["verdict"] for part in parts] == ["undecided", "undecided"]
    assert "made on different devices (NVIDIA H100; a CPU)" in parts[0]["reason"]


def test_one_seed_decides_nothing(spec: TableSpec) -> None:
    finish(cells_of(spec, seeds=[1]))
    results = build(spec, seeds=[1])
    bleu = row(results, "lora")["metrics"]["bleu"]
    assert (bleu["n"], bleu["std"], bleu["ci95"]) == (1, None, None)
    assert {c["verdict"] for c in results["claims"]} == {"undecided"}
    assert "needs 2 common seeds, has 1" in to_markdown(results)
    assert "± " not in "".join(
        line for line in to_markdown(results).splitlines() if line.startswith("| LoRA")
    )


def test_mean_column_averages_seed_by_seed(spec: TableSpec) -> None:
    columns = (
        *spec.columns,
        table_spec.Column("average", "Avg.", None, None, 1.0, 2, True, ("bleu", "rouge_l")),
    )
    wide = dataclasses.replace(spec, columns=columns)
    finish(cells_of(wide))
    metrics = row(build(wide), "lora")["metrics"]
    for seed in "123":
        expected = (metrics["bleu"]["values"][seed] + metrics["rouge_l"]["values"][seed]) / 2
        assert metrics["average"]["values"][seed] == pytest.approx(expected)


def test_side_columns_are_shown_below_the_table_and_not_judged(spec: TableSpec) -> None:
    column = table_spec.Column("last", "BLEU, last epoch", "e2e", "last_epoch/bleu", 100.0, 2, True)
    wide = dataclasses.replace(spec, side_columns=(column,))
    for cell in cells_of(wide):
        record = fake_runs.record(cell.run)
        record["metrics"]["last_epoch/bleu"] = record["metrics"]["bleu"] - 0.1
        record["training"] = {
            "steps": 10, "epochs": 2, "checkpoint_rule": "best", "validation": [{}] * cell.seed,
        }  # fmt: skip
        fake_runs.write(cell.run, record, fake_runs.resources(cell.run))
    results = build(wide)
    lora = row(results, "lora")
    shift = lora["side_metrics"]["last"]["mean"] - lora["metrics"]["bleu"]["mean"]
    assert shift == pytest.approx(-10.0)
    judged = {part["column"] for item in results["claims"] for part in item["parts"]}
    assert "last" not in judged | {item["column"] for item in results["contrasts"]}
    text = to_markdown(results)
    table, _, below = text.partition("## Other scores of the same runs")
    assert "BLEU, last epoch" not in table
    assert "BLEU, last epoch" in below.partition("## Claims")[0]
    assert "best; evaluations of a run: 1 to 3 (where there is one, best and last are" in table
    assert any(",last," in line for line in to_csv(results).splitlines())


def test_memory_of_a_cpu_is_explained(spec: TableSpec) -> None:
    finish(cells_of(spec))
    assert "that of the whole process" in to_markdown(build(spec))
    finish(cells_of(spec), provenance={
        "git": {"commit": "1" * 40, "dirty": False}, "device": {"name": "a GPU", "type": "cuda"},
    })  # fmt: skip
    assert "that of the whole process" not in to_markdown(build(spec))


def test_a_table_of_two_tasks_reads_each_column_from_its_own_run(spec: TableSpec) -> None:
    runs = {"one": spec.runs["e2e"], "two": (*spec.runs["e2e"], "train_fraction=0.5")}
    columns = (
        table_spec.Column("first", "First", "one", "bleu", 100.0, 2, True),
        table_spec.Column("second", "Second", "two", "bleu", 100.0, 2, True),
    )
    wide = dataclasses.replace(
        spec, runs=runs, columns=columns, claims=(), contrasts=(), paper={"title": "", "rows": {}}
    )
    for cell in cells_of(wide):
        shift = 0.1 if cell.on == "two" else 0.0
        record = fake_runs.record(cell.run)
        record["metrics"]["bleu"] += shift
        fake_runs.write(cell.run, record, fake_runs.resources(cell.run))
    lora = row(build(wide), "lora")
    first, second = (lora["metrics"][name]["mean"] for name in ("first", "second"))
    assert second - first == pytest.approx(10.0)
    assert lora["resources"]["predict_time_s"]["mean"] == pytest.approx(4.0)  # of both runs
    assert len(lora["runs"]) == 6


# ---------------------------------------------------------------------- honesty


def test_failed_and_missing_runs_stay_visible(spec: TableSpec) -> None:
    cells = cells_of(spec)
    finish([c for c in cells if c.row not in ("adalora", "dylora")])
    for cell in (c for c in cells if c.row == "adalora"):
        error = {"type": "RuntimeError", "message": "loss is <nan> | at\nstep 3 & later_on"}
        record = fake_runs.record(cell.run, status="failed", error=error)
        fake_runs.write(cell.run, record)
    results = build(spec)
    assert row(results, "adalora")["metrics"]["bleu"]["n"] == 0
    assert [item["seed"] for item in row(results, "adalora")["absent"]] == [1, 2, 3]
    assert claim(results, "C9")["verdict"] == "undecided"
    text = to_markdown(results)
    line = next(line for line in text.splitlines() if line.startswith("| AdaLoRA"))
    assert line.count("failed") == 7
    assert next(x for x in text.splitlines() if x.startswith("| DyLoRA")).count("not run") == 7
    assert "AdaLoRA, seed 1: failed: loss is &lt;nan&gt; \\| at step 3 &amp; later_on" in text
    assert "<nan>" not in text
    assert r"\textless{}nan\textgreater{} \textbar{} at step 3 \& later\_on" in to_latex(results)
    assert "30 of 36 runs finished" in text


def test_a_failure_without_a_record_is_shown(spec: TableSpec) -> None:
    cells = cells_of(spec)
    victim = next(c for c in cells if c.row == "lora" and c.seed == 2)
    finish([c for c in cells if c is not victim])
    job = Job("run", (victim.run,), victim.signature)
    for was_run, reason, state in (
        (True, "the worker process was ended by SIGKILL", "failed"),
        (False, "the run that it starts from failed: no memory", "not run"),
    ):
        failures = {victim.signature: Outcome(job, reason, 2.0, was_run)}
        entries = tables.collect(cells, failures=failures)
        text = to_markdown(tables.build_results(spec, "tiny", SEEDS, (), entries))
        assert f"LoRA, seed 2: {state}: {reason}" in text
    assert re.search(r"\| LoRA \[\d\] .* \(2; ", text)


def test_a_metric_that_could_not_run_is_empty_with_its_reason(spec: TableSpec) -> None:
    reason = "METEOR needs Java; install a Java runtime"
    for cell in cells_of(spec):
        record = fake_runs.record(cell.run)
        del record["metrics"]["meteor"]
        record["missing_metrics"]["meteor"] = reason
        fake_runs.write(cell.run, record, fake_runs.resources(cell.run))
    results = build(spec)
    assert row(results, "lora")["metrics"]["meteor"]["mean"] is None
    text = to_markdown(results)
    assert text.count(reason) == 1
    assert re.search(r"\| LoRA +\|.*\| – \[1\] +\|", text)
    assert claim(results, "C1")["verdict"] == "undecided"
    assert claim(results, "C1")["parts"][0]["verdict"] == "reproduced"


def test_a_metric_the_task_does_not_give_is_named(spec: TableSpec) -> None:
    for cell in cells_of(spec):
        record = fake_runs.record(cell.run)
        record["metrics"]["nist_perl"] = record["metrics"].pop("nist")
        fake_runs.write(cell.run, record, fake_runs.resources(cell.run))
    text = to_markdown(build(spec))
    assert "NIST: the run has no metric 'nist' (it has: bleu, cider, meteor, nist_perl" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "paper"}, "never mixes scales"),
        ({"task": {"name": "e2e", "version": 1, "protocol": "challenge"}}, "protocol"),
        ({"task": {"name": "e2e", "version": 2, "protocol": "lora"}}, "version"),
    ],
)
def test_records_that_must_not_share_a_table_are_refused(
    spec: TableSpec, changes: dict[str, Any], message: str
) -> None:
    cells = cells_of(spec)
    finish(cells)
    finish(cells[-1:], **changes)
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_several_commits_and_changed_trees_are_named(spec: TableSpec) -> None:
    cells = cells_of(spec)
    device = {"name": "test CPU"}
    finish(cells)
    git = {"commit": "fedcba9876543210", "dirty": True}
    finish(cells[:3], provenance={"git": git, "device": device})
    finish(cells[3:4], provenance={"git": {"commit": None, "dirty": None}, "device": device})
    text = to_markdown(build(spec))
    assert (
        "- Code: commit 0123456789ab (32 runs), unknown commit (1 runs), commit fedcba987654 with "
        "uncommitted changes (3 runs) (several versions of the code in one table)"
    ) in text


def test_only_the_papers_scale_lacks_the_warning(spec: TableSpec) -> None:
    finish(cells_of(spec))
    finish(cells_of(spec, scale="paper"))
    assert "**These are not the paper's numbers.**" in to_markdown(build(spec))
    assert "These are not the paper's numbers." in to_latex(build(spec))
    paper = to_markdown(build(spec, scale="paper"))
    assert "not the paper's" not in paper
    entries = tables.collect(cells_of(spec, scale="paper"))
    changed = tables.build_results(spec, "paper", SEEDS, ["recipe.rank=8"], entries)
    assert "Settings differ from the paper's" in to_markdown(changed)
    assert "recipe.rank=8" in to_markdown(changed)


def test_recalled_numbers_stand_in_parentheses_in_rows_of_their_own(spec: TableSpec) -> None:
    finish(cells_of(spec))
    text = to_markdown(build(spec))
    lines = text.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("| Delta-LoRA "))
    paper = lines[index + 1]
    assert paper.startswith("| ↳ paper")
    assert "| (70.84) " in paper
    assert "0.375M [d]" in paper
    assert "70.84" not in lines[index]
    assert "recalled, check against the PDF" in text
    assert "+1.24 [t]" in text


def test_a_note_on_the_papers_row_is_a_footnote(spec: TableSpec) -> None:
    finish(cells_of(spec))
    results = build(spec)
    text = to_markdown(results)
    assert "follows from them in no unit" in row(results, "full")["paper_note"]
    assert "| ↳ paper [1] " in text
    assert "\n[1] the architecture has 354,823,168 parameters" in text
    assert "[1] the architecture has 354,823,168 parameters" in to_latex(results)
    assert row(results, "lora")["paper_note"] is None


def test_the_head_says_what_was_read_and_how_it_was_scored(spec: TableSpec) -> None:
    files = [
        {"name": "train.jsonl", "rows": 1000, "official": False, "official_rows": 204_045},
        {"name": "test.jsonl", "rows": 100, "official": False, "official_rows": 100},
        {"name": "dev.tsv", "rows": 10, "official": False, "complete": False},
        {"name": "train.txt", "rows": 5, "official": False},
        {"name": "test.txt", "rows": 5, "official": True},
    ]
    task = {
        "name": "xsum", "version": 1, "source": "files", "aggregate": "mean", "files": files,
        "rows": {"train": 1000, "test": 100}, "max_rows": {"test": 100},
    }  # fmt: skip
    finish(cells_of(spec), task=task)
    text = to_markdown(build(spec))
    assert (
        "- Task e2e: name xsum, version 1, aggregate mean, source files, rows 1,000 train + 100 "
        "test, max rows 100 test, incomplete train.jsonl + dev.tsv, not official train.txt\n"
    ) in text
    assert "- DyLoRA trains every rank at once; scored at rank 4\n" in text


# ---------------------------------------------------------------------- formats


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
