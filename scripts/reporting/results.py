"""The content of a table, from run records and from nothing else.

A record is read from its run folder, or from its accepted copy ``results/runs/**/<signature>.json``
where there is no run folder. The same records give the same content.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_lora import stored
from delta_lora.writing import make_folder, write_text
from scripts.reporting import stats
from scripts.reporting.claims import RESOURCE_LABELS, Place, compare_contrasts, judge_claims
from scripts.reporting.formats import FORMATS
from scripts.reporting.scope import as_shown, check_one_model, shown, words_of_part
from scripts.reporting.spec import ROOT, Column, TableSpec
from scripts.reporting.spread import spread_of
from scripts.runs import checksums
from scripts.runs.cells import Cell
from scripts.runs.jobs import Outcome

RESULTS = ROOT / "results"


@dataclass(frozen=True)
class Entry:
    """A cell and its completed record, or why it has none."""

    cell: Cell
    record: dict[str, Any] | None
    state: str
    reason: str


def read_accepted(folder: Path, problems: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the accepted records below `folder` by signature.

    Args:
        folder: as a rule ``results/runs``.
        problems: gets a message for every file that is left out; None refuses the first.

    Raises:
        ValueError: a file is no record, is named differently from its signature, or is there twice.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            record = _read_accepted(path)
            if record["signature"] in records:
                raise ValueError(
                    f"two accepted records of {record['signature']} below {folder}; keep one"
                )
        except ValueError as error:
            if problems is None:
                raise
            problems.append(str(error))
            continue
        records[record["signature"]] = record
    return records


def _read_accepted(path: Path) -> dict[str, Any]:
    """Return one accepted record: of a run, or of a measurement of the audit."""
    try:
        record = stored.read_json(path, "remove it")
        if "signature" not in record:
            raise stored.UnreadableError("it has no signature")
    except stored.UnreadableError as error:
        raise ValueError(f"{path} is no run record ({error}); remove it") from error
    if record["signature"] != path.stem:
        name = record["signature"]
        raise ValueError(f"{path} holds the record of {name}; name it {name}.json")
    advice = "take it from the repository again, or remove it"
    if "part" in record:  # a measurement
        stored.check_seal(path, record, advice)
    else:
        checksums.check_record(path, record, advice)
    return record


def collect(
    cells: Sequence[Cell],
    *,
    accepted: Mapping[str, dict[str, Any]] | None = None,
    failures: Mapping[str, Outcome] | None = None,
) -> list[Entry]:
    """Find the record of every cell.

    Args:
        cells: from `scripts.runs.cells.list_cells`.
        accepted: records to take where a cell has no run folder.
        failures: by signature how those cells ended that failed, or were not run, just now.
    """
    entries = []
    for item in cells:
        status = item.run.status()
        copy = (accepted or {}).get(item.signature)
        if status.state == "damaged":
            entries.append(Entry(item, None, status.state, status.reason))
        elif status.state == "done":
            entries.append(Entry(item, item.run.record(), "done", ""))
        elif status.state == "missing" and copy is not None and copy["status"] == "completed":
            entries.append(Entry(item, copy, "done", "accepted copy"))
        elif failures and item.signature in failures:
            outcome = failures[item.signature]
            state = "failed" if outcome.was_run else "missing"
            entries.append(Entry(item, None, state, outcome.error or ""))
        else:
            entries.append(Entry(item, None, status.state, status.reason))
    return entries


def damaged(entries: Sequence[Entry]) -> list[str]:
    """Return what is damaged, and what to do, of each run whose record cannot be read."""
    return list(dict.fromkeys(entry.reason for entry in entries if entry.state == "damaged"))


def collect_accepted(cells: Sequence[Cell], accepted: Mapping[str, dict[str, Any]]) -> list[Entry]:
    """Find the accepted record of every cell, whatever run folders there are."""
    return [
        Entry(item, accepted[item.signature], "done", "accepted copy")
        if item.signature in accepted
        else Entry(item, None, "missing", "")
        for item in cells
    ]


def build_results(
    spec: TableSpec,
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    entries: Sequence[Entry],
) -> dict[str, Any]:
    """Return the content of ``results/<scale>/<table>.json``.

    Numbers are in the units of the table (per cent where a column's `scale` is 100), ours and the
    paper's alike, and never mixed.

    Args:
        spec: the table.
        scale: scale of the runs.
        seeds: seeds that were asked for.
        extra: overrides given on top of the table's.
        entries: from `collect`.

    Raises:
        ValueError: the records must not share a table (scale, data, protocol, task version, model).
    """
    done = [entry for entry in entries if entry.record is not None]
    check_one_model(spec.name, [entry.cell for entry in entries])
    facts = facts_of(spec, scale, seeds, extra, entries)
    spec = shown_spec(spec, scale, extra, entries)[0]
    scores = {row.name: _scores(spec, row.name, done) for row in spec.rows}
    resources = {row.name: _resources(spec, row.name, done) for row in spec.rows}
    return {
        "table": spec.name,
        "columns": [column.name for column in spec.columns],
        "column_specs": [_column_spec(column) for column in spec.columns],
        "side_column_specs": [_column_spec(column) for column in spec.side_columns],
        **facts,
        "references": _references(spec, done),
        "rows": [
            _row(spec, row.name, entries, scores[row.name], resources[row.name])
            for row in spec.rows
        ],
        "claims": judge_claims(spec, scores, resources, _places(done)),
        "contrasts": compare_contrasts(spec, scores),
        "spread": spread_of(spec, scores, done),
    }


def facts_of(
    spec: TableSpec,
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    entries: Sequence[Entry],
) -> dict[str, Any]:
    """Return what a reader must know to use a table or figure; arguments as `build_results`.

    Raises:
        ValueError: the records must not stand together (scale, data, protocol, task version).
    """
    done = [entry for entry in entries if entry.record is not None]
    _check_comparable(scale, done)
    records = [entry.record for entry in done if entry.record is not None]
    together = max((p.cells_on_device for row in _places(done).values() for p in row), default=1)
    as_it_is, scope = shown_spec(spec, scale, extra, entries)
    models = {record["model"]["name"] for record in records}
    if "other_model" in scope:
        models = {scope["other_model"]["name"]}
    return {
        "number": spec.number,
        "title": as_it_is.title,
        "scale": scale,
        "seeds": list(seeds),
        "overrides": shown(extra),
        "tuning": spec.tuning,
        "tasks": {run: _task_facts(run, done) for run in spec.runs},
        "models": sorted(models),
        "checkpoint_rules": sorted({r["training"]["checkpoint_rule"] for r in records}),
        "code": code_of(records),
        "evaluations": _evaluations(records),
        "scored_ranks": _scored_ranks(records),
        "devices": sorted({device_of(record) for record in records}),
        "device_types": sorted({_device_type(record) for record in records}),
        **({"runs_on_a_device": together} if together > 1 else {}),
        **scope,
    }


def shown_spec(
    spec: TableSpec, scale: str, extra: Sequence[str], entries: Sequence[Entry]
) -> tuple[TableSpec, dict[str, Any]]:
    """Return a table as `scope.as_shown` does; arguments as `build_results`."""
    records = [entry.record for entry in entries if entry.record is not None]
    return as_shown(spec, scale, extra, [entry.cell for entry in entries], records)


def write_results(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a table in all formats to ``folder/<table>.<format>``.

    Args:
        results: from `build_results`.
        folder: created if missing.

    Returns:
        The files.

    Raises:
        WriteError: one cannot be written; the others are whole.
    """
    make_folder(folder)
    return [
        write_text(folder / f"{results['table']}.{suffix}", write(results))
        for suffix, write in FORMATS.items()
    ]


def accept(entries: Sequence[Entry], folder: Path) -> list[Path]:
    """Copy the completed records to ``folder/<signature>.json``.

    Raises:
        ValueError: a record comes from a tree with uncommitted changes.
    """
    records = [entry.record for entry in entries if entry.record is not None]
    dirty = [r["signature"] for r in records if r["provenance"]["git"]["dirty"] is not False]
    if dirty:
        raise ValueError(
            f"{len(dirty)} of {len(records)} records come from uncommitted or unknown code "
            f"({', '.join(sorted(dirty)[:5])}); commit, delete their run folders and run them again"
        )
    make_folder(folder)
    paths = []
    for record in records:
        path = folder / f"{record['signature']}.json"
        paths.append(write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n"))
    return paths


def _check_comparable(scale: str, done: Sequence[Entry]) -> None:
    """Refuse records of another scale, another run, or other data than the rest."""
    first: dict[str, Entry] = {}
    for entry in done:
        record = entry.record
        assert record is not None
        name = entry.cell.signature
        if record["signature"] != name:
            raise ValueError(f"{entry.cell.run.folder} holds the record of {record['signature']}")
        if record["scale"] != scale:
            raise ValueError(
                f"{name} ({entry.cell.label}) is of scale {record['scale']}, not {scale}; "
                "a table never mixes scales"
            )
        reference = first.setdefault(entry.cell.on, entry)
        assert reference.record is not None
        mine, theirs = record["task"], reference.record["task"]
        differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if differing:
            raise ValueError(
                f"{name} ({entry.cell.label}) and {reference.cell.signature} "
                f"({reference.cell.label}) differ in the task's {', '.join(differing)}; a table "
                "never mixes data, protocols or scorers: delete the folder of the outdated run"
            )


def _scores(spec: TableSpec, row: str, done: Sequence[Entry]) -> dict[str, dict[int, float]]:
    """Return column -> seed -> value in printed units."""
    columns = (*spec.columns, *spec.side_columns)
    values: dict[str, dict[int, float]] = {column.name: {} for column in columns}
    for entry in done:
        if entry.cell.row != row or entry.record is None:
            continue
        for column in columns:
            value = entry.record["metrics"].get(column.metric)
            if column.run == entry.cell.on and value is not None:
                values[column.name][entry.cell.seed] = float(value) * column.scale
    for column in spec.columns:
        if column.mean_of:
            parts = [values[name] for name in column.mean_of]
            for seed in sorted(set.intersection(*map(set, parts))):
                values[column.name][seed] = _mean([part[seed] for part in parts])
    return values


def _resources(spec: TableSpec, row: str, done: Sequence[Entry]) -> dict[str, dict[int, float]]:
    """Return resource -> seed -> value over the row's runs: largest memory, summed times."""
    values: dict[str, dict[int, float]] = {}
    by_seed: dict[int, list[Mapping[str, float]]] = {}
    for entry in done:
        if entry.cell.row == row and entry.record is not None:
            by_seed.setdefault(entry.cell.seed, []).append(entry.record.get("resources", {}))
    has_steps = any("step_time_s" in (e.record or {}).get("resources", {}) for e in done)
    for name in RESOURCE_LABELS:
        if name == "step_time_s" and not has_steps:  # no run of the table has measured it
            continue
        combine: Callable[[list[float]], float] = math.fsum
        if name == "peak_memory_bytes":
            combine = max
        elif name == "tokens_per_s":
            combine = _mean
        values[name] = {
            seed: float(combine([run[name] for run in runs]))
            for seed, runs in by_seed.items()
            if len(runs) == len(spec.runs) and all(run.get(name) is not None for run in runs)
        }
    return values


def _places(done: Sequence[Entry]) -> dict[str, list[Place]]:
    """Return by row where each of its runs was made."""
    found: dict[str, list[Place]] = {}
    for entry in done:
        assert entry.record is not None
        number = entry.record.get("resources", {}).get("cells_on_device", 1)
        found.setdefault(entry.cell.row, []).append(Place(device_of(entry.record), int(number)))
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _row(
    spec: TableSpec,
    name: str,
    entries: Sequence[Entry],
    scores: Mapping[str, Mapping[int, float]],
    resources: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    mine = [entry for entry in entries if entry.cell.row == name]
    records = [entry.record for entry in mine if entry.record is not None]
    paper = spec.paper["rows"].get(name, {})
    row = spec.row(name)
    return {
        "method": name,
        "label": row.label,
        "is_control": row.is_control,
        "trainable_parameters": _count(records, "trainable"),
        "updatable_parameters": _count(records, "updatable"),
        "head_parameters": _count(records, "head"),
        "metrics": {
            column.name: {
                **_summary(scores[column.name]),
                "missing": _missing(spec, column, mine),
            }
            for column in spec.columns
        },
        "side_metrics": {c.name: _summary(scores[c.name]) for c in spec.side_columns},
        "paper": paper.get("metrics", {}),
        "paper_note": paper.get("note"),
        "paper_parameters": {key: paper[key] for key in ("trainable", "updatable") if key in paper},
        "resources": {key: _summary(values) for key, values in resources.items()},
        "runs": [record["signature"] for record in records],
        "absent": absent(mine),
    }


def absent(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return which runs of `entries` have no record, and why."""
    return [
        {
            "run": entry.cell.on,
            "seed": entry.cell.seed,
            "signature": entry.cell.signature,
            "state": entry.state,
            "reason": entry.reason,
        }
        for entry in entries
        if entry.record is None
    ]


def _summary(values: Mapping[int, float]) -> dict[str, Any]:
    by_seed = {str(seed): values[seed] for seed in sorted(values)}
    if not values:
        return {"mean": None, "std": None, "n": 0, "ci95": None, "values": by_seed}
    summary = stats.summarize(values[seed] for seed in sorted(values))
    ends = None if summary.ci95 is None else list(summary.ci95)
    return {
        "mean": summary.mean,
        "std": summary.std,
        "n": summary.n,
        "ci95": ends,
        "values": by_seed,
    }


def _missing(spec: TableSpec, column: Column, entries: Sequence[Entry]) -> list[str]:
    """Return why finished runs have no value in `column`, without repetition."""
    reasons: dict[str, None] = {}
    names = column.mean_of or (column.name,)
    for source in map(spec.column, names):
        for entry in entries:
            if entry.record is None or entry.cell.on != source.run or source.metric is None:
                continue
            metrics, missing = entry.record["metrics"], entry.record["missing_metrics"]
            if metrics.get(source.metric) is None:
                known = ", ".join(sorted(metrics)) or "none"
                default = f"the run has no metric {source.metric!r} (it has: {known})"
                reasons[f"{source.label}: {missing.get(source.metric, default)}"] = None
    return list(reasons)


def _count(records: Sequence[Mapping[str, Any]], kind: str) -> int | None:
    """Return the row's parameter count; where its tasks differ (heads), the largest."""
    counts = [record["parameters"][kind] for record in records]
    return max(counts) if counts else None


def _column_spec(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "label": column.label,
        "run": column.run,
        "metric": column.metric,
        "mean_of": list(column.mean_of),
        "scale": column.scale,
        "decimals": column.decimals,
        "better": "higher" if column.higher_is_better else "lower",
    }


def _task_facts(run: str, done: Sequence[Entry]) -> dict[str, Any]:
    """Return what a reader must know of a run's task and start, from its first record."""
    for entry in done:
        if entry.cell.on == run and entry.record is not None:
            task = entry.record["task"]
            keys = ("name", "version", "protocol", "nist", "aggregate", "source", "revision")
            facts = {key: task.get(key) for key in (*keys, "scored_split")}
            for key in ("rows", "max_rows"):
                facts[key] = " + ".join(f"{n:,} {s}" for s, n in task.get(key, {}).items()) or None
            if "part" in task:
                facts["scored"] = words_of_part(task["part"])
            if facts["source"] == "files":
                facts |= _doubtful_files(task.get("files", []))
            before = entry.record["init_from"]
            facts["starts_from"] = None if before is None else before["task"]
            return facts
    return {}


def _doubtful_files(files: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names of files that are cut, and of those that are not the official ones."""
    incomplete = [
        file["name"]
        for file in files
        if file.get("complete") is False or file.get("official_rows", file["rows"]) != file["rows"]
    ]
    # Where a task counts rows instead, no checksum of the official files exists.
    counted = {"complete", "official_rows"}
    other = [f["name"] for f in files if f.get("official") is False and not counted & f.keys()]
    found = {"incomplete": incomplete, "not_official": other}
    return {key: " + ".join(names) for key, names in found.items() if names}


def _scored_ranks(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the ranks at which methods that train many ranks at once (DyLoRA) were scored."""
    methods = [record["config"].get("method", {}) for record in records]
    return sorted({m["eval_rank"] or m["rank"] for m in methods if "eval_rank" in m})


def _references(spec: TableSpec, done: Sequence[Entry]) -> dict[str, dict[str, float]]:
    """Return, by name and column, the scores of what needs no model, where a run gives them."""
    found: dict[str, dict[str, float]] = {}
    for entry in done:
        assert entry.record is not None
        for name, scores in entry.record["reference_metrics"].items():
            for column in spec.columns:
                if column.run == entry.cell.on and column.metric in scores:
                    values = found.setdefault(name, {})
                    values.setdefault(column.name, scores[column.metric] * column.scale)
    for values in found.values():
        for column in spec.columns:
            if column.mean_of and all(name in values for name in column.mean_of):
                values[column.name] = _mean([values[name] for name in column.mean_of])
    return found


def code_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the commits of the records, with how many come from each and whether it was dirty."""
    counts = Counter(
        (record["provenance"]["git"]["commit"], record["provenance"]["git"]["dirty"])
        for record in records
    )
    ordered = sorted(counts.items(), key=lambda item: (str(item[0][0]), str(item[0][1])))
    return [{"commit": c, "dirty": dirty, "runs": count} for (c, dirty), count in ordered]


def _evaluations(records: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return how often, least and most, a run that trained was scored to choose its best epoch."""
    counts = {
        len(record["training"]["validation"])
        for record in records
        if record["training"]["checkpoint_rule"] == "best" and record["training"]["steps"] > 0
    }
    return [min(counts), max(counts)] if counts else None


def _device_type(record: Mapping[str, Any]) -> str:
    device = record["provenance"]["device"]
    return str(device.get("type", "unknown")) if isinstance(device, Mapping) else "unknown"


def device_of(record: Mapping[str, Any]) -> str:
    """Return the name of the device that a record was computed on."""
    device = record["provenance"]["device"]
    return str(device["name"]) if isinstance(device, Mapping) else str(device)
