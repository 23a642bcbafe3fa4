"""A stand-in for `scripts.runs.cell` whose runs fail as those on a broken CUDA device do.

An override is ``<name>:<behaviour>``, with ``@<device>`` behind it only on that device (elsewhere it takes half a second); every run is
noted in the file that the environment variable FAULT_CELL_LOG names.
"""

import os
import time
from pathlib import Path

#: after a fault every later call of the process fails too.
_broken = False


class AcceleratorError(RuntimeError):
    """Named as torch's."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def compose(overrides):
    return overrides[0]


def run(config):
    global _broken
    name, _, behaviour = config.partition(":")
    behaviour, _, device = behaviour.partition("@")
    here = os.environ.get("CUDA_VISIBLE_DEVICES")
    with Path(os.environ["FAULT_CELL_LOG"]).open("a") as stream:
        stream.write(f"{os.getpid()} {here} {name}\n")
    if _broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if device not in ("", here):
        behaviour = "0.5"
    if behaviour == "sticky":
        _broken = True
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")
    if behaviour == "memory":
        _broken = True  # what it holds is not given back
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if behaviour == "bad":
        raise ValueError("rank=0 must be 1 or more")
    if behaviour == "exit":
        os._exit(3)
    time.sleep(float(behaviour) if behaviour[0].isdigit() else 0.0)
