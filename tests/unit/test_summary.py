"""What a command prints of a table at its end: narrow, marked, complete."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from scripts.reporting.figures import build_figure
from scripts.reporting.results import Entry, build_results
from scripts.reporting.spec import load_table
from scripts.reporting.summary import summary
from scripts.runs.cells import Cell
from tests.choices import first
from tests.unit import fake_runs


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(fake_runs, "OUTPUTS", Path("/nowhere"))  # nothing is read or written


@functools.cache
def cells_of(table: str, seeds: tuple[int, ...]) -> list[Cell]:
    return load_table(table).cells(scale="tiny", seeds=seeds)


def content(
    values: dict[str, dict[str, list[float]]] | None = None,
    *,
    table: str = "table1",
    seeds: tuple[int, ...] = (1, 2, 3),
    without: tuple[str, ...] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Return a table of made-up runs; `values`: row -> metric -> a value a seed."""
    spec = load_table(table)
    entries = []
    for cell in cells_of(table, seeds):
        record = {**fake_runs.record(cell.run), **changes}
        for metric, by_seed in (values or {}).get(cell.row, {}).items():
            record["metrics"] = {**record["metrics"], metric: by_seed[seeds.index(cell.seed)]}
        is_lost = cell.row in without
        entries.append(
            Entry(cell, None, "missing", "no memory " * 30)
            if is_lost
            else Entry(cell, record, "done", "")
        )
    build = build_figure if table == "figure3" else build_results
    return build(spec, "tiny", seeds, (), entries)


def line_of(text: str, label: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{label}  ")]
    return line


@pytest.mark.parametrize("width", first([60, 80, 100, 140]))
@pytest.mark.parametrize("table", first(["table1", "figure3", "table4", "table2"]))
def test_no_line_is_wider_than_asked(table: str, width: int) -> None:
    paths = [Path(f"results/tiny/{table}.{suffix}") for suffix in ("md", "csv", "json")]
    text = summary(content(table=table, without=("lora",)), paths, width)
    assert max(map(len, text.splitlines())) <= width
    assert "|" not in text, "no Markdown"
    assert f"wrote results/tiny/{table}.{{md,csv,json}}" in text


@pytest.mark.long
def test_many_scores_are_split_and_none_is_lost() -> None:
    metrics = {column.metric: 0.5 for column in load_table("table4").columns if column.metric}
    results = content(table="table4", metrics=metrics)
    text = summary(results, [])
    heads = [line for line in text.splitlines() if line.startswith("Method")]
    assert len(heads) > 1
    shown = [word for head in heads for word in head.split()[1:]]
    assert shown == [spec["label"] for spec in results["column_specs"]]


def test_the_best_and_what_cannot_be_told_from_it_are_marked() -> None:
    bleu = {
        "lora": {"bleu": [0.50, 0.51, 0.52]},
        "delta_lora": {"bleu": [0.60, 0.61, 0.62]},
        "full": {"bleu": [0.70, 0.50, 0.60]},
    }
    others = [row.name for row in load_table("table1").rows if row.name not in bleu]
    text = summary(content(bleu | {name: {"bleu": [0.1, 0.1, 0.1]} for name in others}), [])
    column = text.splitlines()[4].index("BLEU")
    marks = {}
    for label in ("Full fine-tuning", "LoRA", "Delta-LoRA"):
        cell = line_of(text, label)[: column + 6].rstrip().split("  ")[-1]
        marks[label] = cell[-1]
    assert marks["Delta-LoRA"] == "*"
    assert marks["Full fine-tuning"] == "~", "its differences scatter around zero"
    assert marks["LoRA"].isdigit(), "always 10 below"


def test_where_lower_is_better_the_least_is_best() -> None:
    text = summary(
        content(
            {name.name: {"ter_all": [0.5, 0.5, 0.5]} for name in load_table("table2").rows}
            | {"lora": {"ter_all": [0.3, 0.3, 0.3]}},
            table="table2",
            metrics={"bleu_all": 0.5},
        ),
        [],
    )
    assert "0.30 ±0.00*" in text
    assert "0.50 ±0.00*" not in text
    assert "Lower is better: TER seen, TER unseen, TER all." in " ".join(text.split())


def test_one_seed_has_no_interval_and_decides_nothing() -> None:
    text = summary(content(seeds=(1,)), [])
    assert "±" not in text
    assert "~" not in text
    assert "*" in line_of(text, "Delta-LoRA")
    assert "One seed has no interval" in text


def test_an_empty_cell_says_why() -> None:
    missing = {"meteor": "Java not found; install a runtime"}
    metrics = {name: 0.5 for name in fake_runs.METRICS if name != "meteor"}
    text = summary(content(metrics=metrics, missing_metrics=missing, without=("lora",)), [])
    assert text.count("METEOR:") == 1, "once, not once a row"
    assert line_of(text, "LoRA").split().count("not") == 5
    assert "! LoRA, seed 1, 2, 3: not run: no memory" in text
    assert "–" in line_of(text, "AdaLoRA")
    assert "33 of 36 runs finished" in text


def test_nothing_finished_is_said() -> None:
    every = tuple(row.name for row in load_table("table1").rows)
    assert "No run has finished." in summary(content(without=every), [])


def test_controls_stand_apart_and_verdicts_are_in_words() -> None:
    results = content()
    lines = summary(results, []).splitlines()
    controls = next(i for i, line in enumerate(lines) if line.startswith("Controls"))
    assert any(line.startswith("LoRA without dropout") for line in lines[controls:])
    assert lines[controls - 1].startswith("Delta-LoRA  ")
    text = " ".join(" ".join(lines).split())
    for claim in results["claims"]:
        assert f"{claim['id']} {claim['verdict']}: {claim['statement']}" in text
    assert "not the paper's numbers" in text


def test_too_narrow_is_refused() -> None:
    with pytest.raises(ValueError, match="width=40"):
        summary(content(), [], width=40)
