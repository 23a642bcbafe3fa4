"""Check 1: the machine, a deterministic product, and a pool that outlives a broken CUDA context."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from scripts.checking import poison
from scripts.checking.children import ROOT
from scripts.checking.finding import Context, Deadline, Finding
from scripts.runs import provenance
from scripts.runs.workers import Job, Pool

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "tokenizers")
POOL_TIMEOUT_S = 120.0


def facts(context: Context) -> dict[str, Any]:
    """Return device, driver, versions and commit, for the head of the report.

    Raises:
        RuntimeError: torch cannot use a CUDA device.
    """
    if context.is_cuda and not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} can use no CUDA device (torch.cuda.is_available() is "
            "False); install a torch that fits the driver, or take --device cpu --small, which "
            "shows what a CPU can"
        )
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    return {
        "device": _device(context),
        "versions": versions,
        "tf32_by_default": torch.get_float32_matmul_precision() != "highest",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "git": provenance.git_state(ROOT),
    }


def environment(context: Context) -> Finding:
    """Multiply deterministically, break the context of a worker, and multiply in its successor."""
    finding = Finding(values=_device(context))
    finding.equal("device", finding.values["type"], "cuda")
    jobs = [
        Job(what, (), f"{what} {index}")
        for index, what in enumerate((poison.MULTIPLY, poison.POISON, poison.MULTIPLY))
    ]
    deadline = Deadline(POOL_TIMEOUT_S, "a pool with a broken CUDA context")
    errors: list[str | None] = []
    with Pool(environments=[{}], logs=context.folder / "logs", name="poison") as pool:
        for outcome in pool.run(jobs):
            deadline.check()
            if outcome is not None:
                errors.append(outcome.error)
    finding.values["errors"] = errors
    finding.equal("deterministic_product", errors[0] or "done", "done")
    finding.equal("broken_by_cuda", "CUDA" in (errors[1] or ""), True)
    finding.equal("next_job", errors[2] or "done", "done")
    return finding


def _device(context: Context) -> dict[str, Any]:
    if not context.is_cuda:
        return {"type": "cpu", "name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu_cores": len(os.sched_getaffinity(0)),
    }


def _driver() -> str | None:
    """Return the version of the driver, or None where nothing tells it."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(  # noqa: S603 - found by name, no input
                query,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=30,
                check=True,
            )
            return answer.stdout.split("\n")[0].strip()
    version = Path("/proc/driver/nvidia/version")
    return version.read_text(encoding="utf-8").split("\n")[0] if version.exists() else None
