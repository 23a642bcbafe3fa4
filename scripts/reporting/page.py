"""One page with every table, figure and verdict of a scale: ``results/<scale>/README.md``.

Optional tables are no part of it; they stand beside it.

The verdicts alone stand in ``verdicts.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.reporting.formats import md_table
from scripts.reporting.results import write_text
from scripts.reporting.spec import PAPER, paper_table_names, read_yaml

Results = Mapping[str, Any]


def write_page(folder: Path, scale: str | None = None, *, has_audit: bool | None = None) -> Path:
    """Write ``folder/README.md`` from the tables and figures that stand in `folder`.

    Args:
        folder: ``results/<scale>``.
        scale: its scale; None takes the folder's name.
        has_audit: whether to link the audit; None: where it stands in `folder`.

    Returns:
        The page.
    """
    known = paper_table_names()
    found: dict[str, Results] = {}
    for name in sorted(known, key=_order):
        path = folder / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"# Results at scale {scale or folder.name}", ""]
    lines += ["Generated from run records by `python scripts/tables.py`; never edited.", ""]
    lines += [f"Made by {_command(found, scale or folder.name)}.", ""]
    if (folder / "audit.md").exists() if has_audit is None else has_audit:
        lines += [
            "Beside the paper's claims: [the audit](audit.md), what follows from the method.",
            "",
        ]
    verdicts = _verdicts(found)
    write_text(folder / "verdicts.md", "\n".join(verdicts) + "\n")
    lines += ["## Verdicts", "", *verdicts, ""]
    missing = [name for name in sorted(known, key=_order) if name not in found]
    if missing:
        lines += [f"Not made at this scale: {', '.join(missing)}.", ""]
    for name in found:
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        lines += [re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE).strip(), ""]
        files = " · ".join(f"[{suffix}]({name}.{suffix})" for suffix in _suffixes(folder, name))
        lines += [f"Files: {files}", ""]
    return write_text(folder / "README.md", "\n".join(lines))


def _order(name: str) -> tuple[bool, str]:
    """Tables first, figures behind them."""
    return name.startswith("figure"), name


def _suffixes(folder: Path, name: str) -> list[str]:
    order = ("csv", "json", "tex", "svg", "png")
    pictures = ("svg", "png") if name.startswith("figure") else ()
    return [s for s in order if s in pictures or (folder / f"{name}.{s}").exists()]


def _command(found: Mapping[str, Results], scale: str) -> str:
    """Return the command that makes the page's tables, where one does."""
    seeds = {tuple(results["seeds"]) for results in found.values()}
    extra = {tuple(results["overrides"]) for results in found.values()}
    if len(seeds) > 1 or len(extra) > 1:
        return "**several commands**: seeds or overrides differ, see the head of each table"
    command = f"make reproduce-all SCALE={scale}"
    if seeds:
        command += f" SEEDS={','.join(map(str, next(iter(seeds))))}"
    if extra and (overrides := next(iter(extra))):
        command += f' ARGS="{" ".join(overrides)}"'
    return f"`{command}`"


def _verdicts(found: Mapping[str, Results]) -> list[str]:
    """Return one line a claim of the paper, with its verdict or why there is none."""
    claims = read_yaml(PAPER / "claims.yaml")
    judged = {
        claim["id"]: (name, claim) for name, results in found.items() for claim in results["claims"]
    }
    rows: list[Sequence[str]] = []
    for claim_id, raw in claims.items():
        where = f"figure {raw['figure']}" if "figure" in raw else f"table {raw['table']}"
        verdict, reason = "not judged", f"{where} was not made at this scale"
        if claim_id in judged:
            name, claim = judged[claim_id]
            where = f"{where} ({len(claim['parts'])} parts)"
            if found[name]["overrides"]:
                where += f" with {' '.join(found[name]['overrides'])}"
            verdict, reason = (claim[key] for key in ("verdict", "reason"))
        statement = raw["statement"].strip()
        if "source" in raw:
            statement += f" (Said by {raw['source']}.)"
        rows.append([claim_id, statement, where, f"**{verdict}**", reason])
    return md_table(["Claim", "Statement", "Judged in", "Verdict", "Parts"], rows)
