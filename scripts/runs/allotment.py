"""How many workers a command has, and which device each of them uses."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.runs import devices
from scripts.runs.cells import Cell
from scripts.runs.costs import device_bytes
from scripts.runs.devices import Device
from scripts.runs.scale import runs_on_cpu
from scripts.runs.workers import CELLS_ON_DEVICE

#: memory counted for one worker at scale tiny (PyTorch, a tiny model, METEOR's Java).
WORKER_BYTES = 2 * 2**30
#: of cells on one device. A step is bound by launches, so that a few share a device well; of more
#: than this the host is the limit.
MAX_CELLS_ON_DEVICE = 4
#: cores that a worker on a device needs: one issues the work, one reads and writes.
CORES_OF_WORKER = 2
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Allotment:
    """The workers of a command.

    Attributes:
        environments: environment variables of each worker.
        text: in words, what was chosen and why.
        is_open: whether a cluster takes as many runs at once as it has room for, a number that is
            not known; the one environment is that of each.
        gpus: of a run on a cluster.
    """

    environments: tuple[dict[str, str], ...]
    text: str
    is_open: bool = False
    gpus: int = 0


def parse_workers(text: str) -> int | None:
    """Return the number of workers that was asked for; None for ``auto``.

    Raises:
        ValueError: it is neither ``auto`` nor a number of 1 or more.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"workers={text!r}: use auto or a number of 1 or more")
    return int(text)


def allot(
    workers: str,
    scale: str,
    overrides: Sequence[str],
    num_jobs: int,
    planned: Callable[[], int | None] = lambda: None,
) -> Allotment:
    """Return the workers of a command.

    ``auto`` takes, on CUDA devices, as many workers a device as memory and cores allow, at most
    `MAX_CELLS_ON_DEVICE`; on a CPU one worker per core at scale tiny (where a run uses one thread)
    within the free memory, else one. A number is spread over the devices.

    Args:
        workers: a number of 1 or more, or ``auto``.
        scale: scale of the runs.
        overrides: overrides of every run.
        num_jobs: never more workers than that, but at least one.
        planned: gives the device memory in bytes to reserve for a run, CUDA's own included, or
            None where that is unknown: then ``auto`` takes one worker a device. Called only where
            it is of use.

    Raises:
        ValueError: `workers` is neither.
    """
    number = parse_workers(workers)
    needs_cuda = num_jobs > 0 and not runs_on_cpu(scale, overrides)
    found = devices.cuda().devices if needs_cuda else ()
    if not found:
        return _on_cpu(number, scale, num_jobs)
    need = planned()
    slots = _auto_slots(found, need) if number is None else _spread(found, number)
    return _on_devices(slots[:num_jobs], need)


def cluster_environment(scale: str, *, gpus: int, cpus: int) -> dict[str, str]:
    """Return the environment variables of a run that has a place in a cluster for itself.

    Args:
        scale: of the runs; at tiny a run has one thread, as everywhere.
        gpus: GPUs of its place.
        cpus: cores of its place.
    """
    threads = str(cpus)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    return {
        **_shared(),
        **(_ONE_THREAD if scale == "tiny" else dict.fromkeys(names, threads)),
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        CELLS_ON_DEVICE: "1",
    }


def largest_need(cells: Sequence[Cell]) -> int | None:
    """Return the device memory in bytes for the largest of `cells`; None where it is not known."""
    # Seeds need the same, and each configuration takes a while.
    kinds = {(item.row, item.on): item.run.config for item in cells}
    needs = [device_bytes(config) for config in kinds.values()]
    known = [need for need in needs if need is not None]
    return max(known) if known and len(known) == len(needs) else None


def _on_cpu(number: int | None, scale: str, num_jobs: int) -> Allotment:
    if number is None:
        is_tiny = scale == "tiny"
        number = min(_count_cores(), _free_memory() // WORKER_BYTES) if is_tiny else 1
    number = max(1, min(number, num_jobs))
    # At scale tiny one thread each: the result does not depend on the number of workers.
    threads = _ONE_THREAD if scale == "tiny" else {} if number == 1 else _threads(number)
    # A core is a device here: what has cores of its own has no neighbours.
    sharing = math.ceil(number / _count_cores())
    environment = {
        **_shared(), **threads, "CUDA_VISIBLE_DEVICES": "", CELLS_ON_DEVICE: str(sharing)
    }  # fmt: skip
    text = f"{_count(number, 'worker')} on the CPU"
    return Allotment(tuple(dict(environment) for _ in range(number)), text)


def _on_devices(slots: Sequence[Device], need: int | None) -> Allotment:
    """Return the allotment of one worker for each entry of `slots`."""
    sharing = Counter(slots)
    environments = tuple(
        {
            **_shared(),
            **_threads(len(slots)),
            "CUDA_VISIBLE_DEVICES": device.name,
            CELLS_ON_DEVICE: str(sharing[device]),
        }
        for device in slots
    )
    most = max(sharing.values())
    fewest = min(sharing.values())
    cells = _count(most, "cell") if most == fewest else f"{fewest} to {_count(most, 'cell')}"
    text = f"{_count(len(slots), 'worker')} on {_count(len(sharing), 'device')} ({cells} a device"
    if need is None:
        return Allotment(environments, f"{text}: the memory that a cell needs is not known)")
    smallest = min(device.free_bytes for device in sharing)
    text += f": planned {_gib(need)} each of {_gib(smallest)} free"
    if any(sharing[device] > _fitting(device, need) for device in sharing):
        text += ", which may not suffice"
    return Allotment(environments, f"{text})")


def _auto_slots(found: Sequence[Device], need: int | None) -> list[Device]:
    """Return a device for each worker: the first of every device, the second of every one, ..."""
    most = max(len(found), _count_cores() // CORES_OF_WORKER)
    slots = []
    for level in range(MAX_CELLS_ON_DEVICE):
        for device in found:
            if level == 0 or (need is not None and level < _fitting(device, need)):
                slots.append(device)
    return slots[:most]


def _spread(found: Sequence[Device], number: int) -> list[Device]:
    return [found[index % len(found)] for index in range(number)]


def _fitting(device: Device, need: int) -> int:
    """Return how many cells of `need` bytes have room on a device."""
    return device.free_bytes // need


def _shared() -> dict[str, str]:
    """Return what every worker has: cuBLAS repeats itself to the bit only with a work space."""
    return {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")}


def _threads(num_workers: int) -> dict[str, str]:
    """Return variables by which workers share the cores; what the user has set stays."""
    share = str(max(1, _count_cores() // num_workers))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    return {name: os.environ.get(name, share) for name in names}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_memory() -> int:
    """Return the available memory in bytes (where /proc has none: enough for eight workers)."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 * WORKER_BYTES
