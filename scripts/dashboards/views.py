"""A saved view of a Weights & Biases workspace for every table and sweep.

A view shows the runs of one table or sweep, or of one of its tasks where it has several, by the
names of their groups, which the seeds of a row share; so bars are means over seeds, with their
standard deviation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.dashboards import panels
from scripts.dashboards.subjects import Part, Subject

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def views_of(subject: Subject, *, entity: str, project: str) -> list[Workspace]:
    """Return the views of a table or sweep, one for each of its tasks.

    Args:
        subject: the table, figure or sweep.
        entity: wandb entity.
        project: wandb project.

    Raises:
        ImportError: the package wandb-workspaces is not installed.
    """
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    return [
        ws.Workspace(
            entity=entity,
            project=project,
            name=f"{part.title} at {subject.scale}",
            sections=_sections(part, is_sweep=subject.is_sweep),
            runset_settings=ws.RunsetSettings(
                filters=expr.And(expr.Metric("Group").isin(list(part.groups))),
                groupby=[expr.Metric("Group")],
                pinned_columns=[f"summary:{key}" for key in part.scores.values()],
            ),
        )
        for part in subject.parts
    ]


def _sections(part: Part, *, is_sweep: bool) -> list[Any]:
    from wandb_workspaces.workspaces import Section

    return [
        Section(name="Scores", panels=panels.bars(part.scores), is_open=True),
        Section(name="Settings", panels=panels.settings(part, is_sweep=is_sweep), is_open=True),
        Section(name="Curves", panels=panels.curves(part), is_open=True),
        Section(name="Delta-LoRA", panels=panels.lines(panels.DELTA)),
        Section(name="Cost", panels=panels.costs()),
        Section(name="Predictions", panels=panels.predictions()),
    ]


def content_of(view: Workspace) -> dict[str, Any]:
    """Return a view as JSON values, without the ids that are drawn anew each time."""
    content: dict[str, Any] = panels.without_ids(view._spec)
    return content
