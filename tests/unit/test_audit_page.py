"""The audit's page by made-up records, its settings, and how a killed audit continues."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from scripts import audit
from scripts.auditing import measurements
from scripts.auditing import plan as audit_plan
from scripts.auditing.measurements import Measurement
from scripts.auditing.page import build, to_markdown
from scripts.auditing.plan import load_settings, make_plan
from scripts.reporting.results import RESULTS
from scripts.reporting.spec import load_table
from scripts.runs import devices, launchers
from scripts.runs.devices import Cuda
from scripts.runs.run import Run
from tests.unit import fake_runs
from tests.unit.audit_records import gaps

SETTINGS = load_settings("tiny")


def test_a_page_needs_a_record_and_one_scale() -> None:
    empty = {
        "scale": "tiny", "seeds": [1], "extra": [], "settings": SETTINGS, "runs": {},
        "measurements": [], "missing": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match="make audit"):
        build(empty)
    runs = {"rank/lora/": {1: {"scale": "paper", "signature": "x"}}}
    with pytest.raises(ValueError, match="scale"):
        build({**empty, "runs": runs})
    made = build({**empty, "measurements": gaps(1e-16, 0.2), "missing": ["rank of lora, seed 1"]})
    text = to_markdown(made)
    assert text.startswith("# Audit of Delta-LoRA (scale: tiny)\n\n## What we found\n\n- Without")
    assert "**Not there yet (1):** rank of lora, seed 1" in text
    assert made == json.loads(json.dumps(made))


# ---------------------------------------------------------------------- plan and records


def test_settings_are_a_base_and_a_scale(tmp_path: Path) -> None:
    assert load_settings("paper")["equivalence"]["steps"] < SETTINGS["equivalence"]["steps"]
    with pytest.raises(ValueError, match=r"huge\.yaml is missing"):
        load_settings("huge")
    for name in ("_base", "tiny"):
        source = audit_plan.CONFIGS / "audit" / f"{name}.yaml"
        (tmp_path / f"{name}.yaml").write_text(source.read_text(encoding="utf-8"))
    (tmp_path / "tiny.yaml").write_text("memory: {bathces: [1]}\n")
    with pytest.raises(ValueError, match="bathces"):
        load_settings("tiny", tmp_path)


@pytest.mark.long
def test_runs_are_shared_with_the_tables() -> None:
    few = copy.deepcopy(SETTINGS)
    few["dropout"]["dropouts"], few["low_resource"]["fractions"] = [0.0, 0.1], [0.01, 1.0]
    few["low_resource"]["rows"] = few["low_resource"]["rows"][:2]
    few["memory"]["methods"] = few["memory"]["methods"][:2]
    plan = make_plan("tiny", [1], [], few)
    names = {cell.signature for cell in plan.cells}
    table = {cell.signature for cell in load_table("table1").cells(scale="tiny", seeds=[1])}
    assert len(names & table) >= 5  # LoRA, Delta-LoRA, both controls, fine-tuning
    assert len(names) < len(plan.cells)
    assert len({m.signature for m in plan.measurements}) == len(plan.measurements)
    other = make_plan("tiny", [1], ["recipe.weight_decay=0.1"], few)
    kept = {m.signature for m in plan.measurements} & {m.signature for m in other.measurements}
    assert not kept


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(fake_runs, "OUTPUTS", tmp_path)
    return Run.compose(["experiment=e2e", "method=lora", "scale=tiny"])


def some(run: Run, **settings: Any) -> Measurement:
    return Measurement("memory", "memory of lora", settings, run, needs_run=False)


def test_a_measurement_is_named_by_what_it_depends_on(run: Run) -> None:
    first = some(run, rank=4)
    assert first.signature != some(run, rank=8).signature
    assert first.signature == dataclasses.replace(first, label="x").signature
    assert first.signature != dataclasses.replace(first, extra=("recipe.rank=2",)).signature
    assert first.path.parent == run.outputs / "audit"


def test_what_a_measurement_does_not_read_of_its_run_does_not_name_it(run: Run) -> None:
    first, trained = some(run, rank=4), dataclasses.replace(some(run, rank=4), needs_run=True)
    overrides = ("experiment=e2e", "scale=tiny")
    other = Run.compose([*overrides, "method=full"])
    assert first.signature == dataclasses.replace(first, run=other).signature
    assert trained.signature != dataclasses.replace(trained, run=other).signature
    data = Run.compose([*overrides, "method=lora", "task.max_length=31"])
    assert first.signature != dataclasses.replace(first, run=data).signature


def test_a_killed_audit_measures_only_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setitem(
        measurements.MEASURE, "memory", lambda run, settings: calls.append(settings) or {"grid": []}
    )
    first, second = some(run, rank=4), some(run, rank=8)
    record = measurements.measure(first)
    assert measurements.measure(first) == record == first.read()
    assert second.read() is None
    second.path.write_text('{"signature": "memo')  # what a kill leaves of a file not written whole
    assert second.read() is None
    measurements.measure(second)
    assert [settings["rank"] for settings in calls] == [4, 8]
    assert sorted(p.name for p in first.path.parent.iterdir()) == sorted(
        [first.path.name, second.path.name]
    )


def test_a_measurement_waits_for_its_run(run: Run) -> None:
    mine = Measurement("rank", "rank of lora", {}, run, needs_run=True)
    with pytest.raises(ValueError, match="not finished"):
        measurements.measure(mine)


def test_a_measurement_reaches_a_worker_whole(run: Run) -> None:
    first = some(run, rank=4)
    again = pickle.loads(pickle.dumps(first))
    assert (again.signature, again.path, again.label) == (first.signature, first.path, first.label)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1,x"], "seeds"),
        (["--args", "seed=3"], "seed is set by"),
        (["--args", "recipe.rnak=2"], "rnak"),
        (["--workers", "none", "--seeds", "1"], "workers"),
        (["--seeds", "1", "--results", __file__], "cannot write to the results folder"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = f"paths.outputs={tmp_path}"
    if "--args" not in arguments:
        arguments = [*arguments, "--args", outputs]
    assert audit.main(["--scale", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_measurements_of_scale_paper_need_a_gpu_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((), "the driver is too old"))
    plan = audit_plan.AuditPlan("paper", [1], [], {}, [], [some(run, rank=4)])
    with pytest.raises(ValueError, match=r"scale=paper needs a CUDA device.*driver is too old"):
        audit.run_missing(plan, "auto", tmp_path, launchers.Here())


@pytest.mark.long
@pytest.mark.skipif(
    not (RESULTS / "tiny" / "audit.md").exists(), reason="no page of the audit is committed"
)
def test_the_committed_page_follows_from_its_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--scale", "tiny", "--check"]) == 0, capsys.readouterr().out
