"""The losses of a table's runs over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.htmlreport.charts import curves
from scripts.htmlreport.runs import on_of
from scripts.htmlreport.sources import Sources

Content = Mapping[str, Any]


def curves_of(sources: Sources, content: Content, styles: Sequence[str]) -> list[dict[str, Any]]:
    """Return, for each of a table's runs, the loss over steps: validation, and training if kept."""
    found = []
    for on in content["tasks"]:
        for title, read in (("Validation loss", _validation), ("Training loss", _training)):
            series = []
            for row, style in zip(content["rows"], styles, strict=True):
                seeds = {}
                for run in row["runs"]:
                    record = sources.records.get(run)
                    if record is not None and on_of(content, record) == on:
                        seeds[record["seed"]] = read(sources, run, record)
                series.append((style, row["label"], seeds))
            # What matters most is drawn last, on top.
            series.sort(key=lambda item: (item[0] in ("lora", "delta-lora"), item[0] != "control"))
            name = content["tasks"][on].get("name", on)
            panel = curves(f"{title}, {name}", series)
            if panel is not None:
                found.append({"panel": panel, "is_training": read is _training})
    return found


def _validation(sources: Sources, run: str, record: Content) -> dict[float, float]:
    return {e["step"]: e["loss"] for e in record["training"]["validation"] if "loss" in e}


def _training(sources: Sources, run: str, record: Content) -> dict[float, float]:
    return dict(sources.samples.get(run, {}).get("loss", []))
