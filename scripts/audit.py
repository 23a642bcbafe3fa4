"""Audit Delta-LoRA: seven measurements of what the paper leaves open, on one page.

    python scripts/audit.py                                 scale by the machine
    python scripts/audit.py --scale tiny --seeds 1,2,3 --plan
    python scripts/audit.py --scale tiny --accept           keep the records in results/runs
    python scripts/audit.py --scale tiny --check            compare with what is committed

Writes ``results/<scale>/audit.{md,json}`` and its pictures. Runs and measurements that are done are
not repeated, so the same command goes on after Ctrl-C, a kill or a failure. Settings:
``configs/audit/``. Exit code: 0 all is done, 1 something failed, 2 bad input, 130 stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora.checkpoint import write_json
from scripts.auditing import measurements
from scripts.auditing.measurements import Measurement
from scripts.auditing.page import build, to_markdown
from scripts.auditing.pictures import draw
from scripts.auditing.plan import Plan, load_settings, make_plan
from scripts.reporting.results import (
    RESULTS,
    accept,
    collect,
    collect_accepted,
    read_accepted,
    write_text,
)
from scripts.runs import cell as real_cell
from scripts.runs.allotment import allot, largest_need, parse_workers
from scripts.runs.batch import (
    Progress,
    check_before_work,
    expected_time,
    prepare_models,
    run_cells,
    stop_in_order,
    with_starts,
)
from scripts.runs.jobs import Job
from scripts.runs.plan import CellModule, Durations, parse_overrides, parse_seeds
from scripts.runs.scale import CHOICES, missing_device, resolve_scale
from scripts.runs.space import check_disk_space
from scripts.runs.workers import Pool
from scripts.tables import differences

# ---------------------------------------------------------------------- running


def run_missing(
    plan: Plan, workers: str, results: Path, cell: CellModule, module: str, measuring: str
) -> bool:
    """Run what is missing and show progress; return whether everything is done.

    Args:
        plan: from `make_plan`.
        workers: as for `scripts.reproduce`.
        results: where the page will be written.
        cell: plans and runs cells.
        module: its name, for the worker processes.
        measuring: name of the module that measures.
    """
    distinct = {item.signature: item for item in plan.cells}
    missing = [c for c in distinct.values() if cell.status(c.config).state != "done"]
    todo = with_starts(missing, cell)
    open_measurements = [m for m in plan.measurements if m.read() is None]
    print(
        f"audit: {len(distinct)} runs, {len(todo)} to run; {len(plan.measurements)} measurements, "
        f"{len(open_measurements)} to make",
        flush=True,
    )
    if todo or open_measurements:
        refusal = missing_device(plan.scale, plan.extra)
        if refusal is not None:
            raise ValueError(refusal)
    outputs = plan.cells[0].folder.parent
    failures: dict[str, str] = {}
    check_before_work(todo, results, cell)
    if todo:
        durations = Durations()
        durations.read([outputs], cell)
        chosen = allot(workers, plan.scale, plan.extra, len(todo), lambda: largest_need(todo))
        check_disk_space(todo, len(chosen.environments))
        print(expected_time(todo, len(chosen.environments), durations, cell))
        print(chosen.text, flush=True)
        logs = outputs / "logs"
        with Pool(module, environments=chosen.environments, logs=logs, name="audit") as pool:
            problem = prepare_models(pool, todo, cell)
            if problem is not None:
                print(f"error: preparing the models failed: {problem}", file=sys.stderr)
                return False
            failed = run_cells(pool, todo, durations, cell)
            failures |= {name: str(outcome.error) for name, outcome in failed.items()}
    if open_measurements:
        failures |= _measure(plan, open_measurements, workers, outputs / "logs", measuring)
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return not failures


def _measure(
    plan: Plan, todo: Sequence[Measurement], workers: str, logs: Path, measuring: str
) -> dict[str, str]:
    """Make measurements and show progress; return signature to reason of those that failed."""
    by_key = {m.signature: m for m in todo}
    jobs = [Job("run", (measurements.as_job(m),), name) for name, m in by_key.items()]
    # On the devices of the runs; what one needs there is not known.
    chosen = allot(workers, plan.scale, plan.extra, len(jobs))
    failures = {}
    with (
        Pool(
            measuring, environments=chosen.environments, logs=logs, name="audit-measurements"
        ) as pool,
        Progress(len(jobs)) as progress,
    ):
        for outcome in pool.run(jobs):
            if outcome is None:
                progress.tick([by_key[job.key].label for job, _ in pool.running])
                continue
            progress.step(by_key[outcome.job.key].label, outcome)
            if outcome.error is not None:
                failures[outcome.job.key] = outcome.error
    return failures


# ---------------------------------------------------------------------- results


def read_records(
    plan: Plan, cell: CellModule, accepted: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what `scripts.auditing.page.build` reads: plan, runs and measurements.

    Args:
        plan: from `make_plan`.
        cell: plans and runs cells.
        accepted: take these records only; None takes those of the run folders.
    """
    if accepted is None:
        entries = collect(plan.cells, cell)
        found = [m.read() for m in plan.measurements]
    else:
        entries = collect_accepted(plan.cells, accepted)
        found = [accepted.get(m.signature) for m in plan.measurements]
    runs: dict[str, dict[int, Any]] = {}
    for entry in entries:
        if entry.record is not None:
            runs.setdefault(entry.cell.row, {})[entry.cell.seed] = entry.record
    missing = [entry.cell.label for entry in entries if entry.record is None]
    pairs = zip(plan.measurements, found, strict=True)
    missing += [m.label for m, record in pairs if record is None]
    return {
        "scale": plan.scale,
        "seeds": plan.seeds,
        "extra": plan.extra,
        "settings": plan.settings,
        "runs": runs,
        "measurements": [record for record in found if record is not None],
        "missing": missing,
    }


def write(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write page, data and pictures of an audit to `folder`; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return [
        write_text(folder / "audit.md", to_markdown(content)),
        write_text(folder / "audit.json", text),
        *draw(content, folder),
    ]


def keep(plan: Plan, cell: CellModule, folder: Path) -> None:
    """Copy the records to ``folder`` and ``folder/audit``; those that are there already stay.

    Raises:
        ValueError: a record comes from a tree with uncommitted changes.
    """
    distinct = {c.signature: c for c in plan.cells if not (folder / f"{c.signature}.json").exists()}
    accept(collect(list(distinct.values()), cell), folder)
    dirty = []
    for measurement in plan.measurements:
        record = measurement.read()
        path = folder / "audit" / f"{measurement.signature}.json"
        if record is None or path.exists():
            continue
        if record["provenance"]["git"]["dirty"] is not False:
            dirty.append(measurement.signature)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    if dirty:
        raise ValueError(
            f"{len(dirty)} measurements come from uncommitted or unknown code "
            f"({', '.join(dirty[:5])}); commit, delete their records and measure again"
        )


def main(
    arguments: Sequence[str] | None = None,
    module: str = "scripts.runs.cell",
    measuring: str = "scripts.auditing.measurements",
) -> int:
    """Run the command; return the exit code.

    Args:
        arguments: the command line; None takes the process's.
        module: module that plans and runs cells, for the worker processes.
        measuring: module that measures.
    """
    options = _parser().parse_args(arguments)
    try:
        with stop_in_order():
            return _audit(options, real_cell, module, measuring)
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
    parser.add_argument("--scale", choices=CHOICES, default="auto")
    parser.add_argument("--seeds", default="1,2,3", help="default: 1,2,3")
    parser.add_argument("--workers", default="auto", help="processes; default: by the machine")
    parser.add_argument(
        "--args", default="", metavar="OVERRIDES", dest="overrides", help="of every run, for Hydra"
    )
    parser.add_argument("--plan", action="store_true", help="show what is missing and stop")
    parser.add_argument("--accept", action="store_true", help="keep the records in results/runs")
    parser.add_argument("--check", action="store_true", help="compare, from accepted records only")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return parser


def _audit(options: argparse.Namespace, cell: CellModule, module: str, measuring: str) -> int:
    scale, reason = resolve_scale(options.scale)
    print(f"scale: {scale} ({reason})", flush=True)
    seeds, extra = parse_seeds(options.seeds), parse_overrides(options.overrides)
    parse_workers(options.workers)  # a bad number is said before the planning
    plan = make_plan(scale, seeds, extra, load_settings(scale), cell)
    folder, kept = options.results / scale, options.results / "runs"
    if options.plan:
        open_runs = {c.signature for c in plan.cells if cell.status(c.config).state != "done"}
        open_measurements = [m for m in plan.measurements if m.read() is None]
        print(f"{len({c.signature for c in plan.cells})} runs, {len(open_runs)} missing")
        print(f"{len(plan.measurements)} measurements, {len(open_measurements)} missing")
        refusal = missing_device(scale, extra)
        if refusal is not None and (open_runs or open_measurements):
            print(f"would be refused: {refusal}")
        return 0
    if options.check:
        content = build(read_records(plan, cell, read_accepted(kept)))
        with tempfile.TemporaryDirectory() as temporary:
            write(content, Path(temporary))
            problems = differences(Path(temporary), folder)
        print("\n".join(problems) or f"{folder}/audit.md follows from its records, byte for byte")
        return 1 if problems else 0
    if options.accept:
        keep(plan, cell, kept / scale)
        content = build(read_records(plan, cell, read_accepted(kept)))
        is_done = True
    else:
        is_done = run_missing(plan, options.workers, folder, cell, module, measuring)
        content = build(read_records(plan, cell))
    for path in write(content, folder):
        print(f"wrote {path}")
    for line in content["found"]:
        print(f"- {line}")
    return 0 if is_done and not content["missing"] else 1


if __name__ == "__main__":
    sys.exit(main())
