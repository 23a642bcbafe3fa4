"""Write the view of a sweep: data, page and picture, from the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from delta_lora.writing import make_folder, write_text
from scripts.reporting.figures import try_to_draw
from scripts.reporting.results import Entry, accept, collect
from scripts.runs.batch import HELD
from scripts.runs.cells import Cell
from scripts.runs.folder import is_held
from scripts.runs.jobs import Outcome
from scripts.sweeping.page import LEFT, to_csv, to_markdown, to_pivot
from scripts.sweeping.pictures import draw
from scripts.sweeping.spec import Refused


def collect_runs(
    cells: Sequence[Cell], failures: Mapping[str, Outcome], refused: Refused
) -> list[Entry]:
    """Find the record of every cell, or why there is none.

    Args:
        cells: of the sweep.
        failures: by name of the run how those ended that failed, or were not run, just now.
        refused: rows that were not run, and why.

    Returns:
        The entries; a run of another process is ``held``, one of `refused` is ``refused``.
    """
    entries = []
    for entry in collect(cells, failures=failures):
        place = (entry.cell.row, entry.cell.on)
        was_held = entry.reason.startswith(HELD)
        if entry.record is None and (was_held or is_held(entry.cell.run.folder)):
            entry = replace(entry, state="held", reason=LEFT)
        elif entry.record is None and place in refused:
            entry = replace(entry, state="refused", reason=refused[place])
        entries.append(entry)
    return entries


def keep(cells: Sequence[Cell], folder: Path) -> None:
    """Copy the records of finished runs to ``folder/<name>.json``; those that are there stay.

    Raises:
        ValueError: a record comes from a tree with uncommitted changes.
    """
    known = {c.signature: c for c in cells if not (folder / f"{c.signature}.json").exists()}
    accept(collect(list(known.values())), folder)


def write(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``folder/sweep.{json,csv,md,svg,png}`` and ``folder/pivot.csv``; return the files.

    Args:
        content: from `scripts.sweeping.content.build`.
        folder: created if missing.
    """
    make_folder(folder)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return [
        write_text(folder / "sweep.json", text),
        write_text(folder / "sweep.csv", to_csv(content)),
        write_text(folder / "pivot.csv", to_pivot(content)),
        write_text(folder / "sweep.md", to_markdown(content)),
        *try_to_draw(draw, content, folder, "sweep"),
    ]
