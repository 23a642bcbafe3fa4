"""The page of the audit: what was found, by rules, from records and from nothing else.

Every sentence under "Found" is chosen by a rule from the numbers it states, with the limits
of ``configs/audit``; a number that contradicts what was expected gives the sentence that says so.
The same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from scripts.auditing.sections import (
    dropout,
    equivalence,
    gradients,
    low_resource,
    memory,
    precision,
    rank,
)
from scripts.auditing.words import Content, Record, Section
from scripts.reporting.formats import md_table
from scripts.reporting.results import code_of, device_of
from scripts.reporting.scope import shown

NEAR = (
    "A verdict near its limit says so and gives both figures: it may turn with another processor, "
    "library or seed. How near is near stands in `configs/audit/_base.yaml`."
)
NOT_THE_PAPER = (
    "**These are not the paper's models.** What is algebra holds at every size; a score, an error "
    "or a memory size holds for this scale only."
)


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
    sections = list_sections(runs, measured, records["settings"])
    distinct = {r["signature"]: r for r in [*used, *measured]}.values()
    return {
        "page": "audit",
        "scale": records["scale"],
        "seeds": list(records["seeds"]),
        "overrides": shown(records["extra"]),
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


def list_sections(runs: Content, measured: Iterable[Record], settings: Content) -> list[Section]:
    """Return the sections for which there are records, in the order of the page.

    Args:
        runs: ``<part>/<row>/<value>`` -> seed -> record.
        measured: records of measurements.
        settings: of the audit.
    """
    by_part: dict[str, list[Record]] = {}
    for record in measured:
        by_part.setdefault(record["part"], []).append(record)

    def made(part: str, module: Any) -> Section | None:
        found = module.facts(by_part.get(part, []), settings[part])
        return None if found is None else module.words(found)

    def scored(module: Any) -> Section | None:
        found = module.facts(runs, settings)
        return None if found is None else module.words(found)

    sections = [
        made("rank", rank),
        made("gradients", gradients),
        made("equivalence", equivalence),
        scored(dropout),
        scored(low_resource),
        made("precision", precision),
        made("memory", memory),
    ]
    return [section for section in sections if section is not None]


def to_markdown(content: Content) -> str:
    """Return the page."""
    lines = [f"# Audit of Delta-LoRA (scale: {content['scale']})", "", "## What we found", ""]
    lines += [f"- {sentence}" for sentence in content["found"]]
    lines += ["", NEAR]
    if content["scale"] != "paper":
        lines += ["", NOT_THE_PAPER]
    lines += ["", *_origin(content)]
    for section in content["sections"]:
        lines += ["", *_section(section)]
    return "\n".join(lines) + "\n"


def _origin(content: Content) -> list[str]:
    """Return how the page was made, and what is missing."""
    seeds = ",".join(map(str, content["seeds"]))
    command = f"make audit SCALE={content['scale']} SEEDS={seeds}"
    if content["overrides"]:
        command += f' ARGS="{" ".join(content["overrides"])}"'
    commits = [
        f"{str(c['commit'])[:12]}{' with uncommitted changes' if c['dirty'] else ''} ({c['runs']})"
        for c in content["code"]
    ]
    lines = [
        f"Made by `{command}` from {content['num_runs']} runs and {content['num_measurements']} "
        "measurements; generated, never edited.",
        "",
        f"- Model: {', '.join(content['models'])}",
        f"- Code: commit {', '.join(commits)}",
        f"- Device: {', '.join(content['devices'])}",
    ]
    if content["missing"]:
        shown = ", ".join(content["missing"][:6])
        lines.append(f"- **Not there yet ({len(content['missing'])}):** {shown}, ...")
    return lines


def _section(section: Content) -> list[str]:
    return [
        f"## {section['title']}",
        "",
        f"**Asked.** {section['asked']}",
        "",
        f"![{section['title']}](audit_{section['key']}.svg)",
        "",
        "**Found.**",
        "",
        *(f"- {finding}" for finding in section["findings"]),
        "",
        *md_table(section["head"], section["rows"]),
        "",
        f"**Measured on.** {section['measured_on']}",
        "",
        f"**Does not show.** {section['not_shown']}",
    ]
