"""Reproduce tables: plan, run what is missing, write and print the table.

    python scripts/reproduce.py table1                      scale by the machine
    python scripts/reproduce.py table1 --scale tiny --seeds 1,2,3 --plan
    python scripts/reproduce.py table1 --args "recipe.rank=8"

Every run continues where it was stopped, so the same command goes on after Ctrl-C, a kill or a
failed run, and answers at once where everything is done. Exit code: 0 all runs are done, 1 a run
failed, 2 bad input, 130 stopped.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from scripts.page import write_page
from scripts.plan import (
    Cell,
    CellModule,
    Durations,
    describe,
    format_seconds,
    list_cells,
    parse_overrides,
    parse_seeds,
)
from scripts.scale import CHOICES, count_cuda_devices, resolve_scale
from scripts.table_results import RESULTS, collect
from scripts.table_spec import TableSpec, load_table
from scripts.tables import make
from scripts.workers import Job, Outcome, Pool

#: memory counted for one worker at scale tiny (PyTorch, a tiny model, METEOR's Java).
WORKER_BYTES = 2 * 2**30
TINY_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None, module: str = "scripts.cell") -> int:
    """Run the command.

    Args:
        arguments: the command line; None takes the process's.
        module: module that plans and runs cells; tests give their own.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    cell = importlib.import_module(module)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _reproduce(options, cell, module)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="table1, or 1")
    parser.add_argument("--scale", choices=CHOICES, default="auto")
    parser.add_argument("--seeds", default="1,2,3", help="default: 1,2,3")
    parser.add_argument("--workers", default="auto", help="processes; default: by the machine")
    parser.add_argument(
        "--args", default="", metavar="OVERRIDES", dest="overrides", help="of every run, for Hydra"
    )
    parser.add_argument("--plan", action="store_true", help="show what is missing and stop")
    parser.add_argument(
        "--prepare", action="store_true", help="only pre-train the tiny models that the runs need"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return parser


def _reproduce(options: argparse.Namespace, cell: CellModule, module: str) -> int:
    scale, reason = resolve_scale(options.scale)
    print(f"scale: {scale} ({reason})", flush=True)
    seeds, extra = parse_seeds(options.seeds), parse_overrides(options.overrides)
    specs = [load_table(name) for name in dict.fromkeys(options.tables)]
    plans = {
        spec.name: list_cells(spec, scale=scale, seeds=seeds, extra=extra, cell=cell)
        for spec in specs
    }
    distinct = {item.signature: item for cells in plans.values() for item in cells}
    states = {name: cell.status(item.config) for name, item in distinct.items()}
    todo = [item for name, item in distinct.items() if states[name].state != "done"]
    # A run that starts from another one comes behind it, so that no worker waits for long.
    todo.sort(key=lambda item: item.config.get("init_from") is not None)
    environments = worker_environments(options.workers, scale, max(1, len(todo)))

    for spec in specs:
        print("\n".join(describe(spec, plans[spec.name], states)))
    shared = sum(map(len, plans.values())) - len(distinct)
    if shared:
        print(f"{shared} runs are shared by several rows or tables and run once")
    durations = Durations()
    if todo:
        durations.read([item.folder.parent for item in distinct.values()], cell)
        print(expected_time(todo, len(environments), durations, cell), flush=True)
    else:
        print(f"all {len(distinct)} runs are done; nothing to run")
    if options.plan:
        return 0

    failures: dict[str, str] = {}
    if todo or options.prepare:
        _check_before_work(todo, options.results / scale, cell)
        logs = next(iter(distinct.values())).folder.parent / "logs"
        name = "-".join(plans)
        with Pool(module, environments=environments, logs=logs, name=name) as pool:
            print(f"{len(environments)} worker process(es); their output: {logs}", flush=True)
            everything = list(distinct.values())
            problem = prepare_models(pool, everything if options.prepare else todo)
            if problem is not None:
                print(f"error: preparing the models failed: {problem}", file=sys.stderr)
                return 1
            if options.prepare:
                print("the models that the runs start from are ready")
                return 0
            failures = run_cells(pool, todo, durations, cell)
    return _finish(specs, plans, scale, seeds, extra, cell, failures, options.results)


def worker_environments(workers: str, scale: str, num_cells: int) -> list[dict[str, str]]:
    """Return the environment variables of each worker; their number is the number of workers.

    ``auto`` takes one worker per CPU core at scale tiny (where a run uses one thread), within the
    free memory; else one per CUDA device, and one without CUDA.

    Args:
        workers: a number of 1 or more, or ``auto``.
        scale: scale of the runs.
        num_cells: never more workers than that.

    Raises:
        ValueError: `workers` is neither.
    """
    num_devices = 0 if scale == "tiny" else count_cuda_devices()
    if workers == "auto":
        number = max(1, num_devices)
        if scale == "tiny":
            number = max(1, min(_count_cores(), _free_memory() // WORKER_BYTES))
    elif workers.isdecimal() and int(workers) > 0:
        number = int(workers)
    else:
        raise ValueError(f"workers={workers!r}: use auto or a number of 1 or more")
    number = min(number, num_cells)
    if scale == "tiny":
        # One thread each: the result does not depend on the number of workers.
        return [TINY_ENVIRONMENT for _ in range(number)]
    if num_devices > 1 and number > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(num_devices)]
        return [{"CUDA_VISIBLE_DEVICES": devices[i % num_devices]} for i in range(number)]
    return [{} for _ in range(number)]


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
        return f"{line}unknown (no earlier run at this scale on this machine)"
    total = sum(seconds for seconds in known if seconds is not None)
    parts = [f"{bases.count(basis)} from {basis}" for basis in dict.fromkeys(bases)]
    return (
        f"{line}about {format_seconds(total / num_workers)} with {num_workers} worker(s), from "
        f"earlier runs ({', '.join(parts)})"
    )


def run_cells(
    pool: Pool, todo: Sequence[Cell], durations: Durations, cell: CellModule
) -> dict[str, str]:
    """Run cells and show progress; return signature to reason of those that failed."""
    by_key = {item.signature: item for item in todo}
    groups = {name: cell.group(item.config) for name, item in by_key.items()}
    jobs = [Job("run", (item.overrides,), item.signature) for item in todo]
    pending = dict(by_key)
    failures: dict[str, str] = {}
    progress = _Progress(len(jobs))

    def remaining() -> str:
        running = {job.key: seconds for job, seconds in pool.running}
        rest = 0.0
        for name, item in pending.items():
            expected = durations.expect(groups[name], item.config)
            if expected is None:
                return "unknown"
            rest += max(expected - running.get(name, 0.0), 0.0)
        return format_seconds(rest / max(1, len(running)))

    try:
        for outcome in pool.run(jobs):
            if outcome is None:
                progress.tick(pool.running, by_key, remaining())
                continue
            item = pending.pop(outcome.job.key)
            if outcome.error is None:
                durations.add(groups[outcome.job.key], item.config, outcome.seconds)
            else:
                failures[outcome.job.key] = outcome.error
            progress.step(item, outcome, remaining())
    finally:
        progress.close()
    return failures


class _Progress:
    """A bar on a terminal, one line per run elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.bar: Any = None
        if sys.stderr.isatty():
            form = "{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
            self.bar = tqdm(total=total, bar_format=form, dynamic_ncols=True)

    def tick(
        self, running: Sequence[tuple[Job, float]], cells: Mapping[str, Cell], left: str
    ) -> None:
        """Show that time passes."""
        if self.bar is not None:
            now = "; ".join(cells[job.key].label for job, _ in running)
            self.bar.set_postfix_str(f"left {left}: {now}")

    def step(self, cell: Cell, outcome: Outcome, left: str) -> None:
        """Show that a run has ended."""
        self.count += 1
        how = "done" if outcome.error is None else f"FAILED: {outcome.error}"
        line = f"[{self.count}/{self.total}] {cell.label}: {how} ({outcome.seconds:.1f} s)"
        if self.bar is None:
            print(f"{line}, left {left}", flush=True)
            return
        self.bar.update()
        self.bar.set_postfix_str(f"left {left}")
        if outcome.error is not None:
            self.bar.write(line)

    def close(self) -> None:
        """Leave the terminal clean."""
        if self.bar is not None:
            self.bar.close()


def _check_before_work(todo: Sequence[Cell], results: Path, cell: CellModule) -> None:
    """Check settings and folders once, before any run starts.

    Raises:
        ValueError: a row's settings are not allowed; the row is named.
        OSError: the results folder cannot be written.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=results).close()
    except OSError as error:
        raise OSError(f"cannot write to the results folder {results}: {error.strerror}") from error
    checked = set()
    for item in todo:
        if (item.row, item.run) not in checked:
            checked.add((item.row, item.run))
            try:
                cell.check(item.config)
            except ValueError as error:
                raise ValueError(f"row {item.row} on {item.run}: {error}") from error


def prepare_models(pool: Pool, cells: Sequence[Cell]) -> str | None:
    """Pre-train the models that the cells start from; return why it failed, or None."""
    # One cell of each model: the worker composes what it is given, which takes a while.
    models = {str(item.config.get("model")): item.overrides for item in cells}
    job = Job("prepare", tuple(models.values()), "prepare")
    is_announced = False
    for outcome in pool.run([job]):
        if outcome is not None:
            return outcome.error
        if not is_announced and pool.running[0][1] > 15:
            print("pre-training the tiny models (once) ...", flush=True)
            is_announced = True
    raise AssertionError("a pool ended without an outcome")


def _finish(
    specs: Sequence[TableSpec],
    plans: Mapping[str, Sequence[Cell]],
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    cell: CellModule,
    failures: Mapping[str, str],
    results_folder: Path,
) -> int:
    """Write and print the tables; return the exit code."""
    is_complete = True
    for spec in specs:
        entries = collect(plans[spec.name], cell, failures=failures)
        text, paths = make(spec, scale, seeds, extra, entries, results_folder / scale)
        print(f"\n{text}")
        for path in paths:
            print(f"wrote {path}")
        absent = [entry for entry in entries if entry.record is None]
        for entry in absent:
            print(f"{entry.cell.label}: {entry.state}: {entry.reason}", file=sys.stderr)
        is_complete = is_complete and not absent
    print(f"wrote {write_page(results_folder / scale)}")
    if not is_complete:
        print("not all runs finished; the same command tries the others again", file=sys.stderr)
        return 1
    return 0


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_memory() -> int:
    """Return the available memory in bytes (where /proc has none: enough for eight workers)."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 * WORKER_BYTES


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
