"""Reproduce tables: plan, run what is missing, write and print the table.

    python scripts/reproduce.py table1                      scale by the machine
    python scripts/reproduce.py table1 --scale tiny --seeds 1,2,3 --plan
    python scripts/reproduce.py table1 --args "recipe.rank=8"

Every run continues where it was stopped, so the same command goes on after Ctrl-C, a kill or a
failed run, and answers at once where everything is done. Exit code: 0 all runs are done, 1 a run
failed, 2 bad input, 130 stopped.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.reporting.page import write_page
from scripts.reporting.plan import describe, describe_costs, list_cells
from scripts.reporting.results import RESULTS, Entry, collect
from scripts.reporting.spec import TableSpec, load_table
from scripts.runs.batch import (
    check_before_work,
    expected_time,
    prepare_models,
    run_cells,
    stop_in_order,
    worker_environments,
)
from scripts.runs.plan import Cell, CellModule, Durations, parse_overrides, parse_seeds
from scripts.runs.scale import CHOICES, resolve_scale
from scripts.runs.space import check_disk_space
from scripts.runs.workers import Pool
from scripts.tables import make


def main(arguments: Sequence[str] | None = None, module: str = "scripts.runs.cell") -> int:
    """Run the command.

    Args:
        arguments: the command line; None takes the process's.
        module: module that plans and runs cells; tests give their own.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    cell = importlib.import_module(module)
    try:
        with stop_in_order():
            return _reproduce(options, cell, module)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="table1, or 1")
    parser.add_argument("--scale", choices=CHOICES, default="auto")
    parser.add_argument("--seeds", default="1,2,3", help="default: 1,2,3")
    parser.add_argument("--workers", default="auto", help="processes; default: by the machine")
    parser.add_argument(
        "--args", default="", metavar="OVERRIDES", dest="overrides", help="of every run, for Hydra"
    )
    parser.add_argument("--plan", action="store_true", help="show what is missing and stop")
    parser.add_argument(
        "--prepare", action="store_true", help="only pre-train the tiny models that the runs need"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return parser


def _reproduce(options: argparse.Namespace, cell: CellModule, module: str) -> int:
    scale, reason = resolve_scale(options.scale)
    print(f"scale: {scale} ({reason})", flush=True)
    seeds, extra = parse_seeds(options.seeds), parse_overrides(options.overrides)
    specs = [load_table(name) for name in dict.fromkeys(options.tables)]
    plans = {
        spec.name: list_cells(spec, scale=scale, seeds=seeds, extra=extra, cell=cell)
        for spec in specs
    }
    distinct = {item.signature: item for cells in plans.values() for item in cells}
    states = {name: cell.status(item.config) for name, item in distinct.items()}
    todo = [item for name, item in distinct.items() if states[name].state != "done"]
    # A run that starts from another one comes behind it, so that no worker waits for long.
    todo.sort(key=lambda item: item.config.get("init_from") is not None)
    environments = worker_environments(options.workers, scale, max(1, len(todo)))

    durations = Durations()
    if todo:
        durations.read([item.folder.parent for item in distinct.values()], cell)
    for spec in specs:
        mine = {item.signature for item in plans[spec.name]}
        open_cells = [item for item in todo if item.signature in mine]
        lines = describe(spec, plans[spec.name], states)
        lines += describe_costs(open_cells, len(environments), durations, cell)
        print("\n".join(lines))
    shared = sum(map(len, plans.values())) - len(distinct)
    if shared:
        print(f"{shared} runs are shared by several rows or tables and run once")
    if len(specs) > 1 and todo:
        print("all of them together:")
        print("\n".join(describe_costs(todo, len(environments), durations, cell)))
    if todo:
        print(expected_time(todo, len(environments), durations, cell), flush=True)
    else:
        print(f"all {len(distinct)} runs are done; nothing to run")
    if options.plan:
        return 0

    failures: dict[str, str] = {}
    if todo or options.prepare:
        check_before_work(todo, options.results / scale, cell)
        check_disk_space(todo, len(environments))
        logs = next(iter(distinct.values())).folder.parent / "logs"
        name = "-".join(plans)
        with Pool(module, environments=environments, logs=logs, name=name) as pool:
            print(f"{len(environments)} worker process(es); their output: {logs}", flush=True)
            everything = list(distinct.values())
            problem = prepare_models(pool, everything if options.prepare else todo)
            if problem is not None:
                print(f"error: preparing the models failed: {problem}", file=sys.stderr)
                return 1
            if options.prepare:
                print("the models that the runs start from are ready")
                return 0
            failures = run_cells(pool, todo, durations, cell)
    return _finish(specs, plans, scale, seeds, extra, cell, failures, options.results)


def _finish(
    specs: Sequence[TableSpec],
    plans: Mapping[str, Sequence[Cell]],
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    cell: CellModule,
    failures: Mapping[str, str],
    results_folder: Path,
) -> int:
    """Write and print the tables; return the exit code."""
    is_complete = True
    every: list[Entry] = []
    for spec in specs:
        entries = collect(plans[spec.name], cell, failures=failures)
        text, paths = make(spec, scale, seeds, extra, entries, results_folder / scale)
        print(f"\n{text}")
        for path in paths:
            print(f"wrote {path}")
        every += entries
        absent = [entry for entry in entries if entry.record is None]
        for entry in absent:
            print(f"{entry.cell.label}: {entry.state}: {entry.reason}", file=sys.stderr)
        is_complete = is_complete and not absent
    print(f"wrote {write_page(results_folder / scale)}")
    unscored = [
        entry.cell.folder / "record.json"
        for entry in every
        if entry.record is not None and entry.record["missing_metrics"]
    ]
    if unscored:
        print(
            f"{len(unscored)} runs lack a score (the footnotes say why). Where that is mended, "
            "remove their records and give the command again, which only scores them: rm "
            + " ".join(map(str, dict.fromkeys(unscored))),
            file=sys.stderr,
        )
    if not is_complete:
        print("not all runs finished; the same command tries the others again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
