"""Many runs: what is done, what is to do, what that costs, and their doing where a launcher says.

The commands `reproduce` and `audit` plan a `Batch` of the cells that they need, show it and run it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from delta_lora.writing import make_folder, reason_of
from scripts.runs import checks, starts
from scripts.runs.allotment import Allotment, largest_need, parse_workers
from scripts.runs.cells import Cell
from scripts.runs.durations import Durations, format_seconds
from scripts.runs.folder import LockedError
from scripts.runs.jobs import Job, Outcome
from scripts.runs.launchers import Here, Launcher
from scripts.runs.run import Status
from scripts.runs.space import check_disk_space

if TYPE_CHECKING:
    from scripts.runs.elsewhere import Elsewhere
    from scripts.runs.workers import Pool

    #: what does jobs and yields their outcomes.
    Workers = Pool | Elsewhere

#: what a worker does with a run.
EXECUTE = "scripts.runs.execution:execute"
#: the same, but a run that another process works on is left to it.
ATTEMPT = "scripts.runs.execution:attempt"
#: how the error of a run begins that was left to another process.
HELD = f"{LockedError.__name__}:"
#: what a worker does with runs whose models are to be pre-trained.
PREPARE = "scripts.runs.execution:prepare"


@dataclass(frozen=True)
class Batch:
    """The runs that a command needs, from `plan`.

    Attributes:
        cells: one cell of each run.
        states: state of each run, by name.
        todo: the runs to make, those that others start from first.
        num_starts: how many of them are only made to start others from them.
        scale: of all runs.
        extra: overrides of every run.
        launcher: where the runs work.
        allotment: the workers there.
        durations: of earlier runs.
    """

    cells: list[Cell]
    states: dict[str, Status]
    todo: list[Cell]
    num_starts: int
    scale: str
    extra: Sequence[str]
    launcher: Here | Launcher
    allotment: Allotment
    durations: Durations

    @classmethod
    def plan(
        cls,
        cells: Sequence[Cell],
        *,
        scale: str,
        extra: Sequence[str],
        workers: str,
        launcher: Here | Launcher,
    ) -> Batch:
        """Look which runs of `cells` are done and which are to do.

        Args:
            cells: those of all tables, equal runs as often as they are needed.
            scale: of all of them.
            extra: overrides of every run.
            workers: ``auto`` or a number.
            launcher: where the runs shall work.
        """
        parse_workers(workers)
        distinct = list({cell.signature: cell for cell in cells}.values())
        states = {cell.signature: cell.run.status() for cell in distinct}
        needed_by: dict[str, list[str]] = {}
        for cell in cells:
            needed_by.setdefault(cell.signature, []).append(cell.table)
        missing = [
            replace(cell, run=cell.run.as_part_of(filter(None, needed_by[cell.signature])))
            for cell in distinct
            if states[cell.signature].state != "done"
        ]
        todo = with_starts(missing)
        durations = Durations()
        if todo:
            durations.read([cell.run.outputs for cell in distinct])
        return cls(
            cells=distinct,
            states=states,
            todo=todo,
            num_starts=len(todo) - len(missing),
            scale=scale,
            extra=extra,
            launcher=launcher,
            allotment=launcher.allot(workers, scale, extra, len(todo), lambda: largest_need(todo)),
            durations=durations,
        )

    @property
    def refusal(self) -> str | None:
        """Why nothing of it can run where its launcher works, or None."""
        return self.launcher.refusal(self.scale, self.extra)

    @property
    def num_workers(self) -> int:
        """Runs that work at the same time; 1 where a cluster decides that."""
        return len(self.allotment.environments)

    @property
    def most_at_once(self) -> int:
        """Runs that may work at the same time."""
        return len(self.todo) if self.allotment.is_open else self.num_workers

    @property
    def logs(self) -> Path:
        """Folder of what the workers print."""
        return self.cells[0].run.outputs / "logs"

    def damaged(self) -> list[str]:
        """Return what is damaged, and what to do, of the runs whose record cannot be read."""
        found = (state.reason for state in self.states.values() if state.state == "damaged")
        return list(dict.fromkeys(found))

    def summary(self) -> list[str]:
        """Return in words what is to do, how long it takes and where."""
        if not self.todo:
            return [f"all {len(self.cells)} runs are done; nothing to run"]
        lines = []
        if self.num_starts:
            lines.append(f"runs that are only made to start others from them: {self.num_starts}")
        lines.append(expected_time(self.todo, self.num_workers, self.durations))
        refusal = self.refusal
        lines.append(self.allotment.text if refusal is None else f"would be refused: {refusal}")
        return lines

    def check(self, results: Path) -> None:
        """Check settings, folders, disk, and what is loaded or downloaded, before any run starts.

        Args:
            results: folder that tables are written to.

        Raises:
            ValueError: a row's settings are not allowed, or its device, weights or data cannot be
                had; the row is named.
            OSError: the results folder cannot be written, or the disk is too small.
        """
        self.check_place(results)
        for cell, reason in self.refused():
            raise ValueError(f"row {cell.row} on {cell.on}: {reason}")
        check_disk_space(self.todo, self.most_at_once)

    def check_place(self, results: Path) -> None:
        """Check what holds for all runs alike: where they work, and where results are written.

        Raises:
            ValueError: the runs are made for a device that this machine has not, or the cluster of
                the launcher cannot be used.
            OSError: the results folder cannot be written.
        """
        if self.refusal is not None:
            raise ValueError(self.refusal)
        try:
            make_folder(results)
            with tempfile.TemporaryFile(dir=results) as stream:
                stream.write(b"a full disk takes names, and no content")
        except OSError as error:
            reason = f"cannot write to the results folder {results}: {reason_of(results, error)}"
            raise OSError(reason) from error
        self.launcher.check(self.scale, self.extra)

    def impossible(self) -> Iterator[tuple[Cell, str]]:
        """Check rows as `refused` does, but for the device and what only the network can tell."""
        checked, seen = set(), set[str]()
        for cell in self.todo:
            if (cell.row, cell.on) in checked:
                continue
            checked.add((cell.row, cell.on))
            try:
                checks.check_settings(cell.run)
                checks.check_local_sources(cell.run, seen)
            except ValueError as error:
                yield cell, str(error)

    def refused(self) -> Iterator[tuple[Cell, str]]:
        """Check rows one after the other; yield a cell of each that cannot run, and why."""
        checked, sources = set(), set[str]()
        check = checks.check if self.launcher.is_here else checks.check_settings
        for cell in self.todo:
            if (cell.row, cell.on) not in checked:
                checked.add((cell.row, cell.on))
                try:
                    check(cell.run)
                    checks.check_sources(cell.run, sources)
                except ValueError as error:
                    yield cell, str(error)

    def run(self, name: str, *, waits: bool = True) -> dict[str, Outcome]:
        """Make what is to do, models first, and show progress.

        Args:
            name: start of the names of the workers' logs.
            waits: wait for a process of another command that works on a run; False: leave it to it,
                which is an outcome with a `LockedError`.

        Returns:
            Name of the run to outcome, of those that failed or were not run.

        Raises:
            PreparationError: a model could not be pre-trained; no run was begun.
        """
        if not self.todo:
            return {}
        with self.pool(name) as pool:
            prepare_models(pool, self.todo)
            return run_cells(pool, self.todo, self.durations, EXECUTE if waits else ATTEMPT)

    def prepare(self, name: str) -> None:
        """Pre-train the models that any of the cells starts from, and do nothing else.

        Raises:
            PreparationError: a model could not be pre-trained.
        """
        with self.pool(name) as pool:
            prepare_models(pool, self.cells)

    def pool(self, name: str) -> Workers:
        """Return the workers of the batch, for a ``with`` block."""
        print(f"output of the workers: {self.logs}", flush=True)
        return self.launcher.pool(self.allotment, self.logs, name)


class PreparationError(RuntimeError):
    """A model that runs start from could not be pre-trained."""


def with_starts(todo: Sequence[Cell]) -> list[Cell]:
    """Return `todo` and, before them, the runs that they start from and that are still to be made.

    So a start runs once, as a job of its own.
    """
    known = {cell.signature for cell in todo}
    found: dict[str, Cell] = {}
    for cell in todo:
        before = cell.run.start_run
        if before is None or before.name in known | found.keys():
            continue
        if not before.is_done:
            found[before.name] = Cell(cell.row, before.choices.task, before)
    return [*found.values(), *todo]


def expected_time(todo: Sequence[Cell], num_workers: int, durations: Durations) -> str:
    """Return one line about the time that the open runs will take."""
    known = [durations.expect(cell.run) for cell in todo]
    line = f"to run: {len(todo)}; expected time: "
    if all(seconds is None for seconds in known):
        return f"{line}unknown from earlier runs (none of this kind on this machine)"
    total = sum(seconds for seconds in known if seconds is not None)
    if unknown := sum(seconds is None for seconds in known):
        line = f"{line}unknown for {unknown} of them; for the others "
    bases = [durations.basis(cell.run) for cell in todo]
    told = [basis for basis, seconds in zip(bases, known, strict=True) if seconds is not None]
    parts = [f"{told.count(basis)} from {basis}" for basis in dict.fromkeys(told)]
    return (
        f"{line}about {format_seconds(total / num_workers)} with {num_workers} worker(s), from "
        f"earlier runs ({', '.join(parts)})"
    )


def run_cells(
    pool: Workers,
    todo: Sequence[Cell],
    durations: Durations,
    function: str,
    more: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
) -> dict[str, Outcome]:
    """Run cells and show progress; return how those ended that failed or were not run.

    A cell that starts from another one of `todo` runs behind it, and not where that one fails.

    Args:
        pool: its workers run them.
        todo: the cells, from `with_starts`.
        durations: of earlier runs; gets those of these.
        function: what a worker does with a run: `EXECUTE` or `ATTEMPT`.
        more: further arguments of the function, by name of the run.

    Returns:
        Name of the run to outcome.
    """
    by_key = {cell.signature: cell for cell in todo}
    jobs = []
    for cell in todo:
        before = cell.run.start_run
        after = None if before is None else before.name
        jobs.append(Job(function, (cell.run, *more.get(cell.signature, ())), cell.signature, after))
    pending = dict(by_key)

    def remaining() -> str:
        running = {job.key: seconds for job, seconds in pool.running}
        return time_left(list(pending.values()), running, durations)

    def ended(outcome: Outcome) -> None:
        cell = pending.pop(outcome.job.key)
        if outcome.error is None and cell.run.completed() is not None:  # not pruned
            durations.add(cell.run.group, cell.run.config, outcome.seconds)

    labels = {name: cell.label for name, cell in by_key.items()}
    return run_jobs(pool, jobs, labels, ended=ended, remaining=remaining)


def time_left(pending: Sequence[Cell], running: Mapping[str, float], durations: Durations) -> str:
    """Return in words how long the open cells take, as far as other runs tell.

    Args:
        pending: those that have not ended.
        running: name to seconds so far, of those that a worker has.
        durations: of runs that have ended.
    """
    expected = {cell.signature: durations.expect(cell.run) for cell in pending}
    known = {name: seconds for name, seconds in expected.items() if seconds is not None}
    if expected and not known:
        return "unknown"
    rest = sum(max(seconds - running.get(name, 0.0), 0.0) for name, seconds in known.items())
    text = format_seconds(rest / max(1, len(running)))
    unknown = len(expected) - len(known)
    return f"{text} and {unknown} of unknown length" if unknown else text


def run_jobs(
    pool: Workers,
    jobs: Sequence[Job],
    labels: Mapping[str, str],
    *,
    ended: Callable[[Outcome], None] = lambda _: None,
    remaining: Callable[[], str | None] = lambda: None,
) -> dict[str, Outcome]:
    """Do jobs and show progress; return how those ended that failed or were not run.

    Args:
        pool: its workers do them.
        jobs: what is to do.
        labels: how messages call each job, by its key.
        ended: called with every outcome.
        remaining: returns the time that is left, in words; None shows none.

    Returns:
        Key of the job to outcome.
    """
    failures: dict[str, Outcome] = {}
    with Progress(len(jobs)) as progress:
        for outcome in pool.run(jobs):
            if outcome is None:
                progress.tick([labels[job.key] for job, _ in pool.running], remaining())
                continue
            ended(outcome)
            if outcome.error is not None:
                failures[outcome.job.key] = outcome
            progress.step(labels[outcome.job.key], outcome, remaining())
    return failures


def prepare_models(pool: Workers, cells: Sequence[Cell]) -> None:
    """Pre-train the models that the cells start from.

    Raises:
        PreparationError: it failed.
    """
    needed = {
        cell.run.pretraining.name: cell.run for cell in cells if cell.run.pretraining is not None
    }
    names = starts.unprepared(needed.values())
    if not names:
        return
    print(f"pre-training {', '.join(names)} (once) ...", flush=True)
    job = Job(PREPARE, (list(needed.values()),), "prepare")
    for outcome in pool.run([job]):
        if outcome is not None and outcome.error is not None:
            raise PreparationError(f"preparing the models failed: {outcome.error}")


class Progress:
    """A bar on a terminal, one line per ended job elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.bar: Any = None
        if sys.stderr.isatty():
            form = "{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
            self.bar = tqdm(total=total, bar_format=form, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:  # leave the terminal clean
            self.bar.close()

    def tick(self, running: Sequence[str], left: str | None = None) -> None:
        """Show that time passes on the jobs with the labels `running`."""
        if self.bar is not None:
            now = "; ".join(running)
            self.bar.set_postfix_str(now if left is None else f"left {left}: {now}")

    def step(self, label: str, outcome: Outcome, left: str | None = None) -> None:
        """Show that a job has ended; `left` is the time that the others will take."""
        self.count += 1
        how = f"done ({outcome.seconds:.1f} s)"
        if outcome.error is not None:
            how = f"FAILED: {outcome.error} ({outcome.seconds:.1f} s)"
            if outcome.error.startswith(HELD):
                how = f"left: {outcome.error.removeprefix(HELD).strip()}"
        if not outcome.was_run:
            how = f"not run: {outcome.error}"
        line = f"[{self.count}/{self.total}] {label}: {how}"
        if self.bar is None:
            print(line if left is None else f"{line}, left {left}", flush=True)
            return
        self.bar.update()
        self.bar.set_postfix_str("" if left is None else f"left {left}")
        if outcome.error is not None:
            self.bar.write(line)
