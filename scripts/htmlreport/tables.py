"""A table of the report: its forest plots, its scores, its curves, its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.htmlreport.charts import forest
from scripts.htmlreport.comparisons import (
    BASE,
    Difference,
    Score,
    differences_of,
    number,
    scores_of,
    signed,
    stated_differences,
)
from scripts.htmlreport.costs import cost_of
from scripts.htmlreport.losses import curves_of
from scripts.htmlreport.sources import Sources
from scripts.htmlreport.spread import spread_of
from scripts.htmlreport.words import facts_of, heading, sortable, styles_of

Content = Mapping[str, Any]


def table_of(sources: Sources, name: str, content: Content) -> dict[str, Any]:
    """Return all that the page shows of a table.

    Args:
        sources: what the report is made of.
        name: of the table's file.
        content: of the table.
    """
    rows, specs = content["rows"], content["column_specs"]
    styles = styles_of(rows)
    scores = {spec["name"]: scores_of(rows, spec) for spec in specs}
    stated = stated_differences(content["claims"])
    differences = {spec["name"]: differences_of(rows, spec, stated) for spec in specs}
    return {
        "id": name,
        "title": heading(content),
        "short": heading(content, short=True),
        "is_optional": name in sources.specs and sources.specs[name].is_optional,
        "facts": facts_of(content),
        "forests": [
            _forest(rows, styles, spec, scores[spec["name"]], differences[spec["name"]])
            for spec in specs
        ],
        "columns": [{**spec, "is_lower": spec["better"] == "lower"} for spec in specs],
        "rows": [
            {
                "id": row["method"],
                "label": row["label"],
                "style": styles[i],
                "is_control": row["is_control"],
                "is_base": row["method"] == BASE,
                "note": row["paper_note"],
                "cells": [
                    _cell(row, spec, scores[spec["name"]], differences[spec["name"]], i)
                    for spec in specs
                ],
            }
            for i, row in enumerate(rows)
        ],
        "spread": spread_of(content, styles),
        "curves": curves_of(sources, content, styles),
        "cost": cost_of(content, styles),
        "legend": [(i + 1, row["label"], styles[i]) for i, row in enumerate(rows)],
    }


def _forest(
    rows: Sequence[Content],
    styles: Sequence[str],
    spec: Content,
    scores: Sequence[Score],
    differences: Sequence[Difference | None],
) -> dict[str, Any] | None:
    plot = forest(differences, spec)
    if plot is None:
        return None
    base = next(s for row, s in zip(rows, scores, strict=True) if row["method"] == BASE)
    lines = []
    for row, style, strip, found in zip(rows, styles, plot.strips, differences, strict=True):
        if found is None or strip is None:
            continue
        lines.append(
            {
                "label": row["label"],
                "style": style,
                "is_control": row["is_control"],
                "strip": strip,
                "text": signed(found.mean, spec["decimals"]),
                "ends": _ends(found, spec["decimals"]),
                "reading": found.reading,
                "paper": None if found.paper is None else signed(found.paper, spec["decimals"]),
            }
        )
    return {
        "label": spec["label"],
        "is_lower": spec["better"] == "lower",
        "base": number(base.mean, spec["decimals"]),
        "ticks": plot.ticks,
        "better": plot.better,
        "lines": lines,
    }


def _cell(
    row: Content,
    spec: Content,
    scores: Sequence[Score],
    differences: Sequence[Difference | None],
    i: int,
) -> dict[str, Any]:
    score, difference, decimals = scores[i], differences[i], spec["decimals"]
    half, widest_half = _aligned([s.half for s in scores], i, decimals)
    own, widest = _aligned(_halves(differences), i, decimals)
    state = "–"
    if score.mean is None and not row["runs"]:
        is_failed = any(item["state"] == "failed" for item in row["absent"])
        state = "failed" if is_failed else "not run"
    return {
        "mean": number(score.mean, decimals) if score.mean is not None else state,
        "half": half,
        "widest_half": widest_half,
        "n": score.n,
        "mark": score.mark,
        "paper": number(score.paper, decimals),
        "status": score.status,
        "difference": None if difference is None else signed(difference.mean, decimals),
        "difference_half": own,
        "widest_difference_half": widest,
        "reading": None if difference is None else difference.reading,
        "missing": "; ".join(score.missing),
        "sort": {
            "ours": sortable(score.mean),
            "paper": sortable(score.paper),
            "difference": sortable(
                0.0 if row["method"] == BASE else difference.mean if difference else None
            ),
        },
    }


def _ends(difference: Difference, decimals: int) -> str | None:
    """Return the interval of a difference in words."""
    if difference.low is None or difference.high is None:
        return None
    return f"{signed(difference.low, decimals)} to {signed(difference.high, decimals)}"


def _halves(differences: Sequence[Difference | None]) -> list[float | None]:
    """Return half of the interval of every difference."""
    return [
        None if d is None or d.low is None or d.high is None else (d.high - d.low) / 2
        for d in differences
    ]


def _aligned(values: Sequence[float | None], i: int, decimals: int) -> tuple[str | None, str]:
    """Return value `i` behind ±, as wide as the widest of its column, and that widest.

    A figure space is as wide as a digit; the widest keeps the place where there is no value.
    """
    texts = ["" if value is None else f"±{number(value, decimals)}" for value in values]
    widest = max(texts, key=len)
    return texts[i].rjust(len(widest), "\u2007") if texts[i] else None, widest
