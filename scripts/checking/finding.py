"""What a check gets (`Context`) and what it gives (`Finding`). Nothing here imports torch."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SKIPPED_ON_CPU = "needs a CUDA device"


@dataclass(frozen=True)
class Context:
    """Where and how large a check runs.

    Attributes:
        device: ``cuda`` or ``cpu``.
        is_small: small models and few steps instead of the paper's.
        folder: scratch folder, removed at the end.
    """

    device: str
    is_small: bool
    folder: Path

    @property
    def is_cuda(self) -> bool:
        """Whether limits on time and device memory are judged."""
        return self.device == "cuda"

    def say(self, text: str) -> None:
        """Show what a running check does, on the error stream."""
        print(f"      {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Requirement:
    """One thing that must hold.

    Attributes:
        name: what was measured.
        value: what came out.
        limit: what is allowed, for example ``<= 1.15``.
        holds: whether it does.
    """

    name: str
    value: Any
    limit: str
    holds: bool


@dataclass
class Finding:
    """The outcome of one check.

    Attributes:
        values: what was measured, plain JSON values.
        requirements: what had to hold; a check passes if all do.
        costs: entries for the planner by kind (``steps``, ``decoding``, ``checkpoint``).
    """

    values: dict[str, Any] = field(default_factory=dict)
    requirements: list[Requirement] = field(default_factory=list)
    costs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Require ``value <= limit``; NaN does not hold."""
        self.requirements.append(Requirement(name, value, f"<={limit:g}", bool(value <= limit)))

    def at_least(self, name: str, value: float, limit: float) -> None:
        """Require ``value >= limit``; NaN does not hold."""
        self.requirements.append(Requirement(name, value, f">={limit:g}", bool(value >= limit)))

    def equal(self, name: str, value: Any, expected: Any) -> None:
        """Require ``value == expected``."""
        self.requirements.append(Requirement(name, value, f"=={expected}", value == expected))

    def cost(self, kind: str, **entry: Any) -> None:
        """Add one entry for the planner."""
        self.costs.setdefault(kind, []).append(entry)

    @property
    def holds(self) -> bool:
        """Whether every requirement holds; a check without one has shown nothing."""
        return bool(self.requirements) and all(each.holds for each in self.requirements)


class Deadline:
    """A time limit on waiting for something that may hang.

    Args:
        seconds: from now.
        what: what is waited for, for the message.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._end, self._seconds, self._what = time.monotonic() + seconds, seconds, what

    @property
    def left_s(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise TimeoutError if it has passed."""
        if not self.left_s:
            raise TimeoutError(f"{self._what} did not end within {self._seconds:g} s")
