"""A sweep of ``train.py -m``: its cells, checked before the first one runs, and its view.

Hydra runs the cells. It says nothing of a sweep as a whole, and ends one with the error of its
first failed cell; so what stands here reads the grid from the command line, before, and the
records, after, wherever a launcher has run them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from scripts.runs import checks, composition
from scripts.runs.cells import Cell, parse_seeds
from scripts.runs.composition import ConfigError, as_config_error
from scripts.runs.meaning import hash_of
from scripts.runs.run import Run
from scripts.sweeping.content import build
from scripts.sweeping.page import damaged_lines, last_line, terminal
from scripts.sweeping.space import LABELS
from scripts.sweeping.spec import Axis, Experiment, Method, Refused, SweepSpec
from scripts.sweeping.view import collect_runs, write


@dataclass(frozen=True)
class Grid:
    """What a command line asks for.

    Attributes:
        fixed: overrides of every run.
        swept: key of an override to its values, in the order given; a value of an interval is its
            lower end, which stands for all.
        is_sampled: whether a sweeper chooses values, so that the runs cannot be listed.
    """

    fixed: tuple[str, ...]
    swept: dict[str, tuple[str, ...]]
    is_sampled: bool

    @property
    def firsts(self) -> list[str]:
        """Overrides of the first run."""
        return [*self.fixed, *(f"{key}={values[0]}" for key, values in self.swept.items())]

    def compositions(self) -> Iterator[list[str]]:
        """Yield the overrides of every run, of several seeds only the first."""
        swept = {k: v if k != "seed" else v[:1] for k, v in self.swept.items()}
        for values in itertools.product(*swept.values()):
            own = [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
            yield [*self.fixed, *own]


def read_grid(overrides: Sequence[str], *, has_sampler: bool = False) -> Grid:
    """Return what a command line asks for.

    Args:
        overrides: as Hydra takes them: ``a=1,2``, ``a=choice(1,2)``, ``a=range(1,4)``,
            ``a=glob(*)``, ``a=interval(0,1)``, each also with ``tag(...)``.
        has_sampler: whether another sweeper than Hydra's own picks the runs.

    Raises:
        ConfigError: one cannot be read.
    """
    fixed: list[str] = []
    swept: dict[str, tuple[str, ...]] = {}
    is_sampled = has_sampler
    for override in overrides:
        parsed = composition.parse(override)
        if not parsed.is_sweep_override():
            fixed.append(str(parsed.input_line))
            continue
        swept[parsed.get_key_element()] = _values_of(parsed)
        if parsed.is_interval_sweep() and not has_sampler:
            raise ConfigError(
                f"{parsed.input_line}: values of an interval are chosen by a sampler; add "
                "hydra/sweeper=optuna hydra.sweeper.n_trials=20, or list values"
            )
        is_sampled = is_sampled or parsed.is_interval_sweep()
    return Grid(tuple(fixed), swept, is_sampled)


def _values_of(parsed: Override) -> tuple[str, ...]:
    value: Any = parsed.value()
    if isinstance(value, IntervalSweep):
        return (str(value.start),)
    if isinstance(value, Glob):
        found = value.filter(composition.options(parsed.key_or_group))
    else:
        found = list(parsed.sweep_string_iterator())
    if not found:
        raise ConfigError(f"{parsed.input_line}: no value fits")
    return tuple(found)


@dataclass(frozen=True)
class Multirun:
    """A sweep whose runs are known before they are made.

    Attributes:
        spec: its points; ``spec.name`` is made from the names of its runs.
        scale: of all runs.
        seeds: of every point.
        extra: overrides of every run.
        cells: the runs.
        refused: points whose settings are not allowed, and why.
    """

    spec: SweepSpec
    scale: str
    seeds: list[int]
    extra: list[str]
    cells: list[Cell]
    refused: Refused

    @classmethod
    def check(cls, grid: Grid) -> Multirun | None:
        """Compose and check all runs.

        Args:
            grid: from `read_grid`.

        Returns:
            The sweep; None where its runs cannot be listed, or are of several scales.

        Raises:
            ConfigError: a run does not compose, or no run is allowed.
        """
        first = Run.compose(grid.firsts)
        if grid.is_sampled:
            return None
        for overrides in grid.compositions():
            Run.compose(overrides)  # what does not compose would end the sweep within Hydra
        if "scale" in grid.swept:
            return None
        scale, seeds = str(first.choices.scale), _seeds_of(grid)
        extra = [o for o in grid.fixed if o.partition("=")[0] not in ("seed", "scale")]
        spec = _spec_of(grid, first)
        with as_config_error():
            cells, refused = spec.cells(scale=scale, seeds=seeds, extra=extra)
        for cell in cells:
            if cell.seed == seeds[0]:
                try:
                    checks.check(cell.run)
                except ConfigError as error:
                    refused[cell.row, cell.on] = str(error)
        if len(refused) == len(cells) // len(seeds):
            raise ConfigError(next(iter(refused.values())))
        names = hash_of({"runs": sorted({cell.signature for cell in cells})})
        keys = [axis.key.rpartition(".")[2].lstrip("+") for axis in spec.axes]
        name = "-".join([*keys, names[:8]])
        return cls(replace(spec, name=name), scale, seeds, extra, cells, refused)

    def finish(self) -> int:
        """Write the view to ``outputs/sweeps/<name>/`` and print it; return the exit code.

        Where no run is done there is nothing to show.
        """
        entries = collect_runs(self.cells, {}, self.refused)
        content = build(self.spec, self.scale, self.seeds, self.extra, entries, self.refused)
        for line in damaged_lines(content):
            print(f"left out: {line}", file=sys.stderr)
        if not any(row["runs"] for row in content["rows"]):  # as where a launcher lacks
            print(last_line(content), file=sys.stderr)
            return 1
        paths = write(content, self.cells[0].run.outputs / "sweeps" / self.spec.name)
        print(f"\n{terminal(content)}")
        print("\n".join(f"wrote {path}" for path in paths), flush=True)
        is_complete = all(not row["absent"] for row in content["rows"])
        print(last_line(content), file=sys.stdout if is_complete else sys.stderr)
        return 0 if is_complete else 1


def _seeds_of(grid: Grid) -> list[int]:
    fixed = [o.partition("=")[2] for o in grid.fixed if o.startswith("seed=")]
    return parse_seeds(",".join(grid.swept.get("seed", tuple(fixed[-1:]) or ("1",))))


def _spec_of(grid: Grid, run: Run) -> SweepSpec:
    """Return the grid as a sweep: experiments and methods are no axes, all else is one."""
    swept = {key: values for key, values in grid.swept.items() if key != "seed"}
    on = next((key for key in ("experiment", "task") if key in swept), None)
    experiments = [Experiment(str(run.choices.task), ())]
    if on is not None:
        experiments = [Experiment(value, (f"{on}={value}",)) for value in swept.pop(on)]
    methods = [Method(str(run.choices.method), str(run.choices.method), ())]
    if "method" in swept and len(swept) > 1:
        methods = [Method(name, name, (f"method={name}",)) for name in swept.pop("method")]
    if not swept:
        swept = {"method": (str(run.choices.method),)}
    axes = [Axis(key, LABELS.get(key, key), key, values) for key, values in swept.items()]
    return SweepSpec(
        name="",
        title=", ".join(axis.label for axis in axes),
        tuning="every cell has the recipe's settings but those of the grid",
        experiments=tuple(experiments),
        methods=tuple(methods),
        axes=tuple(axes),
    )
