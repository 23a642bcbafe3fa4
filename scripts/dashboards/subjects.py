"""What a dashboard is of: a table or a sweep, its runs by task, and the keys that they log."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.reporting.spec import TableSpec, load_table, table_names
from scripts.runs.cells import Cell
from scripts.runs.mirroring import group_of
from scripts.sweeping.spec import SweepSpec, load_sweep, sweep_names

#: what tells the rows of a table apart, by its title: keys of a run's configuration.
SETTINGS = {"method": "choices.method", "λ": "method.update_ratio", "K": "method.start_step"}


@dataclass(frozen=True)
class Part:
    """The runs of a table or sweep that were trained on one task.

    Attributes:
        title: what it is called: ``table4 cola``.
        groups: of its runs, as Weights & Biases has them.
        scores: label to the key of the summary, of what is shown.
        validation: label to the key of the curve, of what epochs are compared by.
        selection: key of the summary that settings are chosen by.
        settings: label to the key of the configuration, of what differs between its runs.
    """

    title: str
    groups: tuple[str, ...]
    scores: Mapping[str, str]
    validation: Mapping[str, str]
    selection: str
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Subject:
    """A table or a sweep.

    Attributes:
        name: of its configuration.
        title: what it shows.
        scale: of its runs.
        is_sweep: whether it is a sweep.
        parts: by task.
    """

    name: str
    title: str
    scale: str
    is_sweep: bool
    parts: tuple[Part, ...]

    @property
    def folder(self) -> Path:
        """Folder of its files, below that of all results."""
        scale = Path(self.scale)
        return scale / "sweeps" / self.name if self.is_sweep else scale

    @property
    def stem(self) -> str:
        """Name of its files without their endings."""
        return "sweep" if self.is_sweep else self.name

    @property
    def command(self) -> str:
        """What makes its results."""
        what = f"sweep SWEEP={self.name}" if self.is_sweep else f"reproduce-{self.name}"
        return f"make {what} SCALE={self.scale}"


def subject_names() -> list[str]:
    """Return all tables, figures and sweeps that have a configuration."""
    return [*table_names(), *sweep_names()]


def load_subject(name: str, scale: str) -> Subject:
    """Return a table or a sweep.

    Args:
        name: of its configuration.
        scale: tiny, small or paper.

    Raises:
        ValueError: its configuration is inconsistent.
    """
    if name in sweep_names():
        return of_sweep(load_sweep(name, scale), scale)
    return of_table(load_table(name), scale)


def of_table(spec: TableSpec, scale: str) -> Subject:
    """Return a table as a dashboard shows it."""
    cells = spec.cells(scale=scale, seeds=(1,))
    parts = []
    for on in spec.runs:
        columns = [c for c in (*spec.columns, *spec.side_columns) if c.run == on and c.metric]
        scores = {column.label: f"test/{column.metric}" for column in columns}
        title = spec.name if len(spec.runs) == 1 else f"{spec.name} {on}"
        parts.append(_part(title, [c for c in cells if c.on == on], scores, SETTINGS))
    return Subject(spec.name, spec.title, scale, is_sweep=False, parts=tuple(parts))


def of_sweep(spec: SweepSpec, scale: str) -> Subject:
    """Return a sweep as a dashboard shows it."""
    cells, _ = spec.cells(scale=scale, seeds=(1,))
    settings = {"method": "choices.method", **{axis.label: axis.key for axis in spec.axes}}
    parts = []
    for experiment in spec.experiments:
        own = [cell for cell in cells if cell.on == experiment.name]
        known = {m.name: m.label for m in _task(own[0]).metrics}
        first = experiment.metric or next(iter(known))
        names = [first, *(name for name in known if name != first)]
        scores = {known[name]: f"test/{name}" for name in names}
        several = len(spec.experiments) > 1
        title = f"{spec.name} {experiment.name}" if several else spec.name
        parts.append(_part(title, own, scores, settings))
    return Subject(spec.name, spec.title, scale, is_sweep=True, parts=tuple(parts))


def _part(
    title: str, cells: Sequence[Cell], scores: Mapping[str, str], settings: Mapping[str, str]
) -> Part:
    task = _task(cells[0])
    chosen = task.selection_metric
    curves = {}
    if chosen is not None:  # else only the loss is known after every epoch
        found = {label: key.removeprefix("test/") for label, key in scores.items()}
        curves = {k: f"validation/{name}" for k, name in found.items() if "/" not in name}
    higher = {metric.name: metric.higher_is_better for metric in task.metrics}
    selection = "loss.min" if chosen is None else f"{chosen}.{'max' if higher[chosen] else 'min'}"
    return Part(
        title=title,
        groups=tuple(sorted({group_of(cell.run) for cell in cells})),
        scores=scores,
        validation=curves,
        selection=f"validation/{selection}",
        settings=settings,
    )


def _task(cell: Cell) -> Any:
    from hydra.utils import instantiate

    return instantiate(cell.run.config.task)


# ---------------------------------------------------------------------- what a run is part of


def membership(tasks: Collection[str], scale: str) -> dict[str, list[str]]:
    """Return which tables and sweeps the groups of runs are part of.

    A run may be part of several: they share it. What a command with other settings than those of
    the files made is part of none here; such a run knows itself what it was made for.

    Args:
        tasks: choices of the group ``task``, such as ``glue/cola``; runs of others are left out.
        scale: of the runs.

    Returns:
        Title of a group to names of tables and sweeps, in the order of `subject_names`.
    """
    found: dict[str, list[str]] = {}
    for name, cells in _cells_on(tasks, scale):
        for group in dict.fromkeys(group_of(cell.run) for cell in cells):
            found.setdefault(group, []).append(name)
    return found


def _cells_on(tasks: Collection[str], scale: str) -> Iterator[tuple[str, list[Cell]]]:
    for name in table_names():
        table = load_table(name)
        runs = {on: overrides for on, overrides in table.runs.items() if _is_on(overrides, tasks)}
        if runs:
            yield name, replace(table, runs=runs).cells(scale=scale, seeds=(1,))
    for name in sweep_names():
        sweep = load_sweep(name, scale)
        chosen = tuple(e for e in sweep.experiments if _is_on(e.overrides, tasks))
        if chosen:
            yield name, replace(sweep, experiments=chosen).cells(scale=scale, seeds=(1,))[0]


def _is_on(overrides: Sequence[str], tasks: Collection[str]) -> bool:
    keys = [override.partition("=") for override in overrides]
    return any(key in ("experiment", "task") and value in tasks for key, _, value in keys)
