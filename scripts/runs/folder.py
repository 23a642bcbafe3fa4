"""What stands in a run folder: its lock, its predictions, its adapter, its record."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scripts.runs.composition import ConfigError

RECORD, RESOURCES = "record.json", "resources.json"
PREDICTIONS, ITEM_SPREAD = "predictions.jsonl", "item_spread.json"
#: held by the process that works in a run folder, and beside it which process that is.
LOCK, OWNER = ".lock", ".owner"
ADAPTER = "adapter/adapter_model.safetensors"

logger = logging.getLogger(__name__)


class LockedError(RuntimeError):
    """Another process works in the same run folder."""


def read_record(folder: Path) -> dict[str, Any]:
    """Return a run's record, with what stands beside it under ``resources`` and ``item_spread``."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    for key, name in (("resources", RESOURCES), ("item_spread", ITEM_SPREAD)):
        if (folder / name).exists():
            record[key] = json.loads((folder / name).read_text(encoding="utf-8"))
    return record


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the run folder for this process; the system frees it where the process ends.

    It holds between machines too, on a file system whose locks do: NFS 4, Lustre with ``flock``.

    Args:
        folder: made where it does not exist.
        wait: wait for another process that holds it.

    Raises:
        LockedError: another process holds it and `wait` is False.
        ConfigError: the folder cannot be written.
    """
    held, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            held.acquire(blocking=False)
        if not held.is_locked:
            who = owner.read_text(encoding="utf-8") if owner.exists() else "unknown"
            if not wait:
                raise LockedError(
                    f"process {who} is already working in {folder}; wait for it, or stop it"
                )
            logger.info("waiting for process %s, which works in %s", who, folder)
            held.acquire()
        owner.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except NotImplementedError as error:
        raise ConfigError(
            f"the file system of {folder} has no locks, so two processes could spoil one run; "
            "choose another place with paths.outputs=FOLDER"
        ) from error
    except OSError as error:
        held.release()
        raise ConfigError(
            f"cannot write to the output folder {folder}: {error.strerror}; "
            "choose another with paths.outputs=FOLDER"
        ) from error
    try:
        yield
    finally:
        held.release()


def is_held(folder: Path) -> bool:
    """Return whether a process works in a run folder at this moment."""
    if not (folder / LOCK).exists():
        return False
    held = FileLock(folder / LOCK)
    try:
        held.acquire(blocking=False)
    except NotImplementedError:  # a file system without locks: `lock` refuses to work there
        return False
    except (Timeout, OSError):
        return True
    held.release()
    return False


def predict(
    task: Any, model: Any, tokenizer: Any, folder: Path, split: str
) -> list[dict[str, Any]]:
    """Predict a split into ``predictions.jsonl``, continuing what an earlier session wrote.

    In a distributed run all processes call it: each predicts its share, chunk by chunk, and the
    main process writes. So the folder is read and written in one place.

    Returns:
        The predictions; in processes other than the main one an empty list.
    """
    from delta_lora import processes
    from delta_lora.runlog import Progress

    final, partial = folder / PREDICTIONS, folder / "predictions.partial.jsonl"
    is_main = processes.is_main()
    state = processes.gather([(final.exists(), _read_lines(partial))] if is_main else [])
    is_done, predictions = state[0]
    inputs = task.inputs(split)
    if is_done or not len(inputs):
        return _read_lines(final) if is_main else []
    chunks = task.predict(model, tokenizer, split, tuple(predictions), share=processes.share())
    progress = Progress(
        len(inputs),
        initial=len(predictions),
        description="predict",
        unit="input",
        enabled=is_main,
    )
    with contextlib.closing(progress), _lines_of(partial if is_main else None) as write:
        write(predictions)
        # Every process takes part in every round, with nothing where its share is done.
        while found := [c for c in processes.gather([next(chunks, None)]) if c is not None]:
            for chunk in found:
                predictions += chunk
                write(chunk)
                progress.update(len(chunk))
    if not is_main:
        return []
    order = {p["id"]: p for p in predictions}
    predictions = [order[key] for key in sorted(order)]
    with _lines_of(partial) as write:
        write(predictions)
    partial.replace(final)
    return predictions


@contextlib.contextmanager
def _lines_of(path: Path | None) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
    """Open a JSONL file for writing and yield what adds lines to it; None writes nowhere."""
    if path is None:
        yield lambda _: None
        return
    with path.open("w", encoding="utf-8") as stream:

        def write(predictions: Sequence[dict[str, Any]]) -> None:
            stream.writelines(_line(p) for p in predictions)
            stream.flush()

        yield write
        os.fsync(stream.fileno())


def _line(prediction: dict[str, Any]) -> str:
    return json.dumps(prediction, ensure_ascii=False) + "\n"


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Return the predictions of a finished run.

    Raises:
        ConfigError: there are none.
    """
    if not (folder / PREDICTIONS).is_file():
        raise ConfigError(f"{folder} holds no {PREDICTIONS}")
    return _read_lines(folder / PREDICTIONS)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file; a last line cut off by a kill is dropped."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8")
    return [json.loads(line) for line in whole.split("\n") if line]


def read_adapter(folder: Path) -> dict[str, Any]:
    """Return the parameters that the run in `folder` changed, by name.

    Raises:
        ConfigError: there are none.
    """
    from safetensors.torch import load_file

    path = folder / ADAPTER
    if not path.is_file():
        raise ConfigError(f"{folder} holds no finished run: {ADAPTER} is missing")
    return load_file(path)


def finish(
    folder: Path,
    record: dict[str, Any],
    resources: dict[str, Any],
    item_spread: dict[str, Any] | None,
) -> None:
    """Write the record and what stands beside it; then the checkpoints have served.

    Where a score is missing they stay, so that the run can be scored again without training.
    """
    from delta_lora import checkpoint

    checkpoint.write_json(folder / RESOURCES, resources)
    if item_spread is not None:
        checkpoint.write_json(folder / ITEM_SPREAD, item_spread)
    checkpoint.write_json(folder / RECORD, record)
    if not record["missing_metrics"]:
        checkpoint.remove(folder / "checkpoints")
        checkpoint.remove(folder / "best")


def clear(folder: Path) -> None:
    """Remove the results of a stale run; its folder and lock stay."""
    logger.info("run %s is stale: starting it again", folder.name)
    for path in folder.iterdir():
        if path.name in (LOCK, OWNER):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
