"""Faults after which a worker process is of no use: those of its device, and lack of memory.

After an illegal access, a failed assertion on the device or an uncorrectable memory error every
later CUDA call of the process fails as well, at once. What ran out of memory leaves a process whose
memory is in pieces, or still held by the traceback.
"""

from __future__ import annotations

import re

#: kinds of fault.
DEVICE, MEMORY = "device", "memory"
#: what the error of a check says where a run must have a CUDA device and torch sees none.
NO_DEVICE = "PyTorch can use no CUDA device"
#: names of torch's own exceptions, so that torch need not be imported to know them.
_KIND_OF_TYPE = {"AcceleratorError": DEVICE, "OutOfMemoryError": MEMORY, "MemoryError": MEMORY}
_KIND_OF_TEXT = {
    # A library's status may be its way to say so.
    MEMORY: re.compile(
        r"CUDA out of memory|_STATUS_ALLOC_FAILED|can't allocate memory|error: out of memory|"
        r"Cannot allocate memory|can't start new thread|ThreadPoolBuildError"
    ),
    DEVICE: re.compile(
        rf"CUDA error|CUDA driver error|HIP error|CU(BLAS|DNN|SOLVER|SPARSE|FFT)_STATUS_|"
        rf"cu(BLAS|DNN|SOLVER|SPARSE|FFT) error|device-side assert|NCCL error|NVML_SUCCESS|"
        rf"cudaGetDeviceCount|CUDA unknown error|No CUDA GPUs are available|{NO_DEVICE}",
        re.IGNORECASE,
    ),
}
_HINT = (
    "give a device fewer cells (a smaller WORKERS=), or a forward pass fewer examples "
    "(trainer.micro_batch_size=, with make in ARGS=)"
)


def kind_of(error: BaseException) -> str | None:
    """Return `DEVICE` or `MEMORY` where `error`, or what led to it, is such a fault, else None."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind for one in seen for kind in _kinds(one)}
    # AcceleratorError is also how torch reports lack of memory outside of its allocator.
    return MEMORY if MEMORY in kinds else DEVICE if DEVICE in kinds else None


def _kinds(error: BaseException) -> set[str]:
    kinds = {_KIND_OF_TYPE[c.__name__] for c in type(error).__mro__ if c.__name__ in _KIND_OF_TYPE}
    return kinds | {kind for kind, text in _KIND_OF_TEXT.items() if text.search(str(error))}


def reason_of(error: BaseException) -> str:
    """Return an error as one line; for lack of memory with what to do."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{line} ({_HINT})" if kind_of(error) == MEMORY else line
