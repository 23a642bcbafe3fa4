r"""A command and the terminal, pipe or file that it prints to.

Any terminal takes what is printed: a letter that its encoding lacks is written as ``\u03bb``. A
stream that is closed is the empty device. Who reads a part only (``| head -1``) ends the command
without a word, as the shell's own tools do.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from delta_lora.checks import check_path

#: exit code where nobody reads on: 128 and the number of SIGPIPE.
BROKEN_PIPE = 141
#: ... and where the output could not be written.
UNWRITTEN = 2


def settle() -> None:
    """Make the standard streams ones that can be printed to, whatever they are."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would take its place
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number)  # which a child inherits
            if nothing != number:
                os.close(nothing)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run(work: Callable[[], Any]) -> NoReturn:
    """Do the work of a command and end the process with its exit code.

    Args:
        work: returns the exit code, or None for 0.
    """
    settle()
    code: Any = BROKEN_PIPE
    try:
        try:
            code = work()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                sys.stderr.write(f"{code}\n")
                code = 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BrokenPipeError as error:
        code = BROKEN_PIPE if _drop_broken() else _say(error)
    except KeyboardInterrupt:
        code = 130
        _say("stopped")
    except OSError as error:
        _drop_broken()
        code = _say(error)
    sys.exit(code)


def complain(error: Exception) -> int:
    """Print an error as one line; return the exit code for it.

    Raises:
        BrokenPipeError: `error` is one: `run` ends the command.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    return _say(" ".join(str(error).splitlines()))


def as_path(text: str) -> Path:
    """Return a path of the command line, for ``type=`` of argparse."""
    return check_path("path", text)


def _say(what: object) -> int:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {what}\n")
    return UNWRITTEN


def _drop_broken() -> bool:
    """Put the empty device in place of the streams that take nothing; return whether one did not.

    Python flushes them once more when it ends, and would say that it cannot.
    """
    broken = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
    for stream in broken:
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
    return bool(broken)


def _is_broken(stream: Any) -> bool:
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True
