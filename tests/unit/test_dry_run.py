"""Planned against counted: every row of Tables 1 to 4, on small models and as committed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import dry_run
from scripts.reporting.spec import ROOT, load_table
from tests.choices import firsts

ROWS = [(name, row.name) for name in dry_run.TABLES for row in load_table(name).rows]
#: what is told by shapes alone, so that it must be equal.
EXACT = ("trainable", "updatable", "total", "weights", "gradients", "optimizer", "method")
#: of activations and of a step's peak; small models show differences that full ones do not.
WITHIN = 0.03
#: of an adapter, beside whose few tensors its description weighs something here.
WITHIN_ADAPTER = 0.04


@pytest.mark.parametrize(
    ("table", "name"),
    firsts([*ROWS[::4], *(row for row in ROWS if row not in ROWS[::4])], len(ROWS[::4])),
)
def test_a_row_takes_what_was_planned(table: str, name: str) -> None:
    spec = load_table(table)
    row = next(row for row in spec.rows if row.name == name)
    settings = dry_run.row_settings(spec, row, is_small=True)
    planned, measured = dry_run.plan(settings), dry_run.measure(settings)
    assert set(planned) == set(measured)
    for key, value in planned.items():
        if key in EXACT:
            assert value == measured[key], key
        else:
            within = WITHIN_ADAPTER if key == "adapter" else WITHIN
            assert value == pytest.approx(measured[key], rel=within), key
    assert ("peak" in planned) == (name != "untrained")


def committed() -> dict[str, Any]:
    return json.loads((ROOT / "results" / "plan" / "dry_run.json").read_text(encoding="utf-8"))


def test_the_committed_dry_run_has_every_row_and_fits_the_plan_of_today() -> None:
    content = committed()
    assert content["models"] == "paper"
    assert list(content["rows"]) == [f"{table}/{name}" for table, name in ROWS]
    for key, row in content["rows"].items():
        spec = load_table(key.partition("/")[0])
        wanted = next(r for r in spec.rows if r.name == key.partition("/")[2])
        assert row["settings"] == dry_run.row_settings(spec, wanted, is_small=False), key
        assert row["planned"] == dry_run.plan(row["settings"]), key
    assert dry_run.off_rows(content) == []
    page = (ROOT / "results" / "plan" / "dry_run.md").read_text(encoding="utf-8")
    assert page == dry_run.page(content)


def test_a_number_that_is_off_is_named_and_ends_the_command_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def measure(settings: dict[str, Any]) -> dict[str, int]:
        calls.append(settings)
        return dry_run.plan(settings)

    monkeypatch.setattr(dry_run, "measure", measure)
    out = tmp_path / "dry.json"
    command = ["--tables", "table2", "--small", "--out", str(out)]
    assert dry_run.main(command) == 0
    assert len(calls) == len(load_table("table2").rows)
    content = json.loads(out.read_text())
    changed = copy.deepcopy(content)
    changed["rows"]["table2/lora"]["measured"]["peak"] *= 2
    out.write_text(json.dumps(changed))
    capsys.readouterr()
    assert dry_run.main(command) == 1
    assert "off by more than 10%: table2/lora: peak planned" in capsys.readouterr().err
    assert len(calls) == len(load_table("table2").rows)  # nothing was measured again
    assert dry_run.main(["--tables", "table7"]) == 2
    assert "table7" in capsys.readouterr().err


def test_a_file_of_other_models_is_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "dry.json"
    out.write_text(json.dumps({"schema": 1, "device": "cpu", "models": "paper", "rows": {}}))
    with pytest.raises(SystemExit, match="other models or packages"):
        dry_run.main(["--tables", "table2", "--small", "--out", str(out)])
