"""What an audit needs: its settings, the runs that it shares with the tables, its measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.auditing.measurements import Measurement
from scripts.reporting.spec import TableSpec
from scripts.runs import conflicts
from scripts.runs.cells import Cell, list_cells
from scripts.runs.composition import CONFIGS
from scripts.runs.run import Run


@dataclass(frozen=True)
class AuditPlan:
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
) -> AuditPlan:
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
    firsts = {same[0]: overrides for overrides, same in names.items()}
    runs = {settings["experiment"]: [f"experiment={settings['experiment']}"]}
    found = list_cells("audit", runs, firsts, scale=scale, seeds=seeds, extra=extra)
    also = {same[0]: same for same in names.values()}
    cells = [Cell(name, item.on, item.run, item.table) for item in found for name in also[item.row]]
    return AuditPlan(
        scale=scale,
        seeds=list(seeds),
        extra=list(extra),
        settings=dict(settings),
        cells=cells,
        measurements=list_measurements(scale, seeds, extra, settings),
    )


def as_table(plan: AuditPlan) -> TableSpec:
    """Return an audit as a table, for what asks which model its runs start from."""
    experiment = plan.settings["experiment"]
    title = "Audit of Delta-LoRA"
    return TableSpec(
        name="audit", kind="table", number="", title=title, tuning="", columns=(), rows=(),
        runs={experiment: (f"experiment={experiment}",)}, claims=(), contrasts=(),
        paper={"title": title, "rows": {}},
    )  # fmt: skip


def list_measurements(
    scale: str, seeds: Sequence[int], extra: Sequence[str], settings: Mapping[str, Any]
) -> list[Measurement]:
    """Return the measurements of an audit that are no ordinary runs."""
    composed: dict[tuple[str, ...], Run] = {}
    changing = tuple(override for override in extra if not override.startswith("paths."))
    all_wanted = (
        *_of_finished_runs(seeds, settings),
        *_of_equivalence(seeds[0], settings["equivalence"]),
        *_of_precision(seeds[0], settings["precision"]),
        *_of_memory(seeds[0], settings["memory"]),
    )
    conflicts.check_extra(extra, ({wanted.label: wanted.overrides for wanted in all_wanted},))
    found = []
    for wanted in all_wanted:
        if wanted.overrides not in composed:
            whole = (
                f"experiment={settings['experiment']}",
                *wanted.overrides,
                f"scale={scale}",
                *extra,
            )
            composed[wanted.overrides] = Run.compose(whole)
        found.append(
            Measurement(
                part=wanted.part,
                label=wanted.label,
                settings=wanted.settings,
                run=composed[wanted.overrides].with_seed(wanted.seed),
                needs_run=wanted.needs_run,
                extra=changing,
            )
        )
    return found


@dataclass(frozen=True)
class _Wanted:
    """A measurement before its run is composed."""

    part: str
    label: str
    settings: dict[str, Any]
    overrides: tuple[str, ...]
    seed: int
    needs_run: bool = False


def _of_finished_runs(seeds: Sequence[int], settings: Mapping[str, Any]) -> Iterator[_Wanted]:
    rows = {row["name"]: tuple(row["overrides"]) for row in settings["rank"]["rows"]}
    for seed in seeds:
        for name, overrides in rows.items():
            values = {"row": name, "seed": seed}
            label = f"rank of {name}, seed {seed}"
            yield _Wanted("rank", label, values, overrides, seed, needs_run=True)
    chosen = settings["gradients"]
    kept = {key: chosen[key] for key in ("dropouts", "num_masks", "batch", "length")}
    for seed in seeds:
        for loss in chosen["losses"]:
            values = {**kept, "loss": loss, "seed": seed}
            label = f"gradients under {loss}, seed {seed}"
            yield _Wanted("gradients", label, values, rows[chosen["row"]], seed, needs_run=True)


def _of_equivalence(seed: int, chosen: Mapping[str, Any]) -> Iterator[_Wanted]:
    kept = ("steps", "batch", "length", "rank", "alpha", "update_ratio")
    shared = {**{key: chosen[key] for key in kept}, "seed": seed}
    for optimizer in chosen["optimizers"]:
        for case in equivalence_cases(chosen, optimizer):
            own = {key: optimizer[key] for key in ("optimizer", "learning_rate", "options")}
            label = f"equivalence, {optimizer['label']}, {describe_case(case)}"
            values = {**shared, **own, **case}
            yield _Wanted("equivalence", label, values, ("method=lora",), seed)


def _of_precision(seed: int, chosen: Mapping[str, Any]) -> Iterator[_Wanted]:
    kept = ("steps", "every", "batch", "length", "rank", "alpha", "update_ratio", "start_step")
    shared = {**{key: chosen[key] for key in kept}, "seed": seed}
    for rate in chosen["learning_rates"]:
        for form in chosen["forms"]:
            values = {**shared, "form": form, "learning_rate": rate}
            label = f"precision of {form}, learning rate {rate:g}"
            yield _Wanted("precision", label, values, ("method=lora",), seed)


def _of_memory(seed: int, chosen: Mapping[str, Any]) -> Iterator[_Wanted]:
    defaults = {
        "optimizer": "adamw", "dropout": False, "kept_factors": 0, "forward_rank": 1,
        "extra_per_branch": 0,
    }  # fmt: skip
    for method in chosen["methods"]:
        values = {key: method.get(key, default) for key, default in defaults.items()}
        values |= {key: method[key] for key in ("name", "kind")}
        values |= {key: chosen[key] for key in ("batches", "lengths", "rank")}
        label = f"memory of {method['name']}"
        yield _Wanted("memory", label, values, tuple(method["overrides"]), seed)


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
