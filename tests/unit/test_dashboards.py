"""Views and reports of Weights & Biases: made without a network, of the runs of their table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import dashboard
from scripts.dashboards import panels, subjects, views
from scripts.reporting.spec import load_table
from scripts.runs.mirroring import group_of
from scripts.runs.run import Run
from tests.unit import fake_runs

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # of wandb-workspaces


@pytest.fixture(autouse=True)
def _of_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def made(path: Path, *arguments: str) -> dict[str, Any]:
    """Give the command; return what it would save."""
    command = [*arguments, "--scale", "tiny", "--dry-run", str(path), "--project", "mine"]
    assert dashboard.main(command) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_view_and_a_report_show_the_runs_of_their_table_and_no_others(tmp_path: Path) -> None:
    content = made(tmp_path / "made.json", "table1")
    (view,), (report,) = content["views"], content["reports"]
    assert (view["displayName"], view["project"]) == ("table1 at tiny", "mine")
    assert (report["displayName"], report["project"]["name"]) == ("table1 at tiny", "mine")
    groups = {group_of(c.run) for c in load_table("table1").cells(scale="tiny", seeds=(1, 2))}
    grids = [b for b in report["spec"]["blocks"] if b["type"] == "panel-grid"]
    assert [grid["metadata"]["runSets"][0]["name"] for grid in grids] == [
        "results at tiny", "table1",
    ]  # fmt: skip
    for runs in (view["spec"]["section"]["runSets"][0], grids[1]["metadata"]["runSets"][0]):
        (chosen,) = runs["filters"]["filters"]
        assert chosen["key"] == {"section": "run", "name": "group"}
        assert set(chosen["value"]) == groups
        assert runs["grouping"] == [{"section": "run", "name": "group"}]
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [
        "Scores", "Settings", "Curves", "Delta-LoRA", "Cost", "Predictions",
    ]  # fmt: skip
    bars = {panel["config"]["chartTitle"]: panel["config"] for panel in sections[0]["panels"]}
    assert list(bars) == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    assert bars["BLEU"]["metrics"] == ["test/bleu"]
    assert (bars["BLEU"]["groupBy"], bars["BLEU"]["groupAgg"]) == ("group", "mean")
    assert "__id__" not in json.dumps(content)  # drawn anew each time


def test_a_report_holds_our_page_with_intervals_and_verdicts_and_links_every_record(
    tmp_path: Path,
) -> None:
    (report,) = made(tmp_path / "made.json", "table6")["reports"]
    pages = [b["content"] for b in report["spec"]["blocks"] if b["type"] == "markdown-block"]
    page = (dashboard.ROOT / "results/tiny/table6.md").read_text()
    assert pages[0] == "\n".join(x for x in page.split("\n") if not x.startswith("![")).strip()
    table = json.loads((dashboard.ROOT / "results/tiny/table6.json").read_text())
    for row in table["rows"]:
        for name in row["runs"]:
            assert f"/entity/mine/runs/{name}/files/record.json)" in pages[1]
    assert len(pages[1].splitlines()) == len(table["rows"])


def test_a_report_without_results_says_how_they_are_made(tmp_path: Path) -> None:
    (report,) = made(tmp_path / "made.json", "rank", "--results", str(tmp_path))["reports"]
    (page,) = [b["content"] for b in report["spec"]["blocks"] if b["type"] == "markdown-block"]
    assert "`make sweep SWEEP=rank SCALE=tiny` makes them" in page
    kinds = [panel["viewType"] for panel in _panels(report)]
    assert {"Parallel Coordinates Plot", "Scatter Plot", "Parameter Importance"} <= set(kinds)
    keys = panels.keys_of(report)
    assert {"config.recipe.rank", "config.choices.method", "validation/loss.min"} <= keys


def _panels(report: dict[str, Any]) -> list[dict[str, Any]]:
    grids = [b["metadata"] for b in report["spec"]["blocks"] if b["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]


def test_all_are_those_that_have_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/table6.json").write_text('{"rows": []}')
    command = ["all", "--scale", "tiny", "--dry-run", "--results", str(tmp_path)]
    assert dashboard.main(command) == 0
    out, err = capsys.readouterr()
    assert [view["displayName"] for view in json.loads(out)["views"]] == ["table6 at tiny"]
    assert "lambda_k: no results at scale tiny, left out" in err
    (tmp_path / "tiny/table6.json").unlink()
    with pytest.raises(SystemExit):
        dashboard.main(command)
    assert "tiny holds no results of a table or sweep" in capsys.readouterr().err


def test_a_table_of_several_tasks_has_a_view_of_each() -> None:
    spec = load_table("table4")
    subject = subjects.of_table(dataclasses.replace(spec, rows=spec.rows[:1]), "tiny")
    found = views.views_of(subject, entity="me", project="mine")
    assert [view.name for view in found] == [f"table4 {run} at tiny" for run in spec.runs]
    assert len(found) == 8
    cola = next(view for view in found if "cola" in view.name)
    shown = panels.keys_of(views.content_of(cola))
    assert {m for m in shown if m.startswith("test/")} == {
        f"test/{c.metric}"
        for c in (*spec.columns, *spec.side_columns)
        if c.run is not None and "cola" in c.run
    }


def test_a_run_is_part_of_every_table_and_sweep_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tables share runs: whichever was made first, all of them are found."""
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(subjects, "table_names", lambda: ["table1", "table2", "table6"])
    monkeypatch.setattr(subjects, "sweep_names", lambda: ["lambda_k"])
    found = subjects.membership({"e2e"}, "tiny")

    def of(*overrides: str) -> list[str]:
        return found.get(
            group_of(Run.compose(["experiment=e2e", "scale=tiny", "seed=3", *overrides])), []
        )

    assert of("method=lora") == ["table1", "table6"]
    assert of("method=adalora") == ["table1"]
    grid = ("method=delta_lora", "method.update_ratio=2", "method.start_step=20")
    assert of(*grid) == ["lambda_k"]
    assert of("method=lora_no_dropout") == ["table1", "table6", "lambda_k"]
    assert of("method=lora", "recipe.rank=2") == []
    assert not [group for group in found if "webnlg" in group]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "saving a view needs a key, but no key is configured; run `wandb login`"),
        ([], {"WANDB_API_KEY": "0123456789abcdef" * 3}, "whose project? name it with --entity"),
    ],
)
def test_what_saving_needs_is_asked_for(
    arguments: list[str],
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        dashboard.main(["table1", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
