"""Show on a GPU what a CPU cannot: the numbers hold, runs survive, and what a step costs.

    make gpu-check                                      # all, at most nine minutes on one H100
    python scripts/gpu_check.py --only 2,7 --budget-s 120
    python scripts/gpu_check.py --only 5,14 --add-to results/gpu/DEVICE.json     # the rest, later
    python scripts/gpu_check.py --device cpu --small    # what a CPU can show, in a minute

Needs torch, transformers, accelerate, safetensors, numpy and tqdm, no network and no weights. One
line a check on the output, progress on the error stream, everything in a JSON file
(``results/gpu/<device>.json``); exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from delta_lora import console
from delta_lora.console import as_path
from scripts.checking import catalogue, report
from scripts.checking.finding import Context
from scripts.checking.worker import Worker

#: a check that was started in time may end after the budget by this much at most.
GRACE_S = 30.0


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    options = _parse()
    old = json.loads(options.add_to.read_text(encoding="utf-8")) if options.add_to else {}
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    context = Context(options.device, options.small, folder)
    try:
        with Worker(context) as worker:
            try:
                facts = worker.facts()
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            print(_head(facts), flush=True)
            entries, not_run = _run(worker, options, began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    content = report.build(
        facts, entries, is_small=options.small, not_run=not_run, seconds=time.monotonic() - began
    )
    out = options.out or options.add_to or _default_out(facts, options)
    if options.add_to is not None:
        content = report.add(old, content)
    if out is not None:
        report.write(out, content)
        print(f"report: {out}")
    counts = {s: sum(e["status"] == s for e in entries) for s in ("PASS", "FAIL", "SKIP")}
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    if not_run:
        numbers = ", ".join(map(str, not_run))
        print(f"not run for lack of time: {numbers} (--only {numbers.replace(' ', '')})")
    return 1 if counts["FAIL"] else 0


def _run(
    worker: Worker, options: argparse.Namespace, began: float
) -> tuple[list[dict[str, Any]], list[int]]:
    """Run the checks asked for, as long as the budget lasts."""
    entries: list[dict[str, Any]] = []
    not_run: list[int] = []
    for number in options.only:
        check = catalogue.by_number(number)
        left_s = options.budget_s - (time.monotonic() - began)
        if left_s <= 0:
            not_run.append(number)
            continue
        print(f"   ... {number:2d} {check.name}", file=sys.stderr, flush=True)
        entry = worker.run(check, min(check.timeout_s, left_s + GRACE_S))
        entries.append(entry)
        print(f"{catalogue.line(entry)} ({entry['seconds']:.0f} s)", flush=True)
    return entries, not_run


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and few steps")
    parser.add_argument(
        "--only",
        type=_numbers,
        default=os.environ.get("ONLY") or "all",
        help="numbers of checks with commas (default: ONLY= of the environment, else all): "
        + ", ".join(f"{c.number} {c.name}" for c in catalogue.CHECKS),
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        default=540.0,
        help="no check is started after so many seconds (default: 540)",
    )
    parser.add_argument(
        "--out", type=as_path, help="the report (default: results/gpu/<device>.json)"
    )
    parser.add_argument(
        "--add-to", type=as_path, metavar="FILE",
        help="put the checks of this run into an earlier report of the same device",
    )  # fmt: skip
    options = parser.parse_args()
    if options.add_to is not None and not options.add_to.is_file():
        parser.error(f"--add-to {options.add_to}: no such file; name a report of results/gpu")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu takes hours with the paper's models; add --small")
    if options.budget_s <= 0:
        parser.error(f"--budget-s {options.budget_s:g}: use a number of seconds above 0")
    return options


def _numbers(text: str) -> list[int]:
    """Return the numbers of a list such as ``2,7``; ``all`` are all."""
    known = [check.number for check in catalogue.CHECKS]
    if text == "all":
        return known
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) in known for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r}: use numbers from {known[0]} to {known[-1]} with commas, such as 2,7"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def _default_out(facts: dict[str, Any], options: argparse.Namespace) -> Path | None:
    """Return where a report goes that is worth committing: all checks at full size on a GPU."""
    is_whole = len(options.only) == len(catalogue.CHECKS)
    if facts["device"]["type"] != "cuda" or options.small or not is_whole:
        print("no report is written without --out FILE: this is no full run on a GPU")
        return None
    return ROOT / "results" / "gpu" / f"{report.slug(facts['device']['name'])}.json"


def _head(facts: dict[str, Any]) -> str:
    device, versions = facts["device"], facts["versions"]
    parts = [device["name"], *(f"{name} {versions[name]}" for name in ("torch", "transformers"))]
    if device["type"] == "cuda":
        parts += [f"driver {device['driver']}", f"CUDA {device['cuda']}"]
    return ", ".join(parts)


if __name__ == "__main__":
    console.run(main)
