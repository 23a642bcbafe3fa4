"""Runs of seconds with methods of the package peft on GLUE: to the record, stopped, mistaken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delta_lora.methods.peft import Peft
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.run import Run
from tests.choices import first
from tests.smoke.test_runs import contents
from tests.smoke.test_starts import SIZES, small, tokenizer  # noqa: F401  fixtures

#: a prompt, a tuner with state of its own, one with a changed forward pass.
ROWS = ("peft/prefix_tuning", "peft/vera", "peft/dora")


@pytest.mark.parametrize("method", first(ROWS))
def test_a_run_that_was_stopped_continues_to_the_same_bits(
    method: str,
    small: Callable[..., list[str]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = [
        f"method={method}", SIZES, "task.max_length=40", "trainer.checkpoint_every_steps=1",
        "method.learning_rate=0.01", "recipe.model_dropout=0.1",
    ]  # fmt: skip
    straight = Run.compose(small("rte", *settings))
    record = execute(straight)
    assert record["status"] == "completed"
    assert record["training"]["method"]["peft_version"]
    assert record["num_predictions"] == 12
    assert 0 < record["parameters"]["head"] < record["parameters"]["trainable"]

    again = Run.compose(small("rte", *settings, f"paths.outputs={tmp_path / 'again'}"))
    folder = again.folder
    assert folder.name == record["signature"]

    def stop(self: Peft, step: int) -> None:
        if step == 2:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Peft, "after_step", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            execute(again)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept[-1] == "step-00000002"
    execute(again)
    assert contents(folder) == contents(straight.folder)


def test_a_prompt_on_a_causal_model_is_refused_before_data_are_read(tmp_path: Path) -> None:
    run = Run.compose(["method=peft/prompt_tuning", f"paths.outputs={tmp_path}", "logger=none"])
    with pytest.raises(ConfigError, match="stand in one row without padding"):
        execute(run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=peft/ia33", r"unknown method 'peft/ia33'; did you mean 'peft/ia3'"),
        ("method.peft.peft_type=LORRA", r"unknown peft.peft_type='LORRA'; did you mean 'LORA'"),
        ("+method.peft.use_dorra=true", r"unknown key peft.use_dorra of LORA; .*'use_dora'"),
        ("method.peft.rank=3", r"unknown key 'method.peft.rank'"),
    ],
)
def test_mistakes_are_found_before_any_work(override: str, message: str, tmp_path: Path) -> None:
    rest = [] if override.startswith("method=") else ["method=peft"]
    with pytest.raises(ConfigError, match=message):
        execute(Run.compose([*rest, override, f"paths.outputs={tmp_path}", "logger=none"]))
    assert not list(tmp_path.iterdir())


def test_the_optimiser_is_part_of_the_name_only_where_it_is_another() -> None:
    plain = Run.compose(["method=lora"])
    assert not {"optimizer", "momentum"} & set(plain.meaning["trainer"])
    names = {
        Run.compose(["method=lora", *more]).name
        for more in ([], ["trainer.optimizer=sgd"],
                     ["trainer.optimizer=sgd", "trainer.momentum=0.9"])
    }  # fmt: skip
    assert len(names) == 3


def test_a_tiny_run_takes_the_rate_of_the_scale() -> None:
    def rate(scale: str) -> Any:
        run = Run.compose(["experiment=glue/mrpc",
                            "method=peft/ia3", f"scale={scale}"])  # fmt: skip
        return json.loads(json.dumps(run.meaning))["method"]["learning_rate"]

    assert rate("paper") == 3.0e-3
    assert rate("tiny") > rate("paper")
