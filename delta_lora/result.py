"""What a fit did, and which of its evaluations is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from delta_lora.protocols import Task


@dataclass
class FitResult:
    """What a run did; only what a repetition gives again to the bit, but for `resources`.

    Attributes:
        num_steps: applied optimiser steps.
        num_epochs: passes over the data.
        final_train_loss: mean loss per target since the last log line.
        validation: one entry per evaluation (step, epoch, loss, the task's metrics).
        checkpoint_rule: ``last`` or ``best``.
        chosen_step: the step whose weights and method state the model holds now.
        skipped_steps: fp16 steps that overflowed and were repeated.
        resources: seconds, peak memory in bytes, tokens per second, number of sessions.
    """

    num_steps: int = 0
    num_epochs: float = 0.0
    final_train_loss: float = float("nan")
    validation: list[dict[str, float]] = field(default_factory=list)
    checkpoint_rule: str = "last"
    chosen_step: int = 0
    skipped_steps: int = 0
    resources: dict[str, float] = field(default_factory=dict)


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
