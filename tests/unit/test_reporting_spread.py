"""Where the spread of a table comes from: seeds, test items, and what of them a difference has."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from delta_lora.protocols import ItemScores
from scripts.htmlreport.spread import spread_of as spread_of_page
from scripts.htmlreport.words import styles_of
from scripts.reporting import results as tables
from scripts.reporting.formats import to_json, to_markdown
from scripts.reporting.spec import TableSpec, load_table
from scripts.runs.cells import Cell
from scripts.runs.item_spread import resampled
from tasks.metrics import items
from tests.unit import fake_runs

pytestmark = pytest.mark.usefixtures("no_pictures", "outputs")

SEEDS = (1, 2, 3)
NUM_ITEMS = 200
#: what an item is worth to every run.
EASE = np.random.default_rng(0).normal(size=NUM_ITEMS)


@pytest.fixture
def spec() -> TableSpec:
    return load_table("table1")


def own_noise(cell: Cell) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what the items are worth to one run alone, half as much as to all."""
    number = 100 * cell.seed + len(cell.row)
    return np.random.default_rng(number).normal(size=NUM_ITEMS) / 2


def spread(cell: Cell, num_items: int = NUM_ITEMS) -> dict[str, Any]:
    """Return what a run with those items measures: BLEU is their mean, METEOR has no Java."""
    values = (EASE + own_noise(cell))[:num_items] / 100
    found = ItemScores(
        num_items, {"bleu": items.mean(values)}, missing={"meteor": "Java not found"}
    )
    return resampled(found, "e2e")


def finish(cells: Sequence[Cell], measure: Callable[[Cell], Any] = spread) -> None:
    for cell in cells:
        measured = measure(cell)
        changes = {} if measured is None else {"item_spread": measured}
        record = fake_runs.record(cell.run, **changes)
        fake_runs.write(cell.run, record, fake_runs.resources(cell.run))


def build(
    spec: TableSpec, measure: Callable[[Cell], Any] = spread, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    cells = spec.cells(scale="tiny", seeds=seeds, extra=())
    finish(cells, measure)
    return tables.build_results(spec, "tiny", seeds, (), tables.collect(cells))


def found(results: dict[str, Any], method: str, column: str = "bleu") -> dict[str, Any]:
    return next(
        row
        for row in results["spread"]["rows"]
        if (row["method"], row["column"]) == (method, column)
    )


def test_seeds_are_their_standard_error_and_items_that_of_the_bootstrap(spec: TableSpec) -> None:
    results = build(spec)
    part = found(results, "delta_lora")["score"]
    row = next(row for row in results["rows"] if row["method"] == "delta_lora")
    assert part["n"] == 3
    assert part["seeds"] == pytest.approx(row["metrics"]["bleu"]["std"] / math.sqrt(3))
    # The mean over seeds: all of what is common, a third of the variance of what is not.
    cells = [c for c in spec.cells(scale="tiny", seeds=SEEDS, extra=()) if c.row == "delta_lora"]
    worth = EASE + np.mean([own_noise(cell) for cell in cells], axis=0)
    assert part["items"] == pytest.approx(worth.std() / math.sqrt(NUM_ITEMS), rel=0.1)
    variances = part["seeds"] ** 2, part["items"] ** 2
    assert part["items_share"] == pytest.approx(variances[1] / sum(variances))
    assert found(results, "delta_lora")["num_items"] == NUM_ITEMS


def test_what_items_do_to_both_methods_cancels_in_their_difference(spec: TableSpec) -> None:
    results = build(spec)
    score, difference = (found(results, "delta_lora")[key] for key in ("score", "difference"))
    row = found(results, "lora")
    assert row["difference"] is None
    cells = spec.cells(scale="tiny", seeds=SEEDS, extra=())
    noises = [
        np.mean([own_noise(cell) for cell in cells if cell.row == name], axis=0)
        for name in ("delta_lora", "lora")
    ]
    expected = (noises[0] - noises[1]).std() / math.sqrt(NUM_ITEMS)
    assert difference["items"] == pytest.approx(expected, rel=0.1)
    assert difference["items"] < score["items"] / 2


def test_one_seed_has_items_and_no_share(spec: TableSpec) -> None:
    part = found(build(spec, seeds=(1,)), "lora")["score"]
    assert (part["n"], part["seeds"], part["items_share"]) == (1, None, None)
    assert part["items"] > 0


def test_a_mean_of_columns_is_resampled_part_by_part(spec: TableSpec) -> None:
    columns = tuple(
        dataclasses.replace(column, run=None, metric=None, mean_of=("bleu", "nist"), scale=1.0)
        if column.name == "cider"
        else column
        for column in spec.columns
    )
    mixed = dataclasses.replace(spec, columns=columns, claims=())

    def both(cell: Cell) -> dict[str, Any]:
        values = (EASE + own_noise(cell)) / 100
        other = np.roll(values, 1) * 100
        of_sets = {"bleu": items.mean(values), "nist": items.mean(other)}
        return resampled(ItemScores(NUM_ITEMS, of_sets), "e2e")

    results = build(mixed, both)
    parts = [found(results, "lora", name)["score"]["items"] for name in ("bleu", "nist")]
    whole = found(results, "lora", "cider")
    assert whole["num_items"] == 2 * NUM_ITEMS
    assert whole["score"]["items"] == pytest.approx(math.hypot(*parts) / 2, rel=0.15)


def test_old_records_are_not_measured_and_say_so(spec: TableSpec) -> None:
    results = build(spec, lambda cell: None)
    assert results["spread"] == {
        "rows": [],
        "not_measured": ["the records of 36 of 36 runs hold no spread over test items"],
    }
    text = to_markdown(results)
    assert "Test items: not measured (the records of 36 of 36 runs" in text
    assert "python scripts/item_spread.py" in text
    assert "seeds / items" not in text


def test_a_row_with_one_old_record_is_not_measured_and_the_others_are(spec: TableSpec) -> None:
    def some(cell: Cell) -> Any:
        return None if (cell.row, cell.seed) == ("delta_lora", 2) else spread(cell)

    results = build(spec, some)
    assert "delta_lora" not in {row["method"] for row in results["spread"]["rows"]}
    assert found(results, "adalora")["difference"] is not None
    reasons = results["spread"]["not_measured"]
    assert reasons == [
        "METEOR: Java not found",
        "the records of 1 of 36 runs hold no spread over test items",
    ]


def test_other_test_sets_are_not_paired(spec: TableSpec) -> None:
    results = build(spec, lambda cell: spread(cell, 50 if cell.row == "lora" else NUM_ITEMS))
    assert found(results, "delta_lora")["difference"] is None
    assert found(results, "delta_lora")["score"] is not None


def test_a_damaged_spread_costs_its_row_and_is_named(spec: TableSpec) -> None:
    def damaged(cell: Cell) -> Any:
        measured = spread(cell)
        if (cell.row, cell.seed) == ("full", 1):
            measured["resamples"] = 7
        return measured

    results = build(spec, damaged)
    assert "full" not in {row["method"] for row in results["spread"]["rows"]}
    assert any("damaged" in reason for reason in results["spread"]["not_measured"])


def test_tables_and_page_say_both_parts(spec: TableSpec) -> None:
    results = build(spec)
    text = to_markdown(results)
    part = found(results, "delta_lora")["difference"]
    share = round(100 * part["items_share"])
    cell = f"{part['seeds']:.2f} / {part['items']:.2f} ({share} %)"
    line = next(line for line in text.splitlines() if line.startswith("| Delta-LoRA minus LoRA ")
                and " / " in line)  # fmt: skip
    assert cell in line
    assert "Test items are" in text
    assert "Not measured, and –: METEOR: Java not found" in text
    assert json.loads(to_json(results))["spread"] == results["spread"]
    page = spread_of_page(results, styles_of(results["rows"]))
    assert page is not None
    assert [table["title"] for table in page["tables"]] == ["Means", "Differences to LoRA"]
    differences = page["tables"][1]["rows"]
    assert "LoRA" not in {row["label"] for row in differences}
    assert cell in {text for row in differences for text in row["cells"]}
    assert spread_of_page({**results, "spread": None}, styles_of(results["rows"])) is None
