"""What a table still needs: its cells and their state."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.reporting.spec import TableSpec
from scripts.runs.plan import Cell, CellModule, CellStatus


def list_cells(
    spec: TableSpec, *, scale: str, seeds: Sequence[int], extra: Sequence[str], cell: CellModule
) -> list[Cell]:
    """Return the cells of a table, all rows of the first seed first.

    Args:
        spec: the table.
        scale: tiny, small or paper.
        seeds: seeds of every row.
        extra: overrides of every run, applied last.
        cell: `scripts.runs.cell`.

    Raises:
        ValueError: an override does not compose; the row is named.
    """
    cells = []
    composed: dict[tuple[str, str], Any] = {}
    for seed in seeds:
        for run, base in spec.runs.items():
            for row in spec.rows:
                overrides = (*base, *row.overrides, f"scale={scale}", f"seed={seed}", *extra)
                try:
                    if (run, row.name) not in composed:
                        composed[run, row.name] = cell.compose(list(overrides))
                    # Composing takes a quarter of a second; another seed is only another value.
                    config = copy.deepcopy(composed[run, row.name])
                    config["seed"] = seed
                    folder = cell.run_dir(config)
                except ValueError as error:
                    raise ValueError(f"{spec.name}, row {row.name}: {error}") from error
                cells.append(Cell(row.name, run, seed, overrides, config, folder))
    return cells


def describe(spec: TableSpec, cells: Sequence[Cell], states: Mapping[str, CellStatus]) -> list[str]:
    """Return the plan of a table as lines: totals, then every row that is not done.

    Args:
        spec: the table.
        cells: from `list_cells`.
        states: state by signature.
    """
    counts = Counter(states[cell.signature].state for cell in cells)
    order = ("done", "partial", "stale", "failed", "missing")
    totals = ", ".join(f"{counts[state]} {state}" for state in order)
    lines = [f"{spec.name}: {len(cells)} runs: {totals}"]
    for row in spec.rows:
        mine = [cell for cell in cells if cell.row == row.name]
        open_cells = [cell for cell in mine if states[cell.signature].state != "done"]
        if not open_cells:
            continue
        if all(states[cell.signature].state == "missing" for cell in mine):
            lines.append(f"  {row.name}: {len(mine)} missing")
            continue
        lines.append(f"  {row.name}: {len(mine) - len(open_cells)} of {len(mine)} done")
        for cell in open_cells:
            status = states[cell.signature]
            reason = f" ({' '.join(status.reason.split())[:200]})" if status.reason else ""
            lines.append(f"    {cell.run}, seed {cell.seed}: {status.state}{reason}")
    return lines
