"""What the report says of each run: settings, scores, cost, origin, and how to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from scripts.htmlreport.sources import Sources
from scripts.htmlreport.words import heading
from scripts.reporting.results import device_of
from scripts.reporting.spec import TableSpec

Content = Mapping[str, Any]

#: what a meaning says that stands elsewhere in a run's details.
_ELSEWHERE = ("seed", "task.name", "task.version", "method.name", "method.version")
_STATES = {"missing": "not run", "partial": "not finished"}
#: of a state that is not named here: 1.
_ORDER = {"failed": 0, "not run": 2, "no score": 3}


def groups_of(sources: Sources, *, first_seed_only: bool = False) -> list[dict[str, Any]]:
    """Return all runs by table and row; a run stands in the first table that names it.

    Args:
        sources: what the report is made of.
        first_seed_only: leave the details of all other seeds out.
    """
    known: dict[str, bool] = {}  # by name whether its details are shown
    groups = []
    for name, content in sources.contents.items():
        for row in content["rows"]:
            own = [_run(sources, name, content, row, r) for r in row["runs"] if r not in known]
            shared = [run for run in row["runs"] if known.get(run)]
            first = min((run["seed"] for run in own if run["has_record"]), default=None)
            shown = [run for run in own if not first_seed_only or run["seed"] == first]
            known |= {run["id"]: run in shown for run in own}
            groups.append(
                {
                    "id": f"runs-{name}-{row['method']}",
                    "table": name,
                    "label": row["label"],
                    "runs": shown,
                    "shared": shared,
                }
            )
    return groups


def failures_of(sources: Sources) -> list[dict[str, Any]]:
    """Return the runs without a result and why, failed ones first, then scores that are missing."""
    found = []
    for name, content in sources.contents.items():
        place = {"table": name, "where": heading(content, short=True)}
        for row in content["rows"]:
            for item in row["absent"]:
                on, seed = item["run"], item["seed"]
                found.append(
                    {
                        **place,
                        "what": f"{row['label']} on {on}, seed {seed}",
                        "state": _STATES.get(item["state"], item["state"]),
                        "reason": item["reason"],
                        "command": command_of(sources.specs.get(name), content, row, on, seed),
                    }
                )
        for reason, labels in _unscored(content).items():
            what = ", ".join(labels)
            unscored = {"what": what, "state": "no score", "reason": reason, "command": None}
            found.append({**place, **unscored})
    return sorted(found, key=lambda item: _ORDER.get(item["state"], 1))


def _unscored(content: Content) -> dict[str, list[str]]:
    """Return by reason the rows whose finished runs lack a score."""
    found: dict[str, list[str]] = {}
    for row in content["rows"]:
        for column in content.get("column_specs", []):
            for reason in row["metrics"][column["name"]]["missing"]:
                labels = found.setdefault(reason, [])
                if row["label"] not in labels:
                    labels.append(row["label"])
    return found


def command_of(
    spec: TableSpec | None, content: Content, row: Content, on: str | None, seed: int
) -> str | None:
    """Return the command that makes a run; arguments and None as `overrides_of`."""
    overrides = overrides_of(spec, content, row, on, seed)
    return None if overrides is None else shlex.join(["python", "scripts/train.py", *overrides])


def overrides_of(
    spec: TableSpec | None, content: Content, row: Content, on: str | None, seed: int
) -> list[str] | None:
    """Return the overrides that make a run, or None where its table's configuration lacks it.

    Args:
        spec: configuration of the table; None where there is none.
        content: the table.
        row: its row.
        on: which of the table's runs.
        seed: seed of the run.
    """
    rows = {} if spec is None else {each.name: each.overrides for each in spec.rows}
    if spec is None or on is None or on not in spec.runs or row["method"] not in rows:
        return None
    own = (*spec.runs[on], *rows[row["method"]], f"scale={content['scale']}", f"seed={seed}")
    return [*own, *content["overrides"]]


def on_of(content: Content, record: Content) -> str | None:
    """Return which of a table's runs a record is of, by the name of its task."""
    for on, facts in content["tasks"].items():
        if facts.get("name") == record["task"]["name"]:
            return str(on)
    return None


def _run(sources: Sources, name: str, content: Content, row: Content, run: str) -> dict[str, Any]:
    record = sources.records.get(run)
    if record is None:
        return {"id": run, "seed": None, "has_record": False}
    on, training = on_of(content, record), record["training"]
    resources = record.get("resources", {})
    return {
        "id": run,
        "has_record": True,
        "seed": record["seed"],
        "on": on,
        "scores": [(key, f"{value:.4f}") for key, value in record["metrics"].items()],
        "missing": list(record["missing_metrics"].items()),
        "settings": [
            (key, value) for key, value in flat(record["meaning"]) if key not in _ELSEWHERE
        ],
        "training": _training(training),
        "cost": _cost(resources),
        "commit": record["provenance"]["git"]["commit"],
        "dirty": record["provenance"]["git"]["dirty"],
        "device": device_of(record),
        "weights": record["model"].get("weights_sha256"),
        "adapter": record.get("adapter_sha256"),
        "command": command_of(sources.specs.get(name), content, row, on, record["seed"]),
        "samples": sources.samples.get(run, {}).get("predictions", []),
        "repeated": _repeated(sources.samples.get(run, {}).get("repeated")),
    }


def _repeated(repeated: Content | None) -> str | None:
    """Return in words which repetition the samples of a run are of."""
    if repeated is None:
        return None
    scores = ", ".join(f"{name} {value:g}" for name, value in list(repeated["scores"].items())[:3])
    return f"of a repetition on {repeated['device']}: {scores}"


def _training(training: Content) -> str:
    text = (
        f"{training['steps']:,} steps of {training['batch_size']}, {training['epochs']:.1f} epochs"
    )
    if training["final_train_loss"] is not None:
        text += f", last training loss {training['final_train_loss']:.3f}"
    if training["validation"] and "loss" in training["validation"][-1]:
        text += f", last validation loss {training['validation'][-1]['loss']:.3f}"
    text += f"; checkpoint: {training['checkpoint_rule']} (step {training['chosen_step']})"
    if training["skipped_steps"]:
        text += f"; {training['skipped_steps']} steps skipped"
    updates = training["method"].get("num_weight_updates")
    return text if updates is None else f"{text}; {updates:,} updates of W"


def _cost(resources: Content) -> str:
    words = []
    if resources.get("train_time_s") is not None:
        words.append(f"training {resources['train_time_s']:.1f} s")
    if resources.get("predict_time_s") is not None:
        words.append(f"decoding {resources['predict_time_s']:.1f} s")
    if resources.get("tokens_per_s"):
        words.append(f"{resources['tokens_per_s']:,.0f} tokens/s")
    if resources.get("peak_memory_bytes"):
        words.append(f"{resources['peak_memory_bytes'] / 2**20:,.0f} MiB peak")
    return ", ".join(words)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings as ``a.b`` and their text."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from flat(each, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
