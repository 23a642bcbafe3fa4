"""How long the batches of a run are: quantiles of the real data, in configs/plan/lengths.yaml."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from scripts.planning.architecture import UnknownCostError, read_plan_file

#: shares of the data at which quantiles are kept.
SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
#: the largest packed batch of a run is planned this many standard deviations above the mean; in the
#: recipes' five epochs with three seeds the largest lies 4.4 above it (E2E) and 5.2 (WebNLG).
DEVIATIONS = 5.5


@dataclass(frozen=True)
class Lengths:
    """Token lengths of one kind of text.

    Attributes:
        mean: mean.
        sd: standard deviation.
        quantiles: at `SHARES`.
        longest: the longest one; where only a part of the data was measured, what the task allows.
    """

    mean: float
    sd: float
    quantiles: tuple[int, ...]
    longest: int

    def largest_sum(self, number: int) -> int:
        """Return how long `number` of them together get in a run (see `DEVIATIONS`)."""
        bound = number * self.mean + DEVIATIONS * self.sd * number**0.5
        return min(number * self.longest, round(bound))

    def mean_of_longest(self, number: int) -> float:
        """Return the mean length of the longest of `number` drawn at random.

        The maximum of n lies below the quantile of share u with probability u^n; between two
        shares quantiles are taken to rise evenly.
        """
        total = 0.0
        for (low, high), (a, b) in zip(pairwise(SHARES), pairwise(self.quantiles), strict=True):
            # The integral of a + (b - a) (u - low) / (high - low) over the density n u^(n - 1).
            slope = (b - a) / (high - low)
            below = high**number - low**number
            moment = number / (number + 1) * (high ** (number + 1) - low ** (number + 1))
            total += (a - slope * low) * below + slope * moment
        return total

    def mean_of_sorted_parts(self, number: int, parts: int) -> float:
        """Return the mean of the longest of each part, where `number` are sorted and cut.

        The last of k parts ends at the longest of all, the others where so large a share is
        shorter; between two shares quantiles are taken to rise evenly.
        """
        ends = [self._at((part + 1) / parts) for part in range(parts - 1)]
        return (sum(ends) + self.mean_of_longest(number)) / parts

    def _at(self, share: float) -> float:
        """Return the length that so large a share of the data does not exceed."""
        for (low, high), (a, b) in zip(pairwise(SHARES), pairwise(self.quantiles), strict=True):
            if low <= share <= high:
                return a + (b - a) * (share - low) / (high - low)
        raise ValueError(f"share={share} lies outside of [0, 1]")

    def cut(self, limit: int) -> Lengths:
        """Return the same with longer ones cut to `limit`."""
        if limit >= self.longest:
            return self
        quantiles = tuple(min(q, limit) for q in self.quantiles)
        return Lengths(min(self.mean, limit), self.sd, quantiles, limit)


@dataclass(frozen=True)
class TaskLengths:
    """What is known of a task's data.

    Attributes:
        rows: examples of ``train`` and ``validation``, and inputs of the ``scored`` split.
        sequence: whole examples (of XSum: articles).
        targets: positions with a loss (of XSum: tokens of the summaries); None where each has one.
        prompt: inputs of the decoding; None where nothing is decoded.
    """

    rows: dict[str, int]
    sequence: Lengths
    targets: Lengths | None = None
    prompt: Lengths | None = None


def read_lengths(cfg: Any) -> TaskLengths:
    """Return the lengths of the data of a run.

    Raises:
        UnknownCostError: they were not measured, as those of the embedded corpora.
    """
    task = str(cfg.choices.task)
    if cfg.task.get("source") == "embedded":
        raise UnknownCostError(f"the lengths of the embedded corpus of {task} are not kept")
    entry = _file().get(task)
    if entry is None:
        raise UnknownCostError(f"configs/plan/lengths.yaml has no task={task}")
    rows = dict(entry["rows"])
    for split, number in (cfg.task.get("max_rows") or {}).items():
        for key in {"test": ("scored",)}.get(split, (split,)):
            rows[key] = min(rows[key], number)
    if (wanted := cfg.task.get("max_inputs")) is not None:
        rows["scored"] = min(rows["scored"], wanted)
    is_part = "measured" in entry
    if "source" in entry:
        source = _lengths(entry["source"], cfg.task.max_source_length, is_part)
        target = _lengths(entry["target"], cfg.task.max_target_length, is_part)
        return TaskLengths(rows, source, target, source)
    sequence = _lengths(entry["sequence"], cfg.task.max_length, is_part)
    if "prompt" not in entry:
        return TaskLengths(rows, sequence)
    targets, prompt = (
        _lengths(entry[name], cfg.task.max_length, is_part) for name in ("targets", "prompt")
    )
    return TaskLengths(rows, sequence, targets, prompt)


def _lengths(entry: dict[str, Any], limit: int, is_part: bool) -> Lengths:
    quantiles = tuple(entry["quantiles"])
    found = Lengths(entry["mean"], entry["sd"], quantiles, limit if is_part else quantiles[-1])
    return found.cut(limit)


@functools.cache
def _file() -> dict[str, Any]:
    return read_plan_file("lengths.yaml")
