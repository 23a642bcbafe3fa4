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
    accelerate launch --multi_gpu --num_processes 8 scripts/train.py experiment=xsum \
      method=delta_lora                    one run over eight of them
A cluster, one device a run (options: configs/launcher):
    python scripts/reproduce.py table1 --scale paper --launcher slurm \
      --launcher-args "partition=gpu time=12:00:00"
    python scripts/reproduce.py table1 --scale paper --launcher ray
Without --workers a GPU takes as many runs at a time as its memory and the CPU cores allow, at most
four. Their times are not comparable with those of runs alone: for claim C8 (time of Delta-LoRA
against LoRA) give --workers the number of GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora import console
from scripts.reporting.page import write_page
from scripts.reporting.plan import describe, describe_costs, describe_refusals, describe_scope
from scripts.reporting.results import RESULTS, Entry, collect
from scripts.reporting.scope import Other, check_one_model, folder_of, other_model
from scripts.reporting.spec import TableSpec, load_table
from scripts.reporting.summary import summary
from scripts.runs import launchers
from scripts.runs.allotment import parse_workers
from scripts.runs.batch import Batch
from scripts.runs.cells import Cell, parse_overrides, parse_seeds
from scripts.runs.command import add_arguments, exit_code
from scripts.runs.jobs import Outcome
from scripts.runs.scale import resolve_scale
from scripts.tables import make


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line; None takes the process's.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _reproduce(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="table1, or 1")
    add_arguments(parser, RESULTS)
    parser.add_argument(
        "--prepare", action="store_true", help="only pre-train the tiny models that the runs need"
    )
    return parser


def _reproduce(options: argparse.Namespace) -> int:
    scale, reason = resolve_scale(options.scale)
    print(f"scale: {scale} ({reason})", flush=True)
    seeds, extra = parse_seeds(options.seeds), parse_overrides(options.overrides)
    parse_workers(options.workers)  # a bad number is said before the planning
    launcher = launchers.load(options.launcher, options.launcher_args)
    specs = [load_table(name) for name in dict.fromkeys(options.tables)]
    plans = {spec.name: spec.cells(scale=scale, seeds=seeds, extra=extra) for spec in specs}
    everything = [cell for cells in plans.values() for cell in cells]
    for spec in specs:
        check_one_model(spec.name, plans[spec.name])
    others = {spec.name: other_model(spec, plans[spec.name], scale, extra) for spec in specs}
    batch = Batch.plan(
        everything, scale=scale, extra=extra, workers=options.workers, launcher=launcher
    )
    if options.plan:
        _print_plan(specs, plans, batch, others)
        print("\n".join(describe_refusals(batch.impossible())), end="")
        return 1 if batch.damaged() else 0
    if options.prepare:
        batch.check(options.results / scale)
        batch.prepare("-".join(plans))
        print("the models that the runs start from are ready")
        return 0
    if batch.todo and batch.refusal is not None:
        raise ValueError(batch.refusal)
    _print_plan(specs, plans, batch, others)
    if batch.todo:
        batch.check(options.results / scale)
    failures = batch.run("-".join(plans))
    return _finish(specs, plans, scale, seeds, extra, failures, options.results)


def _print_plan(
    specs: Sequence[TableSpec],
    plans: Mapping[str, Sequence[Cell]],
    batch: Batch,
    others: Mapping[str, Other | None],
) -> None:
    """Print what every table still needs, and what that costs."""
    for spec in specs:
        mine = {cell.signature for cell in plans[spec.name]}
        todo = [cell for cell in batch.todo if cell.signature in mine]
        lines = describe(spec, plans[spec.name], batch.states)
        lines += describe_scope(others[spec.name])
        print("\n".join([*lines, *describe_costs(todo, batch.num_workers, batch.durations)]))
    shared = sum(map(len, plans.values())) - len(batch.cells)
    if shared:
        print(f"{shared} runs are shared by several rows or tables and run once")
    if len(specs) > 1 and batch.todo:
        print("all of them together:")
        print("\n".join(describe_costs(batch.todo, batch.num_workers, batch.durations)))
    print("\n".join(batch.summary()), flush=True)


def _finish(
    specs: Sequence[TableSpec],
    plans: Mapping[str, Sequence[Cell]],
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    failures: Mapping[str, Outcome],
    results_folder: Path,
) -> int:
    """Write and print the tables; return the exit code."""
    is_complete = True
    every: list[Entry] = []
    pages: dict[Path, str | None] = {}
    for spec in specs:
        entries = collect(plans[spec.name], failures=failures)
        content, paths = make(spec, scale, seeds, extra, entries, results_folder / scale)
        print(f"\n{summary(content, paths)}", end="")
        folder = folder_of(results_folder / scale, content)
        pages[folder] = content.get("other_model", {}).get("name")
        every += entries
        absent = [entry for entry in entries if entry.record is None]
        for entry in absent:
            state = "not run" if entry.state == "missing" else entry.state
            print(f"{entry.cell.label}: {state}: {entry.reason}", file=sys.stderr)
        is_complete = is_complete and not absent
    for folder, model in pages.items():
        print(f"wrote {write_page(folder, scale, model=model)}")
    unscored = [
        entry.cell.run.folder / "record.json"
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
    console.run(main)
