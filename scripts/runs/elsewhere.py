"""Jobs on the machines of a cluster: the same queue and outcomes as `scripts.runs.workers.Pool`.

The command that was given stays where it is and holds the queue. It gives each job to the cluster
as soon as what the job needs is done, and the cluster decides where and when. A job has a process
and a device of its own, so what it breaks is broken for nobody else. A job that is lost with its
machine, its process or its device is given once more, and continues from its checkpoint; what is
lost twice is reported as failed.

All machines must see the checkout and the run folders at the same path, on a file system whose
locks hold between machines. Each job tests that: the command holds a lock while it lives, and a job
that does not see it held does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scripts.runs import faults
from scripts.runs.folder import is_held, lock
from scripts.runs.jobs import Job, Outcome, Queue
from scripts.runs.workers import COMMAND_BEGAN, DEATH, STOP_TIMEOUT_S, do, when_began

#: seconds until a cluster that took no more jobs is asked again.
ASK_AGAIN_S = 30.0
#: variables of the command that its jobs get, by their beginnings: a cluster's processes may have
#: the environment of whoever started the cluster. Not secrets, by their ends: what jobs get may be
#: written to a file. Keys are where `wandb login` and `hf auth login` put them.
PASSED_ON = ("DELTA_LORA_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_")
SECRETS = ("KEY", "TOKEN")
_HERE = "cluster"

logger = logging.getLogger(__name__)


class SubmissionError(RuntimeError):
    """A cluster did not take a job."""


@dataclass(frozen=True)
class Place:
    """What a job needs to know of the command that gave it.

    Attributes:
        folder: the command's working folder.
        command: a folder whose lock the command holds while it lives.
        log: file for what the job prints.
        environment: environment variables of the job.
    """

    folder: Path
    command: Path
    log: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """How a job ended on the cluster.

    Attributes:
        error: None where it succeeded, else one line that says why not.
        fault: of its process or device, as `scripts.runs.faults` names it, or `DEATH`; or None.
        seconds: how long it took, without its time in the cluster's queue; None where unknown.
    """

    error: str | None
    fault: str | None = None
    seconds: float | None = None


class Task(Protocol):
    """A job that was given to a cluster."""

    def report(self) -> Report:
        """Return how it ended; called once, when it has."""
        ...


class Cluster(Protocol):
    """What does jobs elsewhere; `scripts.runs.on_ray` and `scripts.runs.on_slurm` have one each."""

    def give(self, job: Job, place: Place) -> Task:
        """Let `work` be called with the arguments in a process of its own, some time.

        Raises:
            SubmissionError: the cluster takes no job, now or at all.
        """
        ...

    def wait(self, tasks: Sequence[Task], seconds: float) -> list[Task]:
        """Return those that have ended, as soon as there is one; none after so many seconds."""
        ...

    def stop(self, tasks: Sequence[Task], seconds: float) -> None:
        """Stop tasks; where they are running they have so many seconds for their checkpoint."""
        ...

    def close(self) -> None:
        """Leave the cluster."""
        ...


def work(job: Job, place: Place) -> Report:
    """Do a job on a machine of the cluster; the body of its process."""
    began = time.monotonic()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in all that a shell starts in the background (`ray start ... &`): no stop would come.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(place.environment)
    try:
        os.chdir(place.folder)
        stream = place.log.open("a", encoding="utf-8")
    except OSError as error:
        return Report(
            f"{socket.gethostname()} does not see {error.filename} ({error.strerror}); the "
            "checkout and the run folders must be on a file system that all machines share, at "
            "the same path"
        )
    with stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    print(f"{job.key}: process {os.getpid()} on {socket.gethostname()}", flush=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    if not is_held(place.command):
        return Report(
            f"{socket.gethostname()} sees no lock on {place.command}: either the command that gave "
            "this job has ended (give it again), or the locks of this file system do not hold "
            "between machines, so that two could work on one run (NFS 4 and Lustre mounted with "
            "flock have such locks)"
        )
    answer = do(job)
    sys.stdout.flush()
    sys.stderr.flush()
    return Report(answer.error, answer.fault, time.monotonic() - began)


class Elsewhere:
    """Jobs of one command on a cluster; use it in a ``with`` block.

    Args:
        cluster: does them; closed with the block.
        limit: never more jobs at the cluster than that; None: all that can be done now.
        environment: environment variables of every job.
        logs: folder for what the jobs print, a file each; created if missing.
        name: start of the log files' names.

    Raises:
        ConfigError: `logs` cannot be written, or its file system has no locks.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        limit: int | None,
        environment: Mapping[str, str],
        logs: Path,
        name: str,
    ) -> None:
        self._cluster, self._limit = cluster, limit
        self._logs, self._name = logs.resolve(), name
        self._environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if key.startswith(PASSED_ON) and not key.endswith(SECRETS)
            },
            **environment,
            COMMAND_BEGAN: repr(when_began()),
        }
        self._command = command_folder(logs, name).resolve()
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(lock(self._command, wait=False))
        self._tasks: dict[Task, _Given] = {}
        self._is_known_to_work = False
        self._not_before = 0.0

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> list[tuple[Job, float]]:
        """The jobs that have begun, with their seconds so far."""
        return [(given.job, given.seconds()) for given in self._tasks.values() if given.has_begun()]

    def run(self, jobs: Sequence[Job], *, tick_s: float = 1.0) -> Iterator[Outcome | None]:
        """Run `jobs`; arguments and what is yielded as of `scripts.runs.workers.Pool.run`.

        Raises:
            ValueError: the cluster did not take the first job that it was ever given.
        """
        queue = Queue(jobs)
        while queue or self._tasks:
            refusal = self._give_out(queue)
            if not self._tasks:
                if not self._is_known_to_work:
                    raise ValueError(refusal)
                yield from queue.drop_all(refusal)
                return
            ended = self._cluster.wait(list(self._tasks), tick_s)
            if not ended:
                yield None
            for task in ended:
                given = self._tasks.pop(task)
                report = task.report()
                seconds = given.seconds() if report.seconds is None else report.seconds
                if not self._is_tried_again(given.job, report, queue):
                    yield from queue.settle(Outcome(given.job, report.error, seconds))

    def _give_out(self, queue: Queue) -> str:
        """Give the cluster what can be done; return why it takes no more, where it does not."""
        while self._limit is None or len(self._tasks) < self._limit:
            if self._tasks and time.monotonic() < self._not_before:
                break
            job = queue.take(_HERE, {_HERE})
            if job is None:
                break
            log = self._logs / f"{self._name}-{job.key}.log"
            place = Place(Path.cwd(), self._command, log, self._environment)
            given = _Given(job, log)
            try:
                task = self._cluster.give(job, place)
            except SubmissionError as error:
                queue.give_back(job)
                self._not_before = time.monotonic() + ASK_AGAIN_S
                return str(error)
            self._tasks[task] = given
            self._is_known_to_work = True
        return ""

    def _is_tried_again(self, job: Job, report: Report, queue: Queue) -> bool:
        if report.fault not in (DEATH, faults.DEVICE) or not queue.put_back(job, _HERE):
            return False
        logger.warning("%s: %s; once more", job.key, report.error)
        return True

    def close(self) -> None:
        """Stop what runs, let it write its checkpoints, and take back what waits."""
        try:
            self._cluster.stop(list(self._tasks), STOP_TIMEOUT_S)
        finally:
            self._tasks.clear()
            self._cluster.close()
            self._lock.close()
            shutil.rmtree(self._command, ignore_errors=True)


class _Given:
    """A job at the cluster: whether and when it has begun, as its log tells."""

    def __init__(self, job: Job, log: Path) -> None:
        self.job, self._log = job, log
        self._size = self._log_size()
        self._began: float | None = None

    def has_begun(self) -> bool:
        if self._began is None and self._log_size() > self._size:
            self._began = time.monotonic()
        return self._began is not None

    def seconds(self) -> float:
        return time.monotonic() - self._began if self.has_begun() and self._began else 0.0

    def _log_size(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0


def command_folder(logs: Path, name: str) -> Path:
    """Return the folder of a command: for its lock, and what its launcher keeps while it works."""
    return logs / f"{name}-{socket.gethostname()}-{os.getpid()}"
