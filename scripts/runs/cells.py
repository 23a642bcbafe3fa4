"""Cells: the rows of a table or an audit, on what they are trained on, with every seed.

Cells that mean the same are one run, and run once. Nothing here imports torch but to name runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.runs import conflicts
from scripts.runs.run import Run

#: keys that a table sets itself, with what to use instead.
RESERVED = {
    "seed": "--seeds (SEEDS= with make)",
    "scale": "--scale (SCALE= with make)",
    "method": "the rows of configs/table",
    "experiment": "what the file in configs says is trained on",
    "task": "what the file in configs says is trained on",
}


@dataclass(frozen=True)
class Cell:
    """One run that a table needs.

    Attributes:
        row: name of the table's row.
        on: name of what the row is trained on (a key of the table's ``runs``).
        run: the run.
        table: name of the table, sweep or audit that needs it; empty where none does.
    """

    row: str
    on: str
    run: Run
    table: str = ""

    @property
    def signature(self) -> str:
        """Name of the run."""
        return self.run.name

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.run.seed

    @property
    def label(self) -> str:
        """How messages call the cell."""
        return f"{self.row} on {self.on}, seed {self.seed}"


def list_cells(
    name: str,
    runs: Mapping[str, Sequence[str]],
    rows: Mapping[str, Sequence[str]],
    *,
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str] = (),
) -> list[Cell]:
    """Return all cells, all rows of the first seed first.

    Args:
        name: of the table, sweep or audit.
        runs: what every row is trained on: name to overrides.
        rows: name to overrides.
        scale: tiny, small or paper.
        seeds: seeds of every row.
        extra: overrides of every run, applied last.

    Raises:
        ValueError: an override does not compose, or one of `extra` would undo what a row sets; the
            row is named.
    """
    _check_extra(name, runs, rows, scale=scale, extra=extra)
    composed: dict[tuple[str, str], Run] = {}
    cells = []
    for seed in seeds:
        for on, base in runs.items():
            for row, own in rows.items():
                try:
                    if (on, row) not in composed:
                        overrides = (*base, *own, f"scale={scale}", f"seed={seed}", *extra)
                        composed[on, row] = Run.compose(overrides)
                    run = composed[on, row].with_seed(seed)
                    assert run.name  # names a folder that is missing, before anything is planned
                except ValueError as error:
                    raise ValueError(f"{name}, row {row}: {error}") from error
                cells.append(Cell(row, on, run, name))
    return cells


def _check_extra(
    name: str,
    runs: Mapping[str, Sequence[str]],
    rows: Mapping[str, Sequence[str]],
    *,
    scale: str,
    extra: Sequence[str],
) -> None:
    """Refuse overrides of all runs that would undo what a row is; arguments as `list_cells`."""
    free = conflicts.without_methods(extra)
    first = next(iter(runs.values()), ())
    try:
        conflicts.check_extra(extra, (rows, runs))
        conflicts.check_methods(
            extra, rows, lambda own: Run.compose((*first, *own, f"scale={scale}", *free)).config
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of a list such as ``1,2,3``.

    Raises:
        ValueError: an entry is no integer of 0 or more, or is there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"seeds={text!r}: use integers of 0 or more with commas, such as 1,2,3")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={text!r}: a seed is named twice")
    return seeds


def parse_overrides(text: str) -> list[str]:
    """Return Hydra overrides given as one string.

    Raises:
        ValueError: the quoting is broken, an entry is no override, or it sets what a table sets.
    """
    try:
        overrides = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot read the overrides {text!r}: {error}") from None
    for override in overrides:
        key, separator, _ = override.partition("=")
        if override.startswith("-") or not (separator or override.startswith("~")):
            raise ValueError(f"{override!r} is no override; write key=value, for example lr=0.1")
        key = key.lstrip("+~")
        if key in RESERVED:
            raise ValueError(f"{override!r}: {key} is set by {RESERVED[key]}")
    return overrides
