"""Which scale a command runs at: `python scripts/runs/scale.py auto` prints tiny or paper.

`auto` is paper where a CUDA device and a PyTorch built for CUDA are seen, else tiny. PyTorch itself
is not imported for that, so that planning stays fast.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from pathlib import Path

SCALES = ("tiny", "small", "paper")
CHOICES = ("auto", *SCALES)


def count_cuda_devices() -> int:
    """Return the number of devices the CUDA driver shows to this process (0 without a driver)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def is_torch_built_for_cuda() -> bool:
    """Return whether the installed PyTorch has CUDA, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).with_name("version.py")
    lines = version_file.read_text(encoding="utf-8").splitlines() if version_file.exists() else []
    values = [line.partition("=")[2].strip() for line in lines if line.startswith("cuda")]
    return bool(values) and values[0] != "None"


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
    num_devices = count_cuda_devices()
    if num_devices == 0:
        return "tiny", "auto: no CUDA device is seen"
    if not is_torch_built_for_cuda():
        return (
            "tiny",
            "auto: a CUDA device is seen, but the installed PyTorch is built without CUDA",
        )
    return "paper", f"auto: {num_devices} CUDA device{'s' if num_devices > 1 else ''} seen"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="print the scale that a choice stands for")
    parser.add_argument("choice", choices=CHOICES)
    print(resolve_scale(parser.parse_args().choice)[0])
