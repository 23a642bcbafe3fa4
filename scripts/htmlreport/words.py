"""How the report calls and writes things."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.htmlreport.comparisons import signed

Content = Mapping[str, Any]

#: rows that have a style of their own; the others are told apart by their order.
_KEYS = ("lora", "delta_lora")
_NUM_STYLES = 5


def heading(content: Content, *, short: bool = False) -> str:
    """Return ``Table 4: GLUE, RoBERTa-base``, or its beginning."""
    kind = "Figure" if "figure" in content else "Table"
    start = f"{kind} {content['number']}"
    return start if short else f"{start}: {content['title']}"


def facts_of(content: Content) -> list[str]:
    """Return what a reader must know of a table or figure, one clause each."""
    num_done = sum(len(row["runs"]) for row in content["rows"])
    num_all = num_done + sum(len(row["absent"]) for row in content["rows"])
    facts = [
        f"{num_done} of {num_all} runs finished",
        f"seeds {', '.join(map(str, content['seeds']))}",
        f"model {', '.join(content['models'])}",
        f"checkpoint: {', '.join(content['checkpoint_rules'])}",
        f"tuning: {content['tuning']}",
    ]
    if "part" in content:
        facts.append(f"a part of the test set: {content['part']}")
    if content["overrides"]:
        facts.append(f"with {' '.join(content['overrides'])}")
    return facts


def styles_of(rows: Sequence[Content]) -> list[str]:
    """Return the style of each row: by name, ``control``, or by order."""
    styles, number_ = [], 0
    for row in rows:
        if row["method"] in _KEYS:
            styles.append(row["method"].replace("_", "-"))
        elif row["is_control"]:
            styles.append("control")
        else:
            styles.append(f"other-{number_ % _NUM_STYLES}")
            number_ += 1
    return styles


def interval(mean: float | None, low: float | None, high: float | None, decimals: int) -> str:
    """Return ``+3.10 [+3.06, +3.14]``; a dash without a value."""
    text = signed(mean, decimals)
    if low is None or high is None:
        return text
    return f"{text} [{signed(low, decimals)}, {signed(high, decimals)}]"


def held(text: str) -> str:
    """Return a label that is not broken within a short pair of brackets or behind ×: (1 + λ)."""
    return re.sub(r"\([^()]{1,12}\)|× \d", lambda match: match[0].replace(" ", "\u00a0"), text)


def sortable(value: float | None) -> str:
    """Return a number as the script compares it; empty where there is none."""
    return "" if value is None else f"{value:.6g}"
