"""Bring finished and interrupted runs to Weights & Biases, from what stands in their folders.

    python scripts/dashboard.py sync                          every run in outputs/
    python scripts/dashboard.py sync outputs/e2e--* --tags table1
    python scripts/dashboard.py sync --mode offline           files for `wandb sync` elsewhere

A run is written whole, under its name: what was there before of the same run is replaced. So it
does not matter whether it was mirrored while it trained, in how many sittings it was made, or when
the network was gone. Without a key the runs are written offline, beside their folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omegaconf import OmegaConf

from delta_lora import mirror
from delta_lora.mirror import WandbMirror
from scripts.runs.folder import RECORD, read_record
from scripts.runs.mirroring import facts_of
from scripts.runs.run import Run

CONFIG = "config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 where a run could not be written, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="write runs to Weights & Biases from their folders")
    sync.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    sync.add_argument("--mode", choices=mirror.MODES[:-1], help="default: WANDB_MODE, or auto")
    sync.add_argument("--project", help="default: WANDB_PROJECT, or delta-lora")
    sync.add_argument("--entity", help="default: WANDB_ENTITY, or the account's")
    sync.add_argument("--tags", type=lambda text: text.split(","), help="more tags, by commas")
    asked = parser.parse_args(arguments)
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
    failed = [folder for folder in folders if not _sync(folder, settings)]
    print(f"{len(folders) - len(failed)} of {len(folders)} runs written")
    return 1 if failed else 0


def _sync(folder: Path, settings: dict[str, Any]) -> bool:
    """Write one run; return whether it was."""
    from hydra.utils import instantiate

    config: Any = OmegaConf.load(folder / CONFIG)
    status, error = _end_of(folder)
    made = WandbMirror(**settings)
    facts = facts_of(Run(config), instantiate(config.task), folder.resolve())
    made.begin(facts)
    made.log(0, {})
    made.close(status, error)
    print(f"{made.written or 'FAILED':>8}  {folder.name}  ({facts.name}; {status})")
    return made.written is not None


def _end_of(folder: Path) -> tuple[str, str]:
    """Return how a run ended, and its error."""
    if not (folder / RECORD).is_file():
        return "stopped", ""
    record = read_record(folder)
    return record["status"], record.get("error", {}).get("message", "")


if __name__ == "__main__":
    sys.exit(main())
