"""What stands in a run folder: its lock, its predictions, its adapter, its record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_lora import locks, stored, writing
from scripts.runs import checksums
from scripts.runs.checksums import ADAPTER as ADAPTER
from scripts.runs.checksums import ITEM_SPREAD as ITEM_SPREAD
from scripts.runs.checksums import PARTIAL
from scripts.runs.checksums import PREDICTIONS as PREDICTIONS
from scripts.runs.checksums import RECORD as RECORD
from scripts.runs.checksums import RESOURCES as RESOURCES
from scripts.runs.checksums import read_record as read_record
from scripts.runs.composition import ConfigError

#: held by the process that works in a run folder, and beside it which process that is.
LOCK, OWNER = ".lock", ".owner"

logger = logging.getLogger(__name__)


class LockedError(RuntimeError):
    """Another process works in the same run folder."""


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the run folder for this process, as `delta_lora.locks` does.

    Args:
        folder: made where it does not exist.
        wait: wait for another process that holds it.

    Raises:
        LockedError: another process holds it and `wait` is False.
        ConfigError: the folder cannot be written.
    """
    owner, held = folder / OWNER, None
    try:
        writing.make_folder(folder)
        held = locks.take(folder / LOCK, wait=False)
        if held is None:
            who = (
                owner.read_text(encoding="utf-8", errors="replace") if owner.exists() else "unknown"
            )
            advice = locks.advice(folder / LOCK)
            if not wait:
                raise LockedError(
                    f"process {who} is already working in {folder}; wait for it, or stop it{advice}"
                )
            logger.info("waiting for process %s, which works in %s%s", who, folder, advice)
            held = locks.take(folder / LOCK, wait=True)
        assert held is not None
        owner.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except OSError as error:
        if held is not None:
            held.release()
        raise ConfigError(
            f"cannot write to the output folder {folder}: {writing.reason_of(folder, error)}, or "
            "choose another with paths.outputs=FOLDER"
        ) from error
    try:
        yield
    finally:
        held.release()


def is_held(folder: Path) -> bool:
    """Return whether a process works in a run folder at this moment."""
    if not (folder / LOCK).exists() and not locks.soft(folder / LOCK).exists():
        return False
    try:
        held = locks.take(folder / LOCK, wait=False)
    except OSError:
        return True
    if held is None:
        return True
    held.release()
    return False


def predict(
    task: Any,
    model: Any,
    tokenizer: Any,
    folder: Path,
    split: str,
    *,
    origin: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Predict a split into ``predictions.jsonl``, continuing what an earlier session wrote.

    In a distributed run all processes call it: each predicts its share, chunk by chunk, and the
    main process writes. So the folder is read and written in one place.

    Until the record is written the predictions stand in ``predictions.partial.jsonl`` too, where
    every line holds a checksum of `origin` and of all lines so far. Only those are continued.

    Args:
        task: with its data.
        model: a plain one.
        tokenizer: of the model.
        folder: of the run.
        split: to predict.
        origin: JSON values that name the run and its trained weights.

    Returns:
        The predictions; in processes other than the main one an empty list.
    """
    from delta_lora import processes
    from delta_lora.runlog import Progress

    partial, is_main = folder / PARTIAL, processes.is_main()
    origin = {**origin, "split": split}
    state = processes.gather([_read_partial(partial, origin)] if is_main else [])
    predictions = state[0]
    inputs = task.inputs(split)
    if not len(inputs):
        return []
    chunks = task.predict(model, tokenizer, split, tuple(predictions), share=processes.share())
    progress = Progress(
        len(inputs),
        initial=len(predictions),
        description="predict",
        unit="input",
        enabled=is_main,
    )
    with (
        contextlib.closing(progress),
        _lines_of(partial if is_main else None, _Chain(origin)) as write,
    ):
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
    writing.write_text(folder / PREDICTIONS, "".join(_line(p, None) for p in predictions))
    return predictions


class _Chain:
    """A checksum over lines, each with all before it.

    Args:
        origin: what the first line follows on.
    """

    def __init__(self, origin: Mapping[str, Any]) -> None:
        text = json.dumps(origin, sort_keys=True, separators=(",", ":"))
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def add(self, line: str) -> str:
        """Return the checksum up to and with the next line."""
        self._digest = hashlib.sha256(f"{self._digest}{line}".encode()).hexdigest()
        return self._digest


@contextlib.contextmanager
def _lines_of(
    path: Path | None, chain: _Chain
) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
    """Open a JSONL file for writing and yield what adds lines to it.

    Args:
        path: None writes nowhere.
        chain: gives every line its checksum.

    Raises:
        WriteError: a line cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    with writing.writing(path):  # unbuffered: what cannot be written is not tried again
        stream = path.open("wb", buffering=0)
    with stream:

        def write(predictions: Sequence[dict[str, Any]]) -> None:
            rest = memoryview("".join(_line(p, chain) for p in predictions).encode())
            with writing.writing(path):
                while rest:
                    rest = rest[stream.write(rest) :]

        yield write
        with writing.writing(path):
            os.fsync(stream.fileno())


def _line(prediction: Mapping[str, Any], chain: _Chain | None) -> str:
    line = json.dumps(prediction, ensure_ascii=False)
    if chain is not None:
        line = json.dumps({**prediction, stored.SEAL: chain.add(line)}, ensure_ascii=False)
    return f"{line}\n"


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Return the predictions of a finished run.

    Raises:
        ConfigError: there are none.
        UnreadableError: they are not those that its record names.
    """
    if not (folder / PREDICTIONS).is_file():
        raise ConfigError(f"{folder} holds no {PREDICTIONS}")
    checksums.check_files(folder, [PREDICTIONS])
    return read_lines(folder / PREDICTIONS)


def _read_partial(path: Path, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the predictions of an earlier session, up to the first that is not one of them.

    A last line cut off by a kill is dropped; a line that is damaged, or of another run or training,
    is named in a warning, and from there on it is predicted again.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    chain, found = _Chain(origin), list[dict[str, Any]]()
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            prediction = json.loads(line)
            checksum = prediction.pop(stored.SEAL)
            is_mine = checksum == chain.add(json.dumps(prediction, ensure_ascii=False))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            is_mine = False
        if not is_mine:
            logger.warning(
                "%s, line %d is damaged, or of another run or training: predicting again from "
                "there on",
                path, number,
            )  # fmt: skip
            return found
        found.append(prediction)
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file; a last line cut off by a kill is dropped.

    Raises:
        UnreadableError: a line is none.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].decode("utf-8")
        lines = [json.loads(line) for line in whole.split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise stored.damaged(path, str(error), "copy it again, or remove it") from error
    if not all(isinstance(line, dict) for line in lines):
        raise stored.damaged(path, "a line is no JSON object", "copy it again, or remove it")
    return lines


def read_adapter(folder: Path) -> dict[str, Any]:
    """Return the parameters that the run in `folder` changed, by name.

    Raises:
        ConfigError: there are none.
        UnreadableError: they are not those that its record names.
    """
    path = folder / ADAPTER
    if not path.is_file():
        raise ConfigError(f"{folder} holds no finished run: {ADAPTER} is missing")
    checksums.check_files(folder, [ADAPTER])
    return stored.read_tensors(path, "copy it again")


def finish(
    folder: Path,
    record: dict[str, Any],
    resources: dict[str, Any],
    item_spread: dict[str, Any] | None,
) -> None:
    """Write the record and what stands beside it; then the checkpoints have served.

    Where a score is missing they stay, so that the run can be scored again without training.
    """
    checksums.write(folder, record, resources, item_spread)
    remove_served(folder, record)


def remove_served(folder: Path, record: Mapping[str, Any]) -> None:
    """Remove what a completed run needs no more; a kill behind its record may have left some."""
    from delta_lora import checkpoint

    if record["missing_metrics"]:
        return
    checkpoint.remove(folder / "checkpoints")
    checkpoint.remove(folder / "best")
    with contextlib.suppress(OSError):
        (folder / PARTIAL).unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what processes that were killed have left half written in a run folder.

    Only the process that holds the folder may call it.
    """
    for place in (folder, *(folder / name for name in ("adapter", "checkpoints", "best"))):
        writing.remove_unfinished(place)


def clear(folder: Path) -> None:
    """Remove the results of a stale run; its folder and lock stay."""
    logger.info("run %s is stale: starting it again", folder.name)
    for path in folder.iterdir():
        if path.name in (LOCK, locks.soft(folder / LOCK).name, OWNER):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
