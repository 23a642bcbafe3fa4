"""What an audit needs: its settings, the runs that it shares with the tables, its measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from scripts.auditing import measurements
from scripts.auditing.measurements import Measurement
from scripts.reporting.plan import list_cells
from scripts.runs import cell as real_cell
from scripts.runs.composition import CONFIGS
from scripts.runs.plan import Cell, CellModule


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
    # Rows of the same settings are one run; composing it takes a quarter of a second.
    names: dict[tuple[str, ...], list[str]] = {}
    for name, overrides in rows.items():
        names.setdefault(tuple(overrides), []).append(name)
    spec: Any = SimpleNamespace(
        name="audit",
        runs={settings["run"][0].partition("=")[2]: settings["run"]},
        rows=[SimpleNamespace(name=same[0], overrides=o) for o, same in names.items()],
    )
    found = list_cells(spec, scale=scale, seeds=seeds, extra=extra, cell=cell)
    also = {same[0]: same for same in names.values()}
    cells = [replace(item, row=name) for item in found for name in also[item.row]]
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
        changing = [override for override in extra if not override.startswith("paths.")]
        found.append(
            measurements.plan(part, label, values, whole, needs_run=needs_run, extra=changing)
        )

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
    clips, head = settings["clips"], settings["head"]
    cases = [case(first, clip, (), 1.0) for clip in (None, *clips)]
    cases += [case(first, clip, head, 1.0) for clip in (None, clips[0])]
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
