"""Runs as tasks of a real ray cluster on this machine: lost, stopped, and refused before work."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.runs.composition import ROOT
from scripts.runs.elsewhere import Elsewhere
from scripts.runs.on_ray import Ray
from tests.ray_cluster import IS_INSTALLED, TOKEN, WHY_NOT, RayCluster, members, started
from tests.unit.test_launchers import RUN, begun, collect, failed, job

pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason=WHY_NOT)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with started(num_cpus=2) as found:
        yield found


@pytest.fixture
def elsewhere(cluster: RayCluster, tmp_path: Path) -> Callable[[], Elsewhere]:
    """Return ray with the cluster of these tests."""
    return lambda: Ray(address=cluster.address).open(
        gpus=0, limit=None, environment={"FAULT_JOBS_LOG": str(tmp_path / "begun")},
        logs=tmp_path / "logs", name="x",
    )  # fmt: skip


def test_a_lost_job_is_given_once_more_and_then_named(
    elsewhere: Callable[[], Elsewhere], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [
        job("start:bad"), job("needs:good", "start"), job("killed:once"), job("dead:exit"),
        job("poisoned:sticky"), job("good:good", "killed"),
    ]  # fmt: skip
    with elsewhere() as place:
        outcomes = collect(place, jobs)
    assert failed(outcomes) == {"start", "needs", "dead", "poisoned"}
    assert outcomes["start"].error == "ValueError: rank=0 must be 1 or more"
    assert not outcomes["needs"].was_run
    error = outcomes["dead"].error
    assert error is not None
    assert error.startswith("lost by the cluster (WorkerCrashedError: ")
    assert error.endswith("see logs/x-dead.log")
    assert "killed: lost by the cluster" in caplog.text
    assert sorted(begun(tmp_path)) == sorted(["start", "good", *["killed", "dead", "poisoned"] * 2])
    processes = [line.split()[0] for line in (tmp_path / "begun").read_text().splitlines()]
    assert len(set(processes)) == len(processes), "a process does one run, whatever it breaks"
    assert not [path for path in (tmp_path / "logs").iterdir() if path.is_dir()]


def test_stopping_ends_what_runs_and_leaves_the_cluster(
    elsewhere: Callable[[], Elsewhere], cluster: RayCluster, tmp_path: Path
) -> None:
    began = time.monotonic()
    with elsewhere() as place:
        for _ in place.run([job(f"long{i}:60") for i in range(3)], tick_s=0.2):
            if len(place.running) == 2:  # the third has no room
                break
    assert time.monotonic() - began < 30
    for line in (tmp_path / "begun").read_text().splitlines():
        process = Path("/proc") / line.split()[0]
        while process.exists():
            assert time.monotonic() - began < 60, "a run goes on that was stopped"
            time.sleep(0.1)
    assert cluster.process.poll() is None
    with elsewhere() as place:
        assert not failed(collect(place, [job("again:good")]))


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states from /proc")
def test_a_cluster_that_a_command_has_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from scripts.runs.jobs import Job; "
        "from scripts.runs.on_ray import Ray; folder = Path(sys.argv[1]); "
        "place = Ray(address='local').open(gpus=0, limit=1, logs=folder / 'logs', name='x', "
        "environment={'FAULT_JOBS_LOG': str(folder / 'begun')})\n"
        f"with place: print([o.error for o in place.run([Job('{RUN}', ('a:good',), 'a')]) if o])"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, start_new_session=True,
        env={**os.environ, **TOKEN}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert command.communicate(timeout=120)[0].endswith("[None]\n")
    assert command.returncode == 0
    until = time.monotonic() + 60
    while left := members(command.pid):
        assert time.monotonic() < until, f"processes are left: {left}"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": "nowhere"}, "launcher.address='nowhere' is no address; write host:port"),
        ({"gpus": 4}, "no machine of the ray cluster has room for a run with launcher.gpus=4"),
        ({"memory": "900T"}, "launcher.memory=900T: they have 0 GPUs, 2 CPUs"),
    ],
)
def test_a_cluster_that_cannot_do_it_is_said_with_what_to_do(
    options: dict[str, object],
    message: str,
    cluster: RayCluster,
) -> None:
    import ray

    asked = Ray(**{"address": cluster.address, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(message)):
        asked.check("tiny", [])
    assert not ray.is_initialized()


def test_an_address_where_nobody_answers_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"no ray cluster answers at {address}.*ray start --head"):
        Ray(address=address).check("tiny", [])
    assert time.monotonic() - began < 10
