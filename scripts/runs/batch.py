"""Run many cells: how many workers, how long it will take, and progress while it does."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.runs.plan import Cell, CellModule, Durations, format_seconds
from scripts.runs.scale import count_cuda_devices
from scripts.runs.workers import Job, Outcome, Pool

#: memory counted for one worker at scale tiny (PyTorch, a tiny model, METEOR's Java).
WORKER_BYTES = 2 * 2**30
TINY_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


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
) -> dict[str, str]:
    """Run cells and show progress; return signature to reason of those that failed."""
    by_key = {item.signature: item for item in todo}
    groups = {name: cell.group(item.config) for name, item in by_key.items()}
    jobs = [Job("run", (item.overrides,), item.signature) for item in todo]
    pending = dict(by_key)
    failures: dict[str, str] = {}

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
                failures[outcome.job.key] = outcome.error
            progress.step(item.label, outcome, remaining())
    return failures


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
        how = "done" if outcome.error is None else f"FAILED: {outcome.error}"
        line = f"[{self.count}/{self.total}] {label}: {how} ({outcome.seconds:.1f} s)"
        if self.bar is None:
            print(line if left is None else f"{line}, left {left}", flush=True)
            return
        self.bar.update()
        self.bar.set_postfix_str("" if left is None else f"left {left}")
        if outcome.error is not None:
            self.bar.write(line)


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
