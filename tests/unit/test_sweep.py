"""Sweeps: their files, their runs, their view; on runs of no length."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from scripts import sweep
from scripts.reporting import stats
from scripts.reporting.results import Entry
from scripts.reporting.spec import ROOT
from scripts.runs.run import Run
from scripts.runs.scale import SCALES
from scripts.sweeping.content import CHOSEN_ON, SHOWN, build, validation_value
from scripts.sweeping.page import last_line, to_markdown
from scripts.sweeping.pictures import draw
from scripts.sweeping.spec import SweepSpec, load_sweep, parse_values, sweep_names
from scripts.sweeping.view import write
from tests.unit import fake_runs

VALUES = "lambda=1,2 K=0,4"
LAUNCH = (
    "import sys; from pathlib import Path; from tests.unit import fake_runs; fake_runs.install(); "
    "fake_runs.OUTPUTS = Path(sys.argv[1]); from scripts.sweep import main; "
    "sys.exit(main(sys.argv[2:]))"
)


@pytest.fixture
def fake(outputs: Path, tmp_path: Path) -> Path:
    """Make runs take no time; return the folder of what a sweep makes of them."""
    return tmp_path


def arguments_for(folder: Path, *more: str, values: str = VALUES) -> list[str]:
    return [
        "lambda_k", "--scale", "tiny", "--seeds", "1,2", "--workers", "1",
        "--values", values, "--results", str(folder / "results"), *more,
    ]  # fmt: skip


def view(folder: Path) -> Path:
    return folder / "results" / "tiny" / "sweeps" / "lambda_k"


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((view(folder) / "sweep.json").read_text())


def row_of(content: dict[str, Any], point: str) -> dict[str, Any]:
    return next(row for row in content["rows"] if row["point"] == point)


# ---------------------------------------------------------------------- the files


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sweep_names())
def test_every_file_is_read_at_every_scale(name: str, scale: str) -> None:
    points = load_sweep(name, scale).points()
    assert len({point.name for point in points}) == len(points)
    assert any(point.is_reference for point in points)


@pytest.mark.parametrize("name", sweep_names())
def test_every_method_of_a_sweep_has_the_same_budget(name: str) -> None:
    spec = load_sweep(name, "tiny")
    firsts = {point.method: point for point in reversed(spec.points())}
    budgets = set()
    for point in firsts.values():
        base = spec.experiments[0].overrides
        config = Run.compose([*base, *point.overrides, "scale=tiny"]).config
        budgets.add((config.trainer.max_steps, config.trainer.batch_size, config.trainer.schedule))
    assert len(budgets) == 1
    counts = {m.name: sum(p.method == m.name for p in spec.points()) for m in spec.methods}
    assert len(set(counts.values())) == 1


def test_values_take_the_place_of_those_of_the_file() -> None:
    spec = load_sweep("lambda_k", "paper", parse_values("lambda=8"))
    assert [axis.values for axis in spec.axes] == [("8",), ("0", "100", "500", "1000")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lamda_k"], "unknown sweep 'lamda_k'; did you mean 'lambda_k'?"),
        (["lambda_k", "--values", "mu=1"], "no axis 'mu'; it has: lambda, K"),
        (["lambda_k", "--values", "lambda"], "write AXIS=VALUE,VALUE"),
        (["lambda_k", "--values", "K=1,1"], "axis K: values=['1', '1']; use at least one"),
        (["lambda_k", "--seeds", "1,1"], "a seed is named twice"),
        (["lambda_k", "--args", "method.start_step=3"], "sets the axis K of sweep lambda_k"),
        (["lambda_k", "--args", "method=lora"], "method is set by"),
    ],
)
def test_bad_input_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*arguments, "--scale", "tiny", "--plan"]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- whole commands


def test_a_plan_runs_nothing(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(arguments_for(fake, "--plan")) == 0
    out = capsys.readouterr().out
    assert "lambda_k: 14 runs: 0 done, 0 partial, 0 stale, 0 failed, 14 missing" in out
    assert "to run: 14" in out
    assert not any(fake.iterdir())


@pytest.mark.long
def test_a_grid_that_was_killed_and_continued_gives_the_same_bytes(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(arguments_for(fake)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "14 done"
    undisturbed = {path.name: path.read_bytes() for path in view(fake).iterdir()}
    kinds = ("json", "csv", "md", "svg", "png")
    assert undisturbed.keys() == {*(f"sweep.{kind}" for kind in kinds), "pivot.csv"}
    pivot = undisturbed["pivot.csv"].decode().splitlines()
    assert pivot[0] == "panel,score,line,λ = 1,λ = 2"
    assert pivot[1].startswith('e2e: Delta-LoRA,"BLEU, test split",K = 0,')
    assert len(pivot) == 1 + 2 * 4

    other = fake / "other"
    wait = arguments_for(other, "--args", "fake.wait=delta_lora:1:2:4")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(other / "outputs"), *wait], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    calls, deadline = fake_runs.calls_file(other / "outputs"), time.monotonic() + 120
    while not (calls.exists() and len(calls.read_text().splitlines()) >= 4):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not view(other).exists()
    monkeypatch.setattr(fake_runs, "OUTPUTS", other / "outputs")
    assert sweep.main(arguments_for(other)) == 0
    assert {path.name: path.read_bytes() for path in view(other).iterdir()} == undisturbed
    assert len(calls.read_text().splitlines()) == 14 + 1  # the one that was killed, again


def test_a_refused_a_failed_and_a_held_cell_cost_themselves_only(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "fake.fail=delta_lora:2:1:0 fake.lock=delta_lora:1:2:4"
    grid = "lambda=1,2,-1 K=0,4"
    assert sweep.main(arguments_for(fake, "--args", wrong, values=grid)) == 1
    said = capsys.readouterr()
    assert "lambda=2 K=4 on e2e, seed 1: left: process 7 is already working in" in said.out
    error = said.err
    assert (
        "refused: delta_lora lambda=-1 K=0 on e2e: method.update_ratio=-1 is not allowed" in error
    )
    assert error.splitlines()[-1] == (
        "12 done, 1 failed, 6 refused, 1 held by another process: "
        "Delta-LoRA, λ = 1, K = 0 on e2e, seed 2; Delta-LoRA, λ = 2, K = 4 on e2e, seed 1; "
        "Delta-LoRA, λ = -1, K = 0 on e2e, seeds 1, 2; "
        "Delta-LoRA, λ = -1, K = 4 on e2e, seeds 1, 2; "
        "LoRA, α × (1 + λ), no dropout, λ = -1 on e2e, seeds 1, 2"
    )
    page = (view(fake) / "sweep.md").read_text()
    for line in (
        "- Delta-LoRA, λ = 1, K = 0 on e2e, seed 2: failed: RuntimeError: loss is &lt;nan>",
        "- Delta-LoRA, λ = 2, K = 4 on e2e, seed 1: held by another process: another process",
        "- Delta-LoRA, λ = -1, K = 4 on e2e, seeds 1, 2: refused: method.update_ratio=-1",
        "12 done, 1 failed, 6 refused, 1 held by another process.",
    ):
        assert line in page
    with (view(fake) / "sweep.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 20
    assert sum(line["state"] == "done" and float(line["bleu"]) > 1 for line in lines) == 12

    assert sweep.main(arguments_for(fake, values=grid)) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("14 done, 6 refused: ")
    assert sweep.main(arguments_for(fake)) == 0


@pytest.mark.long
def test_what_is_committed_follows_from_the_records(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(arguments_for(fake)) == 0
    assert sweep.main(arguments_for(fake, "--accept")) == 0
    assert len(list((fake / "results" / "runs" / "tiny").iterdir())) == 14
    monkeypatch.setattr(fake_runs, "OUTPUTS", fake / "no run is here")
    assert sweep.main(arguments_for(fake, "--check")) == 0
    assert "follows from its records, byte for byte" in capsys.readouterr().out
    (view(fake) / "sweep.csv").write_text("other")
    assert sweep.main(arguments_for(fake, "--check")) == 1
    assert "sweep.csv differs from what its records give" in capsys.readouterr().out


def test_where_every_cell_is_refused_nothing_is_run(
    fake: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(arguments_for(fake, "--args", "recipe.rank=0")) == 2
    assert "error: sweep lambda_k: recipe.rank=0" in capsys.readouterr().err
    assert not outputs.exists()
    assert not view(fake).exists()


def test_what_does_not_compose_is_refused_alone(fake: Path) -> None:
    spec = load_sweep("rank", "tiny", parse_values("rank=2,["))
    cells, refused = spec.cells(scale="tiny", seeds=[1])
    assert {cell.row for cell in cells} >= {"lora rank=2", "delta_lora rank=2"}
    assert ("lora rank=[", "e2e") in refused
    with pytest.raises(ValueError, match=r"unknown key 'recipe\.rnk'"):
        spec.cells(scale="tiny", seeds=[1], extra=["recipe.rnk=3"])


# ---------------------------------------------------------------------- statistics


def test_holm_corrects_as_in_the_textbook() -> None:
    # In order: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 no less than the one before it.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []
    assert stats.holm([0.9]) == [0.9]


def test_the_paired_test_is_that_of_scipy() -> None:
    left, right = {1: 1.0, 2: 2.5, 3: 2.0, 9: 7.0}, {1: 0.5, 2: 1.0, 3: 2.5}
    expected = ttest_rel([1.0, 2.5, 2.0], [0.5, 1.0, 2.5]).pvalue
    assert stats.paired_p_value(left, right) == pytest.approx(expected, rel=1e-12)
    assert stats.paired_p_value({1: 1.0}, {1: 2.0}) is None
    assert stats.paired_p_value({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}) == 1.0
    assert stats.paired_p_value({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}) == 0.0


@pytest.fixture
def grid(fake: Path) -> Callable[..., dict[str, Any]]:
    """Return the content of a 2 x 2 grid whose scores are given by cell and seed."""

    def make(
        tested: dict[str, Sequence[float]], losses: dict[str, Sequence[float]]
    ) -> dict[str, Any]:
        spec: SweepSpec = load_sweep("lambda_k", "tiny", parse_values(VALUES))
        cells, refused = spec.cells(scale="tiny", seeds=[1, 2, 3])
        entries = []
        for cell in cells:
            name = cell.row.removeprefix("delta_lora ")
            scores, own = tested.get(name, [0.1] * 3), losses.get(name, [3.0] * 3)
            if cell.seed > len(scores):
                entries.append(Entry(cell, None, "missing", ""))
                continue
            record = fake_runs.record(cell.run)
            record["metrics"]["bleu"] = scores[cell.seed - 1]
            record["training"]["validation"][-1]["loss"] = own[cell.seed - 1]
            entries.append(Entry(cell, record, "done", ""))
        return build(spec, "tiny", [1, 2, 3], [], entries, refused)

    return make


def test_the_best_is_chosen_on_validation_and_its_test_score_stands_beside(
    grid: Callable[..., dict[str, Any]],
) -> None:
    content = grid(
        {"lambda=1 K=0": [0.5, 0.6, 0.7], "lambda=2 K=4": [0.3, 0.4, 0.5]},
        {"lambda=1 K=0": [2.0, 2.0, 2.1], "lambda=2 K=4": [1.0, 1.1, 1.2]},
    )
    (panel,) = content["panels"]
    assert content["rows"][panel["best"][SHOWN]["cell"]]["point"] == "delta_lora lambda=1 K=0"
    (chosen,) = panel["chosen"]
    row = content["rows"][chosen["cell"]]
    assert row["point"] == "delta_lora lambda=2 K=4"
    assert row[SHOWN]["mean"] == pytest.approx(40.0)
    assert [content["rows"][item["cell"]]["point"] for item in chosen["against"]] == [
        "lora_scaled lambda=2", "lora_no_dropout"
    ]  # fmt: skip
    assert chosen["against"][0]["difference"] == pytest.approx(30.0)
    page = to_markdown(content)
    assert "Chosen: **Delta-LoRA, λ = 2, K = 4**" in page
    assert "BLEU, test split 40.00 ± 24.84 (3)" in page
    assert re.search(r"\| K = 0 +\| 60\.00 ± 24\.84 \(3\) ★ ", page) is None  # labels of lines
    assert re.search(r"\| 0 +\| 60\.00 ± 24\.84 \(3\) ★ ", page)
    assert re.search(r"\| 4 +\| 10\.00 ± 0\.00 \(3\) .*\| 40\.00 ± 24\.84 \(3\) .*◆ ", page)


def test_what_cannot_be_told_from_the_best_is_marked(
    grid: Callable[..., dict[str, Any]],
) -> None:
    content = grid(
        {
            "lambda=1 K=0": [0.50, 0.60, 0.70],
            "lambda=2 K=0": [0.505, 0.59, 0.70],  # differs by less than the seeds do
            "lambda=1 K=4": [0.40, 0.501, 0.60],  # lower by 0.1 whatever the seed
            "lambda=2 K=4": [0.9],  # one seed is never the best and not compared
        },
        {},
    )
    (panel,) = content["panels"]
    names = [row["point"].removeprefix("delta_lora ") for row in content["rows"]]
    best = panel["best"][SHOWN]
    assert names[best["cell"]] == "lambda=1 K=0"
    assert [names[cell] for cell in best["tied"]] == ["lambda=2 K=0"]
    assert best["compared"] == 2
    cell = str(names.index("lambda=1 K=4"))
    bests, others = [50.0, 60.0, 70.0], [40.0, 50.1, 60.0]
    assert best["p"][cell] == pytest.approx(2 * ttest_rel(bests, others).pvalue)  # Holm: 2 tests


def test_a_validation_score_is_that_of_the_weights_that_are_tested() -> None:
    entries = [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 2.0}]
    training = {"validation": entries, "chosen_step": 5}
    assert validation_value({"training": training}, "loss") == 1.0
    assert validation_value({"training": {**training, "chosen_step": 7}}, "loss") is None
    assert validation_value({"training": {**training, "chosen_step": 10}}, "f1") is None
    entries[1]["loss"] = math.nan
    assert validation_value({"training": {**training, "chosen_step": 10}}, "loss") is None


# ---------------------------------------------------------------------- the picture


def test_the_heat_map_says_what_the_content_says(
    grid: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    content = grid(
        {"lambda=1 K=0": [0.5, 0.6, 0.7], "lambda=2 K=0": [0.5, 0.59, 0.69],
         "lambda=2 K=4": [0.2, 0.3]},
        {"lambda=1 K=0": [1.0, 1.1, 1.2]},
    )  # fmt: skip
    row_of(content, "delta_lora lambda=2 K=4")["all_runs"][2]["state"] = "failed"
    empty = row_of(content, "delta_lora lambda=1 K=4")
    empty["all_runs"] = [{**run, "state": "refused"} for run in empty["all_runs"]]
    for measure in (CHOSEN_ON, SHOWN):
        empty[measure] = {"mean": None, "std": None, "n": 0, "half": None, "values": {}}
    files = draw(content, tmp_path)
    assert [path.name for path in files] == ["sweep.svg", "sweep.png"]
    svg = files[0].read_text()
    for text in ("★ 60.00", "★ 1.100", "± 24.84, n = 3", "n = 2", "refused", "K = 4", "λ",
                 "BLEU, test split", "Loss, validation split"):  # fmt: skip
        assert f">{text}<" in svg or text in svg, text
    assert svg.count("#c62828") == 2  # the failed one, in both heat maps
    assert svg.count("fill: url(#h") == 2  # the missing one is hatched
    assert "stroke-dasharray: 1.1" in svg  # the dotted frame
    again = tmp_path / "again"
    again.mkdir()
    assert [p.read_bytes() for p in draw(content, again)] == [p.read_bytes() for p in files]


def test_a_page_says_where_the_choice_is_not_independent(
    grid: Callable[..., dict[str, Any]],
) -> None:
    content = grid({}, {})
    assert "on the same split" not in to_markdown(content)
    content["scores"]["e2e"][SHOWN]["split"] = "validation"  # as GLUE, whose test labels are hidden
    page = to_markdown(content)
    assert "**Chosen and scored on the same split**" in page
    assert "### BLEU, validation split" in page


@pytest.mark.parametrize("name", ["rank", "learning_rate"])
def test_one_axis_gives_one_heat_map_with_a_line_a_method(
    name: str, fake: Path, tmp_path: Path
) -> None:
    values = {"rank": "rank=2,4", "learning_rate": "learning_rate=1e-3,1e-2"}[name]
    spec = load_sweep(name, "tiny", parse_values(values))
    cells, refused = spec.cells(scale="tiny", seeds=[1])
    entries = [Entry(cell, fake_runs.record(cell.run), "done", "") for cell in cells]
    content = build(spec, "tiny", [1], [], entries, refused)
    (panel,) = content["panels"]
    assert panel["lines"] == [method.label for method in spec.methods]
    assert len(panel["chosen"]) == len(spec.methods)  # each method's own best value
    assert "One seed decides nothing" in to_markdown(content)
    assert len(write(content, tmp_path / "view")) == 6
    assert last_line(content) == f"{len(cells)} done"
