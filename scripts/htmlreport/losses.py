"""The losses of a table's runs over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.htmlreport.charts import Panel, curves
from scripts.htmlreport.runs import on_of
from scripts.htmlreport.sources import Sources

Content = Mapping[str, Any]


def curves_of(sources: Sources, content: Content, styles: Sequence[str]) -> list[Panel]:
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
            is_repeated = read is _training and any(
                sources.samples.get(run, {}).get("repeated")
                for row in content["rows"]
                for run in row["runs"]
            )
            note = " (of repetitions on another device)" if is_repeated else ""
            panel = curves(f"{title}, {name}{note}", series)
            if panel is not None:
                found.append(panel)
    return found


def _validation(sources: Sources, run: str, record: Content) -> dict[float, float]:
    return {e["step"]: e["loss"] for e in record["training"]["validation"] if "loss" in e}


def _training(sources: Sources, run: str, record: Content) -> dict[float, float]:
    return dict(sources.samples.get(run, {}).get("loss", []))
