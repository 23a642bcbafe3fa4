"""What a sweep is: `configs/sweep/<name>.yaml`, checked, and the runs that it needs.

Adding a sweep is adding one yaml; `configs/sweep/lambda_k.yaml` explains the keys.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from delta_lora.checks import NAME, NOT_EMPTY, Matches, check_mapping, check_value, check_values
from scripts.reporting.spec import ROOT, Row, TableSpec, check_keys, read_yaml
from scripts.runs import conflicts
from scripts.runs.cells import Cell, list_cells
from scripts.runs.run import Run
from scripts.runs.scale import SCALES
from scripts.runs.weights import key_of

SWEEPS = ROOT / "configs" / "sweep"
#: (name of a row, name of what it is trained on) -> why its runs cannot be made.
Refused = dict[tuple[str, str], str]

#: how a file declares its entries.
Name = Annotated[str, NAME]
Words = Annotated[str, NOT_EMPTY]
Key = Annotated[str, Matches(r"\+{0,2}[\w./@-]+", "a key of a configuration, as method.rank")]
Overrides = Sequence[
    Annotated[str, Matches(r"\+{0,2}[\w./@-]+=.*|~[\w./@-]+", "an override, as method=lora")]
]
Values = Sequence[str | int | float | bool]


@dataclass(frozen=True)
class Axis:
    """A setting that is varied.

    Attributes:
        name: how commands and files call it.
        label: how pictures call it.
        key: what an override sets.
        values: as an override writes them.
    """

    name: Name
    label: Words
    key: Key
    values: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """What is trained on; `metric` is the score that is shown, None the first of the task."""

    name: str
    overrides: tuple[str, ...]
    metric: Name | None = None


@dataclass(frozen=True)
class Method:
    """A method that is run at every value of every axis; or a reference, which is not.

    Attributes:
        name: how files call it.
        label: how pictures call it.
        overrides: what chooses it.
        along: of a reference: the key that follows the first axis; None where it has one value.
    """

    name: Name
    label: Words
    overrides: tuple[str, ...]
    along: Key | None = None


@dataclass(frozen=True)
class Point:
    """One cell of the grid: a method (or reference) and a value of each axis that it has.

    Attributes:
        name: its own in the sweep; the row of its runs.
        method: name of the method.
        label: how messages and pages call it.
        values: name of the axis to value.
        overrides: what makes it.
        is_reference: whether it stands beside the grid.
    """

    name: str
    method: str
    label: str
    values: Mapping[str, str]
    overrides: tuple[str, ...]
    is_reference: bool


@dataclass(frozen=True)
class SweepSpec:
    """A sweep.

    Attributes:
        name: of its folder of results.
        title: what it shows.
        tuning: what every method was given, in words.
        experiments: what is trained on.
        methods: what is run at every value.
        axes: what is varied, the first from left to right in pictures.
        references: what the grid is compared with.
        model: what the title calls the model, whose place the name of another one takes.
    """

    name: str
    title: str
    tuning: str
    experiments: tuple[Experiment, ...]
    methods: tuple[Method, ...]
    axes: tuple[Axis, ...]
    references: tuple[Method, ...] = ()
    model: str | None = None

    def points(self) -> list[Point]:
        """Return the cells of the grid, method by method, then the references."""
        grid = itertools.product(*(axis.values for axis in self.axes))
        values = [dict(zip((a.name for a in self.axes), v, strict=True)) for v in grid]
        found = [self._point(method, v) for method in self.methods for v in values]
        for reference in self.references:
            if reference.along is None:
                found.append(self._point(reference, {}, is_reference=True))
                continue
            first = self.axes[0]
            for value in first.values:
                found.append(self._point(reference, {first.name: value}, is_reference=True))
        return found

    def _point(
        self, method: Method, values: Mapping[str, str], *, is_reference: bool = False
    ) -> Point:
        axes = [axis for axis in self.axes if axis.name in values]
        setting = ", ".join(f"{axis.label} = {values[axis.name]}" for axis in axes)
        keys = [method.along if is_reference else axis.key for axis in axes]
        own = [f"{key}={values[axis.name]}" for key, axis in zip(keys, axes, strict=True)]
        return Point(
            name=" ".join([method.name, *(f"{a.name}={values[a.name]}" for a in axes)]),
            method=method.name,
            label=", ".join(filter(None, [method.label, setting])),
            values=dict(values),
            overrides=(*method.overrides, *own),
            is_reference=is_reference,
        )

    def cells(
        self, *, scale: str, seeds: Sequence[int], extra: Sequence[str] = ()
    ) -> tuple[list[Cell], Refused]:
        """Return the runs that it needs, all points of the first seed first.

        Args:
            scale: tiny, small or paper.
            seeds: of every point.
            extra: overrides of every run, applied last.

        Returns:
            The runs, and the points whose settings do not compose, with the reason.

        Raises:
            ValueError: no point composes, or `extra` sets an axis.
        """
        for override in extra:
            for axis in self.axes:
                if conflicts.meet(key_of(override), key_of(axis.key)):
                    raise ValueError(f"{override!r} sets the axis {axis.name} of sweep {self.name}")
        found: list[Cell] = []
        refused: Refused = {}
        for point in self.points():
            for experiment in self.experiments:
                runs = {experiment.name: experiment.overrides}
                rows = {point.name: point.overrides}
                try:
                    found += list_cells(
                        self.name, runs, rows, scale=scale, seeds=seeds, extra=extra
                    )
                except ValueError as error:
                    reason = str(error).removeprefix(f"{self.name}, row {point.name}: ")
                    refused[point.name, experiment.name] = reason
        if not found:
            raise ValueError(f"sweep {self.name}: {next(iter(refused.values()))}")
        order = {seed: number for number, seed in enumerate(seeds)}
        return sorted(found, key=lambda cell: order[cell.seed]), refused

    def check_extra(self, scale: str, extra: Sequence[str]) -> None:
        """Check that no override of all runs undoes what a point is; see `conflicts`.

        Raises:
            ValueError: one does.
        """
        points = {point.name: point.overrides for point in self.points()}
        free = conflicts.without_methods(extra)
        on = self.experiments[0].overrides
        try:
            conflicts.check_extra(extra, (points, {e.name: e.overrides for e in self.experiments}))
            conflicts.check_methods(
                extra, points, lambda own: Run.compose((*on, *own, f"scale={scale}", *free)).config
            )
        except ValueError as error:
            raise ValueError(f"sweep {self.name}: {error}") from error

    def as_table(self) -> TableSpec:
        """Return it as a table with a row a point, for what reads tables."""
        rows = [Row(p.name, p.label, p.overrides, p.is_reference) for p in self.points()]
        return TableSpec(
            name=self.name, kind="table", number="", title=self.title, tuning=self.tuning,
            runs={e.name: e.overrides for e in self.experiments}, columns=(), rows=tuple(rows),
            claims=(), contrasts=(), paper={"title": self.title, "rows": {}}, model=self.model,
        )  # fmt: skip


def sweep_names() -> list[str]:
    """Return the sweeps that have a configuration."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def load_sweep(
    name: str, scale: str, values: Mapping[str, Sequence[str]] | None = None
) -> SweepSpec:
    """Read and check a sweep's configuration.

    Args:
        name: of its file.
        scale: tiny, small or paper; an axis may have other values at each.
        values: of axes, by name, in place of those of the file.

    Raises:
        ValueError: there is no such sweep or axis, or the file is inconsistent; the message names
            the file, the key and what is allowed.
    """
    known = sweep_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown sweep {name!r}; {hint}available: {', '.join(known)}")
    path = SWEEPS / f"{name}.yaml"
    try:
        spec = _build(name, read_yaml(path), scale)
    except (TypeError, ValueError) as error:
        reason = "; ".join(str(error).splitlines())
        raise ValueError(f"configs/sweep/{path.name}: {reason}") from None
    names = [axis.name for axis in spec.axes]
    for axis in values or {}:
        if axis not in names:
            raise ValueError(f"sweep {name} has no axis {axis!r}; it has: {', '.join(names)}")
    chosen = values or {}
    axes = [replace(a, values=_values(chosen.get(a.name, a.values), a.name)) for a in spec.axes]
    return replace(spec, axes=tuple(axes))


def parse_values(text: str) -> dict[str, list[str]]:
    """Return the values of axes of a text such as ``lambda=0.5,1 K=0,4``.

    Raises:
        ValueError: it is no such text.
    """
    found: dict[str, list[str]] = {}
    for part in text.split():
        name, separator, values = part.partition("=")
        if not separator or not values or name in found:
            raise ValueError(f"values={text!r}: write AXIS=VALUE,VALUE, each axis once")
        found[name] = values.split(",")
    return found


def _build(name: str, raw: Mapping[str, Any], scale: str) -> SweepSpec:
    required = ("title", "tuning", "experiments", "methods", "axes")
    check_keys(raw, "the sweep", required=required, optional=("references", "model"))
    for key in ("title", "tuning"):
        check_value(key, raw[key], Words)
    for key in ("axes", "methods", "references"):
        check_value(key, raw.get(key, []), Sequence[Any])
        for number, item in enumerate(raw.get(key, [])):
            check_mapping(f"{key}[{number}]", item)
    axes = tuple(_axis(item, scale) for item in raw["axes"])
    methods = tuple(_method(item) for item in raw["methods"])
    references = tuple(_method(item, has_along=True) for item in raw.get("references", []))
    experiments = []
    for on, item in check_mapping("experiments", raw["experiments"]).items():
        what = f"experiment {on!r}"
        check_keys(
            item,
            f"{what}={item}" if isinstance(item, Mapping) else what,
            required=("overrides",),
            optional=("metric",),
        )
        check_value(f"{what}: metric", item.get("metric"), Name | None)
        experiments.append(Experiment(on, _overrides(what, item), item.get("metric")))
    for key, what, names in (
        ("experiments", "experiment", [e.name for e in experiments]),
        ("axes", "axis", [a.name for a in axes]),
        ("methods", "method", [m.name for m in methods]),
        ("methods or references", "method", [m.name for m in (*methods, *references)]),
    ):
        if not names:
            raise ValueError(f"{key} is empty; a sweep needs at least one {what}")
        if len(set(names)) < len(names):
            raise ValueError(f"two of {what} have the same name: {names}")
    return SweepSpec(
        name=name,
        title=str(raw["title"]),
        tuning=str(raw["tuning"]),
        experiments=tuple(experiments),
        methods=methods,
        axes=axes,
        references=references,
        model=raw.get("model"),
    )


def _axis(item: Mapping[str, Any], scale: str) -> Axis:
    what = f"axis {item.get('name', item)!r}"
    check_keys(item, what, required=("name", "label", "key", "values"))
    check_values(Axis, {k: v for k, v in item.items() if k != "values"}, prefix=f"{what}: ")
    values = item["values"]
    if isinstance(values, Mapping):
        check_keys(values, f"{what}: values={values}", required=SCALES)
        by_scale = {each: _values(values[each], item["name"]) for each in SCALES}
        return Axis(item["name"], item["label"], item["key"], by_scale[scale])
    return Axis(item["name"], item["label"], item["key"], _values(values, item["name"]))


def _values(values: Sequence[Any], axis: str) -> tuple[str, ...]:
    check_value(f"axis {axis!r}: values", values, Values)
    found = tuple(_text(v) if isinstance(v, float) else str(v) for v in values)
    if not found or len(set(found)) < len(found) or not all(found):
        raise ValueError(f"axis {axis}: values={list(found)}; use at least one, each once")
    return found


def _text(value: float) -> str:
    """Return a number in few characters: 0.25, 1.25e-3."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _method(item: Mapping[str, Any], *, has_along: bool = False) -> Method:
    what = f"method {item.get('name', item)!r}"
    optional = ("along",) if has_along else ()
    check_keys(item, what, required=("name", "label", "overrides"), optional=optional)
    check_values(Method, {k: v for k, v in item.items() if k != "overrides"}, prefix=f"{what}: ")
    return Method(item["name"], item["label"], _overrides(what, item), item.get("along"))


def _overrides(what: str, item: Mapping[str, Any]) -> tuple[str, ...]:
    check_value(f"{what}: overrides", item["overrides"], Overrides)
    return tuple(item["overrides"])
