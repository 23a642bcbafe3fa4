"""The page of the audit: what was found, by rules, from records and from nothing else.

Every sentence under "finding" is chosen by a rule from the numbers it states, with the thresholds
of ``configs/audit``; a number that contradicts what was expected gives the sentence that says so.
The same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from scripts.auditing.algebra import equivalence_section, gradient_section, rank_section
from scripts.auditing.costs import memory_section, precision_section
from scripts.auditing.scores import dropout_section, low_resource_section
from scripts.auditing.words import Content, Record, Section
from scripts.reporting.formats import md_table
from scripts.reporting.results import code_of, device_of


def build(records: Content) -> dict[str, Any]:
    """Return the content of ``audit.json``.

    Args:
        records: from `scripts.audit.read_records`.

    Returns:
        JSON values: facts, ``found`` (one sentence a question) and ``sections``.

    Raises:
        ValueError: there is no record at all, or one is of another scale.
    """
    runs, measured = records["runs"], records["measurements"]
    used = [record for by_seed in runs.values() for record in by_seed.values()]
    if not used and not measured:
        raise ValueError("the audit has no record yet; run: make audit")
    wrong = sorted({r["scale"] for r in used} - {records["scale"]})
    if wrong:
        raise ValueError(f"records of scale {wrong} on a page of scale {records['scale']}")
    by_part: dict[str, list[Record]] = {}
    for record in measured:
        by_part.setdefault(record["part"], []).append(record)
    settings = records["settings"]
    made: list[Section | None] = [
        rank_section(by_part.get("rank", []), settings["rank"]),
        gradient_section(by_part.get("gradients", []), settings["gradients"]),
        equivalence_section(by_part.get("equivalence", []), settings["equivalence"]),
        dropout_section(runs, settings),
        low_resource_section(runs, settings),
        precision_section(by_part.get("precision", []), settings["precision"]),
        memory_section(by_part.get("memory", []), settings["memory"]),
    ]
    sections = [section for section in made if section is not None]
    distinct = {r["signature"]: r for r in [*used, *measured]}.values()
    return {
        "page": "audit",
        "scale": records["scale"],
        "seeds": list(records["seeds"]),
        "overrides": list(records["extra"]),
        "models": sorted(
            {
                r["model"]["name"] if isinstance(r["model"], Mapping) else r["model"]
                for r in distinct
            }
        ),
        "num_runs": len({r["signature"] for r in used}),
        "num_measurements": len(measured),
        "code": code_of(list(distinct)),
        "devices": sorted({device_of(record) for record in distinct}),
        "missing": list(records["missing"]),
        "found": [section.findings[0] for section in sections],
        "sections": [asdict(section) for section in sections],
    }


def to_markdown(content: Content) -> str:
    """Return the page."""
    seeds = ",".join(map(str, content["seeds"]))
    command = f"make audit SCALE={content['scale']} SEEDS={seeds}"
    if content["overrides"]:
        command += f' ARGS="{" ".join(content["overrides"])}"'
    lines = [f"# Audit of Delta-LoRA (scale: {content['scale']})", "", "## What we found", ""]
    lines += [f"- {sentence}" for sentence in content["found"]]
    if content["scale"] != "paper":
        lines += [
            "",
            "**These are not the paper's models.** What is algebra holds at every size; a ",
        ]
        lines[-1] += "score, an error or a memory size holds for this scale only."
    lines += ["", f"Made by `{command}` from {content['num_runs']} runs and "]
    lines[-1] += f"{content['num_measurements']} measurements; generated, never edited."
    lines += ["", f"- Model: {', '.join(content['models'])}"]
    commits = [
        f"{str(c['commit'])[:12]}{' with uncommitted changes' if c['dirty'] else ''} ({c['runs']})"
        for c in content["code"]
    ]
    lines += [f"- Code: commit {', '.join(commits)}", f"- Device: {', '.join(content['devices'])}"]
    if content["missing"]:
        shown = ", ".join(content["missing"][:6])
        lines.append(f"- **Not there yet ({len(content['missing'])}):** {shown}, ...")
    for section in content["sections"]:
        lines += ["", f"## {section['title']}", "", f"**Asked.** {section['asked']}", ""]
        lines += [f"![{section['title']}](audit_{section['key']}.svg)", ""]
        lines += ["**Found.** " + " ".join(section["findings"]), ""]
        lines += md_table(section["head"], section["rows"])
        lines += ["", f"**Measured on.** {section['measured_on']}", ""]
        lines += [f"**Does not show.** {section['not_shown']}"]
    return "\n".join(lines) + "\n"
