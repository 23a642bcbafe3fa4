"""The report of a run: one JSON file a device, and the hours of each table that follow from it.

Nothing here imports torch. `FORMAT` says what the file holds; `make plan` reads ``costs``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delta_lora.writing import make_folder, write_text
from scripts.checking import recipes
from scripts.checking.catalogue import by_number

SCHEMA = 1
FORMAT = {
    "costs.steps": "one micro-batch with its share of the update: ms_per_step in milliseconds "
    "(mean of the timed steps, warm-up excluded), batch_size in examples and batch_tokens in input "
    "tokens (no padding) of a micro-batch; micro_batches make an optimiser step; peak_bytes of "
    "device memory since the run began; random weights, W updated in every step",
    "costs.decoding": "one chunk of batch_size inputs, all new_tokens decoded: seconds, peak_bytes",
    "costs.checkpoint": "bytes per second, checksums and flush to disk included; entries by method",
    "costs.hours": "optimiser steps and decoding of every run of a table, one after the other on "
    "this device; evaluation, scoring, data and checkpoints are not counted",
    "explore": "checks without a verdict",
}
#: table -> model and task; ``glue`` are all eight.
TABLES = {
    "table1": ("gpt2_medium", "e2e"),
    "table2": ("gpt2_medium", "webnlg"),
    "table3": ("bart_large", "xsum"),
    "table4": ("roberta_base", "glue"),
}
NUM_SEEDS = 3


def slug(device: str) -> str:
    """Return a device's name as a file name: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def build(
    facts: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    *,
    is_small: bool,
    not_run: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """Return the content of the report.

    Args:
        facts: of the machine.
        entries: of the checks that ran or were skipped.
        is_small: whether the models were small; then no hours follow.
        not_run: numbers of checks that time did not allow.
        seconds: of the whole run.
    """
    costs = merge_costs(entries)
    if not is_small:
        costs["hours"] = hours(costs)
    judged = [by_number(entry["number"]).is_judged for entry in entries]
    plain = [{k: v for k, v in entry.items() if k != "costs"} for entry in entries]
    return {
        "schema": SCHEMA,
        "format": FORMAT,
        **facts,
        "is_small": is_small,
        "seconds": round(seconds, 1),
        "not_run": list(not_run),
        "checks": [entry for entry, is_judged in zip(plain, judged, strict=True) if is_judged],
        "costs": costs,
        "explore": [entry for entry, is_judged in zip(plain, judged, strict=True) if not is_judged],
    }


def merge_costs(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the costs of all checks in the planner's form."""
    merged: dict[str, Any] = {"steps": [], "decoding": [], "checkpoint": {}}
    for entry in entries:
        for kind in ("steps", "decoding"):
            merged[kind] += entry["costs"].get(kind, [])
        written = entry["costs"].get("checkpoint", [])
        if written:
            largest = max(written, key=lambda each: each["bytes"])
            merged["checkpoint"] = {
                "write_bytes_per_s": largest["write_bytes_per_s"],
                "read_bytes_per_s": largest["read_bytes_per_s"],
                "entries": written,
            }
    return merged


def add(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a report of a device with the checks and costs of a later, partial one in their place.

    A check that was repeated keeps nothing of its first time; ``again`` says what was added, by
    which commit and with which versions.

    Raises:
        ValueError: they are of different devices or sizes.
    """
    for key in ("device", "is_small", "schema"):
        theirs, ours = (r["device"]["name"] if key == "device" else r[key] for r in (old, new))
        if theirs != ours:
            raise ValueError(f"the report to add to has {key}={theirs!r}, this run {ours!r}")
    numbers = [check["number"] for check in (*new["checks"], *new["explore"])]
    costs: dict[str, Any] = {
        kind: _replaced(old["costs"][kind], new["costs"][kind], keys)
        for kind, keys in (
            ("steps", ("model", "method", "precision", "matmul_precision")),
            ("decoding", ("model",)),
        )
    }
    costs["checkpoint"] = new["costs"]["checkpoint"] or old["costs"]["checkpoint"]
    if not old["is_small"]:
        costs["hours"] = hours(costs)
    again = {"checks": numbers, **{key: new[key] for key in ("versions", "git", "seconds")}}
    return {
        **old,
        "seconds": round(old["seconds"] + new["seconds"], 1),
        "not_run": [number for number in old["not_run"] if number not in numbers],
        "checks": _replaced(old["checks"], new["checks"], ("number",)),
        "costs": costs,
        "explore": _replaced(old["explore"], new["explore"], ("number",)),
        "again": [*old.get("again", []), again],
    }


def _replaced(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the entries of both; where `keys` agree the new one, in the place of the old one."""
    merged = {tuple(entry[key] for key in keys): entry for entry in (*old, *new)}
    return list(merged.values())


def hours(costs: dict[str, Any]) -> dict[str, Any]:
    """Return the hours of Tables 1 to 4 at every precision that their steps were timed in."""
    found: dict[str, Any] = {}
    for table, (model, task) in TABLES.items():
        settings = sorted(
            {(e["precision"], e["matmul_precision"]) for e in costs["steps"] if e["model"] == model}
        )
        for precision, matmul in settings:
            key = f"{precision}, matmul {matmul}"
            found.setdefault(table, {})[key] = _table_hours(
                costs, table, model, task, precision, matmul
            )
    return found


def _table_hours(
    costs: dict[str, Any], table: str, model: str, task: str, precision: str, matmul: str
) -> dict[str, Any]:
    timed = [
        e
        for e in costs["steps"]
        if (e["model"], e["precision"], e["matmul_precision"]) == (model, precision, matmul)
    ]
    times = {e["method"]: e["ms_per_step"] * e["micro_batches"] for e in timed}
    rows = [row["name"] for row in recipes.read(f"table/{table}")["rows"]]
    trained = [row for row in rows if row != "untrained"]
    timed_as = {row: measured_method(row, times) for row in trained}
    unknown = [row for row, method in timed_as.items() if method is None]
    tasks = [f"glue/{name}" for name in recipes.GLUE] if task == "glue" else [task]
    steps = {name: recipes.total_steps(name) for name in tasks}
    train_s = NUM_SEEDS * sum(
        times[method] / 1000 * sum(steps.values())
        for method in timed_as.values()
        if method is not None
    )
    chunk_s = sum(
        e["seconds"] * e["chunks_of_the_test_set"] for e in costs["decoding"] if e["model"] == model
    )
    decode_s = chunk_s * NUM_SEEDS * len(rows) if task in ("e2e", "xsum") else None
    return {
        "training_hours": None if unknown else round(train_s / 3600, 2),
        "decoding_hours": None if decode_s is None or not chunk_s else round(decode_s / 3600, 2),
        "seeds": NUM_SEEDS,
        "timed_with": {
            key: timed[0][key] for key in ("batch_size", "batch_tokens", "micro_batches")
        },
        "steps_of_a_run": steps,
        "row_timed_as": timed_as,
        "rows_without_a_time": unknown,
    }


def measured_method(row: str, times: dict[str, float]) -> str | None:
    """Return the timed method whose step a row of a table takes, or None.

    Controls of LoRA and Delta-LoRA have the same step. Where only some weights train, the step of
    full fine-tuning stands for it, which is an upper bound.
    """
    without_dropout = ("lora_no_dropout", "lora_scaled")
    if row in without_dropout and without_dropout[0] in times:
        return without_dropout[0]
    for method in ("dylora", "adalora", "delta_lora", "lora", "full"):
        if row == method or row.startswith(f"{method}_"):
            return method if method in times else None
    return None


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the report, whole or not at all."""
    make_folder(path.parent)
    write_text(path, json.dumps(content, indent=1, sort_keys=False) + "\n")
