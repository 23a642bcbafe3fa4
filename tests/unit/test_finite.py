"""What is no number stops a run with its place, and what changed nothing is said to have not."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from delta_lora import checkpoint, finite
from delta_lora.finite import NonFiniteError, NonFiniteLossError, Trained
from delta_lora.method_bases import LowRankMethod
from delta_lora.methods import build
from delta_lora.trainer import Trainer
from tests.contract.models import CASES, inject
from tests.toy import ToyMethod, ToyTask, toy_model
from tests.unit.test_trainer import SETTINGS, fit


class Frozen(ToyMethod):
    """Trains at a rate that moves nothing."""

    def param_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.named_parameters()), "lr": 1e-30}]


def run(folder: Path, *, task: ToyTask | None = None, model: Any = None, **settings: Any) -> Any:
    task = task or ToyTask()
    task.load()
    model, method = model or toy_model(0.0), ToyMethod()
    method.inject(model)
    score = settings.pop("score", None)
    return Trainer(**{**SETTINGS, **settings}).fit(
        model, method=method, task=task, train=task.examples("train"),
        validation=task.examples("validation"), seed=1, folder=folder, score=score,
    )  # fmt: skip


def test_a_base_that_is_not_finite_is_said_before_the_first_step(tmp_path: Path) -> None:
    model = toy_model(0.0)
    name, parameter = next(iter(model.named_parameters()))
    with torch.no_grad():
        parameter.flatten()[0] = math.inf
    with pytest.raises(
        NonFiniteError, match=rf"{name} of the model that the run starts from has 1"
    ):
        run(tmp_path, model=model)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_first_loss_that_is_no_number_does_not_blame_the_learning_rate(tmp_path: Path) -> None:
    class Broken(ToyTask):
        def load(self) -> None:
            super().load()
            self.y[:] = math.nan

    with pytest.raises(NonFiniteLossError, match="step 0 is nan, before any update") as caught:
        run(tmp_path, task=Broken())
    assert "learning rate" not in str(caught.value)


def test_a_norm_that_is_no_number_stops_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
    with pytest.raises(NonFiniteError, match="step 2 gave the norm of the gradients=inf"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["loss", "score"])
def test_an_evaluation_that_is_no_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from delta_lora.loop import Loop

    if name == "loss":
        monkeypatch.setattr(Loop, "_validation_loss", lambda self: math.nan)
    with pytest.raises(NonFiniteError, match=rf"the evaluation at step 4 gave {name}=nan"):
        run(tmp_path, score=lambda _: {"score": math.nan if name == "score" else 1.0})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_weights_behind_the_last_step_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step = ToyMethod.after_step

    def spoil(self: ToyMethod, step: int) -> None:
        after_step(self, step)
        if step == 3:
            with torch.no_grad():
                next(iter(self.updated_tensors(model).values())).fill_(math.nan)

    model = toy_model(0.0)
    monkeypatch.setattr(ToyMethod, "after_step", spoil)
    with pytest.raises(NonFiniteError, match="of what 4 steps have trained has"):
        run(tmp_path, model=model, max_steps=4, evaluate_every_epochs=None)


def test_json_has_no_infinity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.write_json(tmp_path / "record.json", {"loss": math.inf})
    assert not (tmp_path / "record.json").exists()


def test_a_run_that_changed_nothing_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    _, result = fit(tmp_path / "a")
    assert not result.is_unchanged
    assert "nothing was learnt" not in caplog.text
    _, still = fit(tmp_path / "b", method=Frozen(), max_steps=3, warmup_steps=0, weight_decay=0.0)
    assert still.is_unchanged
    assert "nothing was learnt: 3 steps" in caplog.text


@pytest.mark.parametrize("method", ["lora", "delta_lora", "adalora", "dylora", "full"])
def test_a_branch_that_adds_nothing_has_learnt_nothing(method: str) -> None:
    case = CASES["roberta"]
    settings = {"init_rank": 3, "target_rank": 1, "alpha": 3, "orth_reg_weight": 0.1,
                "initial_fraction": 0.1, "final_fraction": 0.3, "interval": 2}  # fmt: skip
    made = build({"name": method, **(settings if method == "adalora" else {})})
    model = inject(made, case.model(), case)
    trained = Trained(model)
    assert trained.is_unchanged(model)
    branches = isinstance(made, LowRankMethod)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_left = name.endswith((".lora_B", ".lora_E"))
            if parameter.requires_grad and (is_left or not branches):
                parameter.add_(0.5)
    assert not trained.is_unchanged(model)


def test_tensors_without_values_are_passed_over() -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 2)
    finite.check_weights(layer.named_parameters(), "a model", "nothing")
    finite.check_weights([("count", torch.tensor(3))], "a model", "nothing")
