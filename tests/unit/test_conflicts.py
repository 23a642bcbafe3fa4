"""No override of all runs undoes what a row is: of a table, a sweep, the audit."""

from __future__ import annotations

import pytest

from scripts import audit, reproduce, sweep
from scripts.reporting.spec import load_table
from scripts.runs.cells import parse_overrides
from scripts.runs.conflicts import check_extra, meet
from tests.choices import firsts
from tests.unit import fake_runs

TABLES = ("table1", "table2", "table3", "table4")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs.install(monkeypatch.setattr)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_without_training_stays_one(name: str) -> None:
    table = load_table(name)
    with pytest.raises(ValueError, match=r"'untrained'.*set recipe\.max_steps"):
        table.cells(scale="tiny", seeds=[1], extra=["trainer.max_steps=60"])


def test_the_documented_way_shortens_every_row_but_that_one() -> None:
    cells = load_table("table1").cells(scale="tiny", seeds=[1], extra=["recipe.max_steps=60"])
    steps = {cell.row: cell.run.config.trainer.max_steps for cell in cells}
    assert steps.pop("untrained") == 0
    assert set(steps.values()) == {60}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("trainer.max_steps=60", ["'untrained'", "recipe.max_steps"]),
        ("+trainer.max_steps=60", ["'untrained'", "recipe.max_steps"]),
        ("score_references=false", ["'untrained'", "leave it out"]),
        ("method.dropout=0.2", ["'lora'", "'lora_no_dropout'", "recipe.lora_dropout"]),
        ("method.alpha=8", ["'lora'", "'lora_scaled'", "recipe.alpha"]),
        ("method.learning_rate=1", ["'lora'", "'lora_high_lr'", "recipe.learning_rate.low_rank"]),
        ("method.allow_dropout=true", ["'delta_lora'", "'delta_lora_dropout'"]),
    ],
)
def test_a_conflict_names_row_key_and_way_out(extra: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as caught:
        load_table("table1").cells(scale="tiny", seeds=[1], extra=[extra])
    for word in [repr(extra), *words]:
        assert word in str(caught.value)


def test_what_all_rows_read_from_the_recipe_is_free() -> None:
    extra = ["recipe.lora_dropout=0.2", "recipe.rank=2", "recipe.max_steps=3", "predict=false"]
    assert load_table("table1").cells(scale="tiny", seeds=[1], extra=extra)


def test_what_the_runs_of_a_table_set_is_refused() -> None:
    with pytest.raises(ValueError, match="init_from"):
        load_table("table4").cells(scale="tiny", seeds=[1], extra=["init_from=null"])
    for override in ("experiment=webnlg", "task=webnlg"):
        with pytest.raises(ValueError, match="what the file in configs says"):
            parse_overrides(override)


@pytest.mark.parametrize(
    ("one", "other", "do"),
    [
        ("trainer.max_steps", "trainer.max_steps", True),
        ("method.peft", "method.peft.r", True),
        ("method.peft.r", "method.peft", True),
        ("recipe.rank", "recipe.rank_max", False),
        ("method", "method.dropout", False),  # a choice comes before values, which win
        ("model", "model.path", False),
    ],
)
def test_keys_meet_where_one_holds_the_other(one: str, other: str, do: bool) -> None:
    assert meet(one, other) is do


def test_what_no_row_sets_is_free() -> None:
    check_extra(["trainer.device=cpu", "task.max_inputs=5"], [{"a": ["trainer.max_steps=0"]}])


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    firsts(
        [
            ("rank", "method.rank=4", "recipe.rank"),
            ("rank", "recipe.rank=4", "sets the axis rank"),
            ("dropout", "method.dropout=0.1", "recipe.lora_dropout"),
            ("lambda_k", "method={start_step: 3}", "method is set by the rows of configs/table"),
            ("lambda_k", "recipe.update_ratio=3", "'lora_scaled lambda=0.25'"),
        ],
        3,
    ),
)
def test_a_sweep_keeps_its_axes_and_references(
    name: str, extra: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--scale", "tiny", "--seeds", "1", "--plan", "--args", f"'{extra}'"]
    assert sweep.main([name, *where]) == 2
    assert words in capsys.readouterr().err


def test_commands_say_it_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    where = ["--scale", "tiny", "--results", str(tmp_path), "--args"]
    assert reproduce.main(["table1", *where, "trainer.max_steps=60"]) == 2
    assert "'untrained'" in capsys.readouterr().err
    assert sweep.main(["rank", *where, "method.rank=4"]) == 2
    assert "recipe.rank" in capsys.readouterr().err
    assert audit.main([*where, "method.dropout=0.2"]) == 2
    assert "'method.dropout=0.2' would undo" in capsys.readouterr().err
    assert audit.main([*where, "method.start_step=3"]) == 2
    assert "Lora has no setting 'start_step'" in capsys.readouterr().err
