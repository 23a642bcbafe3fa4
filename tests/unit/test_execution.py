"""Parts of a run that need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import open_dict

from delta_lora.protocols import MetricSpec
from scripts.runs import execution
from scripts.runs.mirroring import title_of
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


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.compose(["experiment=xsum", "scale=tiny", f"paths.outputs={tmp_path}"])
    with open_dict(run.config):
        run.config.logger = {"_target_": f"{__name__}.Seen"}
    run.meaning = {"task": {"name": "xsum"}, "method": {"name": "lora"}}
    run.folder.mkdir()
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
        assert seen.facts.group == run.group
        assert list(seen.facts.tags) == ["xsum", "delta_lora", "tiny"]
        assert seen.facts.metrics == OfATask.metrics
        assert seen.end is None
    assert seen.end == ("completed", "")
    assert (run.folder / "references.jsonl").read_text() == (
        '{"id": "a", "references": ["first", "one"]}\n{"id": "b", "references": ["second"]}\n'
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
