"""One process at a time in a folder, with the system's locks and without."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest

from delta_lora import locks
from scripts.runs.composition import ConfigError
from scripts.runs.folder import LOCK, LockedError, clear, is_held, lock
from tests.faults.tally import Tally

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
pytestmark = pytest.mark.faults


@pytest.fixture(params=NO_LOCKS, ids=lambda number: errno.errorcode[number])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_folder_is_held_by_one_where_there_are_no_locks(
    no_locks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, tally: Tally
) -> None:
    folder = tmp_path / "run"
    soft = locks.soft(folder / LOCK)
    with lock(folder, wait=False):
        assert is_held(folder)
        with pytest.raises(LockedError, match=f"process {os.getpid()} on ") as caught:
            lock(folder, wait=False).__enter__()
        assert f"or, if it is gone, remove {soft}" in str(caught.value)
        clear(folder)
        assert soft.exists()
    assert not is_held(folder)
    assert not soft.exists()
    assert caplog.text.count("has no locks") == 1
    tally.add("file systems without locks", "right")


def test_the_lock_of_a_process_that_has_ended_is_taken_over(no_locks: None, tmp_path: Path) -> None:
    soft = locks.soft(tmp_path / LOCK)
    soft.write_text(f"{2**22 + 1}\n{socket.gethostname()}\n")
    with lock(tmp_path, wait=False):
        assert soft.read_text().splitlines()[0] == str(os.getpid())


def test_that_of_another_machine_is_named_with_what_to_do(no_locks: None, tmp_path: Path) -> None:
    soft = locks.soft(tmp_path / LOCK)
    soft.write_text("7\nanother-machine\n")
    (tmp_path / ".owner").write_text("7 on another-machine")
    with pytest.raises(LockedError, match="process 7 on another-machine is already") as caught:
        lock(tmp_path, wait=False).__enter__()
    assert str(soft) in str(caught.value)


def test_another_error_of_a_lock_is_no_lack_of_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=r"cannot write to the output folder .*Input/output"):
        lock(tmp_path, wait=False).__enter__()
