r"""A study: a search over settings whose runs are chosen one group after the other, and its view.

    python scripts/train.py -m hydra/sweeper=optuna experiment=e2e method=delta_lora scale=tiny \
        'method.update_ratio=interval(0.1,4)' 'method.start_step=int(interval(0,50))' \
        hydra.sweeper.n_trials=20

The study stands in ``outputs/sweeps/<name>/``: ``study.journal``, which Optuna's own tools read,
and the view, ``study.{json,csv,md,svg,png}``. Trials run on the workers of the tables, so one that
is killed costs itself only. What came of a trial is read from its record, wherever that was made: a
finished run costs nothing. The same command continues a study that was stopped, tries again what
failed or was held by another process, and with a larger ``n_trials`` goes on.

The plugin hydra-optuna-sweeper is not used: it needs an Optuna below 3 from 2022, ends a study at
its first failed trial, begins anew when it is called again, and cannot prune.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from delta_lora.checks import near
from scripts.runs import batch as batches
from scripts.runs import checks, composition
from scripts.runs.allotment import allot, largest_need
from scripts.runs.batch import HELD, Batch, prepare_models, run_cells
from scripts.runs.cells import Cell
from scripts.runs.composition import ConfigError
from scripts.runs.folder import LOCK, OWNER, RECORD, LockedError, lock, read_record
from scripts.runs.jobs import Outcome
from scripts.runs.launchers import Here
from scripts.runs.meaning import hash_of
from scripts.runs.run import Run
from scripts.runs.space import check_disk_space
from scripts.sweeping.content import CHOSEN_ON, scores_of, validation_value
from scripts.sweeping.page import LEFT
from scripts.sweeping.search import Rule, Search, Settings, Trial, curve_of
from scripts.sweeping.space import Dimension, read_space
from scripts.sweeping.study_view import build_study, last_line, terminal, trial_line, write_study

if TYPE_CHECKING:
    from scripts.runs.batch import Workers

SWEEPER = "hydra/sweeper"
OPTUNA = f"{SWEEPER}=optuna"
MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
JOURNAL = "study.journal"
#: settings of which one must be allowed.
NUM_TRIED = 64
#: how Hydra's own plugin for Optuna calls settings -> how they are called here.
_ALIASES = {"sampler.seed": "seed"}


def asks_for_study(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for Optuna."""
    return OPTUNA in arguments


def read_study(arguments: Sequence[str]) -> Study:
    """Return the study of a command line of ``train.py``.

    Raises:
        ConfigError: it asks for what a study cannot do; the message says what to write.
    """
    if not set(MULTIRUN) & set(arguments):
        raise ConfigError(f"{OPTUNA} chooses the runs of a sweep; add -m, or leave it out")
    own: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if argument in (*MULTIRUN, OPTUNA):
            continue
        if key == composition.SEARCH_PATH or not key.startswith(("hydra", "-")):
            overrides.append(argument)
            continue
        name = key.removeprefix("hydra.sweeper.").removeprefix(f"{SWEEPER}/")
        name = _ALIASES.get(name, name)
        known = [each.name for each in fields(Settings)]
        if key.startswith("hydra/launcher") or key.startswith("hydra.launcher"):
            raise ConfigError(
                f"{argument}: a study runs on workers of its own, over all devices of this "
                "machine; leave the launcher out, hydra.sweeper.n_jobs=N is how many run at a time"
            )
        if name == key or name not in known or not separator:
            raise ConfigError(
                f"{argument} is no setting of a study; {near(name, known)}"
                f"known: {', '.join(f'hydra.sweeper.{each}' for each in known)}"
            )
        own[name] = yaml.safe_load(value)
    try:
        settings = Settings(**own)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("a study needs optuna; install requirements.lock, or pip install optuna")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a study starts processes of its own; call it with python, not accelerate launch"
        )
    fixed, space = read_space(overrides)
    return Study.of(fixed, space, settings)


@dataclass
class Study:
    """A study.

    Attributes:
        fixed: overrides of every trial.
        search: how it chooses.
        first: the run at one value of every dimension.
        scores: from `scripts.sweeping.content.scores_of`.
        trials: so far.
    """

    fixed: list[str]
    search: Search
    first: Run
    scores: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    _runs: dict[int, Run | str] = field(default_factory=dict)

    @classmethod
    def of(cls, fixed: list[str], space: Sequence[Dimension], settings: Settings) -> Study:
        """Compose one run of every choice and check that a study of them can be.

        Raises:
            ConfigError: it cannot.
        """
        firsts = _firsts(fixed, space)
        first = Run.compose([*fixed, *(f"{key}={text}" for key, text in firsts.items())])
        for dimension in space:
            for text in dimension.texts:
                chosen = {**firsts, dimension.key: text}
                Run.compose([*fixed, *(f"{key}={value}" for key, value in chosen.items())])
        if first.config.trainer.evaluate_every_epochs is None:
            raise ConfigError(
                "trainer.evaluate_every_epochs=null: a study compares validation scores; use 1"
            )
        scores = scores_of(first, str(first.choices.task))
        chosen_on = scores[CHOSEN_ON]
        direction = "maximize" if chosen_on["better"] == "higher" else "minimize"
        if settings.direction not in (None, direction):
            raise ConfigError(
                f"hydra.sweeper.direction={settings.direction}: of the validation "
                f"{chosen_on['name']}, which trials are compared by, {chosen_on['better']} is "
                f"better; use {direction}, or leave it out"
            )
        search = Search(space, settings, metric=chosen_on["name"], direction=direction)
        return cls(fixed, search, first, scores)

    # ------------------------------------------------------------------ what it is

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that its trials depend on; plain JSON values."""
        settings = vars(self.search.settings)
        left_out = ("n_trials", "direction", "study_name")
        return {
            "runs": hash_of(self.first.meaning),
            "space": [d.describe() for d in self.search.space],
            **{key: value for key, value in settings.items() if key not in left_out},
        }

    @cached_property
    def name(self) -> str:
        """Its name: as asked, or what is searched and a hash of all that its trials depend on."""
        chosen = self.search.settings.study_name
        if chosen is not None:
            if not chosen or chosen.strip(".") == "" or "/" in chosen:
                raise ConfigError(f"hydra.sweeper.study_name={chosen!r}: use a name of a folder")
            return chosen
        keys = [d.key.rpartition(".")[2].lstrip("+") for d in self.search.space]
        return "-".join([*keys, "study", hash_of(self.identity)[:8]])

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.first.outputs / "sweeps" / self.name

    def overrides_of(self, trial: Trial) -> list[str]:
        """Return the overrides of a trial that are its own."""
        return [f"{d.key}={d.text(trial.params[d.key])}" for d in self.search.space]

    def run_of(self, trial: Trial) -> Run | None:
        """Return the run of a trial; None where its setting does not compose."""
        found = self.composed(trial)
        return None if isinstance(found, str) else found

    def composed(self, trial: Trial) -> Run | str:
        """Return the run of a trial, or why there is none."""
        if trial.number not in self._runs:
            try:
                run = Run.compose([*self.fixed, *self.overrides_of(trial)])
                assert run.name  # names a folder that is missing
                self._runs[trial.number] = run
            except ConfigError as error:
                self._runs[trial.number] = str(error)
        return self._runs[trial.number]

    # ------------------------------------------------------------------ its work

    def run(self) -> int:
        """Make the trials that lack, write the view; return the exit code.

        Raises:
            ConfigError: nothing can be run, another process works on the study, or its file does
                not fit.
        """
        try:
            with lock(self.folder, wait=False), contextlib.ExitStack() as stack:
                return self._run(stack)
        except ConfigError:
            left = {path.name for path in self.folder.glob("*")}
            if self.folder.is_dir() and left <= {LOCK, OWNER}:  # nothing came of it
                shutil.rmtree(self.folder)
            raise
        except LockedError as error:
            raise ConfigError(
                f"{error}: one process chooses the trials of a study (hydra.sweeper.n_jobs is how "
                "many run at a time); another hydra.sweeper.seed makes another study"
            ) from error

    def _run(self, stack: contextlib.ExitStack) -> int:
        settings, search = self.search.settings, self.search
        try:
            self.trials = search.read(self.folder / JOURNAL, self.identity)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        print(f"study {self.name}: {settings.n_trials} trials, {settings.n_jobs} at a time")
        print(f"{len(self.trials)} of them are known; by validation {search.metric}, "
              f"{search.direction}; {self.folder / JOURNAL}", flush=True)  # fmt: skip
        work = _Work(self, stack)
        known = self.trials[: settings.n_trials]
        lost = [t for t in known if not t.is_settled or (t.state == "done" and not self._has(t))]
        if lost:  # what failed, was held, or lost its record: once more
            self._note(work.do(lost))
        while len(self.trials) < settings.n_trials:
            first = len(self.trials)
            for number in range(first, min(search.group(first).stop, settings.n_trials)):
                self.trials.append(search.ask(self.trials[:number]))
            found = work.do(self.trials[first:])
            if first == 0 and all(trial.state == "refused" for trial in found):
                raise ConfigError(found[0].reason)  # a setting of all, more likely than not
            self._note(found)
        return self._finish()

    def _has(self, trial: Trial) -> bool:
        run = self.run_of(trial)
        return run is not None and run.is_done

    def _note(self, found: Sequence[Trial]) -> None:
        """Take over what came of trials, keep it, and say it."""
        for trial in found:
            self.trials[trial.number] = trial
        self.search.write(self.folder / JOURNAL, self.name, self.trials, self.identity)
        for trial in found:
            print(trial_line(trial, self.overrides_of(trial), self.search.metric), flush=True)

    def _finish(self) -> int:
        trials = self.trials[: self.search.settings.n_trials]
        content = build_study(self, trials)
        paths = write_study(content, self.folder)
        print(f"\n{terminal(content)}")
        print("\n".join(f"wrote {path}" for path in paths), flush=True)
        is_complete = all(trial.state in ("done", "pruned") for trial in trials)
        print(last_line(content), file=sys.stdout if is_complete else sys.stderr)
        return 0 if is_complete else 1

    # ------------------------------------------------------------------ what came of a trial

    def outcome(self, trial: Trial, run: Run, rule: Rule | None) -> Trial | None:
        """Return a trial as its record has it; None where its run is still to be made, or to go on.

        A run that another study gave up counts as far as this study would have let it go.
        """
        metric, status = self.search.metric, run.status()
        if status.state == "done":
            record = run.record()
            value = validation_value(record, metric)
            curve = curve_of(record["training"]["validation"], metric)
            if value is None:
                why = f"its validation {metric} is no finite number"
                return replace(trial, state="failed", reason=why, curve=curve)
            return replace(trial, state="done", reason="", value=value, curve=curve, step=None)
        if rule is None or status.state != "partial" or not (run.folder / RECORD).exists():
            return None
        entries = read_record(run.folder)["training"]["validation"]
        stop = rule.first_stop(entries)
        if stop is None:
            return None
        count, reason = stop
        curve = curve_of(entries[:count], metric)
        step = int(entries[count - 1]["step"])
        return replace(trial, state="pruned", reason=reason, value=None, curve=curve, step=step)


def _firsts(fixed: Sequence[str], space: Sequence[Dimension]) -> dict[str, str]:
    """Return the first values that a run can have; one that is refused costs its trials only.

    Where no setting of the first `NUM_TRIED` can be had: the very first, of which it will be said.
    """
    texts = [d.texts or [d.first] for d in space]
    for chosen in itertools.islice(itertools.product(*texts), NUM_TRIED):
        found = dict(zip((d.key for d in space), chosen, strict=True))
        with contextlib.suppress(ConfigError):
            run = Run.compose([*fixed, *(f"{key}={text}" for key, text in found.items())])
            assert run.name  # its values are checked for it
            return found
    return {d.key: d.first for d in space}


class _Work:
    """Runs trials on workers, which are started where the first run is to be made.

    Args:
        study: whose trials.
        stack: ends the workers.
    """

    def __init__(self, study: Study, stack: contextlib.ExitStack) -> None:
        self.study, self.stack = study, stack
        self.pool: Workers | None = None

    def do(self, trials: Sequence[Trial]) -> list[Trial]:
        """Make the runs of trials that are still to be made; return the trials with their state."""
        study = self.study
        found: dict[int, Trial] = {}
        todo: dict[int, Cell] = {}
        rules = {t.number: study.search.rule(study.trials, t.number) for t in trials}
        for trial in trials:
            run = study.composed(trial)
            if isinstance(run, str):
                found[trial.number] = replace(trial, state="refused", reason=run)
                continue
            known = study.outcome(trial, run, rules[trial.number])
            if known is not None:
                found[trial.number] = known
                continue
            name = f"trial {trial.number}"
            todo[trial.number] = Cell(name, str(run.choices.task), run)
        failures, refused = self._make(todo, rules)
        for trial in trials:
            if trial.number in todo:
                cell = todo[trial.number]
                found[trial.number] = self._settle(
                    trial, cell, rules[trial.number], failures, refused.get(cell.signature)
                )
        return [found[trial.number] for trial in trials]

    def _settle(
        self,
        trial: Trial,
        cell: Cell,
        rule: Rule | None,
        failures: Mapping[str, Outcome],
        refusal: str | None,
    ) -> Trial:
        if refusal is not None:
            return replace(trial, state="refused", reason=refusal)
        outcome = failures.get(cell.signature)
        if outcome is None:
            now = self.study.outcome(trial, cell.run, rule)
            return now or replace(trial, state="missing", reason="it left no record")
        error = outcome.error or ""
        if error.startswith(HELD):
            return replace(trial, state="held", reason=LEFT)
        return replace(trial, state="failed" if outcome.was_run else "missing", reason=error)

    def _make(
        self, cells: Mapping[int, Cell], rules: Mapping[int, Rule | None]
    ) -> tuple[dict[str, Outcome], dict[str, str]]:
        """Make runs; return, by name, how those ended that failed, and why others were refused."""
        if not cells:
            return {}, {}
        study = self.study
        scale = str(study.first.choices.scale)
        batch = Batch.plan(
            list(cells.values()), scale=scale, extra=study.fixed, workers="auto", launcher=Here()
        )
        if batch.refusal is not None:
            checks.check(batch.todo[0].run)  # it says what to do in the words of this command
        batch.check_place(study.folder)
        refused = {cell.signature: reason for cell, reason in batch.refused()}
        for cell in batch.todo:
            before = cell.run.start_run
            if before is not None and before.name in refused:
                refused[cell.signature] = f"the run that it starts from: {refused[before.name]}"
        todo = [cell for cell in batch.todo if cell.signature not in refused]
        if not todo:
            return {}, refused
        check_disk_space(todo, batch.num_workers)
        if self.pool is None:
            self.pool = self._start(batch, todo)
        prepare_models(self.pool, todo)
        more = {cell.signature: (rules[number],) for number, cell in cells.items()}
        failures = run_cells(self.pool, todo, batch.durations, batches.ATTEMPT, more)
        return failures, refused

    def _start(self, batch: Batch, todo: Sequence[Cell]) -> Workers:
        """Start workers for as many runs as are chosen together, whatever is to do just now."""
        study = self.study
        number, scale = study.search.settings.n_jobs, str(study.first.choices.scale)
        allotment = allot("auto", scale, study.fixed, number, lambda: largest_need(todo))
        print(allotment.text)
        pool = replace(batch, allotment=allotment).pool(f"study-{study.name}")
        self.stack.enter_context(pool)
        return pool
