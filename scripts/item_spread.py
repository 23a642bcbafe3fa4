"""Measure how much the scores of finished runs spread over test items, from their predictions.

    python scripts/item_spread.py                       all finished runs in outputs/ that lack it
    python scripts/item_spread.py outputs/e2e--*        these
    python scripts/item_spread.py --again outputs/NAME  where it is measured already, too

A run measures it by itself when it is scored; this adds it to runs that are older, without
training. The predictions are scored again, and must give the scores of the record. Afterwards
``python scripts/tables.py`` shows it in the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omegaconf import OmegaConf

from delta_lora import console
from delta_lora.console import as_path
from delta_lora.stored import UnreadableError
from scripts.runs import item_spread
from scripts.runs.building import load_task
from scripts.runs.composition import ConfigError
from scripts.runs.folder import ITEM_SPREAD, PREDICTIONS, RECORD, LockedError, read_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 where a run could not be measured, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=as_path, metavar="RUN", help="folders of runs")
    parser.add_argument("--outputs", type=as_path, default=ROOT / "outputs", help="of all of them")
    parser.add_argument("--again", action="store_true", help="also where it is measured already")
    asked = parser.parse_args(arguments)
    for folder in asked.runs:
        if not (folder / RECORD).is_file():
            parser.error(f"{folder} is no folder of a finished run: it has no {RECORD}")
    folders = asked.runs or sorted(path.parent for path in asked.outputs.glob(f"*/{RECORD}"))
    needed = [f for f in folders if asked.again or not (f / ITEM_SPREAD).exists()]
    tasks: dict[str, Any] = {}
    states = [_measure(folder, tasks, is_named=bool(asked.runs)) for folder in needed]
    failed = states.count("failed")
    print(
        f"{states.count('measured')} of {len(folders)} runs measured, "
        f"{len(folders) - len(needed)} were before, {states.count('without')} have no scores, "
        f"{failed} failed"
    )
    return 1 if failed else 0


def _measure(folder: Path, tasks: dict[str, Any], *, is_named: bool) -> str:
    """Measure one run; return ``measured``, ``without`` or ``failed``.

    Args:
        folder: of the run.
        tasks: those that are loaded, by their settings; one is kept, for the runs that follow.
        is_named: whether somebody asked for this very run, so that a lack is a failure.
    """
    try:
        record = read_record(folder)
    except UnreadableError as error:
        print(f"FAILED    {folder.name}: {error}", file=sys.stderr)
        return "failed"
    is_scored = record["status"] == "completed" and bool(record["metrics"])
    if not is_named and not (is_scored and (folder / PREDICTIONS).is_file()):
        return "without"
    try:
        if not is_scored:
            raise ConfigError("it is not completed, or has no scores")
        config: Any = OmegaConf.load(folder / "config.yaml")
        key = json.dumps(OmegaConf.to_container(config.task, resolve=True), sort_keys=True)
        if key not in tasks:
            tasks.clear()
            tasks[key] = load_task(config)
        found = item_spread.add(folder, tasks[key])
    except (ConfigError, LockedError, ValueError, OSError) as error:
        print(f"FAILED    {folder.name}: {error}", file=sys.stderr)
        return "failed"
    print(f"measured  {folder.name}: {', '.join(_words(found))}")
    return "measured"


def _words(found: dict[str, Any]) -> list[str]:
    """Return what was measured in words: the standard error of every score, or what it lacks."""
    words = [f"{name} ± {each['se']:.4f}" for name, each in found["scores"].items()]
    return words + [f"{name} not measured ({why})" for name, why in found["missing"].items()]


if __name__ == "__main__":
    console.run(main)
