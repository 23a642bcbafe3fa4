"""Views of Weights & Biases: made without a network, of keys that runs have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from scripts import dashboard
from scripts.reporting import views
from scripts.reporting.spec import load_table

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # of wandb-workspaces


@pytest.fixture(autouse=True)
def _of_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_a_view_shows_the_runs_of_its_table_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "views.json"
    command = ["table1", "--scale", "tiny", "--dry-run", str(path), "--project", "mine"]
    assert dashboard.main(command) == 0
    (view,) = json.loads(path.read_text())
    assert (view["displayName"], view["project"]) == ("table1 at tiny", "mine")
    (runs,) = view["spec"]["section"]["runSets"]
    (chosen,) = runs["filters"]["filters"]
    assert chosen["key"] == {"section": "run", "name": "group"}
    groups = {cell.run.group for cell in load_table("table1").cells(scale="tiny", seeds=(1, 2))}
    assert set(chosen["value"]) == groups
    assert runs["grouping"] == [{"section": "run", "name": "group"}]
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [
        "Scores", "Curves", "Delta-LoRA", "Cost", "Predictions",
    ]  # fmt: skip
    bars = {panel["config"]["chartTitle"]: panel["config"] for panel in sections[0]["panels"]}
    assert list(bars) == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    assert bars["BLEU"]["metrics"] == ["test/bleu"]
    assert (bars["BLEU"]["groupBy"], bars["BLEU"]["groupAgg"]) == ("group", "mean")
    assert "__id__" not in path.read_text()  # drawn anew each time


def test_a_table_of_several_tasks_has_a_view_of_each() -> None:
    spec = load_table("table4")
    spec = dataclasses.replace(spec, rows=spec.rows[:1])
    found = views.views_of(spec, scale="tiny", entity="me", project="mine")
    assert [view.name for view in found] == [f"table4 {run} at tiny" for run in spec.runs]
    assert len(found) == 8
    cola = next(view for view in found if "cola" in view.name)
    shown = views.metrics_of(views.content_of(cola))
    assert {m for m in shown if m.startswith("test/")} == {
        f"test/{c.metric}"
        for c in (*spec.columns, *spec.side_columns)
        if c.run is not None and "cola" in c.run
    }


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
