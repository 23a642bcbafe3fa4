r"""Sweep settings over a grid: plan, run what is missing, write the view of what came of it.

    python scripts/sweep.py lambda_k --scale tiny --plan
    python scripts/sweep.py lambda_k --scale tiny --seeds 1,2,3 --workers 2
    python scripts/sweep.py lambda_k --values "lambda=0.5,1,2 K=0,100"      other values of an axis
    python scripts/sweep.py lambda_k --scale tiny --accept      keep the records in results/runs
    python scripts/sweep.py lambda_k --scale tiny --check       compare with what is committed

A search over intervals is a study: `python scripts/train.py -m hydra/sweeper=optuna ...`.

Sweeps are files of configs/sweep. Every cell is composed and checked before the first one runs. A
cell that is refused, fails, or is held by another process costs itself only: the last line names
it, and the same command tries it again. Several commands may share a grid: each takes the cells
that no other works on.

Writes results/<scale>/sweeps/<name>/: sweep.{json,csv,md,svg,png} and pivot.csv. Exit code: 0 all
cells are done, 1 some are not (the view is written all the same), 2 bad input, 130 stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora import console
from scripts.reporting.plan import describe, describe_costs, describe_refusals, describe_scope
from scripts.reporting.results import RESULTS, collect_accepted, read_accepted
from scripts.reporting.scope import other_model
from scripts.runs import launchers
from scripts.runs.allotment import parse_workers
from scripts.runs.batch import Batch
from scripts.runs.cells import parse_overrides, parse_seeds
from scripts.runs.command import add_arguments, exit_code
from scripts.runs.scale import resolve_scale
from scripts.runs.space import check_disk_space
from scripts.sweeping.content import build
from scripts.sweeping.page import damaged_lines, last_line, terminal
from scripts.sweeping.spec import Refused, load_sweep, parse_values
from scripts.sweeping.view import collect_runs, keep, write
from scripts.tables import differences, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line; None takes the process's.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _sweep(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="SWEEP", help="lambda_k, rank, dropout, learning_rate")
    add_arguments(parser, RESULTS)
    parser.add_argument("--values", default="", help="of axes, in place of those of the file")
    parser.add_argument("--accept", action="store_true", help="keep the records in results/runs")
    parser.add_argument("--check", action="store_true", help="compare, from accepted records only")
    return parser


def _sweep(options: argparse.Namespace) -> int:
    scale, reason = resolve_scale(options.scale)
    print(f"scale: {scale} ({reason})", flush=True)
    seeds, extra = parse_seeds(options.seeds), parse_overrides(options.overrides)
    parse_workers(options.workers)  # a bad number is said before the planning
    launcher = launchers.load(options.launcher, options.launcher_args)
    if importlib.util.find_spec("statsmodels") is None:  # said before hours of runs
        raise ValueError("a sweep needs statsmodels; install requirements.lock")
    spec = load_sweep(options.sweep, scale, parse_values(options.values))
    cells, refused = spec.cells(scale=scale, seeds=seeds, extra=extra)
    spec.check_extra(scale, extra)
    other = other_model(spec.as_table(), cells, scale, extra)
    results = options.results / scale / ("" if other is None else other.folder)
    folder = results / "sweeps" / spec.name
    if options.accept or options.check:
        if options.accept:
            keep(cells, options.results / "runs" / scale)
        problems: list[str] = []
        entries = collect_accepted(cells, read_accepted(options.results / "runs", problems))
        content = build(spec, scale, seeds, extra, entries, refused)
        code = _finish(content, folder) if options.accept else _compare(content, folder)
        return max(code, left_out(problems))
    batch = Batch.plan(cells, scale=scale, extra=extra, workers=options.workers, launcher=launcher)
    lines = describe(spec.as_table(), cells, batch.states)
    print("\n".join([*lines, *describe_scope(other)]))
    print("\n".join(describe_costs(batch.todo, batch.num_workers, batch.durations)))
    print("\n".join(batch.summary()), flush=True)
    if options.plan:
        print("\n".join(describe_refusals(batch.impossible())), end="")
        return 1 if batch.damaged() else 0
    if batch.todo:
        batch.check_place(options.results / scale)
        batch, refused = _without_refused(batch, refused)
        check_disk_space(batch.todo, batch.most_at_once)
    for (row, on), why in refused.items():
        print(f"refused: {row} on {on}: {why}", file=sys.stderr)
    failures = batch.run(f"sweep-{spec.name}", waits=False)
    entries = collect_runs(cells, failures, refused)
    return _finish(build(spec, scale, seeds, extra, entries, refused), folder)


def _finish(content: Mapping[str, Any], folder: Path) -> int:
    """Write and print the view; return the exit code."""
    paths = write(content, folder)
    print(f"\n{terminal(content)}")
    print("\n".join(f"wrote {path}" for path in paths), flush=True)
    is_complete = all(not row["absent"] for row in content["rows"])
    left_out(damaged_lines(content))
    print(last_line(content), file=sys.stdout if is_complete else sys.stderr)
    return 0 if is_complete else 1


def _compare(content: Mapping[str, Any], folder: Path) -> int:
    """Say what differs between a view and the one in `folder`; return the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        write(content, Path(temporary))
        problems = differences(Path(temporary), folder)
    print("\n".join(problems) or f"{folder} follows from its records, byte for byte")
    return 1 if problems else 0


def _without_refused(batch: Batch, refused: Refused) -> tuple[Batch, Refused]:
    """Check every cell; return what can run, and `refused` with those that cannot.

    Raises:
        ValueError: nothing can run.
    """
    found = {(cell.row, cell.on): reason for cell, reason in batch.refused()}
    names = {c.signature: found[c.row, c.on] for c in batch.todo if (c.row, c.on) in found}
    for cell in batch.todo:
        before = cell.run.start_run
        if before is not None and before.name in names:
            found[cell.row, cell.on] = f"the run that it starts from: {names[before.name]}"
    todo = [cell for cell in batch.todo if (cell.row, cell.on) not in found]
    if not todo and len(batch.todo) == len(batch.cells):
        raise ValueError(next(iter(found.values())))
    return replace(batch, todo=todo), {**refused, **found}


if __name__ == "__main__":
    console.run(main)
