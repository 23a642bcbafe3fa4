"""Persistent worker processes that run cells, one at a time each.

A worker is a fresh interpreter (spawn), so imports and the METEOR process are paid once and a
crash, a kill or running out of memory takes one cell with it, not the table: the cell is reported
as failed and a new worker goes on with the rest. Workers end with their parent, also when that is
killed.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

#: seconds that a stopped worker has for its checkpoint before it is killed.
STOP_TIMEOUT_S = 60.0
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Job:
    """One thing for a worker to do.

    Attributes:
        kind: ``run`` runs the cell of ``overrides[0]``; ``prepare`` prepares all of `overrides`.
        overrides: Hydra overrides, one tuple a cell.
        key: what the caller knows the job by.
    """

    kind: str
    overrides: tuple[tuple[str, ...], ...]
    key: str


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `error` is None where it succeeded, else one line that says why not."""

    job: Job
    error: str | None
    seconds: float


class _Worker:
    """A worker process, its pipe and what it is doing."""

    def __init__(self, module: str, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        self.job: Job | None = None
        self.started = 0.0
        self.connection, theirs = _SPAWN.Pipe()
        self.process: BaseProcess = _SPAWN.Process(target=_serve, args=(theirs, module, log))
        with _environment(environment):
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        """Start `job`."""
        self.job, self.started = job, time.monotonic()
        with suppress(OSError):  # a worker that died while idle is seen by `finish`
            self.connection.send(job)

    def finish(self) -> Outcome:
        """Return how the job ended; called when the pipe or the process has news."""
        assert self.job is not None
        try:
            error = self.connection.recv() if self.connection.poll() else self._death()
        except (EOFError, OSError):
            error = self._death()
        outcome = Outcome(self.job, error, time.monotonic() - self.started)
        self.job = None
        return outcome

    def _death(self) -> str:
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        if code >= 0:
            return f"the worker process ended with exit code {code}; see logs/{self.log.name}"
        name = signal.Signals(-code).name
        hint = " (killed, perhaps for lack of memory)" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}; see logs/{self.log.name}"


class Pool:
    """A fixed number of workers; use it in a ``with`` block.

    Args:
        module: module with `compose`, `run` and `prepare` that the workers import.
        environments: environment variables of each worker, set before it starts; their number is
            the number of workers.
        logs: folder for what the workers print; created if missing.
        name: start of the log files' names.
    """

    def __init__(
        self, module: str, *, environments: Sequence[Mapping[str, str]], logs: Path, name: str
    ) -> None:
        if not environments:
            raise ValueError("a pool needs at least one worker")
        logs.mkdir(parents=True, exist_ok=True)
        self._module = module
        self._workers: dict[int, _Worker] = {}
        self._slots = [
            (logs / f"{name}-worker{index}.log", environment)
            for index, environment in enumerate(environments)
        ]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> list[tuple[Job, float]]:
        """The jobs in progress with their seconds so far."""
        now = time.monotonic()
        return [(w.job, now - w.started) for w in self._workers.values() if w.job is not None]

    def run(self, jobs: Sequence[Job], *, tick_s: float = 1.0) -> Iterator[Outcome | None]:
        """Run `jobs` in order and yield each outcome when it is there.

        Args:
            jobs: what to do.
            tick_s: after so many seconds without news None is yielded, so that a caller can show
                that time passes.
        """
        queue = deque(jobs)
        while queue or self.running:
            for slot, (log, environment) in enumerate(self._slots):
                if queue and slot not in self._workers:
                    self._workers[slot] = _Worker(self._module, log, environment)
                if queue and self._workers[slot].job is None:
                    self._workers[slot].give(queue.popleft())
            busy = {slot: worker for slot, worker in self._workers.items() if worker.job}
            handles = [h for w in busy.values() for h in (w.connection, w.process.sentinel)]
            news = wait(handles, tick_s)
            if not news:
                yield None
            for slot, worker in busy.items():
                if worker.connection in news or worker.process.sentinel in news:
                    outcome = worker.finish()
                    if not worker.process.is_alive():
                        worker.connection.close()
                        del self._workers[slot]
                    yield outcome

    def close(self) -> None:
        """Stop all workers: ask, let a running cell write its checkpoint, then kill."""
        workers = list(self._workers.values())
        self._workers = {}
        for worker in workers:
            worker.connection.close()
            if worker.job is not None:
                worker.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a child that is started inside the block."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, module: str, log: Path) -> None:
    """Do jobs until the parent closes the pipe; the body of a worker process."""
    os.setsid()  # Ctrl-C reaches the parent only, which then stops the workers in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_do(job, module))
        except (KeyboardInterrupt, BrokenPipeError):
            return


def _do(job: Job, module: str) -> str | None:
    """Do one job; return None or the reason why it failed."""
    try:
        cell = importlib.import_module(module)
        configs = [cell.compose(list(overrides)) for overrides in job.overrides]
        if job.kind == "prepare":
            cell.prepare(configs)
        else:
            cell.run(configs[0])
    except Exception as error:  # whatever one cell does must not end the table
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
