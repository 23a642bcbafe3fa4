"""One sitting of a run: what it uses of the machine, and how it is asked to stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from delta_lora import memory

logger = logging.getLogger(__name__)


class Session:
    """Time, tokens and memory of this session, added to what earlier sessions used.

    Args:
        device: whose memory is measured, and which is waited for where times are read.
        earlier: `resources` of the sessions before; empty for a new run.
        step: number of steps that were taken in them.
    """

    def __init__(self, device: torch.device, earlier: dict[str, float], step: int = 0) -> None:
        self._device, self._earlier = device, dict(earlier)
        self._start = self._mark = time.monotonic()
        self._apart_s = 0.0
        self._last_measured = (step, 0.0)
        self.num_tokens = 0
        memory.reset_peak(device)

    @contextlib.contextmanager
    def apart(self, *, wait: bool) -> Iterator[None]:
        """Leave the time inside out of ``step_time_s``: evaluation, checkpoints.

        Args:
            wait: let the device finish the steps before the clock stops; False where the block
                only queues work.
        """
        if wait:
            memory.synchronize(self._device)
        began = time.monotonic()
        try:
            yield
        finally:
            self._apart_s += time.monotonic() - began

    def mark(self) -> None:
        """Begin to count `since_mark_s`: a checkpoint was written."""
        self._mark = time.monotonic()

    def since_mark_s(self) -> float:
        """Return the seconds since `mark`, or since the start."""
        return time.monotonic() - self._mark

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def tokens_per_s(self) -> float:
        """Return input tokens per second of this session."""
        return self.num_tokens / max(self._elapsed_s(), 1e-9)

    def measured(self, step: int) -> dict[str, float]:
        """Return what a mirror shows beside the losses behind `step` steps."""
        return {
            "perf/tokens_per_s": self.tokens_per_s(),
            "perf/step_time_s": self._mean_step_s(step),
            "perf/peak_memory_bytes": float(memory.peak_bytes(self._device)),
            "perf/train_time_s": self.resources()["train_time_s"],
        }

    def _mean_step_s(self, step: int) -> float:
        """Return the mean seconds of the steps since the last call, without what was apart."""
        time_s, earlier = self._elapsed_s() - self._apart_s, self._last_measured
        self._last_measured = (step, time_s)
        return (time_s - earlier[1]) / max(step - earlier[0], 1)

    def resources(self) -> dict[str, float]:
        """Return seconds, tokens, tokens per second, peak memory in bytes, number of sessions.

        ``train_time_s`` is all of `delta_lora.trainer.Trainer.fit`, ``step_time_s`` the optimiser
        steps alone: neither evaluation nor checkpoints.
        """
        elapsed_s = self._elapsed_s()
        time_s = self._earlier.get("train_time_s", 0.0) + elapsed_s
        tokens = self._earlier.get("train_tokens", 0) + self.num_tokens
        peak = max(self._earlier.get("peak_memory_bytes", 0), memory.peak_bytes(self._device))
        found = {
            "train_time_s": time_s,
            "train_tokens": tokens,
            "tokens_per_s": tokens / max(time_s, 1e-9),
            "peak_memory_bytes": peak,
            "sessions": self._earlier.get("sessions", 0) + 1,
        }
        # Where an earlier session did not measure it, the sum would be too small.
        if not self._earlier or "step_time_s" in self._earlier:
            earlier_s = self._earlier.get("step_time_s", 0.0)
            found["step_time_s"] = earlier_s + elapsed_s - self._apart_s
        return found


class Stop:
    """Whether a signal asked the loop to stop, and whether it may be interrupted at once."""

    requested = False
    _is_interruptible = False

    @contextlib.contextmanager
    def at_once(self, enabled: bool = True) -> Iterator[None]:
        """Let a signal interrupt the block by `KeyboardInterrupt`: for long work between steps.

        Args:
            enabled: False leaves signals as they are outside of the block.
        """
        self._is_interruptible = enabled
        try:
            if enabled and self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_interruptible = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request to stop at the next line of the log."""
    stop = Stop()

    def request(signum: int, frame: Any) -> None:
        if stop.requested or stop._is_interruptible:
            stop.requested = True
            raise KeyboardInterrupt("stopped at once")
        stop.requested = True
        logger.warning(
            "signal %d: stopping at the next line of the log, with a checkpoint (again to stop at "
            "once, and do the steps since the last checkpoint again)",
            signum,
        )

    try:
        old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals stay as they are
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
