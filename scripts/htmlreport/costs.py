"""What a table's rows cost, and their scores against the parameters that they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.htmlreport.charts import scatter
from scripts.htmlreport.comparisons import number
from scripts.htmlreport.words import sortable
from scripts.reporting.claims import RESOURCE_LABELS

Content = Mapping[str, Any]

#: factor to the unit that is shown, and that unit.
_UNITS = {
    "peak_memory_bytes": (2**-20, "MiB"),
    "step_time_s": (1, "s"),
    "train_time_s": (1, "s"),
    "predict_time_s": (1, "s"),
    "tokens_per_s": (1, "tokens/s"),
}


def cost_of(content: Content, styles: Sequence[str]) -> dict[str, Any]:
    """Return what each row of a table costs, and the chart of score against parameters."""
    names = [n for n in RESOURCE_LABELS if any(n in row["resources"] for row in content["rows"])]
    rows = []
    for row, style in zip(content["rows"], styles, strict=True):
        cells = []
        for name in names:
            cell, (factor, _) = row["resources"].get(name), _UNITS[name]
            mean = None if cell is None or cell["mean"] is None else cell["mean"] * factor
            decimals = 1 if _UNITS[name][1] == "s" else 0
            text = "–" if mean is None else f"{mean:,.{decimals}f}"
            cells.append({"text": text, "sort": sortable(mean)})
        counts = [row["trainable_parameters"], row["updatable_parameters"]]
        rows.append({"label": row["label"], "style": style, "counts": counts, "cells": cells})
    spec = content["column_specs"][_key_column(content["column_specs"])]
    points = []
    for i, (row, style) in enumerate(zip(content["rows"], styles, strict=True), start=1):
        cell, rate = row["metrics"][spec["name"]], row["resources"].get("tokens_per_s", {})
        if rate.get("mean") == 0:  # nothing was trained
            continue
        low, high = cell["ci95"] or (None, None)
        points.append(
            {"number": i, "label": row["label"], "style": style, "low": low, "high": high,
             "x": row["trainable_parameters"], "y": cell["mean"],
             "text": number(cell["mean"], spec["decimals"])}
        )  # fmt: skip
    title = f"{spec['label']} against trainable parameters"
    return {
        "heads": [(RESOURCE_LABELS[name].capitalize(), _UNITS[name][1]) for name in names],
        "rows": rows,
        "panel": scatter(title, "trainable parameters", points, spec["decimals"]),
        "is_cpu": "cpu" in content["device_types"],
    }


def _key_column(specs: Sequence[Content]) -> int:
    """Return which column stands for a table: a mean of the others, else the first."""
    return next((i for i, spec in enumerate(specs) if spec["mean_of"]), 0)
