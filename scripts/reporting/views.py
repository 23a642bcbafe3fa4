"""A saved view of a Weights & Biases workspace for every table: scores, curves, costs, predictions.

A view shows the runs of one table, or of one of its tasks where it has several, by the names of
their groups, which seeds of a row share; so bars are means over seeds, with their standard
deviation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.reporting.spec import Column, TableSpec

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

#: the key that a panel shows, by its title: of the sections that every table has.
CURVES = {
    "Training loss": "train/loss",
    "Validation loss": "validation/loss",
    "Gradient norm": "train/grad_norm",
    "Learning rate": "train/learning_rate",
}
DELTA = {
    "Norm of what was added to W": "delta/w_change_norm",
    "Norm of B A": "delta/ba_norm",
    "Updates of W": "delta/num_updates",
}
SPEED = {"Seconds of a step": "perf/step_time_s", "Tokens a second": "perf/tokens_per_s"}
COSTS = {
    "Seconds of training": "cost/train_time_s",
    "Peak memory in bytes": "cost/peak_memory_bytes",
    "Trainable parameters": "parameters/trainable",
}


def views_of(
    spec: TableSpec, *, scale: str, entity: str, project: str, extra: Sequence[str] = ()
) -> list[Workspace]:
    """Return the views of a table, one for each of its runs.

    Args:
        spec: the table or figure.
        scale: whose runs.
        entity: wandb entity.
        project: wandb project.
        extra: further overrides, those that the table was made with.

    Raises:
        ImportError: the package wandb-workspaces is not installed.
    """
    from hydra.utils import instantiate
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    views = []
    cells = spec.cells(scale=scale, seeds=(1,), extra=extra)
    for name in spec.runs:
        runs = [cell.run for cell in cells if cell.on == name]
        groups = sorted({run.group for run in runs})
        is_validated = instantiate(runs[0].config.task).selection_metric is not None
        columns = [c for c in (*spec.columns, *spec.side_columns) if c.run == name and c.metric]
        title = spec.name if len(spec.runs) == 1 else f"{spec.name} {name}"
        views.append(
            ws.Workspace(
                entity=entity,
                project=project,
                name=f"{title} at {scale}",
                sections=_sections(columns, is_validated=is_validated),
                runset_settings=ws.RunsetSettings(
                    filters=expr.And(expr.Metric("Group").isin(groups)),
                    groupby=[expr.Metric("Group")],
                    pinned_columns=[f"summary:test/{column.metric}" for column in columns],
                ),
            )
        )
    return views


def _sections(columns: Sequence[Column], *, is_validated: bool) -> list[Section]:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.workspaces import Section

    curves = {
        f"Validation {column.label}": f"validation/{column.metric}"
        for column in columns
        if is_validated and "/" not in str(column.metric)  # else of one epoch
    }
    scores = {column.label: f"test/{column.metric}" for column in columns}
    predictions = wr.WeavePanelSummaryTable(table_name="predictions")
    return [
        Section(name="Scores", panels=_bars(scores), is_open=True),
        Section(name="Curves", panels=_lines({**CURVES, **curves}), is_open=True),
        Section(name="Delta-LoRA", panels=_lines(DELTA)),
        Section(name="Cost", panels=[*_bars(COSTS), *_lines(SPEED)]),
        Section(name="Predictions", panels=[predictions]),
    ]


def _bars(panels: Mapping[str, str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    seeds: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    return [
        wr.BarPlot(title=title, metrics=[key], groupby="Group", **seeds)
        for title, key in panels.items()
    ]


def _lines(panels: Mapping[str, str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    seeds: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    return [
        wr.LinePlot(title=title, x="step", y=[key], groupby="Group", **seeds)
        for title, key in panels.items()
    ]


# ---------------------------------------------------------------------- what is in a view


def content_of(view: Workspace) -> dict[str, Any]:
    """Return a view as JSON values, without the ids that are drawn anew each time."""
    return _without_ids(view._spec)


def metrics_of(content: dict[str, Any]) -> set[str]:
    """Return the keys of a run that the panels of a view (from `content_of`) read."""
    bank = content["spec"]["section"]["panelBankConfig"]
    configs = [panel["config"] for section in bank["sections"] for panel in section["panels"]]
    found = {metric for config in configs for metric in config.get("metrics", ())}
    tables = {name for config in configs for name in _keys_of_tables(config)}
    axes = {config["xAxis"] for config in configs if "xAxis" in config}
    return found | tables | axes


def write(views: Sequence[Workspace], path: Path) -> None:
    """Write views to a JSON file."""
    text = json.dumps([content_of(view) for view in views], indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _keys_of_tables(config: dict[str, Any]) -> Iterator[str]:
    if "panel2Config" in config:
        yield config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_ids(v) for key, v in value.items() if key != "__id__"}
    return [_without_ids(each) for each in value] if isinstance(value, list) else value
