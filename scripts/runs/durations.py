"""How long runs take, from the runs that are finished on this machine."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from delta_lora.checks import expanded
from delta_lora.stored import UnreadableError
from scripts.runs.checksums import RECORD, read_record
from scripts.runs.run import Run

#: what two runs must share for the time of one to tell that of the other: scale, task and data,
#: weights, and how much is done. The method may differ.
SAME_KIND = (
    "choices.scale", "choices.task", "train_fraction", "predict", "init_from",
    "model.name", "model.path", "model.hub_id", "model.init", "model.dtype", "model.attention",
    "task.source", "task.data_dir", "task.max_rows", "task.max_inputs", "task.embedded_sizes",
    "task.max_length", "task.max_source_length", "task.max_target_length", "task.decoding",
    "trainer.max_steps", "trainer.num_epochs", "trainer.batch_size", "trainer.micro_batch_size",
    "trainer.evaluate_every_epochs", "trainer.eval_batch_size", "trainer.group_by_length",
    "trainer.gradient_checkpointing", "trainer.compile",
    "trainer.precision", "trainer.matmul_precision", "trainer.device",
)  # fmt: skip
#: of these, folders: two ways to write one are the same.
FOLDERS = ("model.path", "task.data_dir")
#: values that a record leaves out where they are these.
USUAL = {"trainer.matmul_precision": "fp32", "predict": True}

logger = logging.getLogger(__name__)


class Durations:
    """Expected seconds of a run, from the runs that are finished.

    The mean of the same group (all settings but the seed) if it has one, else of the runs that are
    of the same kind (`SAME_KIND`), else unknown: a run of other steps, another model or other data
    tells nothing.
    """

    def __init__(self) -> None:
        self._by_group: dict[str, list[float]] = defaultdict(list)
        self._by_kind: dict[str, list[float]] = defaultdict(list)

    def read(self, outputs: Iterable[Path]) -> None:
        """Add every finished run in the folders `outputs`; a damaged record is left out."""
        for parent in sorted(set(outputs)):
            for path in sorted(parent.glob(f"*/{RECORD}")):
                try:
                    record = read_record(path.parent, is_whole=True)
                except UnreadableError as error:
                    logger.warning("no time is taken from it: %s", error)
                    continue
                resources = record.get("resources")
                if record["status"] == "completed" and resources is not None:
                    keys = ("train_time_s", "predict_time_s", "score_time_s")
                    seconds = math.fsum(resources.get(key, 0.0) for key in keys)
                    self.add(record["group"], record["config"], seconds)

    def add(self, group: str, config: Any, seconds: float) -> None:
        """Add one finished run."""
        self._by_group[group].append(seconds)
        self._by_kind[_kind(config)].append(seconds)

    def expect(self, run: Run) -> float | None:
        """Return the expected seconds of a run, or None where no earlier run tells."""
        values = self._by_group.get(run.group) or self._by_kind.get(_kind(run.config))
        return math.fsum(values) / len(values) if values else None

    def basis(self, run: Run) -> str:
        """Return which runs `expect` is the mean of."""
        if self._by_group.get(run.group):
            return "same settings"
        is_known = self._by_kind.get(_kind(run.config))
        return "same task, model, data and steps" if is_known else "no earlier run"


def _kind(config: Any) -> str:
    """Return what `SAME_KIND` names of a configuration, composed or as a record has it."""
    values = {key: _at(config, key) for key in SAME_KIND}
    # A folder, another run's name or null: the length of a run depends on whether it is there.
    values["init_from"] = values["init_from"] is not None
    for key in FOLDERS:
        if values[key] is not None:
            values[key] = str(expanded(values[key]).resolve())
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
