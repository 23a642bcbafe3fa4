"""Figure 3 and the page of a scale, from made-up records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import tables as command
from scripts.reporting.figures import build_figure, figure_to_csv, figure_to_markdown
from scripts.reporting.page import write_page
from scripts.reporting.results import collect
from scripts.reporting.spec import TableSpec, load_table
from scripts.runs.cells import Cell
from tests.unit import fake_runs

SEEDS = [1, 2, 3]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableSpec:
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(fake_runs, "OUTPUTS", tmp_path / "outputs")
    return load_table("figure3")


def cells_of(spec: TableSpec) -> list[Cell]:
    return spec.cells(scale="tiny", seeds=SEEDS)


def finish(cells: list[Cell], **changes: Any) -> None:
    for cell in cells:
        fake_runs.write(cell.run, {**fake_runs.record(cell.run), **changes})


def build(spec: TableSpec) -> dict[str, Any]:
    return build_figure(spec, "tiny", SEEDS, (), collect(cells_of(spec)))


def test_every_block_has_mean_and_interval_over_seeds(spec: TableSpec) -> None:
    finish(cells_of(spec))
    results = build(spec)
    lora = next(row for row in results["rows"] if row["method"] == "lora")
    values = [fake_runs.similarity("lora", seed)["h.2.attn.query"] for seed in SEEDS]
    block = lora["series"]["query"][2]
    assert block["mean"] == pytest.approx(sum(values) / 3, abs=1e-12)
    assert block["n"] == 3
    assert len(lora["series"]["value"]) == 4
    lines = figure_to_csv(results).splitlines()
    assert len(lines) == 1 + 3 * 2 * 4
    assert "![Figure 3" in figure_to_markdown(results)


def test_the_claim_is_judged_by_the_share_of_blocks(
    spec: TableSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(cells_of(spec))
    (claim,) = build(spec)["claims"]
    assert (claim["id"], claim["verdict"]) == ("C7", "reproduced")
    assert [part["difference"] for part in claim["parts"]] == [0.5] * 4

    def turned(method: str, seed: int) -> dict[str, float]:
        turn = {"lora": 0.3, "delta_lora": 0.1}.get(method, 0.2)
        return {f"h.{b}.{role}": 1 - turn for b in range(3) for role in ("query", "value")}

    monkeypatch.setattr(fake_runs, "similarity", turned)
    finish(cells_of(spec))
    (claim,) = build(spec)["claims"]
    assert claim["verdict"] == "not reproduced"
    assert {part["difference"] for part in claim["parts"]} == {-0.5}


def test_equal_similarities_are_no_highest(
    spec: TableSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_runs, "similarity", lambda *_: {"h.0.query": 1.0, "h.0.value": 1.0})
    finish(cells_of(spec))
    assert build(spec)["claims"][0]["verdict"] == "not reproduced"


def test_a_missing_run_is_named_and_leaves_the_claim_undecided(spec: TableSpec) -> None:
    finish([cell for cell in cells_of(spec) if cell.row != "lora"])
    results = build(spec)
    lora = next(row for row in results["rows"] if row["method"] == "lora")
    assert [item["seed"] for item in lora["absent"]] == SEEDS
    assert results["claims"][0]["verdict"] == "undecided"


def test_command_writes_pictures_and_the_page(spec: TableSpec, tmp_path: Path) -> None:
    finish(cells_of(spec))
    arguments = ["figure3", "--scale", "tiny", "--results", str(tmp_path / "results")]
    assert command.main([*arguments, "--accept"]) == 0
    folder = tmp_path / "results" / "tiny"
    assert (folder / "figure3.png").read_bytes().startswith(b"\x89PNG")
    assert "Cosine similarity" in (folder / "figure3.svg").read_text(encoding="utf-8")
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "| C7    |" in page
    assert "not judged" in page
    assert "table 4 was not made at this scale" in page
    assert "Not made at this scale: table1, " in page
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert command.main([*arguments, "--check"]) == 0


def test_a_page_says_how_it_was_made(spec: TableSpec, tmp_path: Path) -> None:
    finish(cells_of(spec))
    (tmp_path / "small").mkdir()
    results = {**build(spec), "seeds": [4, 5], "overrides": ["recipe.rank=2"]}
    (tmp_path / "small" / "figure3.json").write_text(json.dumps(results))
    (tmp_path / "small" / "figure3.md").write_text("# Figure")
    text = write_page(tmp_path / "small").read_text(encoding="utf-8")
    assert 'make reproduce-all SCALE=small SEEDS=4,5 ARGS="recipe.rank=2"' in text
