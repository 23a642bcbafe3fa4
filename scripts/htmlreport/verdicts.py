"""The claims of the paper as cards: the verdict, why, and every part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.htmlreport.comparisons import signed
from scripts.htmlreport.sources import Sources
from scripts.htmlreport.words import heading, interval

Content = Mapping[str, Any]


def verdicts_of(sources: Sources) -> list[dict[str, Any]]:
    """Return a card a claim; those that were judged first."""
    judged = {
        claim["id"]: (name, claim)
        for name, content in sources.contents.items()
        for claim in content["claims"]
    }
    cards = []
    for key, raw in sources.claims.items():
        name, claim = judged.get(key, (None, None))
        parts = (
            [] if claim is None else [_part(sources.contents[str(name)], p) for p in claim["parts"]]
        )
        cards.append(
            {
                "id": key,
                "short": raw["short"],
                "source": raw.get("source"),
                "statement": raw["statement"],
                "verdict": "not judged" if claim is None else claim["verdict"],
                "reason": "not made at this scale" if claim is None else claim["reason"],
                "table": name,
                "where": None if name is None else heading(sources.contents[name], short=True),
                "parts": parts,
            }
        )
    return cards


def _part(content: Content, part: Content) -> dict[str, Any]:
    decimals = {spec["name"]: spec["decimals"] for spec in content.get("column_specs", [])}
    factor, places, unit = 1.0, decimals.get(part["column"], 2), ""
    if part["measure"] == "relative difference":
        factor, places, unit = 100.0, 0, " %"
    ends = part["ci95"] or (None, None)
    values = [None if v is None else v * factor for v in (part["difference"], *ends)]
    return {
        "statement": part["statement"],
        "verdict": part["verdict"],
        "reason": part.get("note") or part["reason"],
        "text": interval(values[0], values[1], values[2], places) + unit,
        "paper": None
        if part["paper_difference"] is None
        else signed(part["paper_difference"], places),
    }
