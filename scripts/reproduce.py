r"""Reproduce tables: plan, run what is missing, write and print the table.

    python scripts/reproduce.py table1                      scale by the machine
    python scripts/reproduce.py table1 --scale tiny --seeds 1,2,3 --plan
    python scripts/reproduce.py table1 --args "recipe.rank=8"

Every run continues where it was stopped, so the same command goes on after Ctrl-C, a kill or a
failed run, and answers at once where everything is done. Exit code: 0 all runs are done, 1 a run
failed, 2 bad input, 130 stopped.

Several GPUs:
    python scripts/reproduce.py table1                      all of them, from one queue
    CUDA_VISIBLE_DEVICES=0,1 python scripts/reproduce.py table1          these two
    python scripts/reproduce.py table1 --workers 8          eight runs at a time, over all of them
    accelerate launch --multi_gpu --num_processes 8 scripts/train.py task=xsum recipe=xsum \
      model=bart_large method=delta_lora                    one run over eight of them
Without --workers a GPU takes as many runs at a time as its memory and the CPU cores allow, at most
four. Their times are not comparable with those of runs alone: for claim C8 (time of Delta-LoRA
against LoRA) give --workers the number of GPUs.
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
from scripts.reporting.summary import summary
from scripts.runs.allotment import allot, largest_need, parse_workers
from scripts.runs.batch import (
    check_before_work,
    expected_time,
    prepare_models,
    run_cells,
    stop_in_order,
    with_starts,
)
from scripts.runs.jobs import Outcome
from scripts.runs.plan import Cell, CellModule, CellStatus, Durations, parse_overrides, parse_seeds
from scripts.runs.scale import CHOICES, missing_device, resolve_scale
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
    parser.add_argument(
        "--workers", default="auto", help="runs at a time, over all GPUs; default: by the machine"
    )
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
    parse_workers(options.workers)  # a bad number is said before the planning
    specs = [load_table(name) for name in dict.fromkeys(options.tables)]
    plans = {
        spec.name: list_cells(spec, scale=scale, seeds=seeds, extra=extra, cell=cell)
        for spec in specs
    }
    distinct = {item.signature: item for cells in plans.values() for item in cells}
    states = {name: cell.status(item.config) for name, item in distinct.items()}
    missing = [item for name, item in distinct.items() if states[name].state != "done"]
    todo = with_starts(missing, cell)
    chosen = allot(options.workers, scale, extra, len(todo), lambda: largest_need(todo))
    num_workers = len(chosen.environments)
    refusal = missing_device(scale, extra) if todo or options.prepare else None
    if refusal is not None and not options.plan:
        raise ValueError(refusal)

    durations = Durations()
    if todo:
        durations.read([item.folder.parent for item in distinct.values()], cell)
    _print_plan(specs, plans, states, todo, num_workers, durations, cell)
    if len(todo) > len(missing):
        print(f"runs that are only made to start others from them: {len(todo) - len(missing)}")
    if todo:
        print(expected_time(todo, num_workers, durations, cell), flush=True)
        print(chosen.text if refusal is None else f"would be refused: {refusal}", flush=True)
    else:
        print(f"all {len(distinct)} runs are done; nothing to run")
    if options.plan:
        return 0

    failures: dict[str, Outcome] = {}
    if todo or options.prepare:
        check_before_work(todo, options.results / scale, cell)
        check_disk_space(todo, num_workers)
        logs = next(iter(distinct.values())).folder.parent / "logs"
        name = "-".join(plans)
        with Pool(module, environments=chosen.environments, logs=logs, name=name) as pool:
            print(f"output of the workers: {logs}", flush=True)
            everything = list(distinct.values())
            problem = prepare_models(pool, everything if options.prepare else todo, cell)
            if problem is not None:
                print(f"error: preparing the models failed: {problem}", file=sys.stderr)
                return 1
            if options.prepare:
                print("the models that the runs start from are ready")
                return 0
            failures = run_cells(pool, todo, durations, cell)
    return _finish(specs, plans, scale, seeds, extra, cell, failures, options.results)


def _print_plan(
    specs: Sequence[TableSpec],
    plans: Mapping[str, Sequence[Cell]],
    states: Mapping[str, CellStatus],
    todo: Sequence[Cell],
    num_workers: int,
    durations: Durations,
    cell: CellModule,
) -> None:
    """Print what every table still needs, and what that costs."""
    for spec in specs:
        mine = {item.signature for item in plans[spec.name]}
        open_cells = [item for item in todo if item.signature in mine]
        lines = describe(spec, plans[spec.name], states)
        lines += describe_costs(open_cells, num_workers, durations, cell)
        print("\n".join(lines))
    num_distinct = len({item.signature for cells in plans.values() for item in cells})
    shared = sum(map(len, plans.values())) - num_distinct
    if shared:
        print(f"{shared} runs are shared by several rows or tables and run once")
    if len(specs) > 1 and todo:
        print("all of them together:")
        print("\n".join(describe_costs(todo, num_workers, durations, cell)))


def _finish(
    specs: Sequence[TableSpec],
    plans: Mapping[str, Sequence[Cell]],
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    cell: CellModule,
    failures: Mapping[str, Outcome],
    results_folder: Path,
) -> int:
    """Write and print the tables; return the exit code."""
    is_complete = True
    every: list[Entry] = []
    for spec in specs:
        entries = collect(plans[spec.name], cell, failures=failures)
        content, paths = make(spec, scale, seeds, extra, entries, results_folder / scale)
        print(f"\n{summary(content, paths)}", end="")
        every += entries
        absent = [entry for entry in entries if entry.record is None]
        for entry in absent:
            state = "not run" if entry.state == "missing" else entry.state
            print(f"{entry.cell.label}: {state}: {entry.reason}", file=sys.stderr)
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
