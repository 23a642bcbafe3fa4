"""Tables from records: numbers, verdicts, and what they say of their runs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from scripts.reporting import results as tables
from scripts.reporting import spec as table_spec
from scripts.reporting.formats import to_csv, to_latex, to_markdown
from scripts.reporting.spec import TableSpec, load_table
from scripts.runs.jobs import Job, Outcome
from tests.unit import fake_runs
from tests.unit.built_tables import SEEDS, build, cells_of, claim, finish, row

pytestmark = pytest.mark.usefixtures("no_pictures", "outputs")


@pytest.fixture
def spec() -> TableSpec:
    return load_table("table1")


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
