"""Make the report of a scale: one HTML file with verdicts, plots, tables, curves, cost and runs.

    python scripts/report.py --scale tiny           results/tiny/report/index.html (or: make report)
    python scripts/report.py --scale tiny --check   compare with what is committed

It is made of the tables, figures, pictures and sweeps of ``results/<scale>``, of run records, and
of ``report/samples.json``, to which this command first copies a few points of the curves and a few
predictions of every run folder at hand. ``--check`` reads no run folder. A file that is damaged is
named and left out; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora import console
from delta_lora.console import as_path
from delta_lora.writing import make_folder, write_text
from scripts.htmlreport import page, samples
from scripts.htmlreport.sources import PAGE, REPORT, SAMPLES, read_sources
from scripts.reporting.results import RESULTS
from scripts.runs.composition import ROOT
from scripts.runs.scale import CHOICES, resolve_scale
from scripts.tables import left_out


def make(results: Path, scale: str, outputs: Path, problems: list[str] | None = None) -> Path:
    """Write the report of a scale; return its file.

    Args:
        results: the folder ``results``.
        scale: tiny, small or paper.
        outputs: folder of the run folders.
        problems: gets a message for every file that was left out.

    Raises:
        ValueError: there is no table at this scale, or the page is too large.
    """
    sources = read_sources(results, scale, outputs)
    folder = sources.folder / REPORT
    make_folder(folder)
    found = samples.collect(sources, outputs)
    known = sources.problems
    if found != sources.samples:
        write_text(folder / SAMPLES, samples.to_text(found))
        sources = read_sources(results, scale, outputs)
    if problems is not None:
        problems += dict.fromkeys([*known, *sources.problems])
    return write_text(folder / PAGE, page.write(sources))


def check(results: Path, scale: str) -> str | None:
    """Return what is wrong with the committed report of a scale, or None."""
    path = results / scale / REPORT / PAGE
    if not path.exists():
        return f"{path} is missing; make it: make report SCALE={scale}"
    if page.write(read_sources(results, scale, None)).encode() != path.read_bytes():
        return f"{path} differs from what its records give; make it anew: make report SCALE={scale}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or check the report; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=CHOICES, default="auto")
    parser.add_argument("--results", type=as_path, default=RESULTS)
    parser.add_argument("--outputs", type=as_path, default=ROOT / "outputs")
    parser.add_argument("--check", action="store_true", help="compare, from committed files only")
    options = parser.parse_args(arguments)
    try:
        scale, reason = resolve_scale(options.scale)
        print(f"scale: {scale} ({reason})")
        if options.check:
            problem = check(options.results, scale)
            print(problem or f"{options.results / scale / REPORT / PAGE} follows from its records")
            return 1 if problem else 0
        problems: list[str] = []
        print(f"wrote {make(options.results, scale, options.outputs, problems)}")
        return left_out(problems)
    except (ValueError, OSError) as error:
        return console.complain(error)


if __name__ == "__main__":
    console.run(main)
