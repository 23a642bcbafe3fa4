"""Tables of runs that take no time, built as the commands do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.reporting import results as tables
from scripts.reporting.spec import TableSpec
from scripts.runs.cells import Cell
from tests.unit import fake_runs

SEEDS = (1, 2, 3)


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
