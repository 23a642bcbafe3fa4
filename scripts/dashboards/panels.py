"""Panels of Weights & Biases, and which keys of runs the panels of a made view or report read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scripts.dashboards.subjects import Part

#: the key that a panel shows, by its title: of what every run has.
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
TRAINABLE = "parameters/trainable"


def bars(panels: Mapping[str, str]) -> list[Any]:
    """Return bars over groups: the mean over seeds and its standard deviation."""
    import wandb_workspaces.reports.v2 as wr

    seeds: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    return [
        wr.BarPlot(title=title, metrics=[key], groupby="Group", **seeds)
        for title, key in panels.items()
    ]


def lines(panels: Mapping[str, str]) -> list[Any]:
    """Return curves over steps: the mean over seeds, its least and its largest value."""
    import wandb_workspaces.reports.v2 as wr

    seeds: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    return [
        wr.LinePlot(title=title, x="step", y=[key], groupby="Group", **seeds)
        for title, key in panels.items()
    ]


def curves(part: Part) -> list[Any]:
    """Return the curves of training, and of the scores that epochs are compared by."""
    return lines({**CURVES, **{f"Validation {k}": key for k, key in part.validation.items()}})


def costs() -> list[Any]:
    """Return what runs cost."""
    return [*bars(COSTS), *lines(SPEED)]


def settings(part: Part, *, is_sweep: bool) -> list[Any]:
    """Return how scores depend on settings: a line a run across them, and a point a run.

    Of a sweep there is also how much each setting matters, and the score of the validation split,
    which its settings are chosen by.
    """
    import wandb_workspaces.reports.v2 as wr

    def column(label: str, metric: Any) -> Any:
        return wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=label)

    columns = [column(label, wr.Config(key)) for label, key in part.settings.items()]
    if is_sweep:
        columns.append(column("chosen by", wr.SummaryMetric(part.selection)))
    columns += [column(label, wr.SummaryMetric(key)) for label, key in part.scores.items()]
    found: list[Any] = [wr.ParallelCoordinatesPlot(title="Settings and scores", columns=columns)]
    first = next(iter(part.scores.items()), None)
    if first is None:  # a figure has no scores of its own
        return found
    score = wr.SummaryMetric(first[1])
    if is_sweep:
        for label, key in list(part.settings.items())[1:]:
            title = f"{first[0]} against {label}"
            found.append(wr.ScatterPlot(title=title, x=wr.Config(key), y=score))
        found.append(wr.ParameterImportancePlot(with_respect_to=first[1]))
    else:
        title = f"{first[0]} against trainable parameters"
        found.append(
            wr.ScatterPlot(title=title, x=wr.SummaryMetric(TRAINABLE), y=score, log_x=True)
        )
    return found


def predictions() -> list[Any]:
    """Return the table of predictions."""
    import wandb_workspaces.reports.v2 as wr

    return [wr.WeavePanelSummaryTable(table_name="predictions")]


def pictures(*keys: str) -> list[Any]:
    """Return logged pictures."""
    import wandb_workspaces.reports.v2 as wr

    whole = wr.Layout(w=24, h=14)
    return [wr.MediaBrowser(title="Pictures", media_keys=list(keys), num_columns=1, layout=whole)]


# ---------------------------------------------------------------------- what is in them


def keys_of(content: Any) -> set[str]:
    """Return the keys of runs that the panels somewhere in a made view or report read.

    Args:
        content: JSON values, from `views.content_of` or `reports.content_of`.

    Returns:
        Keys of history and summary as they are, those of the configuration as ``config.a.b``.
    """
    return {_plain(key) for panel in _panels(content) for key in _keys(panel)}


def _panels(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if "viewType" in content and "config" in content:
            yield content["config"]
            return
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from _panels(each)


def _keys(config: dict[str, Any]) -> Iterator[str]:
    yield from config.get("metrics", ())
    yield from config.get("mediaKeys", ())
    yield from (config[axis] for axis in ("xAxis", "yAxis", "zAxis", "targetKey") if axis in config)
    yield from (column["accessor"] for column in config.get("columns", ()))
    if "panel2Config" in config:
        yield config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]


def _plain(key: str) -> str:
    if key.startswith("config:"):
        return "config." + key.removeprefix("config:").replace(".value", "", 1)
    return key.removeprefix("summary:")


def without_ids(value: Any, *, names: tuple[str, ...] = ("__id__",)) -> Any:
    """Return JSON values without the ids that are drawn anew each time."""
    if isinstance(value, dict):
        return {key: without_ids(v, names=names) for key, v in value.items() if key not in names}
    return [without_ids(v, names=names) for v in value] if isinstance(value, list) else value
