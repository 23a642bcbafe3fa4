"""What a run starts from: a model that the suite pre-trains, or an earlier run on another task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.runs import checksums
from scripts.runs.composition import ConfigError
from scripts.runs.run import Run, completed

#: settings of a method without which the weights of a run mean something else.
SHARED_WITH_START = ("rank", "alpha")


@dataclass(frozen=True)
class Start:
    """The run that another one starts from: its folder, and what the record says of it."""

    folder: Path
    facts: dict[str, Any]


def unprepared(runs: Iterable[Run]) -> list[str]:
    """Return the names of the models that are still to be pre-trained for `runs`."""
    names = [
        run.config.model.name
        for run in runs
        if run.pretraining is not None and not run.pretraining.is_done
    ]
    return list(dict.fromkeys(names))


def read_start(run: Run) -> Start | None:
    """Return what `run` starts from, which must be there and fit it; None where there is nothing.

    Raises:
        ConfigError: it is not finished, or a run of another method or model, rank or alpha.
        UnreadableError: its record or its adapter is damaged.
    """
    if run.start is None:
        return None
    before = run.start.folder if isinstance(run.start, Run) else run.start
    record = completed(before)
    if record is not None:
        checksums.check_record(before / checksums.RECORD, record, checksums.advice_for(before))
    if record is None:
        raise ConfigError(f"init_from: the run in {before} is not finished")
    mine = (run.choices.method, run.model_facts["name"])
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
    checksums.check_files(before, [checksums.ADAPTER])
    facts = {
        "task": record["task"]["name"],
        "signature": record["signature"],
        "adapter_sha256": record["adapter_sha256"],
    }
    return Start(before, facts)
