"""A report of Weights & Biases for every table and sweep.

It holds what W&B cannot compute, our own page with intervals and verdicts, and beside it what a
page cannot do: panels of the runs, which open each run. A report is made of the files in
``results/<scale>/`` and of the configuration; it can be made, but not saved, without a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_lora.mirror import run_id
from scripts.dashboards import panels
from scripts.dashboards.subjects import Part, Subject

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report, Runset

#: group of the run that holds tables, pictures and verdicts.
RESULTS_GROUP = "results"
HOW_TO_READ = (
    "Intervals and verdicts are those of the page. The bars of the panels are means over seeds "
    "with one standard deviation, which is no interval."
)


def report_of(subject: Subject, *, entity: str, project: str, results: Path) -> Report:
    """Return the report of a table or sweep.

    Args:
        subject: the table, figure or sweep.
        entity: wandb entity.
        project: wandb project.
        results: folder of all results; what is not there yet is said in the report.

    Raises:
        ImportError: the package wandb-workspaces is not installed.
    """
    import wandb_workspaces.reports.v2 as wr

    folder = results / subject.folder
    blocks: list[Any] = [wr.P(HOW_TO_READ), wr.MarkdownBlock(_page(subject, folder))]
    if (folder / f"{subject.stem}.png").is_file():
        shown = wr.PanelGrid(
            runsets=[_runset(f"results at {subject.scale}", [RESULTS_GROUP])],
            panels=panels.pictures(picture_key(subject)),
            hide_run_sets=True,
        )
        blocks += [wr.H2("Picture"), shown]
    for part in subject.parts:
        blocks += [wr.H2(f"Runs of {part.title}"), _grid(part, is_sweep=subject.is_sweep)]
    links = list(_links(folder / f"{subject.stem}.json", _runs_address(entity, project)))
    if links:
        blocks += [wr.H2("Records"), wr.MarkdownBlock("\n".join(links))]
    return wr.Report(
        entity=entity,
        project=project,
        title=report_title(subject),
        description=subject.title,
        blocks=blocks,
        width="fluid",
    )


def report_title(subject: Subject) -> str:
    """Return what a report is called."""
    return f"{subject.name} at {subject.scale}"


def picture_key(subject: Subject) -> str:
    """Return the key of a subject's picture in the run that holds all pictures."""
    return f"pictures/{subject.name}"


def _page(subject: Subject, folder: Path) -> str:
    """Return our page, without pictures and links to files that are not there."""
    path = folder / f"{subject.stem}.md"
    if not path.is_file():
        return (
            f"**{subject.title}**: there are no results at scale {subject.scale} yet. "
            f"`{subject.command}` makes them; make this report again after it."
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("![")).strip()


def _grid(part: Part, *, is_sweep: bool) -> Any:
    import wandb_workspaces.reports.v2 as wr

    scores = list(part.scores.values())
    return wr.PanelGrid(
        runsets=[_runset(part.title, part.groups, [f"summary:{key}" for key in scores])],
        panels=[
            *panels.bars(part.scores),
            *panels.settings(part, is_sweep=is_sweep),
            *panels.curves(part),
            *panels.lines(panels.DELTA),
            *panels.costs(),
            *panels.predictions(),
        ],
    )


def _runset(name: str, groups: Sequence[str], pinned: Sequence[str] = ()) -> Runset:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    return wr.Runset(
        name=name,
        filters=expr.And(expr.Metric("Group").isin(list(groups))),
        groupby=["Group"],
        pinned_columns=list(pinned),
    )


def _links(path: Path, runs: str) -> Iterator[str]:
    """Yield a line a row of a table or sweep, with the record of each of its runs."""
    if not path.is_file():
        return
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for row in content["rows"]:
        records = [
            f"[{_short(name)}]({runs}/{run_id(name)}/files/record.json)" for name in row["runs"]
        ]
        if records:
            yield f"- {row['label']}: {', '.join(records)}"


def _short(name: str) -> str:
    """Return task and seed of a run's name: ``e2e seed 1``."""
    task, _, *rest = name.split("--")
    seed = next((part.removeprefix("seed") for part in rest if part.startswith("seed")), "")
    return f"{task} seed {seed}"


def _runs_address(entity: str, project: str) -> str:
    from wandb.util import api_to_app_url

    host = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    app = os.environ.get("WANDB_APP_URL") or api_to_app_url(host)
    return f"{app.rstrip('/')}/{entity}/{project}/runs"


# ---------------------------------------------------------------------- saved, or as JSON


def save(report: Report) -> str:
    """Save a report in place of the one of its name, if there is one; return its address.

    Raises:
        Exception: whatever the service says.
    """
    import wandb
    import wandb_workspaces.reports.v2 as wr

    for block in report.blocks:
        for runset in block.runsets if isinstance(block, wr.PanelGrid) else ():
            runset.entity, runset.project = report.entity, report.project
    for known in wandb.Api().reports(f"{report.entity}/{report.project}"):
        if known.display_name == report.title:
            report.id = known.id
    report.save()
    return str(report.url)


def content_of(report: Report) -> dict[str, Any]:
    """Return a report as JSON values, without the ids that are drawn anew each time."""
    model = report._to_model()
    content = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    kept = {key: content[key] for key in ("displayName", "description", "project", "spec")}
    found: dict[str, Any] = panels.without_ids(kept, names=("__id__", "id", "ref"))
    return found
