"""The log of a run: ``metrics.jsonl`` first, then a progress bar, then mirrors such as wandb.

``metrics.jsonl`` holds only what a repetition of the run gives again to the bit (losses, rates,
norms). What differs between two runs of the same thing (seconds, memory, tokens per second) goes to
the progress display, to ``measured.jsonl`` and to ``resources.json``. A mirror shows both; whatever
goes wrong with it is no more than a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from delta_lora.writing import writing

logger = logging.getLogger(__name__)

MEASURED = "measured.jsonl"


class MetricLogger(Protocol):
    """Something that mirrors the log elsewhere; see `Guarded` for what it may do wrong."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror the values of one step, which stand in the run's files already."""

    def close(self, status: str, error: str = "") -> None:
        """End the mirror.

        Args:
            status: ``completed``, ``pruned``, ``failed`` or ``stopped``; the record of a completed
                run stands.
            error: what made it end before its time.
        """


_has_warned = False


def warn_once(message: str) -> None:
    """Warn of a mirror's trouble; after the first time in a process the log has it as debugging."""
    global _has_warned
    logger.log(logging.DEBUG if _has_warned else logging.WARNING, "%s", message)
    _has_warned = True


class Guarded:
    """A mirror that cannot decide over the work.

    Whatever it raises, when it is made or later, is one warning a process. It is then left alone.

    Args:
        make: returns the mirror.
    """

    def __init__(self, make: Callable[[], MetricLogger]) -> None:
        self._mirror: MetricLogger | None = None
        with self.aside():
            self._mirror = make()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror the values of one step."""
        with self.aside():
            if self._mirror is not None:
                self._mirror.log(step, values)

    def close(self, status: str, error: str = "") -> None:
        """End the mirror."""
        with self.aside():
            if self._mirror is not None:
                self._mirror.close(status, error)
        self._mirror = None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run a block for the mirror's sake; where it fails, the mirror is left out."""
        try:
            yield
        except Exception as error:
            self._mirror = None
            what = f"{type(error).__name__}: {error}"
            warn_once(f"a mirror of the log failed, and is left out: {what}")


class RunLog:
    """Writes ``metrics.jsonl`` and ``measured.jsonl`` and tells the mirrors.

    Args:
        path: the ``metrics.jsonl`` of the run; what is measured goes to a file beside it.
        position: byte offset to continue at; what stands behind it (written after the last
            checkpoint of an interrupted run) is cut off and will be written again.
        known: what the file holds up to `position`; where it holds something else it is damaged,
            and is written again with a warning. None takes the file as it is.
        mirrors: further loggers.
    """

    def __init__(
        self,
        path: Path,
        *,
        position: int = 0,
        known: str | None = None,
        mirrors: Sequence[MetricLogger] = (),
    ) -> None:
        self._path, self._measured_path = path, path.with_name(MEASURED)
        with writing(path):
            self._open(position, known)
        steps = [json.loads(line)["step"] for line in self._written.splitlines()]
        with writing(self._measured_path):
            self._measured = _measured_until(self._measured_path, max(steps, default=-1))
        self._mirrors = [Guarded(partial(_same, mirror)) for mirror in mirrors]

    def _open(self, position: int, known: str | None) -> None:
        """Open the file, cut behind `position`, with what is `known` of it."""
        path = self._path
        # Unbuffered: what cannot be written is not tried again when the file is closed.
        self._stream = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._written = bytearray(self._stream.read(position))
        if known is not None and self._written != known.encode():
            logger.warning(
                "%s is damaged: it is not what the checkpoint says; it is written again", path
            )
            self._written = bytearray(known.encode())
            self._stream.seek(0)
            _write(self._stream, self._written)
        self._stream.truncate(len(self._written))
        self._stream.seek(len(self._written))

    def log(
        self, step: int, values: Mapping[str, float], measured: Mapping[str, float] | None = None
    ) -> None:
        """Log the repeatable `values`, and the `measured` ones apart from them.

        Args:
            step: number of applied optimiser steps.
            values: by ``split/name``; written to ``metrics.jsonl``.
            measured: what this very session used, and what else is for mirrors alone; written to
                ``measured.jsonl``.

        Raises:
            WriteError: a file cannot be written; the message has its path.
        """
        if measured:  # before the line that a reader of both waits for
            with writing(self._measured_path):
                _write(self._measured, _line({"step": step, **measured}))
        line = _line({"step": step, **values})
        self._written += line
        with writing(self._path):
            _write(self._stream, line)
        for mirror in self._mirrors:
            mirror.log(step, {**values, **(measured or {})})

    def position(self) -> int:
        """Return the byte offset behind the last line, safely on disk."""
        with writing(self._path):
            os.fsync(self._stream.fileno())
        return self._stream.tell()

    def text(self, position: int) -> str:
        """Return what the file holds up to a byte offset, as it was written."""
        return self._written[:position].decode()

    def close(self) -> None:
        """Close the files; the mirrors live on until the record is written."""
        self._stream.close()
        self._measured.close()


def _write(stream: IO[bytes], line: bytes | bytearray) -> None:
    """Write a line to an unbuffered file, which may take a part at a time."""
    rest = memoryview(line)
    while rest:
        rest = rest[stream.write(rest) :]


def _same(mirror: MetricLogger) -> MetricLogger:
    return mirror


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def _measured_until(path: Path, step: int) -> IO[bytes]:
    """Open the file of measured values behind those of `step`; what is no line ends them."""
    stream: IO[bytes] = path.open("r+b" if path.exists() else "w+b", buffering=0)
    kept = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_until(line, step):
            break
        kept += len(line)
    stream.truncate(kept)
    stream.seek(kept)
    return stream


def _is_until(line: bytes, step: int) -> bool:
    try:
        found = json.loads(line)["step"]
    except (ValueError, RecursionError, KeyError, TypeError):  # a damaged line
        return False
    return isinstance(found, int) and found <= step


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        total: number of units.
        initial: units already done.
        description: what is counted, shown in front.
        unit: name of a unit.
        enabled: False silences it (processes other than the main one).
    """

    #: least time between two plain lines, in seconds.
    PLAIN_INTERVAL_S = 10.0

    def __init__(
        self, total: int, *, initial: int = 0, description: str, unit: str, enabled: bool = True
    ) -> None:
        is_terminal = sys.stderr.isatty()
        self._enabled = enabled
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit=unit,
            disable=not (enabled and is_terminal),
            dynamic_ncols=True,
        )
        self._plain = enabled and not is_terminal
        self._description, self._unit, self._note = description, unit, ""
        self._total, self._done, self._initial = total, initial, initial
        self._start = self._last = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """Advance by `count` units and show `note` behind the numbers."""
        self._done += count
        if note:
            self._note = note
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        is_last = self._done >= self._total
        if self._plain and (now - self._last >= self.PLAIN_INTERVAL_S or is_last):
            rate = (self._done - self._initial) / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate if rate else float("nan")
            logger.info(
                "%s %d/%d %s, %.2f/s, %.0f s left%s",
                self._description, self._done, self._total, self._unit, rate, left,
                f", {self._note}" if self._note else "",
            )  # fmt: skip
            self._last = now

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
