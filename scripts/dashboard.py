"""Bring runs to Weights & Biases from their folders, and make a view of every table there.

    python scripts/dashboard.py sync                          every run in outputs/
    python scripts/dashboard.py sync outputs/e2e--* --tags table1
    python scripts/dashboard.py sync --mode offline           files for `wandb sync` elsewhere
    python scripts/dashboard.py table1 --scale tiny           a view of its runs, in the workspace
    python scripts/dashboard.py summary --scale tiny          tables, pictures, verdicts: one run
    python scripts/dashboard.py all --dry-run views.json      what would be saved; no network

A run is written whole, under its name: what was there before of the same run is replaced. So it
does not matter whether it was mirrored while it trained, in how many sittings it was made, or when
the network was gone. Without a key the runs are written offline, beside their folders.

A view shows scores, curves, costs and predictions of the runs of a table, seeds together. Saving it
needs a key (`wandb login`) and the package wandb-workspaces; saving it again makes another view.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omegaconf import OmegaConf

from delta_lora import mirror
from delta_lora.mirror import RunFacts, WandbMirror
from delta_lora.stored import UnreadableError, damaged, read_json
from scripts.reporting.spec import load_table, table_names
from scripts.runs.checksums import RECORD, check_files, check_places, read_record
from scripts.runs.mirroring import facts_of
from scripts.runs.run import Run

CONFIG = "config.yaml"
SCALES = ("tiny", "small", "paper")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 where something could not be written, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sync = commands.add_parser("sync", help="write runs from their folders")
    sync.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    sync.add_argument("--mode", choices=mirror.MODES[:-1], help="default: WANDB_MODE, or auto")
    sync.add_argument("--tags", type=lambda text: text.split(","), help="more tags, by commas")
    summary = commands.add_parser("summary", help="write tables, pictures and verdicts as one run")
    summary.add_argument("--scale", choices=SCALES, default="tiny", help="default: tiny")
    summary.add_argument("--mode", choices=mirror.MODES[:-1], help="default: WANDB_MODE, or auto")
    summary.add_argument("--results", type=Path, default=ROOT / "results", help="their folder")
    for name in (*table_names(), "all"):
        view = commands.add_parser(name, help="save a view of the runs")
        view.add_argument("--scale", choices=SCALES, default="tiny", help="default: tiny")
        view.add_argument("--dry-run", type=Path, metavar="FILE", help="write JSON, save nothing")
    for command in commands.choices.values():
        command.add_argument("--project", help="default: WANDB_PROJECT, or delta-lora")
        command.add_argument("--entity", help="default: WANDB_ENTITY, or the account's")
    asked = parser.parse_args(arguments)
    if asked.command == "sync":
        return sync_runs(parser, asked)
    if asked.command == "summary":
        return write_summary(parser, asked)
    return save_views(parser, asked)


# ---------------------------------------------------------------------- runs


def sync_runs(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    """Write runs from their folders; return the exit code."""
    folders = asked.runs or sorted(p.parent for p in (ROOT / "outputs").glob(f"*/{CONFIG}"))
    for folder in folders:
        if not (folder / CONFIG).is_file():
            parser.error(f"{folder} is no folder of a run: it has no {CONFIG}")
    try:
        settings = {key: getattr(asked, key) for key in ("mode", "project", "entity", "tags")}
        WandbMirror(**settings)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    mirror.be_patient()
    failed = [folder for folder in folders if not _synced(folder, settings)]
    print(f"{len(folders) - len(failed)} of {len(folders)} runs written")
    return 1 if failed else 0


def _synced(folder: Path, settings: dict[str, Any]) -> bool:
    """Write one run whose files are those that it wrote; return whether it was written."""
    try:
        check_places(folder)
        if (folder / RECORD).exists() and read_record(folder)["status"] == "completed":
            check_files(folder)
        return _sync(folder, settings)
    except UnreadableError as error:
        print(f"  FAILED  {folder.name}: {error}", file=sys.stderr)
        return False


def _sync(folder: Path, settings: dict[str, Any]) -> bool:
    """Write one run; return whether it was."""
    status, error = _end_of(folder)
    made = WandbMirror(**settings)
    facts = _facts_of(folder)
    made.begin(facts)
    made.log(0, {})
    made.close(status, error)
    print(f"{made.written or 'FAILED':>8}  {folder.name}  ({facts.name}; {status})")
    return made.written is not None


def _facts_of(folder: Path) -> RunFacts:
    """Return what is shown of the run in a folder.

    Raises:
        UnreadableError: its configuration is damaged.
    """
    from hydra.utils import instantiate

    try:
        config: Any = OmegaConf.load(folder / CONFIG)
        return facts_of(Run(config), instantiate(config.task), folder.resolve())
    except UnreadableError:
        raise
    except Exception as error:  # of a file in which anything may stand
        what = " ".join(f"{type(error).__name__}: {error}".split())
        advice = "remove it, and the command of the run writes it again"
        raise damaged(folder / CONFIG, what, advice) from error


def _end_of(folder: Path) -> tuple[str, str]:
    """Return how a run ended, and its error."""
    if not (folder / RECORD).is_file():
        return "stopped", ""
    record = read_record(folder)
    return record["status"], record.get("error", {}).get("message", "")


# ---------------------------------------------------------------------- results


def write_summary(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    """Write what the tables came to as one run of the kind ``report``; return the exit code."""
    folder, scale = asked.results / asked.scale, asked.scale
    tables = {name: folder / f"{name}.json" for name in table_names()}
    tables = {name: path for name, path in tables.items() if path.is_file()}
    if not tables:
        parser.error(f"{folder} holds no table; make one with make reproduce-all SCALE={scale}")
    try:
        verdicts = {
            f"verdict/{claim['id']} ({name})": claim["verdict"]
            for name, path in tables.items()
            for claim in read_json(path, "make the table anew").get("claims", ())
        }
    except UnreadableError as error:
        parser.error(str(error))
    media = {name: folder / f"{name}.csv" for name in tables}
    media |= {f"pictures/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    facts = RunFacts(
        folder=folder, outputs=ROOT / "outputs", id=f"results--{scale}", name=f"results at {scale}",
        group="results", job_type="report", tags=["results", scale], config={"scale": scale},
        summary=verdicts, media={name: path for name, path in media.items() if path.is_file()},
    )  # fmt: skip
    try:
        made = WandbMirror(mode=asked.mode, project=asked.project, entity=asked.entity)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    mirror.be_patient()
    made.begin(facts)
    made.close("completed")
    print(f"{made.written or 'FAILED':>8}  {facts.name}: {', '.join(tables)}")
    return 0 if made.written else 1


# ---------------------------------------------------------------------- views


def save_views(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> int:
    """Save the views of one table or of all, or write them to a file; return the exit code."""
    from scripts.reporting import views

    entity = asked.entity or os.environ.get("WANDB_ENTITY", "")
    project = asked.project or os.environ.get("WANDB_PROJECT") or mirror.PROJECT
    if asked.dry_run is None:
        problem = mirror.key_problem(os.environ)
        if problem is not None:
            parser.error(f"saving a view needs a key, but {problem}; run `wandb login`")
        if not entity:
            parser.error("whose project? name it with --entity, or WANDB_ENTITY")
    names = table_names() if asked.command == "all" else [asked.command]
    try:
        made = [
            view
            for name in names
            for view in views.views_of(
                load_table(name), scale=asked.scale, entity=entity or "entity", project=project
            )
        ]
    except ImportError as error:
        parser.error(f"{error}; run `pip install wandb-workspaces`")
    if asked.dry_run is not None:
        views.write(made, asked.dry_run)
        print(f"{len(made)} views in {asked.dry_run}")
        return 0
    failed = [view.name for view in made if not _save(view)]
    return 1 if failed else 0


def _save(view: Any) -> bool:
    """Save one view; return whether it was."""
    try:
        view.save()
    except Exception as error:  # of a service: anything
        print(f"{view.name}: not saved: {mirror.redacted(str(error))}", file=sys.stderr)
        return False
    print(f"{view.name}: {view.url}")
    return True


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # wandb's own exit hooks may wait for a service for ever
