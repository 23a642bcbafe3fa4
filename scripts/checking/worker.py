"""The process that runs the checks, one after the other.

It pays the imports and the CUDA context once. A check that hangs, crashes or leaves the context
broken costs this process, and the next check gets a new one.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from scripts.checking import catalogue
from scripts.checking.finding import Context

_SPAWN = multiprocessing.get_context("spawn")
STARTUP_TIMEOUT_S = 180.0


class Worker:
    """A worker process and its pipe; use it in a ``with`` block.

    Args:
        context: given to every check.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(patience_s=10.0 if kind is None else 0.0)

    def facts(self) -> dict[str, Any]:
        """Return device, driver, versions and commit.

        Raises:
            RuntimeError: the device cannot be used, or the process gave no answer.
        """
        answer = self._ask(None, STARTUP_TIMEOUT_S)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return dict(answer)

    def run(self, check: catalogue.Check, timeout_s: float) -> dict[str, Any]:
        """Run one check; a hanging or crashing one fails, and its process ends.

        Args:
            check: which.
            timeout_s: seconds until it counts as hanging.
        """
        try:
            entry, is_usable = self._ask(check, timeout_s)
        except RuntimeError as error:
            return catalogue.outcome(check, catalogue.FAIL, reason=str(error))
        if not is_usable:
            self.stop()
        return dict(entry)

    def stop(self, patience_s: float = 0.0) -> None:
        """End the process and all that it started.

        Args:
            patience_s: seconds for an idle process to end by itself.
        """
        if self._process is not None:
            assert self._connection is not None
            self._connection.close()  # an idle one ends by that
            self._process.join(patience_s)
            if self._process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()  # also where it has not made a group of its own yet
            self._process.join()
        self._process = self._connection = None

    def _ask(self, check: catalogue.Check | None, timeout_s: float) -> Any:
        if self._process is None:
            self._connection, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=_serve, args=(theirs, self._context))
            self._process.start()
            theirs.close()
        assert self._connection is not None
        try:
            self._connection.send(check)
            if not wait([self._connection, self._process.sentinel], timeout_s):
                raise RuntimeError(f"no answer within {timeout_s:.0f} s")
            if not self._connection.poll():
                raise EOFError
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            raise RuntimeError(f"the process ended with exit code {code}") from None
        except RuntimeError:
            self.stop()
            raise


def _serve(connection: Connection, context: Context) -> None:
    """Answer until the other end is closed; the body of the process."""
    os.setsid()  # one group with all that the checks start
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="      %(levelname)s %(name)s: %(message)s")
    while True:
        try:
            check: catalogue.Check | None = connection.recv()
        except EOFError:
            return
        if check is None:
            connection.send(_facts(context))
            continue
        entry = catalogue.run(check, context)
        raised = entry["status"] == catalogue.FAIL and entry["reason"] is not None
        connection.send((entry, not raised and _is_clean(context)))


def _facts(context: Context) -> dict[str, Any] | str:
    """Return the facts of the machine, or why there are none."""
    try:
        from scripts.checking import environment

        return environment.facts(context)
    except Exception as error:  # a package may be absent, or refuse to work with another
        return " ".join(f"{type(error).__name__}: {error}".split())


def _is_clean(context: Context) -> bool:
    """Free what the check left; False where the device does not work any more."""
    if "torch" not in sys.modules:
        return True
    try:
        from scripts.checking import steps

        steps.clean_up(context.device)
        steps.synchronize(context.device)
    except Exception:
        traceback.print_exc()
        return False
    return True


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(os.getpid(), signal.SIGKILL)
