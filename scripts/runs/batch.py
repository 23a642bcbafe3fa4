"""Run many cells: in which order, how long it will take, and progress while it does."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.runs.jobs import Job, Outcome
from scripts.runs.plan import Cell, CellModule, Durations, format_seconds
from scripts.runs.workers import Pool


@contextmanager
def stop_in_order() -> Iterator[None]:
    """Let SIGTERM stop the block as Ctrl-C does, so that workers write their checkpoints."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def check_before_work(todo: Sequence[Cell], results: Path, cell: CellModule) -> None:
    """Check settings, folders, and what is loaded or downloaded, once, before any run starts.

    Raises:
        ValueError: a row's settings are not allowed, or its weights or data cannot be had; the row
            is named.
        OSError: the results folder cannot be written.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=results).close()
    except OSError as error:
        raise OSError(f"cannot write to the results folder {results}: {error.strerror}") from error
    checked, sources = set(), set[str]()
    for item in todo:
        if (item.row, item.run) not in checked:
            checked.add((item.row, item.run))
            try:
                cell.check(item.config)
                cell.check_sources(item.config, sources)
            except ValueError as error:
                raise ValueError(f"row {item.row} on {item.run}: {error}") from error


def with_starts(todo: Sequence[Cell], cell: CellModule) -> list[Cell]:
    """Return `todo` and, before them, the runs that they start from and that are still to be made.

    So a start runs once, as a job of its own.
    """
    known = {item.signature for item in todo}
    starts: dict[str, Cell] = {}
    for item in todo:
        before = cell.starts_from(item.config)
        if before is None:
            continue
        folder = cell.run_dir(before)
        if folder.name not in known | starts.keys() and cell.status(before).state != "done":
            overrides, run = tuple(before["overrides"]), before["choices"]["task"]
            starts[folder.name] = Cell(item.row, run, item.seed, overrides, before, folder)
    return [*starts.values(), *todo]


def expected_time(
    todo: Sequence[Cell], num_workers: int, durations: Durations, cell: CellModule
) -> str:
    """Return one line about the time that the open runs will take."""
    known, bases = [], []
    for item in todo:
        group = cell.group(item.config)
        known.append(durations.expect(group, item.config))
        bases.append(durations.basis(group, item.config))
    line = f"to run: {len(todo)}; expected time: "
    if all(seconds is None for seconds in known):
        return f"{line}unknown from earlier runs (none of this kind on this machine)"
    total = sum(seconds for seconds in known if seconds is not None)
    if unknown := sum(seconds is None for seconds in known):
        line = f"{line}unknown for {unknown} of them; for the others "
    told = [basis for basis, seconds in zip(bases, known, strict=True) if seconds is not None]
    parts = [f"{told.count(basis)} from {basis}" for basis in dict.fromkeys(told)]
    return (
        f"{line}about {format_seconds(total / num_workers)} with {num_workers} worker(s), from "
        f"earlier runs ({', '.join(parts)})"
    )


def run_cells(
    pool: Pool, todo: Sequence[Cell], durations: Durations, cell: CellModule
) -> dict[str, Outcome]:
    """Run cells and show progress; return how those ended that failed or were not run.

    A cell that starts from another one of `todo` runs behind it, and not where that one fails.

    Args:
        pool: its workers run them.
        todo: the cells, from `with_starts`.
        durations: of earlier runs; gets those of these.
        cell: plans and runs cells.

    Returns:
        Signature to outcome.
    """
    by_key = {item.signature: item for item in todo}
    groups = {name: cell.group(item.config) for name, item in by_key.items()}
    jobs = []
    for item in todo:
        before = cell.starts_from(item.config)
        after = None if before is None else cell.run_dir(before).name
        jobs.append(Job("run", (item.overrides,), item.signature, after))
    pending = dict(by_key)
    failures: dict[str, Outcome] = {}

    def remaining() -> str:
        running = {job.key: seconds for job, seconds in pool.running}
        rest = 0.0
        for name, item in pending.items():
            expected = durations.expect(groups[name], item.config)
            if expected is None:
                return "unknown"
            rest += max(expected - running.get(name, 0.0), 0.0)
        return format_seconds(rest / max(1, len(running)))

    with Progress(len(jobs)) as progress:
        for outcome in pool.run(jobs):
            if outcome is None:
                progress.tick([by_key[job.key].label for job, _ in pool.running], remaining())
                continue
            item = pending.pop(outcome.job.key)
            if outcome.error is None:
                durations.add(groups[outcome.job.key], item.config, outcome.seconds)
            else:
                failures[outcome.job.key] = outcome
            progress.step(item.label, outcome, remaining())
    return failures


def prepare_models(pool: Pool, cells: Sequence[Cell], cell: CellModule) -> str | None:
    """Pre-train the models that the cells start from; return why it failed, or None."""
    # One cell of each model: the worker composes what it is given, which takes a while.
    firsts = {str(item.config.get("model")): item for item in cells}
    names = cell.unprepared([item.config for item in firsts.values()])
    if not names:
        return None
    print(f"pre-training {', '.join(names)} (once) ...", flush=True)
    job = Job("prepare", tuple(item.overrides for item in firsts.values()), "prepare")
    return next(outcome.error for outcome in pool.run([job]) if outcome is not None)


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
