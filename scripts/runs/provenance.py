"""Where a result comes from: code, packages, machine; and the signature that names a run."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_lora import processes

if TYPE_CHECKING:
    import torch

#: packages whose versions can change a result.
PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "evaluate", "tokenizers", "numpy", "scipy",
    "scikit-learn", "nltk", "sacrebleu", "rouge-score", "pycocoevalcap", "hydra-core",
)  # fmt: skip


def signature(config: Mapping[str, Any], length: int = 12) -> str:
    """Return the name of a run: the first hex digits of a hash of its resolved configuration.

    Args:
        config: plain JSON values; the caller has left out what cannot change the result (logger,
            paths, launcher) and has replaced paths to data by checksums.
        length: number of hex digits.
    """
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def sha256_folder(folder: Path, patterns: tuple[str, ...] = ("*",)) -> str:
    """Return one sha256 over the names and contents of the files in `folder`.

    Folders directly below it are read too (a data set may have one per task), hidden ones not.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    digest = hashlib.sha256()
    folders = [folder, *(f for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")]
    for path in sorted({file for pattern in patterns for f in folders for file in f.glob(pattern)}):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def git_state(root: Path) -> dict[str, Any]:
    """Return commit and whether tracked files differ from it; nulls outside a git checkout.

    Files in ``results/`` do not count: writing a table makes no code dirty. Which files a run used
    that no commit holds is found by `scripts.runs.own_files`.
    """
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        diff = _git(root, "diff", "HEAD", "--", ".", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None, "diff_sha256": None}
    return {
        "commit": commit,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }


def packages() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device(used: torch.device) -> dict[str, Any]:
    """Return what a run computed on.

    Args:
        used: the device that its model was on, whatever else the machine has.
    """
    import torch

    facts: dict[str, Any] = {"machine": platform.machine(), "num_threads": torch.get_num_threads()}
    if used.type == "cuda":
        facts |= {
            "type": "cuda",
            "name": torch.cuda.get_device_name(used),
            "count": processes.share()[1],
            "cuda": torch.version.cuda,
        }
    else:
        facts |= {"type": used.type, "name": _cpu_name()}
    return facts


def _cpu_name() -> str:
    """Return what the processor is; kinds of one name can round differently."""
    import torch

    facts: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or "unknown"
    details = [f"{key.split()[-1]} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({', '.join([*details, torch.backends.cpu.get_cpu_capability()])})"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(  # noqa: S603
        command, check=True, capture_output=True, encoding="utf-8", errors="replace"
    ).stdout
