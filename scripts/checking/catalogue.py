"""The checks by number, and how one of them is run. Nothing here imports torch by itself."""

from __future__ import annotations

import importlib
import time
import traceback
from dataclasses import dataclass
from typing import Any

from scripts.checking.finding import SKIPPED_ON_CPU, Context, Finding

PASS, FAIL, SKIP, DONE = "PASS", "FAIL", "SKIP", "DONE"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        number: how it is asked for.
        name: one word.
        function: ``module:function``; takes a `Context` and returns a `Finding`.
        timeout_s: seconds after which it counts as hanging.
        needs_cuda: whether a CPU cannot show it.
        is_judged: whether it can fail by what it measures.
    """

    number: int
    name: str
    function: str
    timeout_s: float
    needs_cuda: bool = False
    is_judged: bool = True


# fmt: off
CHECKS = (
    Check(1, "environment", "scripts.checking.environment:environment", 150, needs_cuda=True),
    Check(2, "golden", "scripts.checking.golden:golden", 150),
    Check(3, "packed", "scripts.checking.golden:packed", 60),
    Check(4, "methods", "scripts.checking.speed:methods", 150),
    Check(5, "precisions", "scripts.checking.speed:precisions", 180, needs_cuda=True),
    Check(6, "fp16", "scripts.checking.resume:fp16", 90, needs_cuda=True),
    Check(7, "killed", "scripts.checking.resume:killed", 180),
    Check(8, "checkpoints", "scripts.checking.resume:checkpoints", 120),
    Check(9, "after_bf16", "scripts.checking.decoding:after_bf16", 90),
    Check(10, "beam_search", "scripts.checking.decoding:beam_search", 150),
    Check(11, "other_models", "scripts.checking.speed:other_models", 150),
    Check(12, "two_processes", "scripts.checking.processes:two_processes", 180),
    Check(13, "host_syncs", "scripts.checking.speed:host_syncs", 90, needs_cuda=True),
    Check(14, "explore", "scripts.checking.explore:explore", 150, needs_cuda=True,
          is_judged=False),
    Check(15, "compiled", "scripts.checking.explore:compiled_in_child", 180, needs_cuda=True,
          is_judged=False),
)
# fmt: on


def by_number(number: int) -> Check:
    """Return a check.

    Raises:
        KeyError: there is no such number.
    """
    return {check.number: check for check in CHECKS}[number]


def run(check: Check, context: Context) -> dict[str, Any]:
    """Run one check and return its entry of the report; whatever it raises makes it fail."""
    if check.needs_cuda and not context.is_cuda:
        return outcome(check, SKIP, reason=SKIPPED_ON_CPU)
    began = time.monotonic()
    try:
        module, _, function = check.function.partition(":")
        finding: Finding = getattr(importlib.import_module(module), function)(context)
    except Exception as error:  # one check must not end the others
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return outcome(check, FAIL, time.monotonic() - began, reason=reason)
    status = DONE
    if check.is_judged:
        status = PASS if finding.holds else FAIL
    return outcome(check, status, time.monotonic() - began, finding=finding)


def outcome(
    check: Check,
    status: str,
    seconds: float = 0.0,
    *,
    reason: str | None = None,
    finding: Finding | None = None,
) -> dict[str, Any]:
    """Return the entry of one check: plain JSON values."""
    finding = finding or Finding()
    return {
        "number": check.number,
        "name": check.name,
        "status": status,
        "seconds": round(seconds, 1),
        "reason": reason,
        "requirements": [vars(each) for each in finding.requirements],
        "values": finding.values,
        "costs": finding.costs,
    }


def line(entry: dict[str, Any]) -> str:
    """Return ``STATUS number name value limit`` of an entry, on one line."""
    head = f"{entry['status']} {entry['number']:2d} {entry['name']}"
    if entry["reason"] is not None:
        return f"{head} {entry['reason']}"
    requirements = entry["requirements"]
    values = " ".join(f"{r['name']}={_short(r['value'])}" for r in requirements)
    limits = " ".join(f"{r['name']}{r['limit']}" for r in requirements)
    failed = [r["name"] for r in requirements if not r["holds"]]
    broken = f" | failed: {', '.join(failed)}" if failed else ""
    return f"{head} {values} | {limits}{broken}".rstrip(" |")


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else text[:117] + "..."
