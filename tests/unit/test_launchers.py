"""Runs on a cluster: options, what is asked before work, and jobs that are lost.

Slurm is tried twice: as submitit's local executor, and with stand-ins for Slurm's commands.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts import reproduce
from scripts.runs import devices, elsewhere, launchers, on_slurm
from scripts.runs.allotment import CELLS_ON_DEVICE
from scripts.runs.composition import ROOT, ConfigError
from scripts.runs.devices import Cuda
from scripts.runs.elsewhere import Elsewhere, Place, Report, SubmissionError
from scripts.runs.folder import is_held, lock
from scripts.runs.jobs import Job, Outcome
from scripts.runs.on_slurm import Slurm, minutes_of
from scripts.runs.workers import DEATH
from tests.unit import fake_runs
from tests.unit.test_reproduce import arguments_for

RUN = "tests.unit.fault_jobs:run"


def job(text: str, after: str | None = None) -> Job:
    return Job(RUN, (text,), text.partition(":")[0], after)


def collect(place: Elsewhere, jobs: Sequence[Job]) -> dict[str, Outcome]:
    found = [outcome for outcome in place.run(jobs, tick_s=0.2) if outcome is not None]
    assert len(found) == len(jobs)
    return {outcome.job.key: outcome for outcome in found}


def failed(outcomes: dict[str, Outcome]) -> set[str]:
    return {key for key, outcome in outcomes.items() if outcome.error is not None}


def begun(folder: Path) -> list[str]:
    """Return the names of the jobs that were begun, in order."""
    return [line.split()[-1] for line in (folder / "begun").read_text().splitlines()]


# ---------------------------------------------------------------------- options


def test_every_cluster_of_the_configuration_is_made_by_its_class() -> None:
    assert launchers.names() == ["local", "ray", "slurm"]
    for name in launchers.names():
        assert launchers.load(name).is_here == (name == "local")


def test_options_replace_those_of_the_file() -> None:
    text = "partition=gpu time=2-12 gpus=2 memory=64G sbatch='gres=gpu:a100:1 exclusive'"
    found = launchers.load("slurm", text)
    assert isinstance(found, Slurm)
    assert (found.partition, found.time, found.gpus, found.cpus) == ("gpu", "2-12", 2, 4)
    assert found.sbatch == "gres=gpu:a100:1 exclusive"
    clock = launchers.load("slurm", "time=24:00:00")
    assert isinstance(clock, Slurm)
    assert clock.time == "24:00:00"  # no number of base 60, as YAML would read it


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rai", "", "did you mean 'ray'? known: local, ray, slurm"),
        ("local", "gpus=1", "launcher=local has no options"),
        ("slurm", "partitoin=gpu", "no option 'partitoin'; did you mean 'partition'"),
        ("slurm", "time=soon", "launcher.time='soon' is no time limit"),
        ("slurm", "time=00:00:00", "leaves a run no time"),
        ("slurm", "memory=lots", "launcher.memory='lots' is no memory"),
        ("slurm", "gpus=-1", "launcher.gpus=-1 is not allowed"),
        ("slurm", "cpus=0", "launcher.cpus=0 is not allowed"),
        ("slurm", "cluster=lsf", "choose one of 'slurm', 'local'"),
        ("slurm", "sbatch=--exclusive", "no option of sbatch"),
        ("slurm", "exclusive", "'exclusive' is no option of a launcher; write name=value"),
        ("slurm", "a='b", "cannot read the launcher's options"),
        ("ray", "address=7", "launcher.address=7 is a int, not a text"),
        ("ray", "memory=3.5G", "launcher.memory='3.5G' is no memory"),
    ],
)
def test_options_that_cannot_be_are_said_with_what_can(
    name: str, options: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        launchers.load(name, options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-12", 3600), ("1-0:30", 1470),
     ("0-0:0:1", 1)],
)  # fmt: skip
def test_time_limits_are_those_of_slurm(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


# ---------------------------------------------------------------------- before work


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((), "no CUDA device is seen"))
    return lambda *arguments: reproduce.main(arguments_for(tmp_path, "--seeds", "1", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slurm",), "sbatch, srun, sacct, scancel not found on the PATH"),
        (("slurm", "cluster=local gpus=1"), "cluster=local shares no GPUs out"),
        (("slurm", "nodes=3"), "no option 'nodes'"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_said_before_any_work(
    arguments: tuple[str, ...],
    message: str,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    name, *options = arguments
    given = [f"--launcher-args={option}" for option in options]
    assert command("--scale", "tiny", "--launcher", name, *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(("name", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_package_that_lacks_is_named_with_how_to_get_it(
    name: str,
    package: str,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = on_slurm.importlib.util.find_spec
    lacks = lambda asked, *more: None if asked == package else find(asked, *more)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", lacks)
    assert command("--scale", "tiny", "--launcher", name) == 2
    error = capsys.readouterr().err
    assert f"launcher={name} needs the package {package}" in error
    assert "pip install" in error


def test_the_plan_of_a_cluster_looks_at_no_device_of_this_machine(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--scale", "paper", "--launcher", "slurm", "--plan") == 0
    said = capsys.readouterr().out
    assert "on slurm, as many at once as it has room for; 1 GPU and 4 cores for each run" in said
    assert "refused" not in said
    assert command("--scale", "paper", "--launcher=slurm", "--launcher-args=gpus=0") == 2
    assert "launcher.gpus=0 asks for none" in capsys.readouterr().err


def test_a_run_on_a_cluster_has_its_place_for_itself() -> None:
    slurm = launchers.load("slurm")
    paper = slurm.allot("3", "paper", [], 9)
    assert len(paper.environments) == 3
    assert paper.environments[0]["OMP_NUM_THREADS"] == "4"
    assert "CUDA_VISIBLE_DEVICES" not in paper.environments[0]  # Slurm sets it
    tiny = slurm.allot("auto", "tiny", [], 9)
    assert tiny.is_open
    assert tiny.environments[0] == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", CELLS_ON_DEVICE: "1",
    }  # fmt: skip


# ---------------------------------------------------------------------- order, limits, refusals


class Recorded:
    """A cluster that does a job while it is waited for, and takes no more than it has room for.

    Args:
        room: jobs that it takes before one has ended.
    """

    def __init__(self, room: int = 99) -> None:
        self.room, self.given, self.most = room, 0, 0
        self.tasks: list[Any] = []

    def give(self, job: Job, place: Place) -> Any:
        if len(self.tasks) >= self.room:
            raise SubmissionError("no room")
        self.place = place
        self.tasks.append(Ended(job))
        self.given += 1
        self.most = max(self.most, len(self.tasks))
        return self.tasks[-1]

    def wait(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        first = self.tasks.pop(0)
        assert first in tasks
        return [first]

    def stop(self, tasks: Sequence[Any], seconds: float) -> None:
        assert not tasks

    def close(self) -> None:
        pass


class Ended:
    def __init__(self, job: Job) -> None:
        self.job = job

    def report(self) -> Report:
        behaviour = self.job.arguments[0].partition(":")[2]
        return Report("lost", DEATH) if behaviour == "lost" else Report(None, seconds=1.0)


def recorded(folder: Path, cluster: Recorded, limit: int | None = None) -> Elsewhere:
    return Elsewhere(cluster=cluster, limit=limit, environment={}, logs=folder, name="x")


@pytest.mark.parametrize(("limit", "room", "most"), [(None, 99, 4), (2, 99, 2), (None, 3, 3)])
def test_a_cluster_is_given_what_it_takes(
    limit: int | None, room: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "ASK_AGAIN_S", 0.0)
    cluster = Recorded(room)
    with recorded(tmp_path, cluster, limit) as place:
        assert not failed(collect(place, [job(f"a{i}:good") for i in range(4)]))
    assert (cluster.given, cluster.most) == (4, most)


def test_a_lost_job_waits_for_nobody_and_is_given_twice(tmp_path: Path) -> None:
    cluster = Recorded()
    jobs = [job("a:lost"), job("b:good", "a"), job("c:good")]
    with recorded(tmp_path, cluster) as place:
        outcomes = collect(place, jobs)
    assert failed(outcomes) == {"a", "b"}
    assert not outcomes["b"].was_run
    assert cluster.given == 3


def test_a_job_gets_the_settings_of_its_command_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    cluster = Recorded()
    with recorded(tmp_path, cluster) as place:
        collect(place, [job("a:good")])
    assert cluster.place.environment["WANDB_MODE"] == "offline"
    assert "secret" not in cluster.place.environment.values()


def test_a_cluster_that_takes_nothing_ends_the_command(tmp_path: Path) -> None:
    with recorded(tmp_path, Recorded(0)) as place, pytest.raises(ValueError, match="no room"):
        collect(place, [job("a:good")])


def test_the_lock_of_a_command_is_held_while_it_lives_and_leaves_nothing(tmp_path: Path) -> None:
    folder = elsewhere.command_folder(tmp_path, "x")
    with recorded(tmp_path, Recorded()):
        assert is_held(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["folder", "lock"])
def test_a_job_that_does_not_see_its_command_does_nothing(which: str, tmp_path: Path) -> None:
    """As on a machine without the shared file system, or one whose locks are its own."""
    (tmp_path / "here").mkdir()
    folder = tmp_path / ("nowhere" if which == "folder" else "here")
    code = (
        "import sys; from pathlib import Path; from scripts.runs.elsewhere import Place, work; "
        "from scripts.runs.jobs import Job; folder = Path(sys.argv[1]); "
        "place = Place(folder, folder, folder / 'log', {}); "
        f"print(work(Job('{RUN}', ('a:good',), 'a'), place).error, file=open(sys.argv[2], 'w'))"
    )
    said = tmp_path / "said"
    subprocess.run([sys.executable, "-c", code, str(folder), str(said)], cwd=ROOT, check=True)
    words = "on a file system that all machines share" if which == "folder" else "sees no lock on"
    assert words in said.read_text()


# ---------------------------------------------------------------------- Slurm, tried here


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., Elsewhere]:
    """Return Slurm, or what options make of it."""
    pytest.importorskip("submitit", reason="submitit is not installed (requirements.lock)")

    def make(**options: Any) -> Elsewhere:
        return Slurm(**options).open(
            gpus=0, limit=2, environment={"FAULT_JOBS_LOG": str(tmp_path / "begun")},
            logs=tmp_path / "logs", name="x",
        )  # fmt: skip

    return make


@pytest.mark.long
def test_a_lost_job_is_given_once_more_and_then_named(
    slurm: Callable[..., Elsewhere], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [
        job("start:bad"), job("needs:good", "start"), job("killed:once"), job("dead:exit"),
        job("poisoned:sticky"), job("good:good", "killed"),
    ]  # fmt: skip
    with slurm(cluster="local") as place:
        outcomes = collect(place, jobs)
    assert failed(outcomes) == {"start", "needs", "dead", "poisoned"}
    assert outcomes["start"].error == "ValueError: rank=0 must be 1 or more"
    assert not outcomes["needs"].was_run
    error = outcomes["dead"].error
    assert error is not None
    assert error.endswith("see logs/x-dead.log")
    assert "ended without an answer" in error
    assert "killed: job" in caplog.text
    assert sorted(begun(tmp_path)) == sorted(["start", "good", *["killed", "dead", "poisoned"] * 2])
    assert "killed: process" in (tmp_path / "logs" / "x-killed.log").read_text()
    assert not [path for path in (tmp_path / "logs").iterdir() if path.is_dir()]


def test_a_job_that_is_preempted_goes_on_under_its_own_number(
    slurm: Callable[..., Elsewhere], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    is_asked = False
    with slurm(cluster="local") as place:
        for outcome in place.run([job("long:again")], tick_s=0.2):
            if place.running and (tmp_path / "begun").exists() and not is_asked:
                process = int((tmp_path / "begun").read_text().split()[0])
                os.kill(process, signal.SIGUSR2)  # as Slurm does before it preempts
                is_asked = True
            if outcome is not None:
                assert outcome.error is None
    assert begun(tmp_path) == ["long", "long"]
    assert "once more" not in caplog.text


@pytest.mark.long
def test_stopping_ends_what_runs(slurm: Callable[..., Elsewhere], tmp_path: Path) -> None:
    with slurm(cluster="local") as place:
        for _ in place.run([job("long:60")], tick_s=0.2):
            if place.running and (tmp_path / "begun").exists() and begun(tmp_path):
                break
        assert place.running[0][0].key == "long"
    process = int((tmp_path / "begun").read_text().split()[0])
    deadline = time.monotonic() + 30  # a busy machine takes a while to end it
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.long
def test_two_commands_at_once_make_every_run_once(tmp_path: Path) -> None:
    """Each on a cluster of its own, as two machines on one folder."""
    pytest.importorskip("submitit", reason="submitit is not installed (requirements.lock)")
    code = (
        "import sys; from pathlib import Path; from scripts.runs.on_slurm import Slurm; "
        "from scripts.runs.jobs import Job; folder = Path(sys.argv[1]); "
        f"jobs = [Job('{__name__}:make', (str(folder), f'r{{i}}'), f'r{{i}}') for i in range(3)]; "
        "place = Slurm(cluster='local').open(gpus=0, limit=2, environment={}, "
        "logs=folder / 'logs', name='x')\n"
        "with place: print([o.error for o in place.run(jobs) if o is not None])"
    )
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [command.communicate(timeout=120)[0] for command in commands]
    assert said == ["[None, None, None]\n"] * 2
    for index in range(3):
        assert len((tmp_path / f"r{index}" / "made").read_text().splitlines()) == 1


def make(folder: str, name: str) -> None:
    """Make a run as `scripts.runs.execution.execute` does: once, under its lock."""
    place = Path(folder) / name
    with lock(place, wait=True):
        if not (place / "done").exists():
            with (place / "made").open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            time.sleep(0.3)
            (place / "done").touch()


# ---------------------------------------------------------------------- Slurm's commands

COMMANDS = {
    "sbatch": """
grep -q 'partition=closed' "$1" && { echo "sbatch: error: invalid partition: closed" >&2; exit 1; }
id=$((100 + $(ls "$HERE" | grep -c '[.]job$')))
cp "$1" "$HERE/$id.job"
export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0
export SLURM_LOCALID=0 SLURM_JOB_NODELIST=node1
setsid sh -c 'bash "$0"; echo $? > "$1"' "$1" "$HERE/$id.rc" > /dev/null 2>&1 &
echo $! > "$HERE/$id.pid"
echo "Submitted batch job $id"
""",
    "srun": """
while [ "${1#--}" != "$1" ]; do
  case "$1" in --output) out=$2; shift;; --error) err=$2; shift;; esac
  shift
done
exec "$@" >> "$(echo "$out" | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/")" \\
  2>> "$(echo "$err" | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/")"
""",
    "sacct": """
echo "JobID|State|NodeList"
for job in "$HERE"/*.job; do
  id=$(basename "$job" .job); state=RUNNING
  [ -f "$HERE/$id.rc" ] && state=NODE_FAIL
  [ "$(cat "$HERE/$id.rc" 2> /dev/null)" = 0 ] && state=COMPLETED
  echo "$id|$state|node1"
done
""",
    "scancel": """
kill -TERM -- "-$(cat "$HERE/$1.pid")"
echo "$1" >> "$HERE/cancelled"
""",
}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stand-ins for Slurm's commands on the PATH; return the folder of what they keep."""
    kept, folder = tmp_path / "slurm", tmp_path / "bin"
    kept.mkdir()
    folder.mkdir()
    for name, text in COMMANDS.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\nHERE={kept}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setitem(on_slurm.LOOK_S, "slurm", 0.2)
    monkeypatch.setattr(on_slurm, "ANSWER_WITHIN_S", 0.0)
    return kept


def test_slurm_is_given_a_job_a_run_with_what_was_asked_for(
    slurm: Callable[..., Elsewhere], commands: Path, tmp_path: Path
) -> None:
    Slurm(gpus=0).check("tiny", [])
    options: dict[str, Any] = {
        "partition": "gpu", "account": "me", "time": "12:00:00", "cpus": 2, "memory": "8G",
        "sbatch": "gres=gpu:a100:1", "setup": f"echo loaded >> {tmp_path}/modules",
    }  # fmt: skip
    with slurm(**options) as place:
        outcomes = collect(place, [job("good:good"), job("bad:bad"), job("killed:once")])
    assert failed(outcomes) == {"bad"}
    assert outcomes["bad"].error == "ValueError: rank=0 must be 1 or more"
    given = [path.read_text() for path in sorted(commands.glob("*.job"))]
    assert len(given) == 4
    for line in (
        "--partition=gpu", "--account=me", "--time=720", "--cpus-per-task=2", "--mem=8G",
        "--gres=gpu:a100:1", "--requeue", "--job-name=x",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in given[0]
    assert "--gpus-per-node" not in given[0]
    assert (tmp_path / "modules").read_text() == "loaded\n" * 4


def test_what_slurm_does_not_take_is_said(slurm: Callable[..., Elsewhere], commands: Path) -> None:
    with slurm(partition="closed") as place, pytest.raises(ValueError, match="invalid partition"):
        collect(place, [job("good:good")])


def test_stopping_cancels_what_was_given_to_slurm(
    slurm: Callable[..., Elsewhere], commands: Path, tmp_path: Path
) -> None:
    with slurm() as place:
        for _ in place.run([job("long:60"), job("other:60")], tick_s=0.2):
            if len(place.running) == 2:
                break
    assert (commands / "cancelled").read_text().split() == ["100", "101"]
