"""Checkpoints that are atomic, verified and complete.

A checkpoint is a folder ``step-00000100`` with one safetensors file per part (weights, optimiser,
method), one ``state.json`` and a ``manifest.json`` that holds the step and the sha256 of every
other file. It is written under a temporary name, flushed to disk and renamed, so a folder with the
final name is always whole. No random state is stored because none is needed:
`delta_lora.trainer` derives every draw from (seed, step, micro-batch, process), and the data
position is the step itself.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from delta_lora import stored, writing

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
#: of a manifest; raised when an older version could not read a checkpoint as it is meant.
SCHEMA = 1
#: checkpoints that stay: a kill before the next one may need the one before.
KEPT = 2
_PREFIX = "step-"


class NoneIntactError(stored.UnreadableError, RuntimeError):
    """There are checkpoints, and none of them can be used."""


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
    """Write `content` as JSON to `path` atomically (temporary name, flush, rename).

    Raises:
        ValueError: a number in it is infinite or NaN, which JSON does not have.
        WriteError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    writing.write_text(path, f"{text}\n")


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file and flush it to disk.

    Raises:
        WriteError: it cannot be written; nothing half is left.
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach()
        storage = value.untyped_storage()
        is_whole = storage.nbytes() == value.numel() * value.element_size()
        if not (value.is_cpu and value.is_contiguous() and is_whole) or storage._cdata in storages:
            value = value.to("cpu", copy=True).contiguous()  # a file holds no views
        storages.add(value.untyped_storage()._cdata)
        plain[name] = value
    with writing.whole(path) as temporary:
        save_file(plain, temporary)


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = KEPT,
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

    Raises:
        WriteError: it cannot be written; the checkpoints before it stand, and nothing half.
    """
    writing.make_folder(folder)
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f"{writing.UNFINISHED}{final.name}"
    writing.remove_unfinished(folder)  # of a process that was killed
    try:
        writing.make_folder(temporary)
        for part, content in tensors.items():
            write_tensors(temporary / f"{part}.safetensors", content)
        write_json(temporary / STATE, {"step": step, **state})
        checksums = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": checksums})
        with writing.writing(final):
            writing.flush(temporary)
            _delete(final)
            temporary.replace(final)
            writing.flush(folder)
            for old in _folders(folder)[:-keep]:
                _delete(old)
    except BaseException:  # half a checkpoint would only fill the disk further
        writing.discard(temporary)
        raise
    return final


class Writer:
    """Writes checkpoints in a background thread, one at a time and in order.

    `save` takes a copy of everything and returns; on CUDA the copies go to pinned memory behind
    the kernels that are already queued, so that neither the device nor the loop waits for the
    disk. The host memory of one checkpoint is kept for the next. Use it in a ``with`` block:
    leaving it waits for the last write.

    Raises:
        OSError: at the next call after a write that failed, for example of a full disk; the
            checkpoints before it stand.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._buffers.clear()

    def save(
        self,
        folder: Path,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        keep: int = KEPT,
    ) -> None:
        """Begin to write a checkpoint; arguments as `save` of this module."""
        self.wait()
        copies = {part: self._copy(part, content) for part, content in tensors.items()}
        is_on_cuda = any(t.is_cuda for content in tensors.values() for t in content.values())
        copied = torch.cuda.Event() if is_on_cuda else None
        if copied is not None:
            copied.record()
        frozen = copy.deepcopy(dict(state))

        def write() -> Path:
            if copied is not None:
                copied.synchronize()
            return save(folder, step, tensors=copies, state=frozen, keep=keep)

        self._running = self._thread.submit(write)

    def wait(self) -> None:
        """Wait for the running write; raises what stopped it."""
        running = self._running
        if running is None:
            return
        try:
            running.result()
        finally:
            if running.done():  # not where a signal interrupted the waiting
                self._running = None

    def _copy(self, part: str, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in content.items():
            source = tensor.detach()
            target = self._buffers.get((part, name))
            if target is None or target.shape != source.shape or target.dtype != source.dtype:
                target = torch.empty(
                    source.shape, dtype=source.dtype, pin_memory=source.is_cuda
                )  # contiguous, whatever the layout of the source
                self._buffers[part, name] = target
            copies[name] = target.copy_(source, non_blocking=True)
        return copies


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a continued run will write again.

    And what a process that was killed was about to remove, or has not removed as a whole.
    """
    writing.remove_unfinished(folder)
    for path in _folders(folder):
        if int(path.name.removeprefix(_PREFIX)) > step:
            _delete(path)
    for path in _folders(folder)[:-KEPT]:
        _delete(path)


def latest(folder: Path, identity: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is whole and of this run; None where there is none.

    One that is damaged or of another run is named in a warning, and the one before it is used.

    Args:
        folder: the run's ``checkpoints`` folder.
        identity: what ``state["identity"]`` must be; None takes any.

    Raises:
        NoneIntactError: checkpoints exist, but none of them can be used.
    """
    if folder.exists() and not folder.is_dir():
        raise NoneIntactError(f"{folder} is damaged (a file instead of a folder); remove it")
    candidates = _folders(folder)
    problem = ""
    for path in reversed(candidates):
        try:
            return _read(path, identity)
        except stored.UnreadableError as error:
            problem = str(error)
            logger.warning("checkpoint %s", problem)
    if candidates:
        raise NoneIntactError(
            f"none of the {len(candidates)} checkpoints in {folder} is intact and of this run "
            f"({problem.partition('; ')[0]}); delete that folder to train this run again from its "
            "start"
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
    """Return the checkpoints of a folder from the first step to the last."""
    paths = folder.glob(f"{_PREFIX}*") if folder.is_dir() else ()
    return sorted(path for path in paths if re.fullmatch(rf"{_PREFIX}\d{{8,}}", path.name))


def _delete(path: Path) -> None:
    """Remove a checkpoint, or what stands in its place."""
    if path.is_dir() and not path.is_symlink():
        # Under another name first: a kill leaves no part of it where a whole one is looked for.
        aside = path.with_name(f"{writing.UNFINISHED}old-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(path.replace(aside))
    else:
        path.unlink(missing_ok=True)


def _read(path: Path, identity: Mapping[str, Any] | None) -> Checkpoint:
    """Return the checkpoint at `path`.

    Raises:
        UnreadableError: a file of it is not the one that was written, or it is of another run.
    """
    advice = "trying the one before it"
    try:
        manifest = stored.read_json(path / MANIFEST, advice)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise stored.damaged(path, f"{MANIFEST} is missing", advice) from error
    stored.check_schema(path / MANIFEST, manifest.get("schema"), {SCHEMA})
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or STATE not in files or not isinstance(step, int):
        raise stored.damaged(path / MANIFEST, "it names no files or no step", advice)
    if path.name != f"{_PREFIX}{step:08d}":
        raise stored.damaged(path, f"it is the checkpoint of step {step}", advice)
    for name, checksum in files.items():
        stored.check_checksum(path / name, checksum, MANIFEST, advice)
    state = stored.read_json(path / STATE, advice)
    if state.get("step") != step:
        raise stored.damaged(path / STATE, f"it is not of step {step}", advice)
    if identity is not None:
        _check_identity(path, state.get("identity"), identity, advice)
    parts = sorted(Path(name) for name in files if name.endswith(".safetensors"))
    tensors = {part.stem: stored.read_tensors(path / part, advice) for part in parts}
    return Checkpoint(step=step, tensors=tensors, state=state)


def _check_identity(path: Path, theirs: Any, mine: Mapping[str, Any], advice: str) -> None:
    """Refuse a checkpoint of another run, other data or another base; say what differs."""
    mine = json.loads(json.dumps(mine))
    theirs = theirs if isinstance(theirs, dict) else {}
    differing = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
    if differing:
        changes = "; ".join(f"{k}: {theirs.get(k)} then, {mine.get(k)} now" for k in differing)
        raise stored.UnreadableError(f"{path} belongs to another run ({changes}); {advice}")
