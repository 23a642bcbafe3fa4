"""The front page of a scale, ``results/<scale>/README.md``: contents, verdicts, pictures.

One picture a table, with links to its files and no copy of it. Optional tables are no part of it;
they stand beside it. Beside the page too: ``key_rows.md`` and its picture, which the README of the
repository shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_lora import stored
from delta_lora.writing import write_text
from scripts.reporting import key_rows
from scripts.reporting.figures import try_to_draw
from scripts.reporting.formats import md_table, md_text
from scripts.reporting.scope import MODELS
from scripts.reporting.spec import PAPER, paper_table_names, read_yaml

Results = Mapping[str, Any]

#: formats of a table, in the order in which they are linked.
SUFFIXES = ("md", "csv", "tex", "json", "svg")


def write_page(
    folder: Path,
    scale: str | None = None,
    *,
    model: str | None = None,
    has_audit: bool | None = None,
    has_pictures: bool = True,
) -> Path:
    """Write ``folder/README.md`` from the tables and figures that stand in `folder`.

    Args:
        folder: ``results/<scale>``.
        scale: its scale; None takes the folder's name.
        model: the model that all of it is of, where it is another than the paper's; `folder` is
            then one of ``results/<scale>/models``.
        has_audit: whether to link the audit; None: where it stands in `folder`.
        has_pictures: whether to draw the picture of the key rows.

    Returns:
        The page.
    """
    scale = scale or folder.name
    known = sorted(paper_table_names(), key=_order)
    found: dict[str, Results] = {}
    for name in known:
        path = folder / f"{name}.json"
        if path.exists():
            found[name] = stored.read_json(path, f"make it anew: make reproduce-{name}")
    if has_audit is None:
        has_audit = (folder / "audit.md").exists()
    if model is None:
        _write_key_rows(found, folder, has_pictures)
    of_model = "" if model is None else f" with {md_text(model)}"
    lines = [f"# Results at scale {scale}{of_model}", ""]
    if model is not None:
        lines += ["**Not the paper's model.** None of the paper's claims is judged here.", ""]
    elif scale != "paper":
        lines += ["**These are not the paper's numbers.** Other models learn on other data.", ""]
    lines += [f"Generated from run records by {_command(found, scale)}; never edited.", ""]
    up = ".." if model is None else "../../.."
    lines += [f"[How to read tables, pictures and verdicts]({up}/README.md)", ""]
    lines += ["## Contents", ""]
    if model is None:
        lines.append("- [Verdicts](#verdicts)")
    lines += [f"- [{_title(found[name])}](#{_anchor(found[name])})" for name in found]
    if has_audit:
        lines.append("- [The audit](audit.md): what follows from the method")
    missing = [_spoken(name) for name in known if name not in found]
    if missing:
        lines += ["", f"Not made at this scale: {', '.join(missing)}."]
    if others := sorted(folder.glob(f"{MODELS}/*/README.md")):
        links = [f"[{p.parent.name}]({MODELS}/{p.parent.name}/README.md)" for p in others]
        lines += ["", f"Other models, in folders of their own: {', '.join(links)}."]
    if model is None:
        lines += ["", "## Verdicts", "", *_verdicts(found)]
    lines.append("")
    for name, results in found.items():
        lines += [*_section(name, results), ""]
    return write_text(folder / "README.md", "\n".join(lines))


def _write_key_rows(found: Mapping[str, Results], folder: Path, has_pictures: bool) -> None:
    results = found.get(key_rows.TABLE)
    if results is None or not key_rows.find_rows(results):
        return
    verdicts = [claim["verdict"] for each in found.values() for claim in each["claims"]]
    write_text(folder / f"{key_rows.NAME}.md", key_rows.to_markdown(results, verdicts))
    if has_pictures:
        try_to_draw(key_rows.draw_key_rows, results, folder, key_rows.NAME)


def _order(name: str) -> tuple[bool, str]:
    """Tables first, figures behind them."""
    return name.startswith("figure"), name


def _spoken(name: str) -> str:
    """Return ``table 4`` for ``table4``."""
    kind = "figure" if name.startswith("figure") else "table"
    return f"{kind} {name.removeprefix(kind).replace('_', ' ')}"


def _title(results: Results) -> str:
    kind = "Figure" if "figure" in results else "Table"
    return f"{kind} {results['number']}: {results['title']}"


def _anchor(results: Results) -> str:
    """Return the anchor that GitHub gives the heading of a section."""
    kept = "".join(c for c in _title(results).lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _section(name: str, results: Results) -> list[str]:
    """Return heading, picture, verdicts and links of a table or figure."""
    num_done = sum(len(row["runs"]) for row in results["rows"])
    num_all = num_done + sum(len(row["absent"]) for row in results["rows"])
    facts = f"{num_done} of {num_all} runs finished"
    if results["overrides"]:
        facts += f"; with `{' '.join(results['overrides'])}`"
    verdicts = [f"{claim['id']} **{claim['verdict']}**" for claim in results["claims"]]
    if verdicts:
        facts += f". Claims: {', '.join(verdicts)}"
    suffixes = [s for s in SUFFIXES if s != "tex" or "figure" not in results]
    links = " · ".join(
        f"[{'values and verdicts' if s == 'md' else s}]({name}.{s})" for s in suffixes
    )
    title = _title(results)
    return [f"## {title}", "", f"{facts}.", "", f"![{title}]({name}.png)", "", links]


def _command(found: Mapping[str, Results], scale: str) -> str:
    """Return the command that makes the page's tables, where one does."""
    seeds = {tuple(results["seeds"]) for results in found.values()}
    extra = {tuple(results["overrides"]) for results in found.values()}
    if len(seeds) > 1 or len(extra) > 1:
        return "**several commands** (seeds or overrides differ, see the head of each table)"
    command = f"make reproduce-all SCALE={scale}"
    if seeds:
        command += f" SEEDS={','.join(map(str, next(iter(seeds))))}"
    if extra and (overrides := next(iter(extra))):
        command += f' ARGS="{" ".join(overrides)}"'
    return f"`{command}`"


def _verdicts(found: Mapping[str, Results]) -> list[str]:
    """Return one line a claim: in short, the verdict, how many parts say what, and where."""
    judged = {
        claim["id"]: (name, claim) for name, results in found.items() for claim in results["claims"]
    }
    rows: list[Sequence[str]] = []
    for claim_id, raw in read_yaml(PAPER / "claims.yaml").items():
        short = raw["short"] + (f" (said by {raw['source']})" if "source" in raw else "")
        if claim_id in judged:
            name, claim = judged[claim_id]
            where = f"[{_spoken(name)}]({name}.md)"
            verdict, reason = f"**{claim['verdict']}**", claim["reason"]
        else:
            where = f"figure {raw['figure']}" if "figure" in raw else f"table {raw['table']}"
            verdict, reason = "not judged", "not made at this scale"
        rows.append([claim_id, short, verdict, reason, where])
    return md_table(["Claim", "In short", "Verdict", "Parts", "Where"], rows)
