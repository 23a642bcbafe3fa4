"""Which scale a command runs at: `python scripts/runs/scale.py auto` prints tiny or paper.

`auto` is paper where PyTorch can use a CUDA device, else tiny.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from delta_lora import console
from scripts.runs import devices
from scripts.runs.faults import NO_DEVICE

SCALES = ("tiny", "small", "paper")
CHOICES = ("auto", *SCALES)


def resolve_scale(choice: str) -> tuple[str, str]:
    """Return the scale of a run and the reason for it.

    Args:
        choice: auto, tiny, small or paper.

    Returns:
        (scale, reason), the reason as one clause.

    Raises:
        ValueError: `choice` is none of these.
    """
    if choice not in CHOICES:
        raise ValueError(f"scale={choice!r} is unknown; use one of {', '.join(CHOICES)}")
    if choice != "auto":
        return choice, "as asked"
    found = devices.cuda()
    if not found.devices:
        return "tiny", f"auto: {found.problem}"
    return "paper", f"auto: {devices.describe(found)}"


def runs_on_cpu(scale: str, overrides: Sequence[str]) -> bool:
    """Return whether runs of `scale` with `overrides` are told to train on the CPU."""
    asked = [o.lstrip("+") for o in overrides if o.lstrip("+").startswith("trainer.device=")]
    return asked[-1] == "trainer.device=cpu" if asked else scale == "tiny"


def missing_device(scale: str, overrides: Sequence[str]) -> str | None:
    """Return why runs of `scale` with `overrides` would be refused on this machine, or None.

    What is made for a GPU must not end up on a CPU unasked: there a run of scale paper takes weeks.
    Scale small is made for either.
    """
    if scale != "paper" or runs_on_cpu(scale, overrides) or devices.cuda().devices:
        return None
    return (
        f"scale=paper needs a CUDA device, and {NO_DEVICE}: {devices.cuda().problem}. Use --scale "
        "tiny (with make: SCALE=tiny); to train the paper's models on the CPU all the same, for "
        "weeks, --args trainer.device=cpu (ARGS=trainer.device=cpu)"
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description="print the scale that a choice stands for")
    parser.add_argument("choice", choices=CHOICES)
    chosen, why = resolve_scale(parser.parse_args().choice)
    print(chosen)
    print(f"scale: {chosen} ({why})", file=sys.stderr)


if __name__ == "__main__":
    console.run(_main)
