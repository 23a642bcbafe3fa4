"""Checkpoints that are atomic, verified and complete.

A checkpoint is a folder ``step-00000100`` with one safetensors file per part (weights, optimiser,
method), one ``state.json`` and a ``manifest.json`` that holds the sha256 of every other file. It is
written under a temporary name, flushed to disk and renamed, so a folder with the final name is
always whole. No random state is stored because none is needed: `delta_lora.trainer` derives every
draw from (seed, step, micro-batch, process), and the data position is the step itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "step-"
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into memory.

    Attributes:
        step: number of applied optimiser steps.
        tensors: part name (``weights``, ``optimizer``, ``method``) to its tensors.
        state: the JSON state.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to `path` atomically (temporary name, flush, rename)."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file and flush it to disk."""
    plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(plain, path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` into `folder` and remove all but the `keep` newest.

    Args:
        folder: the run's ``checkpoints`` folder; created if missing.
        step: number of applied optimiser steps.
        tensors: part name to tensors; one file each.
        state: JSON values.
        keep: number of checkpoints to keep, at least 1.

    Returns:
        The folder of the new checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for part, content in tensors.items():
        write_tensors(temporary / f"{part}.safetensors", content)
    write_json(temporary / "state.json", {"step": step, **state})
    checksums = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / MANIFEST, checksums)
    _sync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    _sync_folder(folder)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a continued run will write again."""
    for path in _folders(folder):
        if int(path.name.removeprefix(_PREFIX)) > step:
            shutil.rmtree(path)


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose checksums hold, or None where there is no checkpoint.

    A damaged checkpoint is named in a warning and the one before it is used.

    Raises:
        RuntimeError: checkpoints exist but none of them is intact.
    """
    candidates = _folders(folder)
    for path in reversed(candidates):
        problem = _damage(path)
        if problem is None:
            return _read(path)
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
    if candidates:
        raise RuntimeError(
            f"none of the {len(candidates)} checkpoints in {folder} is intact; delete that folder "
            "to train this run again from its start"
        )
    return None


def remove(folder: Path) -> None:
    """Remove all checkpoints and unfinished writes in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors (by ``index.key``) and JSON values.

    Learning rates are not part of it: the trainer sets them at every step.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def restore_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` returned; the parameter groups stay as built."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@torch.no_grad()
def restore_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters of `model` with the same names.

    Raises:
        RuntimeError: a name or a shape does not fit the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise RuntimeError(
                f"stored weight {name} {tuple(tensor.shape)} does not fit the model ({found}); "
                "the run was made with other settings"
            )
        parameters[name].copy_(tensor)


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def _damage(path: Path) -> str | None:
    """Return what is wrong with the checkpoint at `path`, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, checksum in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_file(path / name) != checksum:
            return f"{name} has another checksum"
    return None


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(step=state["step"], tensors=tensors, state=state)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
