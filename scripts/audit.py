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
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from delta_lora.checkpoint import write_json
from scripts import cell as real_cell
from scripts import measurements
from scripts.audit_page import build, to_markdown
from scripts.audit_pictures import draw
from scripts.composition import CONFIGS
from scripts.measurements import Measurement
from scripts.plan import Cell, CellModule, Durations, list_cells, parse_overrides, parse_seeds
from scripts.reproduce import (
    expected_time,
    prepare_models,
    run_cells,
    worker_environments,
)
from scripts.scale import CHOICES, resolve_scale
from scripts.table_results import (
    RESULTS,
    accept,
    collect,
    collect_accepted,
    read_accepted,
    write_text,
)
from scripts.tables import differences
from scripts.workers import Job, Pool


@dataclass(frozen=True)
class Plan:
    """Everything that an audit needs.

    Attributes:
        scale: scale of all of it.
        seeds: seeds of the runs; a measurement that has no seed of its own takes the first.
        extra: further overrides.
        settings: from `load_settings`.
        cells: ordinary runs, by part and row (`Cell.row` is ``<part>/<row>/<value>``).
        measurements: the others.
    """

    scale: str
    seeds: list[int]
    extra: list[str]
    settings: dict[str, Any]
    cells: list[Cell]
    measurements: list[Measurement]


def load_settings(scale: str, folder: Path = CONFIGS / "audit") -> dict[str, Any]:
    """Return the settings of an audit: the base, overridden by those of the scale.

    Raises:
        ValueError: a file is missing, or the scale sets a key that the base lacks.
    """
    base = OmegaConf.load(folder / "_base.yaml")
    path = folder / f"{scale}.yaml"
    if not path.is_file():
        raise ValueError(f"{path} is missing; a scale says there what it measures")
    OmegaConf.set_struct(base, True)
    try:
        merged = OmegaConf.merge(base, OmegaConf.load(path))
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]


def make_plan(
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    settings: Mapping[str, Any],
    cell: CellModule = real_cell,
) -> Plan:
    """List the runs and measurements of an audit.

    Raises:
        ValueError: a row cannot be composed.
    """
    rows: dict[str, list[str]] = {}
    for row in settings["rank"]["rows"]:
        rows[f"rank/{row['name']}/"] = row["overrides"]
    for row in settings["dropout"]["rows"]:
        for dropout in settings["dropout"]["dropouts"]:
            known = row["known"].get(dropout)
            other = [*row["other"], f"method.dropout={dropout:g}"]
            rows[f"dropout/{row['name']}/{dropout:g}"] = other if known is None else known
    for row in settings["low_resource"]["rows"]:
        for fraction in settings["low_resource"]["fractions"]:
            share = [] if fraction == 1 else [f"train_fraction={fraction:g}"]
            rows[f"low_resource/{row['name']}/{fraction:g}"] = [*row["overrides"], *share]
    spec: Any = SimpleNamespace(
        name="audit",
        runs={settings["score"]["metric"]: settings["run"]},
        rows=[SimpleNamespace(name=name, overrides=o) for name, o in rows.items()],
    )
    cells = list_cells(spec, scale=scale, seeds=seeds, extra=extra, cell=cell)
    return Plan(
        scale=scale,
        seeds=list(seeds),
        extra=list(extra),
        settings=dict(settings),
        cells=cells,
        measurements=list_measurements(scale, seeds, extra, settings),
    )


def list_measurements(
    scale: str, seeds: Sequence[int], extra: Sequence[str], settings: Mapping[str, Any]
) -> list[Measurement]:
    """Return the measurements of an audit that are no ordinary runs."""
    found = []

    def add(
        part: str, label: str, values: Mapping[str, Any], overrides: Sequence[str], seed: int,
        *, needs_run: bool = False,
    ) -> None:  # fmt: skip
        whole = (*settings["run"], *overrides, f"scale={scale}", f"seed={seed}", *extra)
        found.append(measurements.plan(part, label, values, whole, needs_run=needs_run))

    for seed in seeds:
        for row in settings["rank"]["rows"]:
            values = {"row": row["name"], "seed": seed}
            label = f"rank of {row['name']}, seed {seed}"
            add("rank", label, values, row["overrides"], seed, needs_run=True)
    chosen = settings["gradients"]
    overrides = next(r["overrides"] for r in settings["rank"]["rows"] if r["name"] == chosen["row"])
    kept = ("dropouts", "num_masks", "batch", "length")
    for seed in seeds:
        for loss in chosen["losses"]:
            values = {**{key: chosen[key] for key in kept}, "loss": loss, "seed": seed}
            label = f"gradients under {loss}, seed {seed}"
            add("gradients", label, values, overrides, seed, needs_run=True)
    chosen = settings["equivalence"]
    kept = ("steps", "batch", "length", "rank", "alpha", "update_ratio")
    shared = {**{key: chosen[key] for key in kept}, "seed": seeds[0]}
    for optimizer in chosen["optimizers"]:
        for case in equivalence_cases(chosen, optimizer):
            own = {key: optimizer[key] for key in ("optimizer", "learning_rate", "options")}
            label = f"equivalence, {optimizer['label']}, {describe_case(case)}"
            add("equivalence", label, {**shared, **own, **case}, ["method=lora"], seeds[0])
    chosen = settings["precision"]
    kept = ("steps", "every", "batch", "length", "rank", "alpha", "update_ratio", "start_step")
    for rate in chosen["learning_rates"]:
        for form in chosen["forms"]:
            values = {**{key: chosen[key] for key in kept}, "form": form, "learning_rate": rate}
            label = f"precision of {form}, learning rate {rate:g}"
            add("precision", label, {**values, "seed": seeds[0]}, ["method=lora"], seeds[0])
    chosen = settings["memory"]
    defaults = {
        "optimizer": "adamw", "dropout": False, "kept_factors": 0, "forward_rank": 1,
        "extra_per_branch": 0,
    }  # fmt: skip
    for method in chosen["methods"]:
        values = {key: method.get(key, default) for key, default in defaults.items()}
        values |= {key: method[key] for key in ("name", "kind")}
        values |= {key: chosen[key] for key in ("batches", "lengths", "rank")}
        add("memory", f"memory of {method['name']}", values, method["overrides"], seeds[0])
    return found


def equivalence_cases(
    settings: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the settings of every comparison with `optimizer`; the first is the plain one."""

    def case(K: int, clip: float | None, head: Sequence[str], factor: float) -> dict[str, Any]:
        return {
            "start_step": K,
            "max_grad_norm": clip,
            "head": list(head),
            "learning_rate_factor": factor,
        }

    first, *others = settings["start_steps"]
    clip, head = settings["clip"], settings["head"]
    cases = [case(first, None, (), 1.0), case(first, clip, (), 1.0)]
    cases += [case(first, None, head, 1.0), case(first, clip, head, 1.0)]
    cases += [case(K, None, (), 1.0) for K in others]
    if not optimizer["invariant"]:
        cases.append(case(first, None, (), 1 / (1 + settings["update_ratio"])))
    return cases


def describe_case(case: Mapping[str, Any]) -> str:
    """Return a case in words."""
    parts = [f"K = {case['start_step']}"]
    if case["head"]:
        parts.append("another module trains")
    if case["max_grad_norm"] is not None:
        parts.append(f"clipped at {case['max_grad_norm']:g}")
    if case["learning_rate_factor"] != 1:
        parts.append("learning rate divided by 1 + lambda")
    return ", ".join(parts)


# ---------------------------------------------------------------------- running


def run_missing(plan: Plan, workers: str, cell: CellModule, module: str, measuring: str) -> bool:
    """Run what is missing and show progress; return whether everything is done.

    Args:
        plan: from `make_plan`.
        workers: as for `scripts.reproduce`.
        cell: plans and runs cells.
        module: its name, for the worker processes.
        measuring: name of the module that measures.
    """
    distinct = {item.signature: item for item in plan.cells}
    todo = [c for c in distinct.values() if cell.status(c.config).state != "done"]
    open_measurements = [m for m in plan.measurements if m.read() is None]
    print(
        f"audit: {len(distinct)} runs, {len(todo)} to run; {len(plan.measurements)} measurements, "
        f"{len(open_measurements)} to make",
        flush=True,
    )
    environments = worker_environments(
        workers, plan.scale, max(1, len(todo), len(open_measurements))
    )
    outputs = plan.cells[0].folder.parent
    logs = outputs / "logs"
    failures: dict[str, str] = {}
    if todo:
        for item in {item.row: item for item in todo}.values():
            cell.check(item.config)
        durations = Durations()
        durations.read([outputs], cell)
        print(expected_time(todo, len(environments), durations, cell), flush=True)
        with Pool(module, environments=environments, logs=logs, name="audit") as pool:
            problem = prepare_models(pool, todo)
            if problem is not None:
                print(f"error: preparing the models failed: {problem}", file=sys.stderr)
                return False
            failures |= run_cells(pool, todo, durations, cell)
    if open_measurements:
        by_key = {m.signature: m for m in open_measurements}
        jobs = [Job("run", (measurements.as_job(m),), name) for name, m in by_key.items()]
        name = "audit-measurements"
        with Pool(measuring, environments=environments, logs=logs, name=name) as pool:
            count = 0
            for outcome in pool.run(jobs):
                if outcome is None:
                    continue
                count += 1
                how = "done" if outcome.error is None else f"FAILED: {outcome.error}"
                label = by_key[outcome.job.key].label
                seconds = f"{outcome.seconds:.1f} s"
                print(f"[{count}/{len(jobs)}] {label}: {how} ({seconds})", flush=True)
                if outcome.error is not None:
                    failures[outcome.job.key] = outcome.error
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return not failures


# ---------------------------------------------------------------------- results


def read_records(
    plan: Plan, cell: CellModule, accepted: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what `scripts.audit_page.build` reads: plan, runs and measurements.

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
    module: str = "scripts.cell",
    measuring: str = "scripts.measurements",
) -> int:
    """Run the command; return the exit code.

    Args:
        arguments: the command line; None takes the process's.
        module: module that plans and runs cells, for the worker processes.
        measuring: module that measures.
    """
    options = _parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _audit(options, real_cell, module, measuring)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


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
    plan = make_plan(scale, seeds, extra, load_settings(scale), cell)
    folder, kept = options.results / scale, options.results / "runs"
    if options.plan:
        open_runs = {c.signature for c in plan.cells if cell.status(c.config).state != "done"}
        open_measurements = [m for m in plan.measurements if m.read() is None]
        print(f"{len({c.signature for c in plan.cells})} runs, {len(open_runs)} missing")
        print(f"{len(plan.measurements)} measurements, {len(open_measurements)} missing")
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
        is_done = run_missing(plan, options.workers, cell, module, measuring)
        content = build(read_records(plan, cell))
    for path in write(content, folder):
        print(f"wrote {path}")
    for line in content["found"]:
        print(f"- {line}")
    return 0 if is_done and not content["missing"] else 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
