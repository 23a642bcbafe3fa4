"""Parts of a run that need no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import open_dict

from delta_lora.protocols import MetricSpec
from scripts.runs import execution
from scripts.runs.mirroring import facts_of, group_of, title_of
from scripts.runs.run import Run


class Seen:
    """A mirror that keeps what it is told."""

    last: Any = None

    def begin(self, facts: Any) -> None:
        self.facts, self.end = facts, None
        Seen.last = self

    def log(self, step: int, values: Any) -> None:
        pass

    def close(self, status: str, error: str = "") -> None:
        self.end = (status, error)


class OfATask:
    """As much of a task as a mirror sees."""

    metrics = (MetricSpec("rouge_1", "ROUGE-1", 100.0),)
    scored_split = "test"

    def references(self, split: str) -> dict[str, list[str]]:
        return {"b": ["second"], "a": ["first", "one"]}

    def scores_of_items(self, predictions: Any, split: str) -> dict[str, dict[str, float]]:
        return {p["id"]: {"ROUGE-1": 50.0} for p in predictions if p["id"] == "a"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.compose(["experiment=xsum", "scale=tiny", f"paths.outputs={tmp_path}"])
    with open_dict(run.config):
        run.config.logger = {"_target_": f"{__name__}.Seen"}
    run.meaning = {"task": {"name": "xsum"}, "method": {"name": "lora"}}
    run.folder.mkdir()
    lines = [json.dumps({"id": name, "prediction": "text"}) + "\n" for name in "ab"]
    (run.folder / "predictions.jsonl").write_text("".join(lines))
    return run


def test_a_mirror_gets_the_names_of_what_a_run_is_made_of_and_makes_nothing(run: Run) -> None:
    """A signature may name a class that is gone; the configuration is shown, never built."""
    with open_dict(run.config):
        run.config.task.gone = {"_target_": "tasks.nowhere.Gone", "size": 3}
    with execution._mirrored(run, OfATask(), is_main=True):
        seen = Seen.last
        assert seen.facts.config["task"]["gone"]["_target_"] == "tasks.nowhere.Gone"
        assert seen.facts.outputs == run.outputs
        assert seen.facts.id == run.name
        assert seen.facts.group == group_of(run)
        assert list(seen.facts.tags) == ["xsum", "delta_lora", "tiny"]
        assert seen.facts.metrics == OfATask.metrics
        assert seen.end is None
    assert seen.end == ("completed", "")
    assert (run.folder / "references.jsonl").read_text() == (
        '{"id": "a", "references": ["first", "one"], "scores": {"ROUGE-1": 50.0}}\n'
        '{"id": "b", "references": ["second"], "scores": {}}\n'
    )


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (FloatingPointError("loss is nan"), ("failed", "FloatingPointError: loss is nan")),
        (KeyboardInterrupt("stopped at step 3"), ("stopped", "stopped at step 3")),
    ],
)
def test_a_mirror_is_told_how_a_run_ended(
    error: BaseException, end: tuple[str, str], run: Run
) -> None:
    with (
        pytest.raises(type(error)),
        execution._mirrored(run, OfATask(), is_main=True),
    ):
        raise error
    assert Seen.last.end == end


def test_only_the_main_process_has_a_mirror(run: Run) -> None:
    Seen.last = None
    with execution._mirrored(run, OfATask(), is_main=False) as mirrors:
        assert mirrors == []
    assert Seen.last is None


@pytest.mark.parametrize(
    ("overrides", "title"),
    [
        (["method=delta_lora", "seed=3"], "delta_lora e2e tiny seed 3 λ=2 K=3"),
        (
            ["method.update_ratio=0.5", "method.start_step=0"],
            "delta_lora e2e tiny seed 1 λ=0.5 K=0",
        ),
        (["recipe.update_ratio=4"], "delta_lora e2e tiny seed 1 λ=4 K=3"),
        (["method=lora", "logger.mode=offline"], "lora e2e tiny seed 1"),
        (
            [
                "method=lora",
                "recipe.rank=4",
                "trainer.max_steps=5",
                "train_fraction=0.5",
                "trainer.log_every_steps=2",
                "trainer.no_decay=[bias]",
            ],
            "lora e2e tiny seed 1 rank=4 max_steps=5 train_fraction=0.5",
        ),
    ],
)
def test_a_name_says_what_a_run_is(overrides: list[str], title: str) -> None:
    assert title_of(Run.compose(["experiment=e2e", "scale=tiny", *overrides])) == title


def test_a_group_is_called_by_what_it_means_however_it_was_asked_for() -> None:
    """So that the runs of a sweep can be told apart, and a view finds all of a group."""
    base = ["experiment=e2e", "scale=tiny", "seed=2"]
    run = Run.compose([*base, "recipe.update_ratio=0.5", "recipe.rank=4"])
    same = Run.compose([*base, "method.update_ratio=5e-1", "method.rank=4", "seed=3"])
    assert group_of(run) == group_of(same)
    settings = "λ 0.5, K 3, r 4, α 32, lr 0.005"
    assert group_of(run) == f"delta_lora e2e, {settings}, {run.group.rpartition('--')[2]}"
    usual = group_of(Run.compose(base))  # what is the constructor's default is told as well
    assert usual.startswith("delta_lora e2e, λ 2, K 3, r 4, α 32")


def test_what_a_run_is_made_for_is_a_tag_and_changes_nothing_else() -> None:
    run = Run.compose(["experiment=xsum", "scale=tiny"])
    made = run.as_part_of(["table3", "rank", "table3"])
    assert (made.part_of, run.part_of) == (["table3", "rank"], [])
    asked = Run.compose(["experiment=xsum", "scale=tiny", "part_of=[table3,rank]"])
    assert run.name == made.name == asked.name == Run(made.config).name
    for each in (made, asked):
        facts = facts_of(each, OfATask())
        assert list(facts.tags) == ["xsum", "delta_lora", "tiny", "table3", "rank"]
        assert facts.config | {"command": ""} == facts_of(run, OfATask()).config | {"command": ""}
        assert "part_of" not in facts.config["command"]
        assert facts.name == title_of(run)
