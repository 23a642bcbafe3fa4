"""Jobs on a Slurm cluster, a Slurm job each, by the package submitit: ``--launcher slurm``.

Slurm starts a job that it preempted, or whose machine was lost, again; submitit asks for the same
before the time limit of a job ends. Either way the run continues from its checkpoint, and the
command waits for it. `scripts.runs.elsewhere` does the rest: order, second tries, progress.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from delta_lora.checks import OneOf, Range, check_values, documented
from scripts.runs.composition import ROOT
from scripts.runs.elsewhere import (
    Elsewhere,
    Place,
    Report,
    SubmissionError,
    Task,
    work,
)
from scripts.runs.jobs import Job
from scripts.runs.launchers import Launcher, parse_memory
from scripts.runs.workers import DEATH

#: what must be on the PATH of the machine that gives jobs to Slurm.
COMMANDS = ("sbatch", "srun", "sacct", "scancel")
#: seconds between two looks at what Slurm, or this machine, has done.
LOOK_S = {"slurm": 5.0, "local": 0.1}
#: seconds that the result of a job that has ended has to be seen on this machine.
ANSWER_WITHIN_S = 15.0
#: how often a job may go on after its time limit.
MOST_RESTARTS = 20
#: days, hours, minutes and seconds of Slurm's forms D-H:M:S, D-H:M, D-H, H:M:S, M:S and M.
_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(?:(\d+):)?(\d+):(\d+))|(\d+))")


@documented
@dataclass(kw_only=True)
class Slurm(Launcher):
    """Runs as Slurm jobs."""

    cluster: Annotated[str, OneOf(tuple(LOOK_S))] = "slurm"
    """Or local: processes of this machine without any limit, to try it out."""

    partition: str | None = None
    """As of sbatch; None: the cluster's default."""

    account: str | None = None
    """As of sbatch."""

    qos: str | None = None
    """As of sbatch."""

    constraint: str | None = None
    """As of sbatch."""

    time: str = "24:00:00"
    """Limit of one job, as of sbatch; a run that takes longer goes on in the next one."""

    gpus: Annotated[int | None, Range(at_least=0)] = None
    """Of each run (sbatch's gpus-per-node); None: 1, or 0 where the runs are told to train on the
    CPU."""

    cpus: Annotated[int, Range(at_least=1)] = 4
    """Cores of each run."""

    memory: str | None = "32G"
    """Main memory of each run; None: the cluster's default."""

    sbatch: str = ""
    """Further options of sbatch without their dashes, such as 'gres=gpu:a100:1 exclusive'."""

    setup: str = ""
    """Shell commands before each run, such as 'module load cuda; source activate mine'."""

    def __post_init__(self) -> None:
        check_values(type(self), vars(self), prefix="launcher.")
        parse_memory(self.memory)
        minutes_of(self.time)
        for option in shlex.split(self.sbatch):
            if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", option):
                raise ValueError(
                    f"launcher.sbatch has {option!r}, which is no option of sbatch; write it "
                    "without leading dashes, such as 'reservation=mine' or 'exclusive'"
                )

    @property
    def name(self) -> str:
        """How commands call it."""
        return "slurm" if self.cluster == "slurm" else "slurm (tried on this machine)"

    def limit(self, number: int | None) -> int | None:
        """Return how many runs there are at once at most; on this machine one a core."""
        return os.cpu_count() if number is None and self.cluster == "local" else number

    def check(self, scale: str, overrides: Sequence[str]) -> None:
        """Check that jobs can be given to Slurm.

        Raises:
            ValueError: it is not so; the message says what to do.
        """
        if importlib.util.find_spec("submitit") is None:
            raise ValueError(
                "launcher=slurm needs the package submitit; install requirements.lock, or "
                "pip install submitit"
            )
        if self.cluster == "local":
            if self.gpus_of(scale, overrides):
                raise ValueError(
                    "launcher.cluster=local shares no GPUs out; use launcher=local for the GPUs of "
                    "this machine, or launcher.gpus=0"
                )
            return
        lacking = [command for command in COMMANDS if shutil.which(command) is None]
        if lacking:
            raise ValueError(
                f"launcher=slurm: {', '.join(lacking)} not found on the PATH; give the command on "
                "a login node of the cluster. cluster=local tries the same on this machine"
            )

    def open(
        self, *, gpus: int, limit: int | None, environment: Mapping[str, str], logs: Path, name: str
    ) -> Elsewhere:
        """Return the cluster, for a ``with`` block; arguments as of `Elsewhere`.

        Args:
            gpus: of each run.
            limit: never more runs there than that.
            environment: of every run.
            logs: folder for what the runs print.
            name: start of the names of their logs, and name of the Slurm jobs.
        """
        return Elsewhere(
            cluster=_SlurmCluster(self.cluster, self._parameters(gpus, f"{name[:40]}")),
            limit=limit,
            environment=environment,
            logs=logs,
            name=name,
        )

    def _parameters(self, gpus: int, name: str) -> dict[str, Any]:
        """Return what submitit is told of every job."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        further = dict(option.partition("=")[::2] for option in shlex.split(self.sbatch))
        setup = [f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}", self.setup]
        return {
            "name": name,
            "timeout_min": minutes_of(self.time),
            "cpus_per_task": self.cpus,
            "gpus_per_node": gpus or None,
            "slurm_mem": self.memory,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_setup": setup,
            # What is preempted, or loses its machine, goes back into Slurm's queue.
            "slurm_additional_parameters": {
                "requeue": True, **{key: value or True for key, value in further.items()}
            },
        }  # fmt: skip


def minutes_of(text: str) -> int:
    """Return a time limit of Slurm in minutes, rounded up: ``90``, ``24:00:00``, ``2-12``.

    Raises:
        ValueError: it is none.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(
            f"launcher.time={text!r} is no time limit; write minutes, hours:minutes:seconds or "
            "days-hours, such as 90, 24:00:00 or 2-12"
        )
    groups = [int(group or 0) for group in found.groups()]
    days, hours, minutes, seconds = groups[:4]
    hours, minutes, seconds = (
        hours + groups[4],
        minutes + groups[5] + groups[7],
        seconds + groups[6],
    )
    total = -(-(((days * 24 + hours) * 60 + minutes) * 60 + seconds) // 60)
    if total == 0:
        raise ValueError(f"launcher.time={text!r} leaves a run no time; write such as 24:00:00")
    return total


class _Attempt:
    """What Slurm runs: a job, and again where submitit ends it before its time limit."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place = job, place

    def __call__(self) -> Report:
        return work(self.job, self.place)

    def checkpoint(self) -> Any:
        """Return what goes on later: the same, which finds the checkpoint of its run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _SlurmTask:
    """A job that was given to Slurm."""

    def __init__(self, job: Any, log: Path, *, is_here: bool) -> None:
        self.job, self._log, self._is_here = job, log, is_here

    def report(self) -> Report:
        """Return how it ended."""
        if not self._has_answer():
            said = (self.job.stderr() or "").strip().splitlines()
            last = f": {said[-1]}" if said else ""
            return Report(
                f"job {self.job.job_id} ended without an answer (state {self.job.state}){last}; "
                f"see logs/{self._log.name}",
                DEATH,
            )
        error = self.job.exception()
        if error is None:
            report: Report = self.job.result()
            return report
        lines = [line.strip() for line in str(error).splitlines()]
        found = [line for line in lines if re.match(r"[A-Za-z_.]*(Error|Exception)\b", line)]
        return Report((found or lines)[-1])

    def _has_answer(self) -> bool:
        """Return whether the job left a result; another machine's files may come a little late."""
        until = time.monotonic() + (0.0 if self._is_here else ANSWER_WITHIN_S)
        while not self.job.paths.result_pickle.exists():
            if time.monotonic() >= until:
                return False
            time.sleep(1.0)
        return True


class _SlurmCluster:
    """Slurm, or processes of this machine in its place.

    Args:
        cluster: a key of `LOOK_S`.
        parameters: of every job, as submitit takes them.
    """

    def __init__(self, cluster: str, parameters: Mapping[str, Any]) -> None:
        self._cluster, self._parameters = cluster, parameters
        self._executor: Any = None
        self._last_look = 0.0

    def give(self, job: Job, place: Place) -> _SlurmTask:
        """Give Slurm a job.

        Raises:
            SubmissionError: Slurm takes none.
        """
        import submitit

        if self._executor is None:
            self._executor = submitit.AutoExecutor(
                place.command, cluster=self._cluster, slurm_max_num_timeout=MOST_RESTARTS
            )
            self._executor.update_parameters(**self._parameters)
            if self._cluster == "local":  # it has no lines of shell before a job
                paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
                os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            given = self._executor.submit(_Attempt(job, place))
            return _SlurmTask(given, place.log, is_here=self._cluster == "local")
        except (submitit.core.utils.FailedJobError, OSError, RuntimeError) as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise SubmissionError(f"Slurm took no job: {said[-1] if said else error}") from error

    def wait(self, tasks: Sequence[Task], seconds: float) -> list[Task]:
        """Return the tasks that have ended."""
        until = time.monotonic() + seconds
        while True:
            if time.monotonic() >= self._last_look + LOOK_S[self._cluster]:
                self._last_look = time.monotonic()
                ended = [t for t in tasks if isinstance(t, _SlurmTask) and t.job.done()]
                if ended:
                    return list(ended)
            if time.monotonic() >= until:
                return []
            time.sleep(min(seconds, LOOK_S["local"]))

    def stop(self, tasks: Sequence[Task], seconds: float) -> None:
        """Cancel the tasks. Slurm lets them write checkpoints; here they are waited for."""
        jobs = [task.job for task in tasks if isinstance(task, _SlurmTask)]
        for job in jobs:
            job.cancel(check=False)
        until = time.monotonic() + seconds
        while self._cluster == "local" and not all(job.done() for job in jobs):
            if time.monotonic() > until:
                break
            time.sleep(LOOK_S["local"])

    def close(self) -> None:
        """Do nothing: jobs are cancelled, and Slurm stays."""
