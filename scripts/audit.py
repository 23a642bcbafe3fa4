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

from delta_lora import console
from delta_lora.writing import make_folder, write_text
from scripts.auditing.measurements import Measurement
from scripts.auditing.page import build, to_markdown
from scripts.auditing.pictures import draw
from scripts.auditing.plan import AuditPlan, as_table, load_settings, make_plan
from scripts.reporting.plan import describe_scope
from scripts.reporting.results import (
    RESULTS,
    accept,
    collect,
    collect_accepted,
    read_accepted,
)
from scripts.reporting.scope import other_model
from scripts.runs import launchers
from scripts.runs.allotment import parse_workers
from scripts.runs.batch import Batch, run_jobs
from scripts.runs.cells import parse_overrides, parse_seeds
from scripts.runs.command import add_arguments, exit_code
from scripts.runs.jobs import Job
from scripts.runs.launchers import Here, Launcher
from scripts.runs.scale import resolve_scale
from scripts.tables import differences, left_out

#: what a worker does with a measurement.
MEASURE = "scripts.auditing.measurements:measure"

# ---------------------------------------------------------------------- running


def run_missing(plan: AuditPlan, workers: str, results: Path, launcher: Here | Launcher) -> bool:
    """Run what is missing and show progress; return whether everything is done.

    Args:
        plan: from `make_plan`.
        workers: as for `scripts.reproduce`.
        results: where the page will be written.
        launcher: where runs and measurements work.
    """
    batch = Batch.plan(
        plan.cells, scale=plan.scale, extra=plan.extra, workers=workers, launcher=launcher
    )
    todo = [m for m in plan.measurements if m.read() is None]
    print(
        f"audit: {len(batch.cells)} runs, {len(batch.todo)} to run; {len(plan.measurements)} "
        f"measurements, {len(todo)} to make",
        flush=True,
    )
    if batch.todo:
        print("\n".join(batch.summary()), flush=True)
    if batch.todo or todo:
        batch.check(results)
    failures = {name: outcome.error for name, outcome in batch.run("audit").items()}
    if todo:
        failures |= _measure(plan, todo, workers, batch)
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return not failures


def _measure(
    plan: AuditPlan, todo: Sequence[Measurement], workers: str, batch: Batch
) -> dict[str, str | None]:
    """Make measurements and show progress; return signature to reason of those that failed."""
    jobs = [Job(MEASURE, (measurement,), measurement.signature) for measurement in todo]
    labels = {measurement.signature: measurement.label for measurement in todo}
    # On the devices of the runs; what one needs there is not known.
    chosen = batch.launcher.allot(workers, plan.scale, plan.extra, len(jobs))
    with batch.launcher.pool(chosen, batch.logs, "audit-measurements") as pool:
        failed = run_jobs(pool, jobs, labels)
    return {key: outcome.error for key, outcome in failed.items()}


# ---------------------------------------------------------------------- results


def read_records(plan: AuditPlan, accepted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what `scripts.auditing.page.build` reads: plan, runs and measurements.

    Args:
        plan: from `make_plan`.
        accepted: take these records only; None takes those of the run folders.
    """
    if accepted is None:
        entries = collect(plan.cells)
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
    make_folder(folder)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return [
        write_text(folder / "audit.md", to_markdown(content)),
        write_text(folder / "audit.json", text),
        *draw(content, folder),
    ]


def keep(plan: AuditPlan, folder: Path) -> None:
    """Copy the records to ``folder`` and ``folder/audit``; those that are there already stay.

    Raises:
        ValueError: a record comes from a tree with uncommitted changes.
    """
    from delta_lora.checkpoint import write_json

    distinct = {c.signature: c for c in plan.cells if not (folder / f"{c.signature}.json").exists()}
    accept(collect(list(distinct.values())), folder)
    dirty = []
    for measurement in plan.measurements:
        record = measurement.read()
        path = folder / "audit" / f"{measurement.signature}.json"
        if record is None or path.exists():
            continue
        if record["provenance"]["git"]["dirty"] is not False:
            dirty.append(measurement.signature)
            continue
        make_folder(path.parent)
        write_json(path, record)
    if dirty:
        raise ValueError(
            f"{len(dirty)} measurements come from uncommitted or unknown code "
            f"({', '.join(dirty[:5])}); commit, delete their records and measure again"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code.

    Args:
        arguments: the command line; None takes the process's.
    """
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _audit(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, RESULTS)
    parser.add_argument("--accept", action="store_true", help="keep the records in results/runs")
    parser.add_argument("--check", action="store_true", help="compare, from accepted records only")
    return parser


def _audit(options: argparse.Namespace) -> int:
    scale, reason = resolve_scale(options.scale)
    print(f"scale: {scale} ({reason})", flush=True)
    seeds, extra = parse_seeds(options.seeds), parse_overrides(options.overrides)
    parse_workers(options.workers)  # a bad number is said before the planning
    launcher = launchers.load(options.launcher, options.launcher_args)
    plan = make_plan(scale, seeds, extra, load_settings(scale))
    other = other_model(as_table(plan), plan.cells, scale, extra)
    folder = options.results / scale / ("" if other is None else other.folder)
    kept = options.results / "runs"
    if options.plan:
        open_runs = {c.signature for c in plan.cells if not c.run.is_done}
        open_measurements = [m for m in plan.measurements if m.read() is None]
        print(f"{len({c.signature for c in plan.cells})} runs, {len(open_runs)} missing")
        print(f"{len(plan.measurements)} measurements, {len(open_measurements)} missing")
        print("".join(f"{line}\n" for line in describe_scope(other)), end="")
        refusal = launcher.refusal(scale, extra)
        if refusal is not None and (open_runs or open_measurements):
            print(f"would be refused: {refusal}")
        states = (cell.run.status() for cell in plan.cells)
        return left_out([state.reason for state in states if state.state == "damaged"])
    problems: list[str] = []
    if options.check:
        content = build(read_records(plan, read_accepted(kept, problems)))
        with tempfile.TemporaryDirectory() as temporary:
            write(content, Path(temporary))
            problems += differences(Path(temporary), folder)
        print("\n".join(problems) or f"{folder}/audit.md follows from its records, byte for byte")
        return 1 if problems else 0
    if options.accept:
        keep(plan, kept / scale)
        content = build(read_records(plan, read_accepted(kept, problems)))
        is_done = left_out(problems) == 0
    else:
        is_done = run_missing(plan, options.workers, folder, launcher)
        content = build(read_records(plan))
    for path in write(content, folder):
        print(f"wrote {path}")
    for line in content["found"]:
        print(f"- {line}")
    return 0 if is_done and not content["missing"] else 1


if __name__ == "__main__":
    console.run(main)
