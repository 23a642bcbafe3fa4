"""Peak memory of a stretch of work: allocated device memory on CUDA, resident set size on a CPU."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Start a new measurement.

    On Linux the kernel's high-water mark of the process is reset; where that is not possible the
    peak since the start of the process is what `peak_bytes` gives.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        try:
            marks.write_text("5", encoding="ascii")
        except OSError:
            return


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that is queued on it; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Free what an earlier run of this process left: its cycles, and the device memory behind."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int:
    """Return the peak since `reset_peak`, in bytes.

    CUDA: `torch.cuda.max_memory_allocated`. CPU: the resident set size, which holds the
    interpreter and the libraries as well; compare differences between runs, not sizes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
