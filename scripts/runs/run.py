"""One run: its configuration, its name, its folder, its state, its record.

A run's folder ``outputs/<name>/`` holds ``config.yaml``, ``metrics.jsonl``, ``predictions.jsonl``,
``record.json`` (what a repetition gives again to the bit), ``resources.json`` (seconds, memory,
rates), ``checkpoints/`` and ``adapter/``. What means the same always has the same folder: asking
again continues a killed run, or says that it is done.

A run may start from another one: from the model that it pre-trained (``model.pretrain``), or from
what it trained on another task (``init_from``). Such runs are made first where they do not exist.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from delta_lora.checks import check_path, expanded, shown
from delta_lora.stored import UnreadableError
from scripts.runs import composition
from scripts.runs.checksums import RECORD, read_record
from scripts.runs.composition import ROOT, ConfigError
from scripts.runs.leaves import check_leaves
from scripts.runs.meaning import hash_of, meaning_of
from scripts.runs.weights import model_facts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """State of a run: done, partial, missing, stale, failed or damaged, and why."""

    state: str
    reason: str = ""


class Run:
    """One run.

    Args:
        composed: from `scripts.runs.composition.compose`; not changed afterwards.
        own: values of its root that are other for this run, as in `with_seed`.
    """

    def __init__(self, composed: DictConfig, **own: Any) -> None:
        self._composed = composed
        self._own = own
        self._asked: tuple[str, ...] = ()

    @classmethod
    def compose(cls, overrides: Sequence[str]) -> Run:
        """Return the run of Hydra overrides such as ``experiment=e2e`` and ``seed=2``.

        Raises:
            ConfigError: they do not compose.
        """
        run = cls(composition.compose(overrides))
        run._asked = tuple(overrides)
        return run

    def with_seed(self, seed: int) -> Run:
        """Return the same run with another seed; composing it anew takes a quarter of a second."""
        if self._follows_seed:
            others = [o for o in self._asked if o.lstrip("+").partition("=")[0] != "seed"]
            run = Run.compose([*others, f"seed={seed}"])
            run._own = {key: value for key, value in self._own.items() if key != "seed"}
            return run
        run = Run(self._composed, **{**self._own, "seed": seed})
        run._asked = self._asked
        if self.start is None:  # nothing else depends on the seed
            run.meaning = {**self.meaning, "seed": seed}
        return run

    @cached_property
    def _follows_seed(self) -> bool:
        """Whether another value of its configuration may follow its seed."""
        return composition.follows_seed(self._asked)

    def as_part_of(self, names: Iterable[str]) -> Run:
        """Return the same run, made for the tables and sweeps called `names`."""
        run = Run(self._composed, **{**self._own, "part_of": list(dict.fromkeys(names))})
        kept = {key: v for key, v in vars(self).items() if key not in ("config", "_own")}
        run.__dict__.update(kept)
        return run

    def __repr__(self) -> str:
        return f"Run({self.name})"

    @cached_property
    def config(self) -> DictConfig:
        """Its configuration, not to be changed; runs of many seeds share one until it is asked for.

        Copying one takes longer than all else that lists a run.
        """
        if not self._own:
            return self._composed
        config = self._composed.copy()
        for key, value in self._own.items():
            config[key] = value
        return config

    # ------------------------------------------------------------------ what it is called

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self._own.get("seed", self._composed.seed))

    @property
    def part_of(self) -> list[str]:
        """Names of the tables and sweeps that it was made for, where a command said so."""
        return [str(name) for name in self._own.get("part_of", self._composed.get("part_of")) or ()]

    @property
    def choices(self) -> DictConfig:
        """The chosen member of each group of the configuration: ``choices.method`` and so on."""
        return self._composed.choices

    @cached_property
    def meaning(self) -> dict[str, Any]:
        """All that its result depends on; plain JSON values.

        Raises:
            ConfigError: a value is not allowed, or a folder does not exist.
        """
        check_leaves(self.config)
        before, made = self.start, self.pretraining
        if isinstance(before, Path):
            name = read_record(before)["signature"]
        else:
            name = None if before is None else before.name
        return meaning_of(
            self.config, pretrained=None if made is None else hash_of(made.meaning), start=name
        )

    @cached_property
    def name(self) -> str:
        """Task, method, seed and the hash of its meaning: ``e2e--delta_lora--seed1--<12 hex>``."""
        return f"{self._label}--seed{self.seed}--{hash_of(self.meaning)}"

    @cached_property
    def group(self) -> str:
        """The same without the seed: what the runs of one cell of a table share."""
        shared = {**self.meaning, "seed": None}
        if self.start_run is not None:  # each seed starts from the run of that seed
            shared["init_from"] = self.start_run.group
        return f"{self._label}--{hash_of(shared)}"

    @property
    def _label(self) -> str:
        return f"{self.meaning['task']['name']}--{self.meaning['method']['name']}"

    @property
    def outputs(self) -> Path:
        """The folder of all run folders."""
        chosen = self._composed.paths.outputs
        return ROOT / "outputs" if chosen is None else check_path("paths.outputs", chosen)

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.outputs / self.name

    @cached_property
    def model_facts(self) -> dict[str, Any]:
        """Which model it starts from; see `scripts.runs.weights.model_facts`."""
        return model_facts(self._composed, is_made_here=self.pretraining is not None)

    # ------------------------------------------------------------------ how far it is

    def status(self) -> Status:
        """Return whether it is done, partial, missing, stale, failed or damaged."""
        folder = self.folder
        if not (folder / RECORD).exists():
            started = (folder / "checkpoints").is_dir() or (folder / "config.yaml").exists()
            return Status("partial", "started, not finished") if started else Status("missing")
        try:
            record = read_record(folder, self.name, is_whole=True)
        except UnreadableError as error:
            return Status("damaged", str(error))
        if record["status"] == "failed":
            return Status("failed", record["error"]["message"])
        made = None if self.pretraining is None else _known(self.pretraining.folder)
        if made is not None:
            known = record["model"].get("pretrained_sha256")
            if known not in (None, made["model"].get("saved_weights_sha256")):
                return Status("stale", "the pre-trained model was made anew since")
        before = self.start
        base = _known(before.folder if isinstance(before, Run) else before)
        if base is not None and base["adapter_sha256"] != record["init_from"]["adapter_sha256"]:
            return Status("stale", "the run that it starts from was made anew since")
        if record["status"] == "pruned":
            given_up = record["pruned"]
            where = f"pruned at step {given_up['step']} of {given_up['of']}"
            return Status("partial", f"{where}, because {given_up['reason']}")
        return Status("done")

    @property
    def is_done(self) -> bool:
        """Whether its record stands and what it starts from is still the same."""
        return self.status().state == "done"

    def record(self) -> dict[str, Any]:
        """Return its record with its resources under ``resources``."""
        return read_record(self.folder)

    def completed(self) -> dict[str, Any] | None:
        """Return its record where it is completed, else None."""
        return completed(self.folder)

    # ------------------------------------------------------------------ what it starts from

    @cached_property
    def pretraining(self) -> Run | None:
        """The run that pre-trains its model; None where its weights come from outside."""
        model = self._composed.model
        if model.pretrain is None or model.path is not None:
            return None
        return _pretraining(tuple(model.pretrain), self._composed.paths.outputs)

    @cached_property
    def start(self) -> Run | Path | None:
        """The run whose weights it starts from, or that run's folder; None where there is none.

        ``init_from`` names an experiment, or is the folder of a finished run. The run of another
        experiment is the same command with that one: same model, method, scale and seed, and every
        override of a single value, those of ``task.`` and ``recipe.`` included. So a table whose
        runs all take ``recipe.rank=4`` starts from its own cell there.

        Raises:
            ConfigError: it is neither, or the run would start from itself.
        """
        if self._composed.init_from is None:
            return None
        name, overrides = str(self._composed.init_from), list(self._composed.overrides)
        if name in composition.experiments(overrides):
            if name == self.choices.task:
                raise ConfigError(f"init_from={name} is the task of this run itself; use null")
            kept = (*_kept(overrides), f"experiment={name}", f"model={self.choices.model}")
            return _composed(kept).with_seed(self.seed)
        folder = expanded(name).resolve()
        if not (folder / RECORD).is_file():
            raise ConfigError(
                f"init_from={name} is neither an experiment nor the folder of a run with a "
                f"{RECORD}; use an experiment such as glue/mnli, a run folder, or null"
            )
        return folder

    @property
    def start_run(self) -> Run | None:
        """`start` where it is a run that can still be made, else None."""
        return self.start if isinstance(self.start, Run) else None

    @property
    def weights(self) -> tuple[str, str | None] | None:
        """Folder or hub id, and revision, of the pre-trained weights; None without any."""
        model = self._composed.model
        if self.pretraining is not None:
            return str(self.pretraining.folder / "model"), None
        if model.path is not None:
            return str(expanded(model.path)), None
        return None if model.hub_id is None else (model.hub_id, model.revision)


def _known(folder: Path | None) -> dict[str, Any] | None:
    """Return what `completed` does; None, with a warning, where the record is damaged."""
    try:
        return completed(folder)
    except UnreadableError as error:
        logger.warning("%s", error)
        return None


def completed(folder: Path | None) -> dict[str, Any] | None:
    """Return the record of the run in a folder where it is completed, else None.

    Raises:
        UnreadableError: the record is damaged.
    """
    if folder is None or not (folder / RECORD).exists():
        return None
    record = read_record(folder)
    return record if record.get("status") == "completed" else None


def _kept(overrides: Iterable[str]) -> Iterator[str]:
    dropped = ("experiment", "task", "recipe", "model", "seed", "init_from", "score_references")
    for override in overrides:
        if override.partition("=")[0].lstrip("+~") not in dropped:
            yield override


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Run:
    return Run.compose(overrides)


@functools.cache
def _pretraining(overrides: tuple[str, ...], outputs: str | None) -> Run:
    try:
        run = _composed((*overrides, "save_model=true", "predict=false", "logger=none"))
    except ConfigError as error:
        raise ConfigError(f"model.pretrain={shown(list(overrides))}: {error}") from error
    config = run.config.copy()
    config.paths.outputs = outputs
    return Run(config)
