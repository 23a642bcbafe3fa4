"""Jobs on a ray cluster, one task each: ``--launcher ray``.

ray finds a machine with a free device, starts a process for the task and ends it behind it. What it
does not do is left to `scripts.runs.elsewhere`: the order of jobs, second tries, progress.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from delta_lora.checks import Range, check_values, documented
from scripts.runs.composition import ROOT
from scripts.runs.elsewhere import Elsewhere, Place, Report, Task, work
from scripts.runs.jobs import Job
from scripts.runs.launchers import Launcher, parse_memory
from scripts.runs.workers import DEATH

#: seconds that the head of a cluster has to answer.
ANSWER_TIMEOUT_S = 5.0


@documented
@dataclass(kw_only=True)
class Ray(Launcher):
    """Runs as tasks of a ray cluster."""

    address: str | None = None
    """Host and port of its head; None: what RAY_ADDRESS says, else the cluster that was started on
    this machine (``ray start``), else one of this machine alone, for as long as the command works.
    """

    gpus: Annotated[int | None, Range(at_least=0)] = None
    """Of each run; None: 1, or 0 where the runs are told to train on the CPU."""

    cpus: Annotated[int, Range(at_least=1)] = 1
    """Cores of each run."""

    memory: str | None = None
    """Main memory of each run, such as 32G; None: not counted."""

    def __post_init__(self) -> None:
        check_values(type(self), vars(self), prefix="launcher.")
        parse_memory(self.memory)

    @property
    def name(self) -> str:
        """How commands call it."""
        return "ray"

    def check(self, scale: str, overrides: Sequence[str]) -> None:
        """Check that ray is installed, that the cluster answers, and that a run has room in it.

        Raises:
            ValueError: it is not so; the message says what to do.
        """
        if importlib.util.find_spec("ray") is None:
            raise ValueError(
                "launcher=ray needs the package ray; install it with make setup LAUNCHER=ray, or "
                "pip install ray on every machine of the cluster"
            )
        _check_answers(self.address or os.environ.get("RAY_ADDRESS"))
        self._connect()
        self._check_room(self.gpus_of(scale, overrides))

    def open(
        self, *, gpus: int, limit: int | None, environment: Mapping[str, str], logs: Path, name: str
    ) -> Elsewhere:
        """Return the cluster, for a ``with`` block; arguments as of `Elsewhere`.

        Args:
            gpus: of each run.
            limit: never more runs there than that.
            environment: of every run.
            logs: folder for what the runs print.
            name: start of the names of their logs.
        """
        self._connect()
        needs: dict[str, Any] = {"num_gpus": gpus, "num_cpus": self.cpus}
        if self.memory is not None:
            needs["memory"] = parse_memory(self.memory)
        return Elsewhere(
            cluster=_RayCluster(needs), limit=limit, environment=environment, logs=logs, name=name
        )

    def _connect(self) -> None:
        """Connect to the cluster, or start one of this machine, unless that is done.

        Raises:
            ValueError: it cannot be done.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # ray reports its use over the net
        import ray

        if ray.is_initialized():
            return
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            ray.init(
                address=self.address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())
            raise ValueError(f"the ray cluster cannot be used: {line}; {_START}") from error
        nodes = sum(node["Alive"] for node in ray.nodes())
        where = ray.get_runtime_context().gcs_address
        print(f"ray: {nodes} machine{'s' if nodes > 1 else ''}, head {where}", flush=True)

    def _check_room(self, gpus: int) -> None:
        import ray

        wanted = {"GPU": gpus, "CPU": self.cpus, "memory": parse_memory(self.memory) or 0}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(has.get(key, 0) >= wanted[key] for key in wanted) for has in machines):
            return
        have = "; ".join(
            f"{has.get('GPU', 0):.0f} GPUs, {has.get('CPU', 0):.0f} CPUs, "
            f"{has.get('memory', 0) / 2**30:.0f} GiB"
            for has in machines
        )
        ray.shutdown()
        raise ValueError(
            f"no machine of the ray cluster has room for a run with launcher.gpus={gpus}, "
            f"launcher.cpus={self.cpus} and launcher.memory={self.memory}: they have {have}. Ask "
            "for less, or add a machine (ray start --address=HEAD:6379)"
        )


_START = (
    "start one with `ray start --head` on one machine and `ray start --address=HEAD:6379` on the "
    "others, and give this command on one of them; where ray asks for a token, with "
    "RAY_AUTH_MODE=token as ray start has it"
)


def _check_answers(address: str | None) -> None:
    """Check that there is somebody at an address of host and port.

    Raises:
        ValueError: there is not; ray itself would wait for a minute.
    """
    if address in (None, "auto", "local"):
        return
    assert address is not None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"launcher.address={address!r} is no address; write host:port, for example head:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no ray cluster answers at {address} ({error}); {_START}") from error


class _RayTask:
    """A job that was given to ray."""

    def __init__(self, reference: Any, log: Path) -> None:
        self.reference, self._log = reference, log

    def report(self) -> Report:
        """Return how it ended."""
        import ray

        try:
            report: Report = ray.get(self.reference)
        except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
            return Report(_last_line(error))  # as where the machine lacks the checkout
        except ray.exceptions.RayError as error:
            line = f"{type(error).__name__}: {_last_line(error)}"
            return Report(f"lost by the cluster ({line}); see logs/{self._log.name}", DEATH)
        return report


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class _RayCluster:
    """A ray cluster that this process is connected to.

    Args:
        needs: of a task, as ray's ``remote`` takes it.
    """

    def __init__(self, needs: Mapping[str, Any]) -> None:
        import ray

        # A second try is ours: then the log and the progress show it.
        self._work = ray.remote(max_calls=1, max_retries=0, **needs)(work)

    def give(self, job: Job, place: Place) -> _RayTask:
        """Give ray a task."""
        return _RayTask(self._work.remote(job, place), place.log)

    def wait(self, tasks: Sequence[Task], seconds: float) -> list[Task]:
        """Return the tasks that have ended."""
        import ray

        by_reference = {task.reference: task for task in tasks if isinstance(task, _RayTask)}
        ended, _ = ray.wait(list(by_reference), timeout=seconds)
        return [by_reference[reference] for reference in ended]

    def stop(self, tasks: Sequence[Task], seconds: float) -> None:
        """Interrupt the tasks as Ctrl-C does, and wait until they have ended."""
        import ray

        references = [task.reference for task in tasks if isinstance(task, _RayTask)]
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references), timeout=seconds)

    def close(self) -> None:
        """Disconnect; ray ends what is left of this command, and the cluster if it was its own."""
        import ray

        ray.shutdown()
