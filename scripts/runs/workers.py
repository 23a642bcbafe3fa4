"""Persistent worker processes that run cells, one at a time each.

A worker is a fresh interpreter (spawn), so imports and the METEOR process are paid once and a
crash, a kill or running out of memory takes one cell with it, not the table: the cell is reported
as failed and a new worker goes on with the rest. The same holds for a fault of the device, after
which a process can no longer use it: the worker answers and ends, and where there is another device
the cell is tried once more there. A place whose workers fail in that way again and again, as on a
device that is lost, is given up. Workers end with their parent, also when that is killed.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from delta_lora.writing import make_folder
from scripts.runs import faults
from scripts.runs.jobs import Job, Outcome, Queue

#: seconds that a stopped worker has for its checkpoint before it is killed.
STOP_TIMEOUT_S = 60.0
#: and one that ends by itself, before it is killed.
END_TIMEOUT_S = 10.0
#: fault of a worker that ended without an answer.
DEATH = "death"
#: a place is given up when so many different jobs in a row end its workers, each sooner than ...
FAULTS_IN_A_ROW = 3
#: ... so many seconds. Before the first use of the device a run may tokenise for two minutes.
FAULT_WITHIN_S = 300.0
#: what a worker reads from its environment: how many workers share its device, and when the command
#: that it belongs to began (seconds since the epoch).
CELLS_ON_DEVICE = "DELTA_LORA_CELLS_ON_DEVICE"
COMMAND_BEGAN = "DELTA_LORA_COMMAND_BEGAN"
_BEGAN = time.time()
_SPAWN = multiprocessing.get_context("spawn")

logger = logging.getLogger(__name__)


def when_began() -> float:
    """Return when the command of this process began, in seconds since the epoch."""
    return _BEGAN


def cells_on_device() -> int:
    """Return how many workers share the device of this process, itself included."""
    return int(os.environ.get(CELLS_ON_DEVICE, "1"))


@dataclass(frozen=True)
class Answer:
    """What is said of a job: why it failed or None, and the fault after which its process ends."""

    error: str | None
    fault: str | None = None


class _Worker:
    """A worker process, its pipe and what it is doing."""

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        self.job: Job | None = None
        self.started = 0.0
        self.connection, theirs = _SPAWN.Pipe()
        self.process: BaseProcess = _SPAWN.Process(target=_serve, args=(theirs, log))
        with _environment(environment):
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        """Start `job`."""
        self.job, self.started = job, time.monotonic()
        with suppress(OSError):  # a worker that died while idle is seen by `finish`
            self.connection.send(job)

    def finish(self) -> tuple[Outcome, str | None]:
        """Return how the job ended, and the fault that ended the worker or None.

        Called when the pipe or the process has news. A death is a fault of the device too: a
        driver may end the process before Python hears of it.
        """
        assert self.job is not None
        try:
            answer = self.connection.recv() if self.connection.poll() else self._death()
        except (EOFError, OSError):
            answer = self._death()
        outcome = Outcome(self.job, answer.error, time.monotonic() - self.started)
        self.job = None
        return outcome, answer.fault

    def end(self) -> None:
        """See that a process ends that has ended or is about to."""
        self.connection.close()
        self.process.join(END_TIMEOUT_S)
        self.process.kill()
        self.process.join()

    def _death(self) -> Answer:
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        how = f"ended with exit code {code}"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (killed, perhaps for lack of memory)" if name == "SIGKILL" else ""
            how = f"was ended by {name}{hint}"
        return Answer(f"the worker process {how}; see logs/{self.log.name}", DEATH)


class _Slot:
    """A place for a worker, and what became of the workers that were there.

    Args:
        log: file of their output.
        environment: their environment variables.
    """

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self.log, self.environment = log, environment
        self.worker: _Worker | None = None
        self._faults: dict[str, str] = {}

    @property
    def device(self) -> str | None:
        """The CUDA device of this place; None where its environment names none."""
        return self.environment.get("CUDA_VISIBLE_DEVICES")

    @property
    def is_given_up(self) -> bool:
        """Whether too many workers in a row have failed here."""
        return len(self._faults) >= FAULTS_IN_A_ROW

    def note(self, outcome: Outcome, fault: str | None) -> None:
        """Note how a worker here has done a job, and how it ended."""
        if fault not in (faults.DEVICE, DEATH):  # lack of memory says nothing about the place
            self._faults.clear()
        elif outcome.seconds < FAULT_WITHIN_S:
            assert outcome.error is not None
            self._faults[outcome.job.key] = outcome.error
            if self.is_given_up:
                where = "" if self.device is None else f" on device {self.device}"
                logger.warning(
                    "no more cells for %s%s: %d of them in a row ended its worker, last: %s",
                    self.log.stem, where, len(self._faults), outcome.error,
                )  # fmt: skip


class Pool:
    """A fixed number of workers; use it in a ``with`` block.

    Args:
        environments: environment variables of each worker, set before it starts; their number is
            the number of workers. ``CUDA_VISIBLE_DEVICES`` there names the worker's device.
        logs: folder for what the workers print; created if missing.
        name: start of the log files' names.
    """

    def __init__(self, *, environments: Sequence[Mapping[str, str]], logs: Path, name: str) -> None:
        if not environments:
            raise ValueError("a pool needs at least one worker")
        make_folder(logs)
        began = {COMMAND_BEGAN: repr(when_began())}
        self._slots = [
            _Slot(logs / f"{name}-worker{index}.log", {**environment, **began})
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
        return [(w.job, now - w.started) for w in self._busy().values() if w.job is not None]

    def run(self, jobs: Sequence[Job], *, tick_s: float = 1.0) -> Iterator[Outcome | None]:
        """Run `jobs`, each as soon as it can be, in order, and yield each outcome when it is there.

        A job whose `after` fails is not run. Where every place for a worker is given up, the rest
        is not run either.

        Args:
            jobs: what to do.
            tick_s: after so many seconds without news None is yielded, so that a caller can show
                that time passes.
        """
        queue = Queue(jobs)
        last = ""
        while queue or self.running:
            self._give_out(queue)
            busy = self._busy()
            if not busy:
                yield from queue.drop_all(f"no worker is left; the last one failed: {last}")
                return
            handles = [h for w in busy.values() for h in (w.connection, w.process.sentinel)]
            news = wait(handles, tick_s)
            if not news:
                yield None
            for slot, worker in busy.items():
                if worker.connection in news or worker.process.sentinel in news:
                    outcome, fault = worker.finish()
                    last = outcome.error or last
                    if fault is not None or not worker.process.is_alive():
                        worker.end()
                        slot.worker = None
                    slot.note(outcome, fault)
                    if not self._goes_elsewhere(outcome, fault, slot, queue):
                        yield from queue.settle(outcome)

    def _busy(self) -> dict[_Slot, _Worker]:
        return {s: s.worker for s in self._slots if s.worker is not None and s.worker.job}

    def _devices(self) -> set[str | None]:
        return {slot.device for slot in self._slots if not slot.is_given_up}

    def _give_out(self, queue: Queue) -> None:
        """Give every free worker a job; start workers where they lack."""
        devices = self._devices()
        for slot in self._slots:
            is_free = slot.worker is None or slot.worker.job is None
            if slot.is_given_up or not is_free:
                continue
            job = queue.take(slot.device, devices)
            if job is not None:
                if slot.worker is None or not slot.worker.process.is_alive():
                    slot.worker = _Worker(slot.log, slot.environment)
                slot.worker.give(job)

    def _goes_elsewhere(
        self, outcome: Outcome, fault: str | None, slot: _Slot, queue: Queue
    ) -> bool:
        """Put a job back whose device failed, where there is another one; return whether so."""
        if fault != faults.DEVICE or not self._devices() - {slot.device}:
            return False
        is_back = queue.put_back(outcome.job, slot.device)
        if is_back:
            logger.warning(
                "%s on device %s: %s; once more, on another device",
                outcome.job.key, slot.device, outcome.error,
            )  # fmt: skip
        return is_back

    def close(self) -> None:
        """Stop all workers: ask, let a running cell write its checkpoint, then kill."""
        workers = [slot.worker for slot in self._slots if slot.worker is not None]
        for slot in self._slots:
            slot.worker = None
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


def _serve(connection: Connection, log: Path) -> None:
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
            answer = do(job)
            connection.send(answer)
        except (KeyboardInterrupt, BrokenPipeError):
            return
        if answer.fault is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # at once: what would be tidied up may need the device


def do(job: Job) -> Answer:
    """Do one job; return whether and why it failed."""
    module, _, name = job.function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(*job.arguments)
    except Exception as error:  # whatever one cell does must not end the table
        with suppress(OSError):  # the log may be on the disk that is full
            traceback.print_exc()
        return Answer(faults.reason_of(error), faults.kind_of(error))
    return Answer(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
