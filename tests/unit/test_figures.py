"""Figure 3, the pictures of tables and the page of a scale, from made-up records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import tables as command
from scripts.reporting import key_rows
from scripts.reporting.figures import (
    build_figure,
    draw_figure,
    figure_to_csv,
    figure_to_markdown,
    math_label,
)
from scripts.reporting.forest import FAR, _limits, draw_forest
from scripts.reporting.page import _anchor, write_page
from scripts.reporting.results import Entry, build_results, collect
from scripts.reporting.spec import TableSpec, load_table
from scripts.runs.cells import Cell
from tests.unit import fake_runs

SEEDS = [1, 2, 3]


@pytest.fixture
def spec(outputs: Path) -> TableSpec:
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
    assert "Not made at this scale: table 1, " in page
    assert not (folder / "key_rows.md").exists(), "without Table 1 there are no key rows"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert command.main([*arguments, "--check"]) == 0


def test_a_page_says_how_it_was_made(spec: TableSpec, tmp_path: Path) -> None:
    finish(cells_of(spec))
    (tmp_path / "small").mkdir()
    results = {**build(spec), "seeds": [4, 5], "overrides": ["recipe.rank=2"]}
    (tmp_path / "small" / "figure3.json").write_text(json.dumps(results))
    text = write_page(tmp_path / "small").read_text(encoding="utf-8")
    assert 'make reproduce-all SCALE=small SEEDS=4,5 ARGS="recipe.rank=2"' in text


# ---------------------------------------------------------------------- pictures of tables


def table(name: str, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    spec = load_table(name)
    cells = cells_of(spec)
    made = [cell for cell in cells if cell.row not in without]
    finish(made)
    every = collect(cells)
    return build_results(spec, "tiny", SEEDS, (), [e if e.cell in made else lost(e) for e in every])


def lost(entry: Entry) -> Entry:
    return Entry(entry.cell, None, "missing", "")


def test_a_table_is_drawn_to_the_same_bytes_and_names_every_method(
    spec: TableSpec, tmp_path: Path
) -> None:
    results = table("table1", without=("adalora",))
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        assert [p.name for p in draw_forest(results, folder)] == ["table1.svg", "table1.png"]
    for name in ("table1.svg", "table1.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    svg = (tmp_path / "a" / "table1.svg").read_text(encoding="utf-8")
    for text in ("Delta-LoRA", "AdaLoRA", "ROUGE-L", "not the paper"):
        assert text in svg


def test_a_table_without_a_single_run_is_drawn(spec: TableSpec, tmp_path: Path) -> None:
    every = tuple(row.name for row in load_table("table1").rows)
    assert len(draw_forest(table("table1", without=every), tmp_path)) == 2


def test_a_control_far_off_does_not_press_the_methods_together() -> None:
    def cell(mean: float, half: float) -> dict[str, Any]:
        return {"n": 3, "mean": mean, "ci95": [mean - half, mean + half]}

    rows = [{"is_control": False}, {"is_control": False}, {"is_control": True}]
    low, high = _limits(rows, [cell(60, 1), cell(70, 1), cell(5, 1)], FAR)
    assert 50 < low < 59
    assert 71 < high < 75
    low, high = _limits(rows, [cell(60, 1), cell(70, 100), cell(65, 1)], FAR)
    assert high - low < 40, "a single wild interval is cut"
    low, high = _limits(rows, [cell(60, 2), cell(60.1, 2), cell(60.2, 2)], FAR)
    assert low < 58, "usual intervals are whole, however close the means"
    assert high > 62.2


def test_weights_are_set_as_mathematics() -> None:
    assert math_label("Fine-tuning (only W_Q and W_V)") == "Fine-tuning (only $W_Q$ and $W_V$)"


def test_a_figure_is_drawn_to_the_same_bytes(spec: TableSpec, tmp_path: Path) -> None:
    finish(cells_of(spec))
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append([path.read_bytes() for path in draw_figure(build(spec), tmp_path / name)])
    assert found[0] == found[1]


def test_a_picture_that_fails_costs_no_table(
    spec: TableSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> list[Path]:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("scripts.tables.draw_figure", broken)
    finish(cells_of(spec))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "figure3.png").write_bytes(b"of an older table")
    assert command.main(["figure3", "--scale", "tiny", "--results", str(tmp_path)]) == 0
    assert "no picture figure3: RuntimeError: no fonts" in capsys.readouterr().err
    assert (folder / "figure3.json").is_file()
    assert not (folder / "figure3.png").exists()


# ---------------------------------------------------------------------- key rows and the page


def test_the_key_rows_say_what_the_paired_differences_say(spec: TableSpec) -> None:
    results = table("table1")
    text = key_rows.to_markdown(results, ["reproduced", "undecided", "undecided"])
    assert "- Delta-LoRA against LoRA: better in 5 of 5 scores." in text
    assert "3 claims that were judged at this scale: 1 reproduced, 0 not reproduced, 2 und" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 3
    for without in ("lora", "delta_lora", "lora_scaled"):
        assert key_rows.find_rows(table("table1", without=(without,))) == []


def test_the_page_links_and_holds_no_copy_of_a_table(spec: TableSpec, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    results = table("table1")
    (folder / "table1.json").write_text(json.dumps(results))
    text = write_page(folder).read_text(encoding="utf-8")
    assert "![Table 1: E2E NLG Challenge, GPT2-Medium](table1.png)" in text
    assert "(#table-1-e2e-nlg-challenge-gpt2-medium)" in text
    assert "[values and verdicts](table1.md)" in text
    assert "C1 **" in text
    assert "±" not in text
    assert {path.name for path in folder.glob("key_rows.*")} == {
        "key_rows.md", "key_rows.svg", "key_rows.png",
    }  # fmt: skip


def test_an_anchor_is_github_s() -> None:
    results = {"number": "4b", "title": "GLUE, RoBERTa-base (all)", "table": "x"}
    assert _anchor(results) == "table-4b-glue-roberta-base-all"
