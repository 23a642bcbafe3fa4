"""The bootstrap over test items: its numbers, its bits, and how it is added to a finished run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from delta_lora.protocols import ItemScores
from scripts import item_spread as command
from scripts.runs import item_spread
from scripts.runs.building import load_task
from scripts.runs.composition import ConfigError
from scripts.runs.folder import ITEM_SPREAD, LockedError, lock, read_record
from scripts.runs.item_spread import deviations_of, resampled
from scripts.runs.run import Run
from tasks.metrics import glue, items
from tasks.metrics.java import MetricUnavailableError
from tasks.metrics.meteor import shared_process
from tests.choices import first

rng = np.random.default_rng(3)
RIGHT = (rng.random(400) < 0.8).astype(float)


def _accuracy(right: Any = RIGHT, task: str = "rte") -> dict[str, Any]:
    return resampled(ItemScores(len(right), {"accuracy": items.mean(right)}), task)


# ---------------------------------------------------------------------- numbers


def test_the_error_of_an_accuracy_is_the_binomial_one() -> None:
    found, share = _accuracy(), RIGHT.mean()
    expected = math.sqrt(share * (1 - share) / len(RIGHT))
    assert found["scores"]["accuracy"]["se"] == pytest.approx(expected, rel=0.07)
    low, high = found["scores"]["accuracy"]["ci95"]
    assert low == pytest.approx(share - 1.96 * expected, abs=0.2 * expected)
    assert high == pytest.approx(share + 1.96 * expected, abs=0.2 * expected)
    assert (found["num_items"], found["resamples"], found["missing"]) == (400, 1000, {})


def test_it_is_the_plain_bootstrap_written_out() -> None:
    """Matthews' correlation: its spread is that of scores of sets that are drawn and scored."""
    labels = rng.integers(0, 2, 150)
    guesses = np.where(rng.random(150) < 0.7, labels, 1 - labels)
    found = resampled(glue.item_scores(guesses, labels, metrics=("matthews",)), "cola")
    draws = np.random.default_rng(list(b"cola")).integers(0, 150, (1000, 150))
    plain = [glue.score(guesses[d], labels[d], metrics=("matthews",)).values for d in draws[:50]]
    whole = glue.score(guesses, labels, metrics=("matthews",)).values["matthews"]
    deviations = deviations_of(found, "matthews")
    assert deviations is not None
    expected = [values["matthews"] - whole for values in plain]
    assert deviations[:50] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_same_run_gives_the_same_bits_and_keeps_three_digits() -> None:
    found = _accuracy()
    assert json.dumps(found) == json.dumps(_accuracy())
    assert len(found["scores"]["accuracy"]["deviations"]) < 2700
    kept = deviations_of(found, "accuracy")
    assert kept is not None
    assert np.std(kept, ddof=1) == pytest.approx(found["scores"]["accuracy"]["se"], rel=1e-3)


def test_runs_of_one_task_are_resampled_together_and_tasks_apart() -> None:
    worse = RIGHT.copy()
    worse[np.flatnonzero(RIGHT)[0]] = 0  # one item more is wrong
    one, other = (deviations_of(_accuracy(r), "accuracy") for r in (RIGHT, worse))
    assert one is not None
    assert other is not None
    assert np.std(one - other) == pytest.approx(1 / 400, rel=0.1)  # of one item, not of all
    apart = deviations_of(_accuracy(task="mrpc"), "accuracy")
    assert abs(np.corrcoef(one, apart)[0, 1]) < 0.1


def test_large_test_sets_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _accuracy()
    monkeypatch.setattr(item_spread, "_DRAWN_AT_ONCE", 400 * 7)
    assert _accuracy() == whole


# ---------------------------------------------------------------------- edges


def test_equal_items_do_not_spread() -> None:
    found = _accuracy(np.ones(5))
    assert found["scores"]["accuracy"]["se"] == 0
    assert found["scores"]["accuracy"]["ci95"] == [1.0, 1.0]


def test_one_item_is_not_measured() -> None:
    found = _accuracy(np.ones(1))
    assert found["scores"] == {}
    assert "two test items or more, here are 1" in found["missing"]["accuracy"]


def test_a_score_that_some_resamples_lack_is_not_measured_and_the_others_are() -> None:
    labels, guesses = [0.0, 0.0, 0.0, 1.0], [0.1, 0.2, 0.3, 0.9]
    found = resampled(glue.item_scores(guesses, labels, metrics=("pearson",)), "stsb")
    assert "of 1000 resamples of the test set have no pearson" in found["missing"]["pearson"]
    both = ItemScores(
        4, {"mean": items.mean(guesses), "none": lambda counts: np.full(len(counts), np.nan)}
    )
    found = resampled(both, "stsb")
    assert list(found["scores"]) == ["mean"]
    assert list(found["missing"]) == ["none"]
    json.dumps(found, allow_nan=False)


def test_a_scorer_that_fails_costs_its_score_alone() -> None:
    def broken(counts: Any) -> Any:
        raise MetricUnavailableError("METEOR gave no answer")

    found = resampled(
        ItemScores(400, {"meteor": broken, "accuracy": items.mean(RIGHT)}, missing={"x": "why"}),
        "rte",
    )
    assert found["missing"] == {"x": "why", "meteor": "METEOR gave no answer"}
    assert found["scores"]["accuracy"] == _accuracy()["scores"]["accuracy"]


def test_what_is_damaged_or_of_another_schema_is_refused() -> None:
    found = _accuracy()
    assert deviations_of(found, "bleu") is None
    with pytest.raises(ValueError, match="schema 7, not 1"):
        deviations_of({**found, "schema": 7}, "accuracy")
    with pytest.raises(ValueError, match="damaged"):
        deviations_of({**found, "resamples": 10}, "accuracy")


# ---------------------------------------------------------------------- tasks


def _imperfect(task: Any, split: str) -> list[dict[str, Any]]:
    """Return predictions of which some are right, in another order than the inputs."""
    predictions = []
    for number, row in enumerate(task.inputs(split)):
        first = task.references(split)[row.id][0]
        if hasattr(row, "label"):
            given: Any = (
                float(first) if number % 3 else 1 - float(first) + number / 7 * task.is_real
            )
            said = {"input": "\t".join(row.texts)}
        else:
            given, said = (first if number % 5 else " ".join(first.split()[2:])), {}
        predictions.append({"id": row.id, "prediction": given, **said})
    return predictions[::-1]


@pytest.mark.parametrize(
    "name", first(["e2e", "glue/mrpc", "xsum", "webnlg", "glue/mnli", "glue/cola", "glue/stsb"], 2)
)
def test_the_whole_test_set_has_the_score_of_the_task(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # without Java
    shared_process().close()
    task = load_task(Run.compose([f"experiment={name}", "scale=tiny"]).config)
    task.is_real = getattr(task, "labels", ()) is None
    split = task.scored_split
    predictions = _imperfect(task, split)
    score, found = task.score(predictions, split), task.item_scores(predictions, split)
    assert found.num_items == len(task.inputs(split))
    assert set(found.of_sets) == set(score.values)
    assert set(found.of_sets) | set(found.missing) == {spec.name for spec in task.metrics}
    whole = np.ones((1, found.num_items))
    for metric, value in score.values.items():
        assert found.of_sets[metric](whole)[0] == pytest.approx(value, rel=1e-9), metric
    for metric, values in found.values.items():
        assert len(values) == found.num_items
        assert np.mean(values) == pytest.approx(score.values[metric], rel=1e-9)
    measured = resampled(found, task.name)["scores"]
    assert {name for name, each in measured.items() if not each["se"] > 0} == set()


# ---------------------------------------------------------------------- runs that are done


@pytest.fixture(scope="module")
def run_and_task(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    outputs = tmp_path_factory.mktemp("outputs")
    run = Run.compose(["experiment=glue/rte", "scale=tiny", f"paths.outputs={outputs}"])
    run.meaning = {"task": {"name": "rte"}, "method": {"name": "lora"}}
    return run, load_task(run.config)


@pytest.fixture
def folder(run_and_task: tuple[Run, Any], tmp_path: Path) -> Path:
    """A finished run on RTE that is wrong about every fourth example."""
    run, task = run_and_task
    folder = tmp_path / "outputs" / run.name
    folder.mkdir(parents=True)
    rows = task.inputs(task.scored_split)
    predictions = [
        {
            "id": row.id,
            "input": "\t".join(row.texts),
            "prediction": int(row.label) if number % 4 else 1 - int(row.label),
        }
        for number, row in enumerate(rows)
    ]
    OmegaConf.save(run.config, folder / "config.yaml", resolve=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
    metrics = {**task.score(predictions, task.scored_split).values, "best_epoch/accuracy": 0.9}
    record = {"signature": run.name, "status": "completed", "metrics": metrics}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_it_is_added_to_a_finished_run_whose_record_stays_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "record.json").read_bytes()
    assert "item_spread" not in read_record(folder)
    assert command.main(["--outputs", str(folder.parent)]) == 0
    assert "1 of 1 runs measured, 0 were before" in capsys.readouterr().out
    assert (folder / "record.json").read_bytes() == before
    spread = read_record(folder)["item_spread"]
    share, num_items = read_record(folder)["metrics"]["accuracy"], spread["num_items"]
    expected = math.sqrt(share * (1 - share) / num_items)
    assert spread["scores"]["accuracy"]["se"] == pytest.approx(expected, rel=0.07)
    written = (folder / ITEM_SPREAD).stat().st_mtime_ns
    assert command.main(["--outputs", str(folder.parent)]) == 0
    assert "0 of 1 runs measured, 1 were before" in capsys.readouterr().out
    assert (folder / ITEM_SPREAD).stat().st_mtime_ns == written
    assert command.main(["--again", str(folder)]) == 0
    assert read_record(folder)["item_spread"] == spread


def test_predictions_that_do_not_give_the_record_s_scores_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "predictions.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    flipped = {**json.loads(first), "prediction": 1 - json.loads(first)["prediction"]}
    path.write_text(json.dumps(flipped) + "\n" + "".join(others))
    assert command.main([str(folder)]) == 1
    captured = capsys.readouterr()
    assert "they are not of one run" in captured.err
    assert "1 failed" in captured.out
    path.write_text("".join(others))
    assert command.main([str(folder)]) == 1
    assert "no prediction for 1 of" in capsys.readouterr().err
    assert not (folder / ITEM_SPREAD).exists()


def test_a_run_that_is_held_or_has_no_predictions_is_refused(
    folder: Path, run_and_task: tuple[Run, Any]
) -> None:
    with lock(folder, wait=False), pytest.raises(LockedError):
        item_spread.add(folder, run_and_task[1])
    (folder / "predictions.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        item_spread.add(folder, run_and_task[1])
    (folder / "predictions.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds no predictions"):
        item_spread.add(folder, run_and_task[1])


def test_runs_without_scores_are_left_alone_unless_they_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"signature": "x", "status": "failed", "error": {"message": "out of memory"}}
    (folder / "record.json").write_text(json.dumps(failed))
    assert command.main(["--outputs", str(folder.parent)]) == 0
    assert "1 have no scores" in capsys.readouterr().out
    assert command.main([str(folder)]) == 1
    assert "not completed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([str(folder / "nowhere")])


def test_a_score_that_could_not_be_computed_then_can_be_measured_now(folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    record["metrics"] = {"other": 1.0}
    (folder / "record.json").write_text(json.dumps(record))
    assert command.main([str(folder)]) == 0
    assert "accuracy" in read_record(folder)["item_spread"]["scores"]
