"""A ray cluster of this machine for tests, with a token of its own; ended by its process number.

ray reads how it proves itself to a cluster when it is imported, so nothing here imports it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

IS_INSTALLED = importlib.util.find_spec("ray") is not None
WHY_NOT = "ray is not installed (make setup LAUNCHER=ray)"
#: of all clusters of this process and of those who use them.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@dataclass(frozen=True)
class RayCluster:
    """A running cluster.

    Attributes:
        address: host and port of its head.
        process: the command that started it.
    """

    address: str
    process: subprocess.Popen[bytes]


def members(group: int) -> list[int]:
    """Return the processes of a session that live, by number."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@contextmanager
def started(*, num_cpus: int, **environment: str) -> Iterator[RayCluster]:
    """Start a cluster; behind the block it has ended, with all of its processes.

    Args:
        num_cpus: tasks of one core that it does at once.
        environment: further environment variables of its processes.
    """
    os.environ.update(TOKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets are 107 letters at most
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `ray start ... &` of a script is
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
         f"--port={port}", "--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}",
         "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000",
         f"--temp-dir={folder}"],
        env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    try:
        _wait_for_answer(process, port)
        yield RayCluster(f"127.0.0.1:{port}", process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        until = time.monotonic() + 20
        while left := members(process.pid):
            assert time.monotonic() < until, f"the cluster has left processes: {left}"
            time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_answer(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + 60
    while True:
        assert process.poll() is None, "ray start has ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < until, "ray start does not answer"
            time.sleep(0.2)
