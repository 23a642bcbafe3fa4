"""What a fit did, which of its evaluations is the best, and how it is given up before its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # else whoever hears of a pruned run would load torch
    from delta_lora.protocols import Task


@dataclass
class FitResult:
    """What a run did; only what a repetition gives again to the bit, but for `resources`.

    Attributes:
        num_steps: applied optimiser steps.
        num_epochs: passes over the data.
        final_train_loss: mean loss per target since the last log line; None before the first.
        validation: one entry per evaluation (step, epoch, loss, the task's metrics).
        checkpoint_rule: ``last`` or ``best``.
        chosen_step: the step whose weights and method state the model holds now.
        skipped_steps: fp16 steps that overflowed and were repeated.
        is_unchanged: whether the steps have changed nothing of what the model computes.
        resources: seconds, peak memory in bytes, tokens per second, number of sessions.
    """

    num_steps: int = 0
    num_epochs: float = 0.0
    final_train_loss: float | None = None
    validation: list[dict[str, float]] = field(default_factory=list)
    checkpoint_rule: str = "last"
    chosen_step: int = 0
    skipped_steps: int = 0
    is_unchanged: bool = False
    resources: dict[str, float] = field(default_factory=dict)


class PrunedError(RuntimeError):
    """A fit was given up at an evaluation, because it was asked to; its checkpoint stands.

    Attributes:
        step: applied optimiser steps.
        total_steps: those of the whole run.
        reason: why, in words.
        result: what the fit did so far.
    """

    def __init__(self, step: int, total_steps: int, reason: str, result: FitResult) -> None:
        super().__init__(f"pruned at step {step} of {total_steps}, because {reason}")
        self.step, self.total_steps, self.reason, self.result = step, total_steps, reason, result


def best_entry(validation: Sequence[dict[str, float]], task: Task) -> dict[str, float] | None:
    """Return the best evaluation by the task's `selection_metric`, or by loss where it has none.

    Args:
        validation: entries of `FitResult.validation`.
        task: names the metric; its `MetricSpec` says which direction is better.

    Returns:
        The first of the best; None if no entry has a finite value.
    """
    name = task.selection_metric or "loss"
    higher = any(spec.name == name and spec.higher_is_better for spec in task.metrics)
    known = [entry for entry in validation if math.isfinite(entry.get(name, math.nan))]
    sign = -1.0 if higher else 1.0
    return min(known, key=lambda entry: sign * entry[name], default=None)
