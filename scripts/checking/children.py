"""Further processes of a check: started with a time limit, read by the JSON file they leave."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.checking.finding import Deadline

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Child:
    """A running process of `scripts.checking.child`.

    Attributes:
        process: the process.
        answer: the JSON file that it writes at its end.
        log: what it printed.
    """

    process: subprocess.Popen[bytes]
    answer: Path
    log: Path

    def result(self) -> dict[str, Any]:
        """Return what it answered.

        Raises:
            RuntimeError: it ended without an answer; with the end of what it printed.
        """
        if self.process.returncode == 0 and self.answer.exists():
            content: dict[str, Any] = json.loads(self.answer.read_text(encoding="utf-8"))
            return content
        raise RuntimeError(
            f"{self.answer.stem} ended with {self.process.returncode}: {self.tail()}"
        )

    def tail(self) -> str:
        """Return the last lines of what it printed, as one line."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return " / ".join(line.strip() for line in lines[-14:] if line.strip())


def start(
    kind: str,
    arguments: Mapping[str, Any],
    folder: Path,
    *,
    name: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start one process.

    Args:
        kind: which function of `scripts.checking.child`.
        arguments: its keywords; paths as text.
        folder: where its answer and its log go.
        name: name of both files; None: `kind`.
        environment: variables beside this process's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answer, log = folder / f"{name or kind}.json", folder / f"{name or kind}.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "scripts.checking.child", kind, json.dumps(dict(arguments))]
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [*command, str(answer)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
    return Child(process, answer, log)


@contextlib.contextmanager
def ended_after(children: Sequence[Child]) -> Iterator[None]:
    """Kill what still runs of `children` when the block ends."""
    try:
        yield
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()


def wait(children: Sequence[Child], timeout_s: float, what: str) -> None:
    """Wait until all have ended.

    Raises:
        TimeoutError: one did not; with the end of what each of those printed.
    """
    deadline = Deadline(timeout_s, what)
    for child in children:
        try:
            child.process.wait(deadline.left_s)
        except subprocess.TimeoutExpired:
            running = [c for c in children if c.process.poll() is None]
            said = "; ".join(f"{c.answer.stem}: {c.tail()}" for c in running)
            raise TimeoutError(f"{what} did not end within {timeout_s:g} s ({said})") from None


def free_port() -> int:
    """Return a TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
