"""The processes of one distributed run: which one this is, and what all of them know.

`accelerate launch` starts them and tells each its place in the environment; alone, a process is
number 0 of 1. Everything here that waits for the other processes says so: all of them must call it.
"""

from __future__ import annotations

import os
from typing import Any


def share() -> tuple[int, int]:
    """Return the index of this process and the number of processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is the main process of a distributed run, or the only one."""
    return share()[0] == 0


def gather(items: list[Any]) -> list[Any]:
    """Return the items of all processes, those of process 0 first; waits for all of them."""
    if share()[1] == 1:
        return items
    from accelerate.utils import gather_object  # imports torch, which planning does without

    return gather_object(items)
