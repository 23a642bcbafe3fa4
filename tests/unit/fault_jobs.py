"""Jobs that fail as runs on a broken CUDA device do.

A job is ``<name>:<behaviour>``. With ``@<device>`` behind it, it is that of this device only;
elsewhere the run lasts until three runs were begun there. Every run is noted in the file that the
environment variable FAULT_JOBS_LOG names.
"""

import os
import signal
import time
from pathlib import Path

#: after a fault every later call of the process fails too.
_broken = False


class AcceleratorError(RuntimeError):
    """Named as torch's."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def run(job):
    global _broken
    name, _, behaviour = job.partition(":")
    behaviour, _, device = behaviour.partition("@")
    here = os.environ.get("CUDA_VISIBLE_DEVICES")
    log = Path(os.environ["FAULT_JOBS_LOG"])
    with log.open("a") as stream:
        stream.write(f"{os.getpid()} {here} {name}\n")
    if _broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if device not in ("", here):
        behaviour = "good"
        until = time.monotonic() + 60
        while log.read_text().count(f" {device} ") < 3 and time.monotonic() < until:
            time.sleep(0.02)
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
    is_first = log.read_text().count(f" {name}\n") == 1
    if behaviour == "once":  # killed in its first try, done in its second
        if is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        return
    if behaviour == "again":  # its first try lasts, its second does not
        behaviour = "60" if is_first else "0"
    until = time.monotonic() + (float(behaviour) if behaviour[0].isdigit() else 0.0)
    while time.monotonic() < until:  # as a run, of many short things
        time.sleep(0.02)
