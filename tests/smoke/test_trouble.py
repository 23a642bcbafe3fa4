"""All the ways in which Weights & Biases may fail a real run; every run ends completed.

``pytest -s`` prints a line for each: how long the run waited, what was written, what was said.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from delta_lora import mirror, wandb_file
from delta_lora.mirror import WandbMirror
from scripts.runs.execution import execute
from scripts.runs.run import Run
from tests.smoke.mirrored import files, limit_files, services_of, warnings_of
from tests.smoke.wandb_server import KEY, Server

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("fresh_mirror")]

OFFLINE, NOTHING = "offline", "nothing"


@dataclass
class Trouble:
    """What a way to fail may use.

    Attributes:
        patch: sets variables and attributes.
        stack: closes what is opened.
        folder: of this run alone; wandb's files go there.
        at_first_log: called with the mirror when the run logs for the first time.
        pids: of processes that are ended in the end.
    """

    patch: pytest.MonkeyPatch
    stack: ExitStack
    folder: Path
    at_first_log: Callable[[Any], None] = lambda _: None
    pids: list[int] = field(default_factory=list)

    def serve(self, fails: dict[str, int | str | None]) -> Server:
        """Start a service, and let a key be configured."""
        server = self.stack.enter_context(Server(fails).running())
        self.use(server.address)
        return server

    def use(self, address: str) -> None:
        """Let the service be at `address`, with a key."""
        self.patch.setenv("WANDB_API_KEY", KEY)
        self.patch.setenv("WANDB_BASE_URL", address)


WAYS: dict[str, tuple[Callable[[Trouble], Any], str | None, str]] = {}


def way(
    name: str, written: str | None, warning: str
) -> Callable[[Callable[[Trouble], Any]], Callable[[Trouble], Any]]:
    """Add a way to fail: what is written all the same, and what the one warning says."""

    def add(make: Callable[[Trouble], Any]) -> Callable[[Trouble], Any]:
        WAYS[name] = (make, written, warning)
        return make

    return add


way("no key", OFFLINE, "")(lambda t: None)
way("a key that cannot be one", OFFLINE, "written offline: the key has 5 characters")(
    lambda t: t.patch.setenv("WANDB_API_KEY", "short")
)
way("a refused key (401)", OFFLINE, "a key or a project that the service refuses")(
    lambda t: t.serve({"/": 401})
)
way("no permission (403)", OFFLINE, "cannot be reached")(lambda t: t.serve({"/": 403}))
way("errors of the service (500)", OFFLINE, "cannot be reached")(lambda t: t.serve({"/": 500}))
way("answers of something else (a page of a portal)", OFFLINE, "cannot be reached")(
    lambda t: t.serve({"/": "<html>please log in</html>"})
)
way("a service that hangs", OFFLINE, "cannot be reached")(lambda t: t.serve({"/": None}))
way("a service that hangs after the start", OFFLINE, "cannot be reached")(
    lambda t: t.serve({"/files": None})
)
way("a host without a name", OFFLINE, "cannot be reached")(
    lambda t: t.use("http://nowhere.invalid")
)
way("switched off", NOTHING, "")(lambda t: t.patch.setenv("WANDB_MODE", "disabled"))


@way("nobody listens", OFFLINE, "cannot be reached")
def _(trouble: Trouble) -> None:
    with Server({}).running() as server:
        trouble.use(server.address)


@way("the network goes away in the middle", OFFLINE, "cannot be reached")
def _(trouble: Trouble) -> None:
    inner = trouble.stack.enter_context(ExitStack())
    server = inner.enter_context(Server({}).running())
    trouble.use(server.address)

    def leave(_: Any) -> None:
        _wait_for(lambda: server.runs)
        server.fails = {"/": None}

    trouble.at_first_log = leave


@way("a file where the folder should be", NOTHING, "gets nothing more")
def _(trouble: Trouble) -> None:
    (trouble.folder / "wandb").write_text("")


@way("a folder that cannot be written", NOTHING, "gets nothing more")
def _(trouble: Trouble) -> None:
    trouble.patch.setenv("WANDB_DIR", "/proc/nowhere")


@way("a full disk", NOTHING, "gets nothing more")
def _(trouble: Trouble) -> None:
    limit_files(trouble.patch)


def _stop_service(number: int) -> Callable[[Trouble], None]:
    def make(trouble: Trouble) -> None:
        if number == signal.SIGSTOP:
            trouble.patch.setattr(mirror, "_process", mirror._Process(patience_s=6.0))

        def stop(made: Any) -> None:
            services = _wait_for(lambda: services_of(made._child._process.pid))
            trouble.pids += services
            os.kill(services[0], number)

        trouble.at_first_log = stop

    return make


way("its service is killed", OFFLINE, "")(_stop_service(signal.SIGKILL))
way("its service stands still", NOTHING, "gets nothing more")(_stop_service(signal.SIGSTOP))


@way("the mirror's process is killed", NOTHING, "gets nothing more")
def _(trouble: Trouble) -> None:
    trouble.at_first_log = lambda made: os.kill(made._child._process.pid, signal.SIGKILL)


@way("wandb is not installed", NOTHING, "No module named wandb")
def _(trouble: Trouble) -> None:
    _stub(trouble, "raise ImportError('No module named wandb')")


@way("wandb is broken", NOTHING, "gets nothing more")
def _(trouble: Trouble) -> None:
    _stub(trouble, "")


@way("no process can be started", NOTHING, "a mirror of the log failed")
def _(trouble: Trouble) -> None:
    trouble.patch.setattr(mirror.sys, "executable", "/nowhere/python")


@way("a .netrc that cannot be read", OFFLINE, "")
def _(trouble: Trouble) -> None:
    (trouble.folder / "netrc").write_text("no netrc at all")
    trouble.patch.setenv("NETRC", str(trouble.folder / "netrc"))


def _stub(trouble: Trouble, text: str) -> None:
    (trouble.folder / "stub/wandb").mkdir(parents=True)
    (trouble.folder / "stub/wandb/__init__.py").write_text(text)
    trouble.patch.setenv("PYTHONPATH", str(trouble.folder / "stub"))


def _wait_for(look: Callable[[], list[Any]]) -> list[Any]:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("what a trouble waits for did not come")


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Trouble]:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with ExitStack() as stack:
        made = Trouble(monkeypatch, stack, tmp_path)
        yield made
        for pid in made.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", WAYS)
def test_every_run_ends_completed(
    name: str,
    trouble: Trouble,
    small: Callable[..., list[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, written, warning = WAYS[name]
    run = Run.compose(small("method=delta_lora", f"seed={100 + list(WAYS).index(name)}"))
    run.config.logger = {"_target_": "delta_lora.mirror.WandbMirror"}
    make(trouble)
    waited = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.monotonic()
            try:
                return method(*arguments)
            finally:
                waited[0] += time.monotonic() - began

        return call

    log = WandbMirror.log
    steps: list[int] = []

    def first(self: WandbMirror, step: int, values: Any) -> None:
        log(self, step, values)
        steps.append(step)
        if len(steps) == 1:
            trouble.at_first_log(self)

    monkeypatch.setattr(WandbMirror, "log", first)
    for part in ("begin", "close"):
        monkeypatch.setattr(WandbMirror, part, timed(getattr(WandbMirror, part)))
    record = execute(run)
    assert record["status"] == "completed"
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 4
    found = [path for path in files(trouble.folder) if wandb_file.read(path).exit_code == 0]
    said = [text for text in warnings_of(caplog) if "Weights & Biases" in text or "mirror" in text]
    what = OFFLINE if found else NOTHING
    sys.stdout.write(f"\n| {name} | {waited[0]:.1f} s | {what} | {' '.join(said) or '-'} |\n")
    assert waited[0] < 21
    assert bool(found) == (written == OFFLINE)
    assert len(said) == bool(warning)
    if "cannot be reached" in warning:  # the next run of this process does not try again
        assert mirror._process.best == "offline"
    assert warning in "".join(said)
    assert KEY not in caplog.text
