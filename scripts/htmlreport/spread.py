"""What the report says of where the spread of a table comes from: seeds or test items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.reporting.spread import BASE, WHAT_IT_IS, part_words, share_words

Content = Mapping[str, Any]


def spread_of(content: Content, styles: Sequence[str]) -> dict[str, Any] | None:
    """Return both standard errors of the scores of a table and of its differences to LoRA.

    Args:
        content: the table.
        styles: of its rows.

    Returns:
        None for a table that was made before they were measured.
    """
    spread = content.get("spread")
    if spread is None:
        return None
    return {
        "what": WHAT_IT_IS,
        "shares": share_words(spread),
        "tables": [
            {"title": title, "rows": rows}
            for key, title in (("score", "Means"), ("difference", "Differences to LoRA"))
            if (rows := _rows(content, styles, key))
        ],
        "not_measured": "; ".join(spread["not_measured"]),
    }


def _rows(content: Content, styles: Sequence[str], key: str) -> list[dict[str, Any]]:
    found = {(item["method"], item["column"]): item[key] for item in content["spread"]["rows"]}
    rows = []
    for row, style in zip(content["rows"], styles, strict=True):
        specs = content["column_specs"]
        parts = [found.get((row["method"], spec["name"])) for spec in specs]
        if any(part is not None for part in parts) and (key == "score" or row["method"] != BASE):
            cells = [part_words(p, s["decimals"]) for p, s in zip(parts, specs, strict=True)]
            is_control = row["is_control"]
            rows.append(
                {"label": row["label"], "style": style, "is_control": is_control, "cells": cells}
            )
    return rows
