"""Runs of seconds on a real ray cluster of this machine and on submitit's local executor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.runs import launchers
from scripts.runs.batch import Batch
from scripts.runs.cells import Cell
from scripts.runs.execution import execute
from scripts.runs.run import Run
from tests.ray_cluster import IS_INSTALLED, WHY_NOT, RayCluster, started
from tests.smoke.conftest import ROOT, command, environment
from tests.smoke.test_runs import contents

pytestmark = pytest.mark.long
needs_ray = pytest.mark.skipif(not IS_INSTALLED, reason=WHY_NOT)
STARTS = (0, 2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    folder = tmp_path_factory.mktemp("bin")  # what ray needs to start a process, and no Java
    (folder / "bash").symlink_to("/bin/bash")
    with started(num_cpus=2, OMP_NUM_THREADS="1", PATH=str(folder)) as found:
        yield found


def runs_of(
    small: Callable[..., list[str]], folder: Path, *more: str, starts: tuple[int, ...] = STARTS
) -> list[Run]:
    """Return the runs of a small grid."""
    same = ("method=delta_lora", "seed=5", *more)
    return [Run.compose(small(*same, f"method.start_step={k}", folder=folder)) for k in starts]


def straight(
    small: Callable[..., list[str]],
    folder: Path,
    own: Path,
    *more: str,
    starts: tuple[int, ...] = STARTS,
) -> list[Run]:
    """Make the runs in this process; lend their pre-trained model to the folder `own`."""
    runs = runs_of(small, folder, *more, starts=starts)
    for run in runs:
        execute(run)
    base = runs[0].pretraining.folder
    own.mkdir()
    (own / base.name).symlink_to(base)
    return runs


@pytest.mark.parametrize("launcher", ["slurm", pytest.param("ray", marks=needs_ray)])
def test_a_table_on_a_cluster_has_the_same_records_to_the_bit(
    launcher: str,
    small: Callable[..., list[str]],
    outputs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if launcher == "slurm":
        pytest.importorskip("submitit", reason="submitit is not installed (requirements.lock)")
        options = "cluster=local"
    else:
        options = f"address={request.getfixturevalue('cluster').address}"
    expected = straight(small, outputs, tmp_path / "own")
    runs = runs_of(small, tmp_path / "own")
    batch = Batch.plan(
        [Cell(f"K = {k}", "e2e", run) for k, run in zip(STARTS, runs, strict=True)],
        scale="tiny", extra=[], workers="2", launcher=launchers.load(launcher, options),
    )  # fmt: skip
    batch.check(tmp_path / "results")
    assert batch.run("x") == {}
    for run, other in zip(runs, expected, strict=True):
        assert run.is_done
        assert run.record()["resources"]["cells_on_device"] == 1
        assert contents(run.folder) == contents(other.folder)
    again = Batch.plan(batch.cells, scale="tiny", extra=[], workers="2", launcher=batch.launcher)
    assert again.todo == []


@needs_ray
@pytest.mark.long
def test_a_ray_worker_that_is_killed_costs_a_sweep_nothing(
    small: Callable[..., list[str]], outputs: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason=WHY_NOT)
    longer = "trainer.max_steps=20"
    expected = straight(small, outputs, tmp_path / "own", longer)
    runs = runs_of(small, tmp_path / "own", longer)
    arguments = [
        "-m", "hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={cluster.address}",
        *small("method=delta_lora", "seed=5", longer, "method.start_step=0,2",
               folder=tmp_path / "own"),
    ]  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        command(arguments), cwd=work, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = runs[0].folder
    killed = _kill_when(folder / "metrics.jsonl", folder / ".owner", process)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-2000:]
    assert out.splitlines()[-1] == "2 done"
    assert killed != int((folder / ".owner").read_text().split()[0]), "another process went on"
    for run, other in zip(runs, expected, strict=True):
        assert contents(run.folder) == contents(other.folder)


def _kill_when(begun: Path, owner: Path, process: subprocess.Popen[str]) -> int:
    """Kill the process that works in a run folder, once it has trained; return its number."""
    until = time.monotonic() + 120
    while not (begun.exists() and begun.stat().st_size > 0):
        assert process.poll() is None, "the sweep ended before a worker could be killed"
        assert time.monotonic() < until
        time.sleep(0.005)
    number = int(owner.read_text().split()[0])
    os.kill(number, signal.SIGKILL)
    return number


@pytest.mark.long
def test_a_stopped_table_continues_on_the_cluster(
    small: Callable[..., list[str]], outputs: Path, tmp_path: Path
) -> None:
    """Ctrl-C in the middle, then the same again."""
    pytest.importorskip("submitit", reason="submitit is not installed (requirements.lock)")
    longer = "trainer.max_steps=20"
    (other,) = straight(small, outputs, tmp_path / "own", longer, starts=(0,))
    (run,) = runs_of(small, tmp_path / "own", longer, starts=(0,))
    code = (
        "import sys; from scripts.runs import launchers; from scripts.runs.batch import Batch; "
        "from scripts.runs.cells import Cell; from scripts.runs.command import exit_code; "
        "from scripts.runs.run import Run\n"
        "cell = Cell('K = 0', 'e2e', Run.compose(sys.argv[1:]))\n"
        "batch = Batch.plan([cell], scale='tiny', extra=[], workers='2', "
        "launcher=launchers.load('slurm', 'cluster=local'))\n"
        "sys.exit(exit_code(lambda: len(batch.run('x'))))"
    )
    given = [
        sys.executable, "-c", code,
        *small("method=delta_lora", "seed=5", longer, "method.start_step=0",
               folder=tmp_path / "own"),
    ]  # fmt: skip
    settings = {"cwd": ROOT, "env": environment(), "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        given, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **settings
    )
    begun = run.folder / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (begun.exists() and begun.stat().st_size > 0):
        assert process.poll() is None, "the table ended before it could be stopped"
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert "stopped; the same command continues from here" in error
    assert not run.is_done
    done = subprocess.run(given, timeout=200, check=False, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(run.folder) == contents(other.folder)
