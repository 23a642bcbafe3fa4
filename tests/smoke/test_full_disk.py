"""A run whose disk fills up says so in one line, leaves nothing half, and goes on."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from delta_lora import checkpoint
from delta_lora.writing import UNFINISHED, WriteError
from scripts import train
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute, prepare
from scripts.runs.folder import LockedError
from scripts.runs.run import Run
from tests.choices import first
from tests.faults.tally import Tally

pytestmark = pytest.mark.faults


@pytest.fixture
def limit() -> Iterator[Callable[[], None]]:
    """Return what makes the disk full until the test ends or `resource.setrlimit` is called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("moment", first(["checkpoint", "record"]))
def test_a_full_disk_stops_a_run_with_its_own_error_and_the_run_goes_on(
    moment: str,
    small: Callable[..., list[str]],
    limit: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    run = Run.compose(small("method=lora", f"seed={700 + len(moment)}"))
    prepare([run])
    name = "write_tensors" if moment == "checkpoint" else "write_json"
    known = getattr(checkpoint, name)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(path: Path, content: Any) -> None:
        if moment == "checkpoint" or path.name == "resources.json":
            limit()
        known(path, content)

    monkeypatch.setattr(checkpoint, name, write)
    with pytest.raises(WriteError, match=rf"cannot write {run.folder}/\S+: File too large") as seen:
        execute(run)
    assert "\n" not in str(seen.value)
    assert not list(run.folder.rglob(f"{UNFINISHED}*"))
    assert run.status().state == "partial"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(checkpoint, name, known)
    (run.folder / f"{UNFINISHED}7-of-a-killed-process").write_text("half")
    assert execute(run)["status"] == "completed"
    assert not list(run.folder.rglob(f"{UNFINISHED}*"))
    tally.add("full disk in a run", "right")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (KeyboardInterrupt(), "error: stopped; the same command continues\n", 130),
        (KeyboardInterrupt("stopped at step 2 of 6"),
         "error: stopped at step 2 of 6; the same command continues\n", 130),
        (WriteError("cannot write /x: it is full; free space"),
         "error: cannot write /x: it is full; free space\n", 2),
        (ConfigError("a\nb"), "error: a b\n", 2),
        (LockedError("process 7 works there"), "error: process 7 works there\n", 2),
        (RuntimeError("can't start new thread"),
         "error: RuntimeError: can't start new thread (", 1),
    ],
)  # fmt: skip
def test_what_stops_a_run_is_one_line(
    error: BaseException, line: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def make() -> Run:
        raise error

    with pytest.raises(SystemExit) as stop:
        train.carry_out(make, is_sweep=False)
    assert stop.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_another_error_keeps_its_traceback() -> None:
    def make() -> Run:
        raise RuntimeError("a mistake of the program")

    with pytest.raises(RuntimeError, match="a mistake of the program"):
        train.carry_out(make, is_sweep=False)
