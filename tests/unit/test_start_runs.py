"""Runs that others start from: found before the work, made once, not again where they failed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.reporting.spec import load_table
from scripts.runs import execution
from scripts.runs.batch import with_starts
from scripts.runs.cells import Cell, list_cells
from scripts.runs.run import Run, Status
from scripts.runs.starts import unprepared
from scripts.runs.workers import COMMAND_BEGAN

RTE = ["experiment=glue/rte", "method=lora", "scale=tiny"]


def cells_of(tmp_path: Path, *runs: str) -> list[Cell]:
    """Return LoRA's cells of Table 4 on some tasks, for two seeds."""
    table = load_table("table4")
    chosen = {run: table.runs[run] for run in runs}
    rows = {"lora": table.row("lora").overrides}
    extra = [f"paths.outputs={tmp_path}"]
    return list_cells("table4", chosen, rows, scale="tiny", seeds=[1, 2], extra=extra)


def test_a_start_outside_of_the_table_becomes_a_job_of_its_own(tmp_path: Path) -> None:
    todo = cells_of(tmp_path, "rte")
    found = with_starts(todo)
    first = found[: len(found) - len(todo)]
    mnli = cells_of(tmp_path, "mnli")
    assert [item.signature for item in first] == [item.signature for item in mnli]
    assert first[1].label == "lora on glue/mnli, seed 2"
    for cell in first:  # its own overrides compose the same run
        overrides = [*cell.run.config.overrides, f"seed={cell.seed}"]
        assert Run.compose(overrides).folder == cell.run.folder


def test_a_start_that_is_in_the_table_is_not_added(tmp_path: Path) -> None:
    todo = cells_of(tmp_path, "mnli", "rte")
    assert with_starts(todo) == todo


def test_a_start_that_is_a_folder_or_none_is_no_job(tmp_path: Path) -> None:
    assert Run.compose(RTE).start_run is None
    (tmp_path / "record.json").write_text('{"signature": "x"}')
    assert Run.compose([*RTE, f"init_from={tmp_path}"]).start_run is None


@pytest.fixture
def failed(tmp_path: Path) -> Any:
    """Return the configuration of a run that has just failed."""
    run = Run.compose([*RTE, f"paths.outputs={tmp_path}"])
    folder = run.folder
    folder.mkdir()
    record = {"status": "failed", "error": {"message": "no memory"}}
    (folder / "record.json").write_text(json.dumps(record))
    return run


def test_a_start_that_failed_in_this_command_is_not_trained_again(
    failed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(execution, "execute", runs.append)
    monkeypatch.setenv(COMMAND_BEGAN, repr(time.time() - 60))
    with pytest.raises(RuntimeError, match="the run that this one starts from failed: no memory"):
        execution._ensure(failed, "")
    assert not runs
    monkeypatch.setenv(COMMAND_BEGAN, repr(time.time() + 60))  # the failure is an earlier one's
    execution._ensure(failed, "")
    monkeypatch.delenv(COMMAND_BEGAN)
    execution._ensure(failed, "")
    assert runs == [failed, failed]


def test_models_to_pre_train_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = f"paths.outputs={tmp_path}"
    runs = [Run.compose([*RTE, outputs, f"method={method}"]) for method in ("lora", "full")]
    runs.append(Run.compose([*RTE, outputs, "scale=small"]))
    assert unprepared(runs) == ["tiny_roberta"]
    monkeypatch.setattr(Run, "status", lambda run: Status("done"))
    assert unprepared(runs) == []
