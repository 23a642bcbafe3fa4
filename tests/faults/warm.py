"""Commands of the suite in forked processes: a fault costs a second, not ten of imports.

`Warm` starts one process that imports everything and then forks a child for every command. A child
is a real process: it can be killed, limited and signalled. It runs a script with its command line,
or, for ``script=RUN``, what ``train.py`` does behind its composition, which writes nothing and
takes longer than the run. What it prints goes into a pipe, so that a limit on files does not touch
it.

In a child every *writing event* in the folder ``watch`` is counted: opening a file to write, and
making, renaming, cutting or removing one. At the event of a given number the child is killed, or
finds the disk full from there on: `RLIMIT_FSIZE` of 0, under which no file can grow, in Python or
elsewhere, by any way of writing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import runpy
import select
import shlex
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: seconds after which a command is said to hang.
TIMEOUT_S = 150.0
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILL, FULL, READ_ONLY = "kill", "full", "read-only"
#: in place of a script: a run, composed before.
RUN = "a run"
#: what a child says on its pipe of events of a module that it had to import.
_MODULE = "module "


@dataclass(frozen=True)
class Command:
    """What a child does, and what is done to it.

    Attributes:
        arguments: of the script.
        script: relative to the repository; `RUN`: see above.
        watch: folder whose writing events are counted.
        at_event: number of the event, from 1, at which `fault` happens; 0: never.
        on_name: count only events of files whose path holds this text.
        fault: `KILL`, `FULL`, or `READ_ONLY`, which refuses every event from there on.
        kill_after: seconds after which it is killed; None: never.
        signals: (seconds after the one before, number) of signals that it gets.
        limits: name of a limit of `resource` to its value; below 0: so many bytes of address space
            more than it has at its start.
        no_locks: number of the error with which the system refuses locks of files; 0: it has them.
        closed: numbers of streams that are closed from the start.
        environment: variables on top of those of the tests.
        folder: working folder.
    """

    arguments: tuple[str, ...]
    script: str = "scripts/train.py"
    watch: str = "/nonexistent"
    at_event: int = 0
    on_name: str = ""
    fault: str = KILL
    kill_after: float | None = None
    signals: tuple[tuple[float, int], ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    no_locks: int = 0
    closed: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = str(ROOT)

    def __str__(self) -> str:
        """As it is typed, and what is done to it."""
        script = "scripts/train.py" if self.script == RUN else self.script
        usual = {"arguments", "script"}
        faults = {k: v for k, v in asdict(self).items() if k not in usual and v != _USUAL.get(k)}
        return f"python {script} {shlex.join(self.arguments)}   # {faults}"


_USUAL = asdict(Command(()))


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
        seconds: how long it took.
        events: writing events that were seen.
        output: what it printed, both streams.
        hung: whether it had to be killed after `TIMEOUT_S`.
    """

    code: int
    seconds: float
    events: list[str]
    output: str
    hung: bool

    @property
    def last_line(self) -> str:
        """The last line that it printed."""
        return (self.output.strip().splitlines() or [""])[-1]

    @property
    def has_traceback(self) -> bool:
        """Whether a user sees one, or an error that nobody caught."""
        said = ("Traceback (most recent", "Error executing job", "Exception ignored", "Logging er")
        return any(text in self.output for text in said)


class Warm:
    """A process that runs commands in children; use it in a ``with`` block."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nonexistent"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"], cwd=ROOT, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def send(self, *commands: Command) -> None:
        """Start commands, all at the same moment; `receive` waits for them."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([asdict(c) for c in commands]) + "\n")
        self._process.stdin.flush()

    def receive(self) -> list[Ended]:
        """Return how the commands of `send` ended."""
        assert self._process.stdout is not None
        return [Ended(**found) for found in json.loads(self._process.stdout.readline())]

    def run(self, command: Command) -> Ended:
        """Run a command to its end."""
        self.send(command)
        return self.receive()[0]


# ---------------------------------------------------------------------- the process itself


def main() -> None:
    """Import what a run needs; then fork children for the commands on standard input."""
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in (
        "accelerate", "transformers", "transformers.models.gpt2.modeling_gpt2", "hydra", "peft",
        "transformers.models.roberta.modeling_roberta", "safetensors.torch", "scipy.stats",
        "delta_lora.adapter", "delta_lora.trainer", "delta_lora.analysis.similarity",
        "delta_lora.export", "tasks.e2e", "tasks.glue", "tasks.metrics.e2e",
        "scripts.train", "scripts.tables", "scripts.reproduce", "scripts.export", "scripts.sweep",
        "scripts.audit", "scripts.report", "matplotlib.pyplot", "datasets", "evaluate",
    ):  # fmt: skip
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        commands = json.loads(line)
        for command in commands:
            if command["script"] == RUN:
                _composed(*_apart(command["arguments"]))
        children = [_Child(command) for command in commands]
        for child in children:
            child.wait()
            for name in child.modules:  # that the next child need not import
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        answers.write(json.dumps([child.ended for child in children]) + "\n")
        answers.flush()


class _Child:
    """One child and its pipes, seen from the process that forked it."""

    def __init__(self, command: dict[str, Any]) -> None:
        self.command = command
        self.output, theirs = os.pipe()
        self.events, events = os.pipe()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.output)
            os.close(self.events)
            _do(command, theirs, events)
        os.close(theirs)
        os.close(events)
        self.texts = {self.output: b"", self.events: b""}
        self.ended: dict[str, Any] = {}

    def wait(self) -> None:
        """Give the child its signals, and read what it prints until it ends."""
        hung, due = False, self._due()
        open_pipes = {self.output, self.events}
        while open_pipes:
            now = time.monotonic() - self.began
            while due and due[0][0] <= now:
                _signal(self.pid, due.pop(0)[1])
            if now > TIMEOUT_S and not hung:
                hung = True
                _signal(self.pid, signal.SIGKILL)
            for pipe in select.select(list(open_pipes), [], [], 0.02)[0]:
                if found := os.read(pipe, 65536):
                    self.texts[pipe] += found
                else:
                    open_pipes.remove(pipe)
                    os.close(pipe)
        status = os.waitpid(self.pid, 0)[1]
        told = self.texts[self.events].decode(errors="replace").splitlines()
        self.modules = [t.removeprefix(_MODULE) for t in told if t.startswith(_MODULE)]
        self.ended = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - self.began,
            "events": [text for text in told if not text.startswith(_MODULE)],
            "output": self.texts[self.output].decode(errors="replace"),
            "hung": hung,
        }

    def _due(self) -> list[tuple[float, int]]:
        due, at = [], 0.0
        for after, number in self.command["signals"]:
            at += after
            due.append((at, number))
        if self.command["kill_after"] is not None:
            due.append((self.command["kill_after"], signal.SIGKILL))
        return due


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _do(command: dict[str, Any], output: int, events: int) -> None:
    """Run the command in this process, which ends with it."""
    code = 70
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.update(command["environment"])
        os.chdir(command["folder"])
        sys.stdin, sys.stdout, sys.stderr = (
            _stream(number, command["closed"]) for number in (0, 1, 2)
        )
        if command["no_locks"]:
            _refuse_locks(command["no_locks"])
        for name, value in command["limits"].items():
            if value < 0:
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
                value = pages * resource.getpagesize() - value
            resource.setrlimit(getattr(resource, name), (value, value))
        before = set(sys.modules)
        sys.addaudithook(_hook(command, events))
        try:
            if command["script"] == RUN:
                _run(command["arguments"])
            else:
                sys.argv = [str(ROOT / command["script"]), *command["arguments"]]
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        for name in sorted(set(sys.modules) - before):
            os.write(events, f"{_MODULE}{name}\n".encode())
    finally:
        os._exit(code)


def _run(arguments: list[str]) -> None:
    """Do what train.py does with a run that is composed."""
    from delta_lora import console
    from scripts import train
    from scripts.runs.run import Run

    overrides, outputs = _apart(arguments)
    known = _composed(overrides, outputs)
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)

    def make() -> Run:
        config = known.config.copy()
        config.paths.outputs = outputs
        run = Run(config)
        run.meaning = known.meaning
        if known.pretraining is not None:
            run.pretraining.meaning = known.pretraining.meaning  # type: ignore[union-attr]
        return run

    def work() -> None:
        train.carry_out(make, is_sweep=False)

    console.run(work)


def _apart(arguments: list[str]) -> tuple[tuple[str, ...], str]:
    """Return the overrides of a run without its folder of outputs, and that."""
    place = next(a for a in arguments if a.startswith("paths.outputs="))
    return tuple(a for a in arguments if a != place), place.partition("=")[2]


_RUNS: dict[tuple[str, ...], Any] = {}


def _composed(overrides: tuple[str, ...], outputs: str) -> Any:
    """Return a run, composed once; everything of it that costs time is known."""
    from scripts.runs.run import Run

    if overrides not in _RUNS:
        run = Run.compose([*overrides, f"paths.outputs={outputs}"])
        if run.pretraining is not None:
            assert run.pretraining.meaning
        assert run.meaning
        _RUNS[overrides] = run
    return _RUNS[overrides]


def _stream(number: int, closed: list[int]) -> Any:
    """Return a standard stream as Python makes it at its start."""
    if number in closed:
        os.close(number)
        return None
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    errors = "backslashreplace" if number == 2 else "strict"
    return open(
        number, "r" if number == 0 else "w", encoding=encoding, errors=errors, buffering=1,
        closefd=False,
    )  # fmt: skip


def _refuse_locks(number: int) -> None:
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    fcntl.flock = flock  # type: ignore[assignment]


def _hook(command: dict[str, Any], events: int) -> Any:
    count = 0
    watch, name, at = command["watch"], command["on_name"], command["at_event"]
    refused = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, refused
        if event not in _EVENTS or not arguments or not isinstance(arguments[0], (str, bytes)):
            return
        path = os.fsdecode(arguments[0])
        if watch not in path or name not in path:
            return
        if event == "open" and not (arguments[2] or 0) & _WRITES:
            return
        if refused:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        count += 1
        os.write(events, f"{event} {path}\n".encode())
        if count != at:
            return
        if command["fault"] == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif command["fault"] == FULL:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        else:
            refused = True
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    return hook


if __name__ == "__main__":
    main()
