"""What a study searches: the swept overrides of a command line, each as a dimension of a space.

============================================  ====================================================
``method.update_ratio=interval(0.1,4)``        real numbers, both ends included
``method.start_step=int(interval(0,50))``      integers
``method.learning_rate=tag(log,interval(a,b))``  the same on a logarithmic scale
``recipe.rank=range(2,17,2)``                  2, 4, ..., 16 (Hydra leaves the end out), in order
``method=lora,delta_lora``, ``choice(...)``    one of these, without an order
============================================  ====================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from scripts.runs import composition
from scripts.runs.composition import ConfigError

#: what an override varies -> how pictures call it.
LABELS = {
    "method.update_ratio": "λ", "recipe.update_ratio": "λ", "method.start_step": "K",
    "recipe.start_step": "K", "method.rank": "rank r", "recipe.rank": "rank r",
    "method.dropout": "dropout", "recipe.lora_dropout": "dropout",
    "method.learning_rate": "learning rate",
}  # fmt: skip
#: overrides that are no settings to search, with the reason.
NOT_SEARCHED = {
    "seed": "the best seed says nothing about a setting: give one seed to the study, and repeat "
    "its best trial with others",
    "scale": "scores of different scales cannot be compared: make a study of each",
    "experiment": "scores of different tasks cannot be compared: make a study of each",
    "task": "scores of different tasks cannot be compared: make a study of each",
}
TAGS = {"log"}


@dataclass(frozen=True)
class Dimension:
    """A setting that is searched.

    Attributes:
        key: what an override sets.
        kind: ``real``, ``integer`` or ``choice``.
        low: least value of a number.
        high: largest value of a number.
        step: distance of the values of a range; None: all values.
        is_log: whether it is searched on a logarithmic scale.
        texts: as overrides write them: the choices, or the values of a range; else empty.
    """

    key: str
    kind: str
    low: float = 0
    high: float = 0
    step: float | None = None
    is_log: bool = False
    texts: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """How pictures call it."""
        return LABELS.get(self.key.lstrip("+"), self.key)

    @property
    def first(self) -> str:
        """A value, which stands for all of them."""
        return self.texts[0] if self.texts else self.text(self.low)

    @property
    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.texts)
        if self.kind == "integer":
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return distributions.IntDistribution(low, high, log=self.is_log, step=step)
        return distributions.FloatDistribution(self.low, self.high, log=self.is_log, step=self.step)

    def text(self, value: Any) -> str:
        """Return a value of the distribution as an override writes it."""
        if self.kind == "choice":
            return str(value)
        if self.texts:
            return self.texts[round((value - self.low) / (self.step or 1))]
        return str(int(value)) if self.kind == "integer" else repr(float(value))

    def at(self, share: float) -> Any:
        """Return the value of the distribution that lies at a share of it, from 0 to below 1."""
        if self.kind == "choice":
            return self.texts[int(share * len(self.texts))]
        if self.is_log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
            return round(value) if self.kind == "integer" else min(max(value, self.low), self.high)
        step = self.step or (1 if self.kind == "integer" else None)
        if step is None:
            return self.low + share * (self.high - self.low)
        return self.low + int(share * (round((self.high - self.low) / step) + 1)) * step

    def describe(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        numbers = {"low": self.low, "high": self.high, "step": self.step, "is_log": self.is_log}
        own: dict[str, Any] = {"choices": list(self.texts)} if self.kind == "choice" else numbers
        return {"key": self.key, "label": self.label, "kind": self.kind, **own}


def read_space(overrides: Sequence[str]) -> tuple[list[str], list[Dimension]]:
    """Return the overrides of every trial, and what is searched.

    Raises:
        ConfigError: an override cannot be read, searches what cannot be searched, or none is swept.
    """
    fixed: list[str] = []
    space: list[Dimension] = []
    try:
        for parsed in OverridesParser.create().parse_overrides(list(overrides)):
            if parsed.is_sweep_override():
                space.append(_dimension(parsed))
            else:
                fixed.append(str(parsed.input_line))
    except HydraException as error:
        raise ConfigError(f"cannot read the overrides: {error}") from error
    if not space:
        raise ConfigError(
            "a study needs a setting to search; add one, for example "
            "'method.update_ratio=interval(0.1,4)' or method.start_step=0,4,20"
        )
    return fixed, space


def _dimension(parsed: Override) -> Dimension:
    key, value, line = parsed.get_key_element(), parsed.value(), parsed.input_line
    if key in NOT_SEARCHED:
        raise ConfigError(f"{line}: a study cannot search {key}; {NOT_SEARCHED[key]}")
    tags = set(getattr(value, "tags", ()))
    if tags - TAGS or (tags and not isinstance(value, IntervalSweep)):
        raise ConfigError(
            f"{line}: tag {', '.join(sorted(tags))} is not known here; "
            f"write {key}=tag(log, interval(LOW,HIGH)), or no tag"
        )
    if isinstance(value, IntervalSweep):
        return _interval(key, line, value.start, value.end, is_log="log" in tags)
    if isinstance(value, RangeSweep):
        return _range(key, line, value, list(parsed.sweep_string_iterator()))
    if isinstance(value, Glob):
        texts = value.filter(composition.options(parsed.key_or_group))
    else:
        texts = list(dict.fromkeys(parsed.sweep_string_iterator()))
    if not texts:
        raise ConfigError(f"{line}: no value fits")
    return Dimension(key, "choice", texts=tuple(texts))


def _interval(key: str, line: Any, low: Any, high: Any, *, is_log: bool) -> Dimension:
    if not low < high:
        raise ConfigError(f"{line}: the lower end {low:g} must be below the upper end {high:g}")
    if is_log and low <= 0:
        raise ConfigError(f"{line}: a logarithmic scale needs a lower end above 0, not {low:g}")
    kind = "integer" if isinstance(low, int) and isinstance(high, int) else "real"
    return Dimension(key, kind, low, high, is_log=is_log)


def _range(key: str, line: Any, value: RangeSweep, texts: list[str]) -> Dimension:
    if not texts:
        raise ConfigError(f"{line}: no value fits")
    texts = texts if value.step > 0 else texts[::-1]
    low, high = float(texts[0]), float(texts[-1])
    step = abs(Decimal(str(value.step)))
    if all(text.lstrip("-").isdigit() for text in texts):
        return Dimension(key, "integer", int(low), int(high), int(step), texts=tuple(texts))
    high = float(Decimal(str(low)) + (len(texts) - 1) * step)  # as Optuna counts
    return Dimension(key, "real", low, high, float(step), texts=tuple(texts))
