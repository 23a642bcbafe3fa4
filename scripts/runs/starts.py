"""What a run starts from: a model that the suite pre-trains, or an earlier run on another task."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_lora import processes
from scripts.runs.composition import ConfigError
from scripts.runs.folder import RECORD
from scripts.runs.run import Run, completed
from scripts.runs.workers import COMMAND_BEGAN

#: settings of a method without which the weights of a run mean something else.
SHARED_WITH_START = ("rank", "alpha")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The run that another one starts from: its folder, and what the record says of it."""

    folder: Path
    facts: dict[str, Any]


def unprepared(runs: Iterable[Run]) -> list[str]:
    """Return the names of the models that `prepare` would pre-train."""
    names = [
        run.config.model.name
        for run in runs
        if run.pretraining is not None and not run.pretraining.is_done
    ]
    return list(dict.fromkeys(names))


def prepare(runs: Sequence[Run]) -> None:
    """Pre-train, once, the models that the runs need and that do not exist yet."""
    needed = {run.pretraining.name: run for run in runs if run.pretraining is not None}
    for run in needed.values():
        assert run.pretraining is not None
        folder = run.pretraining.folder
        _ensure(run.pretraining, f"pre-training {run.config.model.name} (once; kept in {folder})")


def prepare_start(run: Run) -> Start | None:
    """Make the run that `run` starts from if it does not exist, and check that it fits.

    Raises:
        ConfigError: it is a run of another method or model, or of another rank or alpha.
    """
    before = run.start
    if before is None:
        return None
    if isinstance(before, Run):
        _ensure(before, f"first the run that this one starts from: {before.folder}")
        before = before.folder
    record = completed(before)
    if record is None:
        raise ConfigError(f"init_from: the run in {before} is not finished")
    mine = (run.choices.method, run.config.model.name)
    theirs = (record["method"], record["model"]["name"])
    if mine != theirs:
        raise ConfigError(
            f"init_from: the run in {before} is {' on '.join(theirs)}, this one is "
            f"{' on '.join(mine)}; a run starts from a run of the same method and model"
        )
    for key in SHARED_WITH_START:
        here, there = run.config.method.get(key), record["config"]["method"].get(key)
        if here != there:
            raise ConfigError(
                f"init_from: the run in {before} has {key}={there}, this one {here}: what it "
                f"learned would be another function here; use method.{key}={there}, or init_from="
                "TASK, which makes a start with the settings of this run"
            )
    facts = {
        "task": record["task"]["name"],
        "signature": record["signature"],
        "adapter_sha256": record["adapter_sha256"],
    }
    return Start(before, facts)


def _ensure(run: Run, message: str) -> None:
    """Execute `run` unless it is done.

    Raises:
        RuntimeError: it failed earlier in the same command, which does not try it again.
    """
    from scripts.runs.execution import execute

    now = run.status()
    if now.state == "done":
        return
    began = float(os.environ.get(COMMAND_BEGAN, "inf"))
    if now.state == "failed" and (run.folder / RECORD).stat().st_mtime >= began:
        raise RuntimeError(f"the run that this one starts from failed: {now.reason}")
    logger.info(message)
    execute(run)
    while not processes.is_main() and not run.is_done:
        time.sleep(0.2)  # the main process is still writing
