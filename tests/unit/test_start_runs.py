"""Runs that others start from: found before the work, made once, not again where they failed."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.reporting.plan import list_cells
from scripts.reporting.spec import load_table
from scripts.runs import cell
from scripts.runs.batch import with_starts
from scripts.runs.plan import Cell
from scripts.runs.workers import COMMAND_BEGAN

RTE = ["task=glue/rte", "recipe=glue/rte", "model=roberta_base", "method=lora", "scale=tiny"]


def cells_of(tmp_path: Path, *runs: str) -> list[Cell]:
    """Return LoRA's cells of Table 4 on some tasks, for two seeds."""
    table = load_table("table4")
    rows = tuple(row for row in table.rows if row.name == "lora")
    spec = dataclasses.replace(table, rows=rows, runs={run: table.runs[run] for run in runs})
    extra = [f"paths.outputs={tmp_path}"]
    return list_cells(spec, scale="tiny", seeds=[1, 2], extra=extra, cell=cell)


def test_a_start_outside_of_the_table_becomes_a_job_of_its_own(tmp_path: Path) -> None:
    todo = cells_of(tmp_path, "rte")
    found = with_starts(todo, cell)
    starts = found[: len(found) - len(todo)]
    mnli = cells_of(tmp_path, "mnli")
    assert [item.signature for item in starts] == [item.signature for item in mnli]
    assert starts[1].label == "lora on glue/mnli, seed 2"
    for start in starts:  # what a worker gets composes the same run
        assert cell.run_dir(cell.compose(list(start.overrides))) == start.folder


def test_a_start_that_is_in_the_table_is_not_added(tmp_path: Path) -> None:
    todo = cells_of(tmp_path, "mnli", "rte")
    assert with_starts(todo, cell) == todo


def test_a_start_that_is_a_folder_or_none_is_no_job(tmp_path: Path) -> None:
    assert cell.starts_from(cell.compose(RTE)) is None
    (tmp_path / "record.json").write_text("{}")
    assert cell.starts_from(cell.compose([*RTE, f"init_from={tmp_path}"])) is None


@pytest.fixture
def failed(tmp_path: Path) -> Any:
    """Return the configuration of a run that has just failed."""
    cfg = cell.compose([*RTE, f"paths.outputs={tmp_path}"])
    folder = cell.run_dir(cfg)
    folder.mkdir()
    record = {"status": "failed", "error": {"message": "no memory"}}
    (folder / "record.json").write_text(json.dumps(record))
    return cfg


def test_a_start_that_failed_in_this_command_is_not_trained_again(
    failed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(cell, "run", runs.append)
    monkeypatch.setenv(COMMAND_BEGAN, repr(time.time() - 60))
    with pytest.raises(RuntimeError, match="the run that this one starts from failed: no memory"):
        cell._ensure(failed, "")
    assert not runs
    monkeypatch.setenv(COMMAND_BEGAN, repr(time.time() + 60))  # the failure is an earlier one's
    cell._ensure(failed, "")
    monkeypatch.delenv(COMMAND_BEGAN)
    cell._ensure(failed, "")
    assert runs == [failed, failed]


def test_models_to_pre_train_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = f"paths.outputs={tmp_path}"
    cfgs = [cell.compose([*RTE, outputs, f"method={method}"]) for method in ("lora", "full")]
    cfgs.append(cell.compose([*RTE, outputs, "scale=small"]))
    assert cell.unprepared(cfgs) == ["tiny_roberta"]
    monkeypatch.setattr(cell, "status", lambda cfg: cell.CellStatus("done"))
    assert cell.unprepared(cfgs) == []
