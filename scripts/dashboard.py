"""Bring runs to Weights & Biases from their folders; make views and reports of tables and sweeps.

    python scripts/dashboard.py sync                          every run in outputs/
    python scripts/dashboard.py sync outputs/e2e--* --tags first
    python scripts/dashboard.py sync --mode offline           files for `wandb sync` elsewhere
    python scripts/dashboard.py summary --scale tiny          tables, pictures, verdicts: one run
    python scripts/dashboard.py table1 --scale tiny           a view and a report of its runs
    python scripts/dashboard.py lambda_k --scale tiny         the same of a sweep
    python scripts/dashboard.py all --dry-run made.json       what would be saved; no network

A run is written whole, under its name: what was there before of the same run is replaced. So it
does not matter whether it was mirrored while it trained, in how many sittings it was made, or when
the network was gone. It gets the names of all tables and sweeps that it is part of as tags, however
many share it. Without a key the runs are written offline, beside their folders.

A view shows scores, settings, curves, costs and predictions of the runs of a table or sweep, seeds
together; a report adds our own page, with intervals and verdicts, the picture, and a link to every
record. Both need the runs there (`sync`), the picture needs `summary`. Saving needs a key (`wandb
login`) and the package wandb-workspaces. A report takes the place of the one of its name; a view
that is saved again is another view.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omegaconf import DictConfig, OmegaConf

from delta_lora import console, mirror
from delta_lora.checks import expanded
from delta_lora.console import as_path
from delta_lora.mirror import RunFacts, WandbMirror
from delta_lora.stored import UnreadableError, damaged, read_json
from delta_lora.writing import write_text
from scripts.dashboards import reports, views
from scripts.dashboards.subjects import Subject, load_subject, membership, subject_names
from scripts.reporting.spec import table_names
from scripts.runs.checksums import RECORD, check_files, check_places, read_record
from scripts.runs.mirroring import facts_of, write_references
from scripts.runs.run import Run
from scripts.runs.scale import SCALES
from scripts.sweeping.page import panel_title
from scripts.sweeping.spec import sweep_names

CONFIG = "config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 where something could not be written, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sync = commands.add_parser("sync", help="write runs from their folders")
    sync.add_argument("runs", nargs="*", type=as_path, metavar="RUN", help="folders of runs")
    sync.add_argument("--mode", choices=mirror.MODES[:-1], help="default: WANDB_MODE, or auto")
    sync.add_argument("--tags", type=lambda text: text.split(","), help="more tags, by commas")
    summary = commands.add_parser(
        "summary", help="write tables, sweeps, pictures and verdicts as one run"
    )
    summary.add_argument("--scale", choices=SCALES, default="tiny", help="default: tiny")
    summary.add_argument("--mode", choices=mirror.MODES[:-1], help="default: WANDB_MODE, or auto")
    summary.add_argument("--results", type=as_path, default=ROOT / "results", help="their folder")
    for name in (*subject_names(), "all"):
        what = "all that have results" if name == "all" else name
        made = commands.add_parser(name, help=f"save a view and a report of {what}")
        made.add_argument("--scale", choices=SCALES, default="tiny", help="default: tiny")
        made.add_argument("--results", type=as_path, default=ROOT / "results", help="their folder")
        made.add_argument(
            "--dry-run", nargs="?", const="-", metavar="FILE",
            help="save nothing; write JSON to the file, or to the terminal",
        )  # fmt: skip
    for command in commands.choices.values():
        command.add_argument("--project", help="default: WANDB_PROJECT, or delta-lora")
        command.add_argument("--entity", help="default: WANDB_ENTITY, or the account's")
    asked = parser.parse_args(arguments)
    if asked.command == "sync":
        return sync_runs(parser, asked)
    if asked.command == "summary":
        return write_summary(parser, asked)
    return save_dashboards(parser, asked)


# ---------------------------------------------------------------------- runs


def sync_runs(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    """Write runs from their folders; return the exit code."""
    folders = asked.runs or sorted(p.parent for p in (ROOT / "outputs").glob(f"*/{CONFIG}"))
    for folder in asked.runs:
        if not (folder / CONFIG).exists():
            parser.error(f"{folder} is no folder of a run: it has no {CONFIG}")
    try:
        settings = {key: getattr(asked, key) for key in ("mode", "project", "entity", "tags")}
        WandbMirror(**settings)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    mirror.be_patient()
    runs = {folder: run for folder in folders if (run := _read_run(folder)) is not None}
    parts = _parts(list(runs.values()))
    written = [folder for folder, run in runs.items() if _sync(folder, run, parts, settings)]
    print(f"{len(written)} of {len(folders)} runs written")
    return 0 if len(written) == len(folders) else 1


def _read_run(folder: Path) -> Run | None:
    """Return the run in a folder; None, with a message, where a file is not the one it wrote."""
    try:
        check_places(folder)
        if (folder / RECORD).exists() and read_record(folder).get("status") == "completed":
            check_files(folder)
        return Run(_read_config(folder))
    except UnreadableError as error:
        print(f"{'FAILED':>8}  {folder.name}: {error}")
        return None


def _read_config(folder: Path) -> Any:
    """Return the configuration of a run.

    Raises:
        UnreadableError: it is damaged.
    """
    advice = "remove it, and the command of the run writes it again"
    try:
        config = OmegaConf.load(folder / CONFIG)
    except Exception as error:  # of a file in which anything may stand
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise damaged(folder / CONFIG, what, advice) from error
    if not isinstance(config, DictConfig) or not {"choices", "task", "method"} <= config.keys():
        raise damaged(folder / CONFIG, "it is no configuration of a run", advice)
    return config


def _parts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return which tables and sweeps the groups of `runs` are part of."""
    tasks: dict[str, set[str]] = {}
    for run in runs:
        if run.choices.scale in SCALES:
            tasks.setdefault(run.choices.scale, set()).add(run.choices.task)
    found: dict[str, list[str]] = {}
    for scale, names in tasks.items():
        print(f"looking up what the runs of scale {scale} are part of", flush=True)
        found |= membership(names, scale)
    return found


def _sync(
    folder: Path, run: Run, parts: Mapping[str, Sequence[str]], settings: dict[str, Any]
) -> bool:
    """Write one run; return whether it was. Whatever is wrong with one costs no other."""
    from hydra.utils import instantiate

    made = WandbMirror(**settings)
    try:
        task = instantiate(run.config.task)
        status, error = _end_of(folder)
        if status == "completed":
            _add_references(task, folder)
        facts = facts_of(run, task, folder.resolve())
        facts = dataclasses.replace(facts, tags=[*facts.tags, *parts.get(facts.group, ())])
        made.begin(facts)
        made.log(0, {})
        made.close(status, error)
    except Exception as problem:  # of a folder: anything
        print(f"{'FAILED':>8}  {folder.name}: {type(problem).__name__}: {problem}")
        return False
    print(f"{made.written or 'FAILED':>8}  {folder.name}  ({facts.name}; {status})")
    return made.written is not None


def _add_references(task: Any, folder: Path) -> None:
    """Write what predictions are compared with, where the run had no mirror to do so."""
    lines = folder / "references.jsonl"
    if lines.is_file() and '"scores"' in lines.read_text(encoding="utf-8"):
        return
    try:
        task.load()
        write_references(task, folder)
    except Exception as problem:  # of data that are not here: anything
        print(f"          {folder.name}: no references: {problem}")


def _end_of(folder: Path) -> tuple[str, str]:
    """Return how a run ended, and its error."""
    if not (folder / RECORD).is_file():
        return "stopped", ""
    record = read_record(folder)
    why = record.get("error", {}).get("message") or record.get("pruned", {}).get("reason", "")
    return record["status"], why


# ---------------------------------------------------------------------- results


def write_summary(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    """Write what the tables came to as one run of the kind ``report``; return the exit code."""
    folder, scale = asked.results / asked.scale, asked.scale
    tables = {name: folder / f"{name}.json" for name in table_names()}
    tables = {name: path for name, path in tables.items() if path.is_file()}
    if not tables:
        parser.error(f"{folder} holds no table; make one with make reproduce-all SCALE={scale}")
    sweeps = {name: folder / "sweeps" / name / "sweep.json" for name in sweep_names()}
    try:
        contents = {name: read_json(path, "make the table anew") for name, path in tables.items()}
        views_of = {
            name: read_json(path, "make the sweep anew")
            for name, path in sweeps.items()
            if path.is_file()
        }
    except UnreadableError as error:
        parser.error(str(error))
    verdicts = {
        f"verdict/{claim['id']} ({name})": claim["verdict"]
        for name, content in contents.items()
        for claim in content.get("claims", ())
    }
    media = {name: folder / f"{name}.csv" for name in tables}
    media |= {f"pictures/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    chosen: dict[str, str] = {}
    for name, view in views_of.items():
        place = folder / "sweeps" / name
        media |= {name: place / "sweep.csv", f"pictures/{name}": place / "sweep.png"}
        chosen |= _chosen(view)
    facts = RunFacts(
        folder=folder, outputs=ROOT / "outputs", id=f"results--{scale}", name=f"results at {scale}",
        group=reports.RESULTS_GROUP, job_type="report", tags=["results", scale],
        config={"scale": scale}, summary={**verdicts, **chosen},
        media={name: path for name, path in media.items() if path.is_file()},
    )  # fmt: skip
    try:
        made = WandbMirror(mode=asked.mode, project=asked.project, entity=asked.entity)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    mirror.be_patient()
    made.begin(facts)
    made.close("completed")
    names = [name for name in facts.media if "/" not in name]
    print(f"{made.written or 'FAILED':>8}  {facts.name}: {', '.join(names)}")
    return 0 if made.written else 1


def _chosen(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what a sweep chose on the validation split, by a key of the summary."""
    found: dict[str, str] = {}
    for panel in content["panels"]:
        labels = [
            content["rows"][c["cell"]]["label"] for c in panel["chosen"] if c["cell"] is not None
        ]
        found[f"chosen/{content['sweep']}, {panel_title(panel)}"] = "; ".join(labels)
    return found


# ---------------------------------------------------------------------- views and reports


def save_dashboards(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    """Save views and reports of one table or sweep or of all, or write them to a file.

    Returns:
        The exit code.
    """
    entity = asked.entity or os.environ.get("WANDB_ENTITY", "")
    project = asked.project or os.environ.get("WANDB_PROJECT") or mirror.PROJECT
    if asked.dry_run is None:
        problem = mirror.key_problem(os.environ)
        if problem is not None:
            parser.error(f"saving a view needs a key, but {problem}; run `wandb login`")
        if not entity:
            parser.error("whose project? name it with --entity, or WANDB_ENTITY")
    entity = entity or "entity"
    found_views: list[Any] = []
    found_reports: list[Any] = []
    try:
        for subject in _subjects(parser, asked):
            found_views += views.views_of(subject, entity=entity, project=project)
            found_reports.append(
                reports.report_of(subject, entity=entity, project=project, results=asked.results)
            )
    except ImportError as error:
        parser.error(f"{error}; run `pip install wandb-workspaces`")
    if asked.dry_run is not None:
        content = {
            "views": [views.content_of(view) for view in found_views],
            "reports": [reports.content_of(report) for report in found_reports],
        }
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        if asked.dry_run == "-":
            print(text, end="")
        else:
            write_text(expanded(asked.dry_run), text)
            where = f"{len(found_views)} views, {len(found_reports)} reports in {asked.dry_run}"
            print(where)
        return 0
    jobs = {f"view {view.name}": partial(_address_of_saved, view) for view in found_views}
    jobs |= {f"report {r.title}": partial(reports.save, r) for r in found_reports}
    return _save_all(jobs)


def _save_all(jobs: Mapping[str, Callable[[], str]]) -> int:
    """Save views and reports; return the exit code.

    Two failures in a row are of the service: the rest, which would wait as long, is not tried.
    """
    failed, in_a_row = 0, 0
    for number, (name, save) in enumerate(jobs.items()):
        is_saved = _save(name, save)
        in_a_row = 0 if is_saved else in_a_row + 1
        failed += not is_saved
        left = len(jobs) - number - 1
        if in_a_row == 2 and left:
            print(f"two failed in a row; {left} more are not tried", file=sys.stderr)
            break
    return 1 if failed else 0


def _subjects(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> Iterator[Subject]:
    """Yield what was asked for: one, or all that have results at the scale."""
    names = subject_names() if asked.command == "all" else [asked.command]
    found = 0
    for name in names:
        place = asked.results / asked.scale
        files = (place / f"{name}.json", place / "sweeps" / name / "sweep.json")
        if len(names) == 1 or any(path.is_file() for path in files):
            found += 1
            yield load_subject(name, asked.scale)
        else:
            print(f"{name}: no results at scale {asked.scale}, left out", file=sys.stderr)
    if not found:
        parser.error(f"{asked.results / asked.scale} holds no results of a table or sweep")


def _address_of_saved(view: Any) -> str:
    return str(view.save().url)


def _save(name: str, save: Callable[[], str]) -> bool:
    """Save a view or a report; return whether it was."""
    try:
        place = save()
    except Exception as error:  # of a service: anything
        print(f"{name}: not saved: {mirror.redacted(str(error))}", file=sys.stderr)
        return False
    print(f"{name}: {place}", flush=True)
    return True


if __name__ == "__main__":
    try:
        console.run(main)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))  # wandb's own exit hooks may wait for a service for ever
