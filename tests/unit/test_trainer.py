"""The loop: equal steps however a batch is split, bit-identical continuation, clear stops."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from delta_lora import checkpoint
from delta_lora.draws import step_indices
from delta_lora.finite import NonFiniteLossError
from delta_lora.optimization import schedule_factor
from delta_lora.result import FitResult
from delta_lora.trainer import Trainer
from tests.choices import first
from tests.toy import ToyMethod, ToyTask, toy_model

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "batch_size": 8, "num_epochs": 5, "warmup_steps": 3, "weight_decay": 0.1, "device": "cpu",
    "log_every_steps": 3, "checkpoint_every_steps": 4,
}  # fmt: skip
Prune = Callable[[Sequence[dict[str, float]]], str | None] | None


def fit(
    folder: Path, *, seed: int = 1, dropout: float = 0.0, method: ToyMethod | None = None,
    task: ToyTask | None = None, prune: Prune = None, **settings: Any,
) -> tuple[torch.nn.Module, FitResult]:  # fmt: skip
    task = task or ToyTask()
    task.load()
    model, method = toy_model(dropout), method or ToyMethod()
    method.inject(model)
    result = Trainer(**{**SETTINGS, **settings}).fit(
        model, method=method, task=task, train=task.examples("train"),
        validation=task.examples("validation"), seed=seed, folder=folder, prune=prune,
    )  # fmt: skip
    return model, result


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule_warms_up_from_zero_and_decays_to_its_end(schedule: str) -> None:
    factors = [schedule_factor(schedule, step, 4, 20) for step in range(21)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert factors[20] == (1.0 if schedule == "constant" else pytest.approx(0.0, abs=1e-12))
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))


def test_schedule_equals_the_one_of_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for name, build in (
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = build(optimizer, 7, 50)
        for step in range(50):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(
                schedule_factor(name, step, 7, 50), abs=1e-12
            )
            optimizer.step()
            theirs.step()


def test_every_epoch_is_a_permutation_filled_up_with_repeats() -> None:
    epochs = [[step_indices(10, 4, 5, 3 * e + k) for k in range(3)] for e in range(2)]
    for epoch in epochs:
        flat = [i for batch in epoch for i in batch]
        assert [len(batch) for batch in epoch] == [4, 4, 4]
        assert sorted(flat[:10]) == list(range(10))
        assert set(flat[10:]) <= set(range(10))
    assert epochs[0] != epochs[1]
    assert step_indices(10, 4, 6, 0) != step_indices(10, 4, 5, 0)


def test_accumulation_does_not_change_the_run(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "a")
    split, _ = fit(tmp_path / "b", micro_batch_size=3)
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-5, atol=1e-6)


def test_hooks_run_once_per_step_in_order(tmp_path: Path) -> None:
    method = ToyMethod()
    fit(tmp_path, method=method, max_steps=2, micro_batch_size=4)
    one = [("micro", 0), ("micro", 0), ("before", 0), ("after", 0)]
    assert method.calls == one + [(name, 1) for name, _ in one]


@pytest.mark.parametrize("stop_at", first([5, 1, 13]))
def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    straight, expected = fit(tmp_path / "straight", dropout=0.3)

    class Killed(ToyMethod):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == stop_at:
                raise ZeroDivisionError("killed")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "killed", dropout=0.3, method=Killed())
    method = ToyMethod()
    resumed, result = fit(tmp_path / "killed", dropout=0.3, method=method)
    assert torch.equal(weights(resumed), weights(straight))
    assert method.num_after == expected.num_steps
    assert vars(result) | {"resources": 0} == vars(expected) | {"resources": 0}
    read = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "killed")]
    assert read[0] == read[1]


OTHER_OPTIMIZERS = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "rmsprop", "momentum": 0.5},
    {"optimizer": "adafactor"},
]


@pytest.mark.parametrize("settings", first(OTHER_OPTIMIZERS[::-1], 1), ids=str)
def test_a_killed_run_continues_to_the_same_bits_with_other_optimisers(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    start = weights(toy_model())
    straight, _ = fit(tmp_path / "straight", **settings)
    assert not torch.equal(weights(straight), start)

    class Killed(ToyMethod):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 8:
                raise ZeroDivisionError("killed")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "killed", method=Killed(), **settings)
    stored = checkpoint.latest(tmp_path / "killed" / "checkpoints")
    assert stored is not None
    assert stored.step == 6
    has_state = bool(stored.tensors.get("optimizer"))
    assert has_state == (settings != {"optimizer": "sgd"}), "plain SGD keeps nothing"
    resumed, _ = fit(tmp_path / "killed", **settings)
    assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.long
def test_every_optimiser_goes_its_own_way(tmp_path: Path) -> None:
    runs = [{}, *OTHER_OPTIMIZERS]
    ends = [weights(fit(tmp_path / str(i), **run)[0]) for i, run in enumerate(runs)]
    for a, b in itertools.combinations(ends, 2):
        assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_sgd_by_hand(momentum: float, tmp_path: Path) -> None:
    """Decay 0.1 but for biases, warm-up of 3 steps, linear decay: written out step by step."""
    model, _ = fit(tmp_path, optimizer="sgd", momentum=momentum, no_decay=["bias"])
    task, twin = ToyTask(), toy_model()
    task.load()
    velocity = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    for step in range(20):
        batch = task.collate(step_indices(32, 8, 1, step))
        twin.zero_grad()
        (task.loss(twin, batch) / batch.num_targets).backward()
        rate = 0.02 * schedule_factor("linear", step, 3, 20)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                assert p.grad is not None
                gradient = p.grad + (0.0 if "bias" in name else 0.1) * p
                velocity[name] = momentum * velocity[name] + gradient
                p -= rate * velocity[name]
    assert not torch.equal(weights(twin), weights(toy_model()))
    torch.testing.assert_close(weights(model), weights(twin), atol=1e-6, rtol=1e-5)


def test_a_method_that_trains_nothing_is_refused() -> None:
    class Idle(ToyMethod):
        def param_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
            return []

    with pytest.raises(ValueError, match="trains no parameter; check its settings"):
        Trainer(**SETTINGS).build_optimizer(toy_model(), Idle())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "trainer.optimizer='lion' is not known; choose one of 'adamw', 's"),
        ({"momentum": 0.9}, "trainer.momentum=0.9 has no meaning for trainer.optimizer=adamw"),
        ({"optimizer": "sgd", "momentum": 1.0}, "trainer.momentum=1.0 .*< 1"),
    ],
)
def test_bad_optimisers_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(**{**SETTINGS, **settings})


def test_a_signal_writes_a_checkpoint_and_stops(tmp_path: Path) -> None:
    class Signalled(ToyMethod):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="stopped in the evaluation at step 8 of 20"):
        fit(tmp_path, method=Signalled(), checkpoint_every_steps=1000)
    stored = checkpoint.latest(tmp_path / "checkpoints")
    assert stored is not None
    assert stored.step == 8, "the next pause of the loop: an evaluation, before the next log step"


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight, _ = fit(tmp_path)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    (newest / "weights.safetensors").write_bytes(b"cut")
    resumed, _ = fit(tmp_path)
    assert "damaged" in caplog.text
    assert torch.equal(weights(resumed), weights(straight))
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "state.json").unlink()
    with pytest.raises(RuntimeError, match="none of the 2 checkpoints"):
        fit(tmp_path)


def test_the_best_checkpoint_is_the_one_of_lowest_validation_loss(tmp_path: Path) -> None:
    model, result = fit(tmp_path, checkpoint_rule="best", num_epochs=60)
    losses = [entry["loss"] for entry in result.validation]
    assert min(losses) < losses[-1], "the run must overfit for this test to say anything"
    assert result.chosen_step == result.validation[losses.index(min(losses))]["step"]
    best = checkpoint.latest(tmp_path / "best")
    assert best is not None
    stored = torch.cat([best.tensors["weights"][n].flatten() for n, _ in model.named_parameters()])
    assert torch.equal(weights(model), stored)


def test_a_non_finite_loss_names_step_and_examples(tmp_path: Path) -> None:
    class Broken(ToyTask):
        def load(self) -> None:
            super().load()
            self.y[11] = math.nan

    broken_step = next(s for s in range(4) if 11 in step_indices(32, 8, 1, s))
    with pytest.raises(NonFiniteLossError, match=rf"step {broken_step} is nan.*toy-11"):
        fit(tmp_path, task=Broken())


def test_metrics_hold_nothing_that_varies(tmp_path: Path) -> None:
    fit(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    allowed = {
        "step", "epoch", "train/loss", "train/learning_rate", "train/grad_norm", "validation/loss",
    }  # fmt: skip
    assert {key for line in lines for key in line} == allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"trainer\.batch_size=0 .* >= 1"),
        ({"schedule": "step"}, "schedule='step' is not known; choose one of 'linear'"),
        ({"precision": "fp16"}, "needs a CUDA device"),
        ({"warmup_ratio": 0.1}, "both warmup_steps=3 and warmup_ratio=0.1"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0\.1 is not allowed"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0 is not allowed"),
        ({"checkpoint_rule": "best", "evaluate_every_epochs": None}, "needs evaluations"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(**{**SETTINGS, **settings})


FIELDS = {field.name: field for field in dataclasses.fields(Trainer)}
#: a value that no field allows, by the plain type of the field.
NEVER_ALLOWED: dict[Any, list[Any]] = {
    int: ["2", 1.5, 2.0, True, math.nan, math.inf, [1], -(10**9)],
    float: ["2", "1e-3", True, math.nan, math.inf, -math.inf, [1.0], -1e300],
    bool: ["true", 0, 1, 0.0, None],
    str: ["no such choice", "", 1, True, None],
    Sequence[str]: ["bias", [1], None, 1, True],
}


def plain_type(name: str) -> tuple[Any, bool]:
    """Return the type of a field without None, and whether None is allowed."""
    hint = get_type_hints(Trainer)[name]
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    [kind] = (part for part in parts if part is not NoneType)
    return kind, NoneType in parts


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name in FIELDS for v in NEVER_ALLOWED[plain_type(name)[0]]]
)
def test_every_field_is_checked(name: str, value: Any) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=rf"^trainer\.{name}={re.escape(repr(value))}"
    ):
        Trainer(**{**SETTINGS, name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_none_is_allowed_where_it_is_declared(name: str) -> None:
    if plain_type(name)[1]:
        assert getattr(Trainer(**{**SETTINGS, name: None}), name) is None
    else:
        with pytest.raises((TypeError, ValueError), match=rf"^trainer\.{name}=None"):
            Trainer(**{**SETTINGS, name: None})


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "device"])
def test_every_default_is_allowed_and_kept_as_it_is(name: str) -> None:
    default = FIELDS[name].default
    if default is dataclasses.MISSING:
        assert name == "batch_size", "the only value without a default"
    else:
        assert getattr(Trainer(batch_size=8, **{name: default}), name) is default


def test_no_value_changes_after_it_was_checked() -> None:
    trainer = Trainer(**SETTINGS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trainer.batch_size = 0  # type: ignore[misc]


def test_what_is_declared_once_can_be_read_by_people_and_programs() -> None:
    assert Trainer.__doc__ is not None
    for name in FIELDS:
        assert re.search(rf"^    {name}\b.*: [A-Z`]", Trainer.__doc__, re.MULTILINE), name
    parameters = inspect.signature(Trainer).parameters
    assert list(parameters) == list(FIELDS)
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["eval_batch_size"].default == 8
    assert get_type_hints(Trainer)["micro_batch_size"] == int | None


def test_the_yaml_names_exactly_the_keywords_of_the_constructor() -> None:
    text = (ROOT / "configs" / "trainer" / "default.yaml").read_text(encoding="utf-8")
    names = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert names == ["_target_", *FIELDS], "in the order of the declaration"


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    task = ToyTask()
    task.load()
    trainer = Trainer(**SETTINGS)
    for identity, context in (({"data": "a"}, None), ({"data": "b"}, "delete that folder")):
        model, method = toy_model(), ToyMethod()
        arguments: dict[str, Any] = {
            "method": method, "task": task, "train": task.examples("train"),
            "validation": [], "seed": 1, "folder": tmp_path, "identity": identity,
        }  # fmt: skip
        if context is None:
            trainer.fit(model, **arguments)
        else:
            with pytest.raises(RuntimeError, match=context):
                trainer.fit(model, **arguments)


def test_bf16_autocast_trains_on_a_cpu(tmp_path: Path) -> None:
    _, full = fit(tmp_path / "a")
    model, result = fit(tmp_path / "b", precision="bf16")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert result.final_train_loss == pytest.approx(full.final_train_loss, rel=0.05)
    assert result.final_train_loss != full.final_train_loss


@pytest.mark.long  # tests/contract/test_distributed.py tries more of them
def test_two_processes_give_the_run_of_one(tmp_path: Path) -> None:
    one, _ = fit(tmp_path / "one", micro_batch_size=2)
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "import os, torch\n"
        "from safetensors.torch import save_file\n"
        "from tests.unit.test_trainer import fit\n"
        f"folder = Path({str(tmp_path / 'two')!r})\n"
        "model, _ = fit(folder, micro_batch_size=2)\n"
        "name = os.environ['RANK'] + '.safetensors'\n"
        "save_file(dict(model.named_parameters()), folder / name)\n"
    )
    (tmp_path / "two").mkdir()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", str(script),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        other = load_file(tmp_path / "two" / f"{rank}.safetensors")
        flat = torch.cat([other[name].flatten() for name, _ in one.named_parameters()])
        torch.testing.assert_close(flat, weights(one), rtol=1e-5, atol=1e-6)
    a, b = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two"))
    for mine, theirs in zip(a.splitlines(), b.splitlines(), strict=True):
        assert json.loads(theirs) == pytest.approx(json.loads(mine), rel=1e-5)
