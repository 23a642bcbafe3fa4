"""How a study chooses: which settings come next, and which run is hopeless. Optuna decides both.

Both are functions of what is known and of nothing else. Trials are asked for in groups of `n_jobs`.
A trial depends on the sampler's seed, its own number, the results of the groups before, and the
settings of those before it in its group; whether a run is given up depends on its own evaluations
and the curves of the groups before. So a study that was killed goes on to the same trials, whatever
ran at the same time, and so does one that is given more trials.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from delta_lora.checks import OneOf, Range, check_values, documented
from delta_lora.writing import whole
from scripts.sweeping.space import Dimension

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "none")
DIRECTIONS = ("minimize", "maximize")
#: first trials of ``tpe``, which know nothing of each other.
NUM_SPREAD = 10
#: state of a trial -> how Optuna calls it; all others have failed there.
_OPTUNA = {"done": "COMPLETE", "pruned": "PRUNED"}


@documented
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a study searches: ``hydra.sweeper.<name>=<value>``."""

    n_trials: Annotated[int, Range(at_least=1)] = 20
    """Trials in all, those of earlier commands included."""

    n_jobs: Annotated[int, Range(at_least=1)] = 2
    """Trials that are chosen together, so that they can run at the same time; those of one group
    know nothing of each other's results."""

    sampler: Annotated[str, OneOf(SAMPLERS)] = "tpe"
    """``tpe``: near what was good so far, after ten trials that are spread over the space;
    ``random``: all at random."""

    seed: Annotated[int, Range(at_least=0)] = 1
    """Of the sampler; the runs have a seed of their own."""

    pruner: Annotated[str, OneOf(PRUNERS)] = "median"
    """``median``: a run is given up at an evaluation where its best score so far is worse than the
    median of the finished trials at that evaluation; ``none``: all run to their end."""

    pruner_startup: Annotated[int, Range(at_least=0)] = 5
    """Finished trials that the median needs at least."""

    pruner_warmup: Annotated[int, Range(at_least=0)] = 0
    """First evaluations of a run at which it is never given up; a setting that learns slowly at
    first, and is better in the end, needs them."""

    direction: Annotated[str | None, OneOf(DIRECTIONS)] = None
    """None, or what the validation score asks for anyway; the other one is refused."""

    study_name: str | None = None
    """Folder below ``outputs/sweeps``; None: made of what is searched and a hash of all settings
    but `n_trials`."""

    def __post_init__(self) -> None:
        check_values(Settings, vars(self), prefix="hydra.sweeper.")


@dataclass(frozen=True)
class Trial:
    """One try.

    Attributes:
        number: from 0.
        params: by key of the dimension, as Optuna has them.
        state: ``done``, ``pruned``, ``failed``, ``refused``, ``held`` or ``missing``.
        reason: why it is not done.
        value: validation score, as stored in records, of a trial that is done.
        curve: validation scores, one an evaluation, up to where it was given up.
        step: optimiser steps at which it was given up.
    """

    number: int
    params: Mapping[str, Any]
    state: str = "missing"
    reason: str = ""
    value: float | None = None
    curve: tuple[float, ...] = ()
    step: int | None = None

    @property
    def is_settled(self) -> bool:
        """Whether it is not tried again."""
        return self.state in ("done", "pruned", "refused")


@dataclass(frozen=True)
class Rule:
    """Says by the evaluations of a run so far why it is hopeless, or None; see `Settings.pruner`.

    Attributes:
        metric: key of the score in an evaluation.
        direction: of the score.
        startup: see `Settings.pruner_startup`.
        warmup: see `Settings.pruner_warmup`.
        curves: of the finished trials that are known.
    """

    metric: str
    direction: str
    startup: int
    warmup: int
    curves: tuple[tuple[float, ...], ...] = field(repr=False)

    def __call__(self, validation: Sequence[Mapping[str, float]]) -> str | None:
        """Decide; `validation` is that of `delta_lora.result.FitResult`."""
        import optuna

        curve = curve_of(validation, self.metric)
        if not any(map(math.isfinite, curve)):  # nothing to compare
            return None
        pruner = optuna.pruners.MedianPruner(self.startup, self.warmup)
        study = _empty_study(self.direction, pruner=pruner)
        study.add_trials([_frozen("done", curve=c, value=c[-1]) for c in self.curves if c])
        trial = study.ask()
        for number, value in enumerate(curve):
            trial.report(value, number)
        if not trial.should_prune():
            return None
        known = [c[len(curve) - 1] for c in self.curves if len(c) >= len(curve)]
        known = [value for value in known if math.isfinite(value)]
        best = (min if self.direction == "minimize" else max)(filter(math.isfinite, curve))
        return (
            f"its best validation {self.metric} so far, {best:.4g}, is worse than "
            f"{statistics.median(known):.4g}, the median of {len(known)} earlier trials at "
            f"evaluation {len(curve)}"
        )

    def first_stop(self, validation: Sequence[Mapping[str, float]]) -> tuple[int, str] | None:
        """Return after how many evaluations it would have given a run up and why, or None."""
        for count in range(1, len(validation) + 1):
            reason = self(validation[:count])
            if reason is not None:
                return count, reason
        return None


def curve_of(validation: Sequence[Mapping[str, float]], metric: str) -> tuple[float, ...]:
    """Return a score by evaluation; NaN where there is none."""
    return tuple(float(entry.get(metric, math.nan)) for entry in validation)


class Search:
    """The choosing side of a study.

    Args:
        space: what is searched.
        settings: how.
        metric: key of the validation score.
        direction: of the score.
    """

    def __init__(
        self, space: Sequence[Dimension], settings: Settings, *, metric: str, direction: str
    ) -> None:
        self.space, self.settings = tuple(space), settings
        self.metric, self.direction = metric, direction

    def group(self, number: int) -> range:
        """Return the numbers of the trials that are asked for together with `number`."""
        first = number - number % self.settings.n_jobs
        return range(first, first + self.settings.n_jobs)

    def ask(self, trials: Sequence[Trial]) -> Trial:
        """Return the trial that follows `trials`, which are all before it."""
        number = len(trials)
        if self.settings.sampler == "tpe" and number < NUM_SPREAD:
            return Trial(number, self._spread(number))
        known = self.group(number).start
        study = _empty_study(self.direction, sampler=self._sampler(number))
        study.add_trials([self._stored(trial) for trial in trials[:known]])
        study.add_trials([self._stored(trial, is_running=True) for trial in trials[known:]])
        asked = study.ask({d.key: d.distribution for d in self.space})
        return Trial(number, dict(asked.params))

    def _spread(self, number: int) -> dict[str, Any]:
        """Return a point of a Halton sequence: few at random may leave half of a setting out."""
        from scipy.stats import qmc

        points = qmc.Halton(len(self.space), scramble=True, seed=self.settings.seed)
        shares = points.fast_forward(number).random(1)[0]
        return {d.key: d.at(float(share)) for d, share in zip(self.space, shares, strict=True)}

    def _sampler(self, number: int) -> Any:
        """Return a sampler whose draws are those of one trial."""
        import numpy as np
        import optuna

        seed = int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0])
        if self.settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=NUM_SPREAD)

    def rule(self, trials: Sequence[Trial], number: int) -> Rule | None:
        """Return what gives trial `number` up; None where nothing does."""
        if self.settings.pruner == "none":
            return None
        known = trials[: self.group(number).start]
        return Rule(
            self.metric, self.direction, self.settings.pruner_startup, self.settings.pruner_warmup,
            tuple(trial.curve for trial in known if trial.state == "done"),
        )  # fmt: skip

    # ------------------------------------------------------------------ the file

    def write(
        self, path: Path, name: str, trials: Sequence[Trial], identity: Mapping[str, Any]
    ) -> None:
        """Write a study as a journal of Optuna, in place of the one that is there.

        Args:
            path: the file; a kill leaves the one before or this one, whole.
            name: of the study.
            trials: all of them.
            identity: JSON values by which the study is known again.
        """
        import optuna
        from optuna.storages import journal

        with whole(path) as temporary:
            storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(temporary)))
            study = _empty_study(self.direction, storage=storage, study_name=name)
            study.set_user_attr("identity", dict(identity))
            study.add_trials([self._stored(trial) for trial in trials])

    def read(self, path: Path, identity: Mapping[str, Any]) -> list[Trial]:
        """Return the trials of the file; none where there is no file.

        Raises:
            ValueError: the study was made with other settings, or the file cannot be read.
        """
        import optuna
        from optuna.storages import journal

        if not path.exists():
            return []
        try:
            storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
            (name,) = optuna.get_all_study_names(storage)
            study = optuna.load_study(study_name=name, storage=storage)
            known, stored = study.user_attrs["identity"], study.get_trials(deepcopy=False)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path} is no study ({type(error).__name__}: {error}); remove it: finished runs "
                "are found again by their records"
            ) from error
        differing = [k for k in {**known, **identity} if known.get(k) != identity.get(k)]
        if differing:
            raise ValueError(
                f"the study in {path.parent} was made with another {', '.join(differing)}; choose "
                "another hydra.sweeper.study_name, or remove that folder"
            )
        return [_trial(frozen) for frozen in stored]

    def _stored(self, trial: Trial, *, is_running: bool = False) -> Any:
        """Return a trial as Optuna keeps it."""
        own = {"state": trial.state, "reason": trial.reason, "step": trial.step}
        return _frozen(
            "running" if is_running else trial.state,
            value=None if is_running else trial.value,
            curve=() if is_running else trial.curve,
            params=dict(trial.params),
            distributions={d.key: d.distribution for d in self.space},
            user_attrs=own,
        )


def _frozen(
    state: str, *, value: float | None = None, curve: Sequence[float] = (), **more: Any
) -> Any:
    from optuna.trial import TrialState, create_trial

    name = "RUNNING" if state == "running" else _OPTUNA.get(state, "FAIL")
    curve = [] if name in ("FAIL", "RUNNING") else curve
    return create_trial(
        state=TrialState[name],
        value=value if name == "COMPLETE" else None,
        intermediate_values=dict(enumerate(curve)),
        **more,
    )


def _trial(frozen: Any) -> Trial:
    own = frozen.user_attrs
    curve = tuple(frozen.intermediate_values[i] for i in sorted(frozen.intermediate_values))
    return Trial(
        frozen.number, dict(frozen.params), own["state"], own["reason"],
        frozen.value if own["state"] == "done" else None, curve, own["step"],
    )  # fmt: skip


def _empty_study(direction: Any, **more: Any) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every trial otherwise
    return optuna.create_study(direction=direction, **more)
