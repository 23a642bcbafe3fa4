"""Make tables and figures from run records, and from nothing else.

    python scripts/tables.py table1 --scale tiny           regenerate results/tiny/table1.*
    python scripts/tables.py --scale tiny --accept         all, and keep the records in results/runs
    python scripts/tables.py --scale tiny --check          compare with what is committed

Without names: everything in configs/table, of the optional ones what is complete. ``--accept`` and
``--check`` are for maintainers: what is committed must follow, byte for byte, from the records that
are committed. A record that is damaged is named and left out; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora import console
from delta_lora.console import as_path
from scripts.reporting.figures import build_figure, draw_figure, try_to_draw, write_figure
from scripts.reporting.forest import draw_forest
from scripts.reporting.page import write_page
from scripts.reporting.results import (
    RESULTS,
    Entry,
    accept,
    build_results,
    collect,
    collect_accepted,
    damaged,
    read_accepted,
    write_results,
)
from scripts.reporting.scope import folder_of
from scripts.reporting.spec import TableSpec, load_table, table_names
from scripts.reporting.summary import summary
from scripts.runs.cells import parse_overrides, parse_seeds
from scripts.runs.scale import CHOICES, resolve_scale

#: written by a library whose bytes may differ between machines; their data are compared.
PICTURES = (".png", ".svg")


def make(
    spec: TableSpec,
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    entries: Sequence[Entry],
    folder: Path,
    *,
    has_pictures: bool = True,
) -> tuple[dict[str, Any], list[Path]]:
    """Write a table or figure, with its picture; return its content and the files.

    They stand in `folder`, those of another model than the table's in a folder of its own below.
    """
    is_figure = spec.kind == "similarity"
    build = build_figure if is_figure else build_results
    content = build(spec, scale, seeds, extra, entries)
    folder = folder_of(folder, content)
    paths = (write_figure if is_figure else write_results)(content, folder)
    if has_pictures:
        draw = draw_figure if is_figure else draw_forest
        paths += try_to_draw(draw, content, folder, spec.name)
    return content, paths


def differences(found: Path, committed: Path) -> list[str]:
    """Return what differs between two folders of results, pictures left out."""
    problems = []
    for path in sorted(found.iterdir()):
        other = committed / path.name
        if path.suffix in PICTURES or path.is_dir():
            continue
        if not other.exists():
            problems.append(f"{other} is missing")
        elif other.read_bytes() != path.read_bytes():
            problems.append(f"{other} differs from what its records give")
    return problems


def left_out(problems: Sequence[str]) -> int:
    """Say which records were left out, each once; return the exit code that this makes."""
    for problem in dict.fromkeys(problems):
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Regenerate tables and figures from records; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="default: see above")
    parser.add_argument("--scale", choices=CHOICES, default="auto")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--args", default="", metavar="OVERRIDES", dest="overrides")
    parser.add_argument("--results", type=as_path, default=RESULTS)
    parser.add_argument("--accept", action="store_true", help="keep the records in results/runs")
    parser.add_argument("--check", action="store_true", help="compare, from accepted records only")
    options = parser.parse_args(arguments)
    try:
        scale, reason = resolve_scale(options.scale)
        print(f"scale: {scale} ({reason})")
        seeds, extra = parse_seeds(options.seeds), parse_overrides(options.overrides)
        problems: list[str] = []
        accepted = read_accepted(options.results / "runs", problems)
        folder = options.results / scale
        with tempfile.TemporaryDirectory() as temporary:
            written = Path(temporary) if options.check else folder
            pages: dict[Path, str | None] = {}
            for spec in [load_table(name) for name in options.tables or table_names()]:
                is_asked = not spec.is_optional or options.tables
                if not is_asked and not (folder / f"{spec.name}.json").exists():
                    continue
                cells = spec.cells(scale=scale, seeds=seeds, extra=extra)
                if options.check:
                    entries = collect_accepted(cells, accepted)
                else:
                    entries = collect(cells, accepted=accepted)
                    problems += damaged(entries)
                if not is_asked and not all(entry.record for entry in entries):
                    continue
                if not any(entry.record for entry in entries):
                    raise ValueError(
                        f"{spec.name} has no finished run at scale {scale}; "
                        f"run: python scripts/reproduce.py {spec.name} --scale {scale}"
                    )
                if options.accept:
                    accept(entries, options.results / "runs" / scale)
                content, paths = make(
                    spec, scale, seeds, extra, entries, written, has_pictures=not options.check
                )
                pages[folder_of(Path(), content)] = content.get("other_model", {}).get("name")
                if not options.check:
                    print(f"\n{summary(content, paths)}")
            differing: list[str] = []
            for place, model in pages.items():
                if not options.check:
                    print(f"wrote {write_page(folder / place, scale, model=model)}")
                    continue
                if not options.tables:
                    has_audit = (folder / place / "audit.md").exists()
                    write_page(
                        written / place, scale, model=model, has_audit=has_audit, has_pictures=False
                    )
                differing += differences(written / place, folder / place)
            if options.check:
                problems = [*dict.fromkeys(problems), *differing]
                print("\n".join(problems) or f"{folder} follows from its records, byte for byte")
                return 1 if problems else 0
            return left_out(problems)
    except (ValueError, OSError) as error:
        return console.complain(error)


if __name__ == "__main__":
    console.run(main)
