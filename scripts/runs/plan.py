"""Runs that a table or the audit asks for: a cell, its state, and how long it will take.

A cell is one row on one run with one seed. Cells of several tables that have the same signature are
the same run and run once. Nothing here imports torch, so a plan takes seconds.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

#: keys that a table sets itself, with what to use instead.
RESERVED = {
    "seed": "--seeds (SEEDS= with make)",
    "scale": "--scale (SCALE= with make)",
    "method": "the rows of configs/table",
}


class CellStatus(Protocol):
    """State of a cell (done, partial, missing, stale, failed) and the reason for it."""

    @property
    def state(self) -> str:
        """One of done, partial, missing, stale, failed."""

    @property
    def reason(self) -> str:
        """Why; empty where the state says it all."""


class CellModule(Protocol):
    """What planning needs of `scripts.runs.cell`; tests give their own."""

    def compose(self, overrides: Sequence[str]) -> Any:
        """Return the configuration of one run."""

    def run_dir(self, cfg: Any) -> Path:
        """Return its folder, named by its signature."""

    def group(self, cfg: Any) -> str:
        """Return its signature without the seed."""

    def status(self, cfg: Any) -> CellStatus:
        """Return its state."""

    def starts_from(self, cfg: Any) -> Any | None:
        """Return the configuration of the run that it starts from; None where there is none."""

    def unprepared(self, cfgs: Sequence[Any]) -> list[str]:
        """Return the names of the models that are to be pre-trained for them."""

    def check(self, cfg: Any) -> None:
        """Raise ValueError where it cannot run as asked."""

    def check_sources(self, cfg: Any, seen: set[str]) -> None:
        """Raise ValueError where weights or data that `seen` does not name cannot be had."""

    def load_record(self, folder: Path) -> dict[str, Any]:
        """Return its record with the resources under ``resources``."""


@dataclass(frozen=True)
class Cell:
    """One run that a table needs.

    Attributes:
        row: name of the table's row.
        run: name of the table's run (its task).
        seed: seed of the run.
        overrides: the Hydra overrides that compose it.
        config: the composed configuration.
        folder: its run folder; the last part is the signature.
    """

    row: str
    run: str
    seed: int
    overrides: tuple[str, ...]
    config: Any
    folder: Path

    @property
    def signature(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def label(self) -> str:
        """How messages call the cell."""
        return f"{self.row} on {self.run}, seed {self.seed}"


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of a list such as ``1,2,3``.

    Raises:
        ValueError: an entry is no integer of 0 or more, or is there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"seeds={text!r}: use integers of 0 or more with commas, such as 1,2,3")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={text!r}: a seed is named twice")
    return seeds


def parse_overrides(text: str) -> list[str]:
    """Return Hydra overrides given as one string.

    Raises:
        ValueError: the quoting is broken, an entry is no override, or it sets what a table sets.
    """
    try:
        overrides = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot read the overrides {text!r}: {error}") from None
    for override in overrides:
        key, separator, _ = override.partition("=")
        if override.startswith("-") or not (separator or override.startswith("~")):
            raise ValueError(f"{override!r} is no override; write key=value, for example lr=0.1")
        key = key.lstrip("+~")
        if key in RESERVED:
            raise ValueError(f"{override!r}: {key} is set by {RESERVED[key]}")
    return overrides


#: what two runs must share for the time of one to tell that of the other: scale, task and data,
#: model, and how much is done. The method may differ.
SAME_KIND = (
    "choices.scale", "choices.task", "model.name", "train_fraction", "predict", "init_from",
    "task.source", "task.max_rows", "task.embedded_sizes", "task.max_length",
    "task.max_source_length", "task.max_target_length", "task.decoding",
    "trainer.max_steps", "trainer.num_epochs", "trainer.batch_size", "trainer.micro_batch_size",
    "trainer.precision", "trainer.matmul_precision", "trainer.device",
)  # fmt: skip
#: values that a record leaves out where they are these.
USUAL = {"trainer.matmul_precision": "fp32", "predict": True}


class Durations:
    """Expected seconds of a run, from the runs that are finished.

    The mean of the same group (all settings but the seed) if it has one, else of the runs that are
    of the same kind (`SAME_KIND`), else unknown: a run of other steps, another model or other data
    tells nothing.
    """

    def __init__(self) -> None:
        self._by_group: dict[str, list[float]] = defaultdict(list)
        self._by_kind: dict[str, list[float]] = defaultdict(list)

    def read(self, outputs: Iterable[Path], cell: CellModule) -> None:
        """Add every finished run in the folders `outputs`."""
        for parent in sorted(set(outputs)):
            for path in sorted(parent.glob("*/record.json")):
                record = cell.load_record(path.parent)
                resources = record.get("resources")
                if record["status"] == "completed" and resources is not None:
                    keys = ("train_time_s", "predict_time_s", "score_time_s")
                    seconds = math.fsum(resources.get(key, 0.0) for key in keys)
                    self.add(record["group"], record["config"], seconds)

    def add(self, group: str, config: Any, seconds: float) -> None:
        """Add one finished run."""
        self._by_group[group].append(seconds)
        self._by_kind[_kind(config)].append(seconds)

    def expect(self, group: str, config: Any) -> float | None:
        """Return the expected seconds of a run, or None where no earlier run tells."""
        values = self._by_group.get(group) or self._by_kind.get(_kind(config))
        return math.fsum(values) / len(values) if values else None

    def basis(self, group: str, config: Any) -> str:
        """Return which runs `expect` is the mean of."""
        if self._by_group.get(group):
            return "same settings"
        is_known = self._by_kind.get(_kind(config))
        return "same task, model, data and steps" if is_known else "no earlier run"


def _kind(config: Any) -> str:
    """Return what `SAME_KIND` names of a configuration, composed or as a record has it."""
    values = {key: _at(config, key) for key in SAME_KIND}
    # A folder, another run's name or null: the length of a run depends on whether it is there.
    values["init_from"] = values["init_from"] is not None
    return json.dumps(values, sort_keys=True, default=_plain)


def _at(config: Any, key: str) -> Any:
    node = config
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return USUAL.get(key)
        node = node.get(part)
    return USUAL.get(key) if node is None else node


def _plain(node: Any) -> Any:
    """Return a mapping or a list of OmegaConf as JSON has it."""
    return dict(node) if isinstance(node, Mapping) else list(node)


def format_seconds(seconds: float | None) -> str:
    """Return a duration as people say it: ``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
