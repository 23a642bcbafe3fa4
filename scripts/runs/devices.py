"""The CUDA devices that PyTorch can use, found without importing it here.

The driver is asked first, so that a machine without a GPU plans in seconds. Where it shows a
device, PyTorch is asked in a process of its own: a driver that is too old for the installed build,
a build without CUDA or a broken device are seen by nobody else.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

#: seconds that PyTorch has to import and to use every device once.
PROBE_TIMEOUT_S = 180.0
_PROBE = """
import json, warnings
facts = {"devices": [], "problems": []}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    facts["torch"], facts["cuda"] = torch.__version__, torch.version.cuda
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(number):
        try:
            assert torch.ones(1, device=f"cuda:{index}").add(1).item() == 2
            name = torch.cuda.get_device_name(index)
            free, total = torch.cuda.mem_get_info(index)
            device = {"index": index, "model": name, "free_bytes": free, "total_bytes": total}
            facts["devices"].append(device)
        except Exception as error:
            facts["problems"].append(f"device {index}: {type(error).__name__}: {error}")
if not number:
    facts["problems"] += [str(warning.message) for warning in caught]
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Device:
    """A CUDA device that PyTorch has used.

    Attributes:
        name: what ``CUDA_VISIBLE_DEVICES`` calls it in a process that shall see it alone.
        model: its product name.
        free_bytes: memory that nobody used when it was asked.
        total_bytes: all of its memory.
    """

    name: str
    model: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Cuda:
    """The usable devices, and as a clause what is wrong with the others or why there are none."""

    devices: tuple[Device, ...]
    problem: str = ""


def count_driver_devices() -> int:
    """Return the number of devices the CUDA driver shows to this process (0 without a driver)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def cuda() -> Cuda:
    """Return the CUDA devices that PyTorch can use; asked once in a process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count_driver_devices() == 0:
        chosen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        return Cuda((), f"no CUDA device is seen{chosen}")
    try:
        facts = _ask_torch()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Cuda((), f"a CUDA device is seen, but asking PyTorch for it failed: {error}")
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    devices = tuple(
        Device(
            name=str(found["index"]) if names is None else names[found["index"]],
            model=found["model"],
            free_bytes=found["free_bytes"],
            total_bytes=found["total_bytes"],
        )
        for found in facts["devices"]
    )
    problem = "; ".join(" ".join(text.split()) for text in facts["problems"])
    if devices:
        return Cuda(devices, problem)
    return Cuda((), _why_none(facts["torch"], facts["cuda"], problem))


def _why_none(version: str, cuda_version: str | None, problem: str) -> str:
    if cuda_version is None:
        return (
            f"a CUDA device is seen, but the installed PyTorch {version} is built without CUDA; "
            "install a build with it (https://pytorch.org/get-started/locally)"
        )
    return (
        f"a CUDA device is seen, but the installed PyTorch {version} (CUDA {cuda_version}) cannot "
        f"use it: {problem or 'torch.cuda.is_available() is False'}; update the driver, or install "
        "a PyTorch that is built for the CUDA version of this driver (nvidia-smi shows it)"
    )


def _ask_torch() -> dict[str, Any]:
    """Return what PyTorch says of its devices.

    Raises:
        ValueError: it cannot be imported, or its answer is none.
        OSError: no process can be started.
        subprocess.SubprocessError: it takes too long.
    """
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _PROBE],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=PROBE_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ValueError(last[0])
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def describe(found: Cuda) -> str:
    """Return the devices as words: ``2 CUDA devices (NVIDIA H100)``."""
    number = len(found.devices)
    models = ", ".join(dict.fromkeys(device.model for device in found.devices))
    words = f"{number} CUDA device{'s' if number > 1 else ''} ({models})"
    return f"{words}; not usable: {found.problem}" if found.problem else words
