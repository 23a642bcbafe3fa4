"""What workers are given to do: jobs in order, those that need another one behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One thing for a worker to do.

    Attributes:
        function: what does it, ``module:name``; imported by the worker.
        arguments: of the function; they are pickled.
        key: what the caller knows the job by; its own in one queue.
        after: key of the job without whose success this one is not done; None, or the key of no
            job of the queue: it waits for nothing.
    """

    function: str
    arguments: tuple[Any, ...]
    key: str
    after: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: the job.
        error: None where it succeeded, else one line that says why not.
        seconds: how long it took.
        was_run: False where it was never begun; `error` then says why.
    """

    job: Job
    error: str | None
    seconds: float
    was_run: bool = True


class Queue:
    """Jobs that wait, in the order given.

    Args:
        jobs: what is to be done.

    Raises:
        ValueError: two jobs have the same key.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        keys = [job.key for job in jobs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two jobs have the same key: {sorted(keys)}")
        self._waiting = list(jobs)
        self._open = set(keys)
        self._failed_on: dict[str, str | None] = {}

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._waiting)

    def take(self, device: str | None, devices: Collection[str | None]) -> Job | None:
        """Return the first job that can be done now, or None.

        Args:
            device: where it will be done.
            devices: all that are in use; a job that failed on `device` is left for the others.
        """
        for job in self._waiting:
            is_mine = self._failed_on.get(job.key, "") != device or len(devices) == 1
            if is_mine and job.after not in self._open:
                self._waiting.remove(job)
                return job
        return None

    def give_back(self, job: Job) -> None:
        """Let `job`, which was taken and not begun, be taken again, before all others."""
        self._waiting.insert(0, job)

    def put_back(self, job: Job, device: str | None) -> bool:
        """Let `job`, which failed on `device`, be taken once more, before all others.

        Returns:
            False where it has had its second try.
        """
        if job.key in self._failed_on:
            return False
        self._failed_on[job.key] = device
        self._waiting.insert(0, job)
        return True

    def settle(self, outcome: Outcome) -> Iterator[Outcome]:
        """Note how a job ended; yield that, and the jobs that cannot be done where it failed."""
        self._open.discard(outcome.job.key)
        yield outcome
        if outcome.error is None:
            return
        reason = outcome.error
        if outcome.was_run:
            reason = f"the run that it starts from failed: {reason}"
        yield from self._drop([j for j in self._waiting if j.after == outcome.job.key], reason)

    def drop_all(self, reason: str) -> Iterator[Outcome]:
        """Give up every waiting job for `reason`; yield each."""
        yield from self._drop(list(self._waiting), reason)

    def _drop(self, jobs: Sequence[Job], reason: str) -> Iterator[Outcome]:
        for job in jobs:
            if job in self._waiting:  # not gone with the one that it needs
                self._waiting.remove(job)
                yield from self.settle(Outcome(job, reason, 0.0, was_run=False))
