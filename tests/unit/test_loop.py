"""What the loop leaves behind, what it writes when, and what may not reach it from outside."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from delta_lora import checkpoint
from delta_lora.finite import NonFiniteLossError
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.protocols import MetricSpec
from delta_lora.result import PrunedError
from delta_lora.session import Session
from delta_lora.trainer import Trainer
from delta_lora.watched_loss import WatchedLoss
from tests.choices import first
from tests.contract.models import CASES
from tests.golden.test_trajectories import CopyTask
from tests.toy import ToyMethod, ToyTask, toy_model
from tests.unit.test_trainer import SETTINGS, fit, weights


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- the best step


class ScoredCopy(CopyTask):
    """Chooses its best epoch by a score."""

    metrics = (MetricSpec("score", "Score"),)
    selection_metric = "score"


@pytest.mark.parametrize("form", ["in_place", "closed_form"])
def test_the_best_step_brings_its_method_state_back(form: str, tmp_path: Path) -> None:
    """The best epoch ends before W is first updated: the model must be the LoRA it was then."""
    task = ScoredCopy()
    task.load()
    model = CASES["gpt2"].build()
    model.resize_token_embeddings(64)
    model.config.max_position_embeddings = 64
    model.transformer.wpe = torch.nn.Embedding(64, model.config.n_embd)
    method = DeltaLora(
        rank=2, alpha=4, learning_rate=0.05, update_ratio=2.0, start_step=4, form=form
    )
    method.inject(model, projections=None, head=(), total_steps=12, seed=1)
    falling = itertools.count()
    result = Trainer(
        batch_size=4, num_epochs=4, checkpoint_rule="best", device="cpu", schedule="constant"
    ).fit(
        model, method=method, task=task, train=task.examples("train"),
        validation=task.examples("validation"), seed=1, folder=tmp_path,
        score=lambda _: {"score": -next(falling)},
    )  # fmt: skip
    assert result.chosen_step == 3
    assert method.describe() == {"num_weight_updates": 0, "first_weight_update_step": None}
    batch = task.collate(task.examples("validation"))
    with torch.no_grad():
        loss = float(task.loss(model, batch)) / batch.num_targets
    assert loss == pytest.approx(result.validation[0]["loss"], rel=1e-6)
    assert loss != pytest.approx(result.validation[-1]["loss"], rel=1e-3)


# ---------------------------------------------------------------------- checkpoints


def test_checkpoints_go_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(
        checkpoint.Writer, "save", lambda self, folder, step, **_: steps.append(step)
    )
    fit(tmp_path / "a", checkpoint_every_steps=None)
    assert steps == [20], "twenty quick steps need one checkpoint, that of the end"
    steps.clear()
    fit(tmp_path / "b", checkpoint_every_steps=None, checkpoint_every_s=1e-9)
    assert steps == [3, 6, 9, 12, 15, 18, 20], "every log step is late"


def test_a_checkpoint_is_of_the_moment_and_does_not_hold_up_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, save = threading.Event(), checkpoint.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert may_write.wait(30)
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    tensor, state = torch.arange(6.0).view(2, 3).T, {"list": [1]}
    with checkpoint.Writer() as writer:
        writer.save(tmp_path, 1, tensors={"weights": {"w": tensor}}, state=state)
        tensor += 1
        state["list"].append(2)
        assert not list(tmp_path.glob("step-*"))
        may_write.set()
        writer.save(tmp_path, 2, tensors={"weights": {"w": tensor}}, state=state)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert torch.equal(newest.tensors["weights"]["w"], torch.arange(1.0, 7).view(2, 3).T)
    monkeypatch.setattr(checkpoint, "_folders", lambda folder: [folder / "step-00000001"])
    first = checkpoint.latest(tmp_path)
    assert first is not None
    assert torch.equal(first.tensors["weights"]["w"], torch.arange(6.0).view(2, 3).T)
    assert first.state["list"] == [1]


def test_views_transposes_and_shared_tensors_are_written_whole(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {
        "whole": whole, "again": whole, "row": whole[1], "transposed": whole.T,
        "reversed": whole.flatten().view(4, 3), "scalar": torch.tensor(3), "empty": whole[:0],
    }  # fmt: skip
    checkpoint.write_tensors(tmp_path / "all.safetensors", tensors)
    found = load_file(tmp_path / "all.safetensors")
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_a_write_that_fails_stops_the_run_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, max_steps=6)
    write, calls = checkpoint.write_tensors, itertools.count()

    def full_disk(path: Path, tensors: Any) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    (tmp_path / "checkpoints" / ".writing-step-00000099").mkdir()  # of a process that was killed
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, max_steps=20)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000006"]


def test_what_a_kill_kept_from_being_removed_is_removed_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, max_steps=20)
    places = tmp_path / "checkpoints"
    names = sorted(path.name for path in places.iterdir())
    shutil.copytree(places / names[0], places / "step-00000001")
    shutil.copytree(places / names[0], places / ".writing-old-step-00000002")
    fit(tmp_path, max_steps=20)
    assert sorted(path.name for path in places.iterdir()) == names

    def killed(path: Path, **_: Any) -> None:
        for file in sorted(path.iterdir())[:1] if path.is_dir() else ():
            file.unlink()
            raise ZeroDivisionError

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(ZeroDivisionError):
        checkpoint.drop_after(places, 0)
    assert len([path for path in places.iterdir() if path.name.startswith("step-")]) == 1


def test_step_time_holds_neither_evaluation_nor_checkpoints(tmp_path: Path) -> None:
    class SlowToScore(ToyTask):
        def collate(self, examples: Any) -> Any:
            if max(examples) >= 32:  # of the validation split
                time.sleep(0.05)
            return super().collate(examples)

    _, result = fit(tmp_path, task=SlowToScore())
    resources = result.resources
    assert resources["train_time_s"] >= resources["step_time_s"] + 5 * 0.05
    session = Session(torch.device("cpu"), {"step_time_s": 7.0, "train_time_s": 9.0})
    with session.apart(wait=True):
        time.sleep(0.05)
    assert 7.0 <= session.resources()["step_time_s"] < 7.05
    assert session.resources()["train_time_s"] >= 9.05
    unmeasured = Session(torch.device("cpu"), {"train_time_s": 9.0})  # by an older version
    assert "step_time_s" not in unmeasured.resources()


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize("where", first(["loss", "score"]))
def test_a_signal_in_an_evaluation_loses_nothing(where: str, tmp_path: Path) -> None:
    """Also where the evaluation is at no log step; the log is that of an undisturbed run."""
    settings = {"log_every_steps": 7, "checkpoint_every_steps": None}
    straight, expected = fit(tmp_path / "straight", **settings)

    class Signalled(ToyTask):
        def collate(self, examples: Any) -> Any:
            if max(examples) >= 32 and len(metrics_of(tmp_path / "stopped")) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().collate(examples)

    def stop_once(_: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    if where == "loss":
        with pytest.raises(KeyboardInterrupt, match="in the evaluation at step 12 of 20"):
            fit(tmp_path / "stopped", task=Signalled(), **settings)
    else:
        task, model, method = ToyTask(), toy_model(), ToyMethod()
        task.load()
        method.inject(model)
        with pytest.raises(KeyboardInterrupt, match="in the evaluation at step 4 of 20"):
            Trainer(**{**SETTINGS, **settings}).fit(
                model, method=method, task=task, train=task.examples("train"),
                validation=task.examples("validation"), seed=1, folder=tmp_path / "stopped",
                score=stop_once,
            )  # fmt: skip
    resumed, result = fit(tmp_path / "stopped", **settings)
    assert torch.equal(weights(resumed), weights(straight))
    assert result.validation == expected.validation
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "straight")


# ---------------------------------------------------------------------- pruning


@pytest.mark.parametrize("log_every_steps", first([2, 7]))
def test_a_pruned_run_is_continued_to_the_same_bits_without_pruning(
    log_every_steps: int, tmp_path: Path
) -> None:
    """Also where the evaluation is at no log step; and asked again it is pruned again."""
    settings = {"log_every_steps": log_every_steps, "checkpoint_every_steps": None}
    straight, expected = fit(tmp_path / "straight", dropout=0.3, **settings)
    seen: list[list[float]] = []

    def third(validation: Sequence[dict[str, float]]) -> str | None:
        seen.append([entry["step"] for entry in validation])
        return "it is the third" if len(validation) == 3 else None

    for _ in range(2):
        with pytest.raises(PrunedError, match="at step 12 of 20, because it is the third") as it:
            fit(tmp_path / "pruned", dropout=0.3, prune=third, **settings)
        assert it.value.result.validation == expected.validation[:3]
    assert seen == [[4], [4, 8], [4, 8, 12], [4, 8, 12]]
    resumed, result = fit(tmp_path / "pruned", dropout=0.3, **settings)
    assert torch.equal(weights(resumed), weights(straight))
    assert result.validation == expected.validation
    assert metrics_of(tmp_path / "pruned") == metrics_of(tmp_path / "straight")


def test_pruning_that_goes_on_changes_nothing_and_is_not_asked_at_the_end(tmp_path: Path) -> None:
    straight, expected = fit(tmp_path / "straight", dropout=0.3)
    asked: list[int] = []

    def count(validation: Sequence[dict[str, float]]) -> None:
        asked.append(len(validation))

    model, result = fit(tmp_path / "asked", dropout=0.3, prune=count)
    assert asked == [1, 2, 3, 4]
    assert torch.equal(weights(model), weights(straight))
    assert result.validation == expected.validation


# ---------------------------------------------------------------------- half precision


def skip_steps(monkeypatch: pytest.MonkeyPatch, calls: Container[int]) -> None:
    """Let the optimiser skip these of its calls, as the loss scaler does when fp16 overflows."""
    numbers, step = itertools.count(), AcceleratedOptimizer.step

    def step_or_skip(self: Any, closure: Any = None) -> None:
        self.skips = next(numbers) in calls
        if not self.skips:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step_or_skip)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self.skips))


def test_a_step_that_the_loss_scaler_skips_is_repeated_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"dropout": 0.3, "micro_batch_size": 4, "max_steps": 6}
    expected, straight = fit(tmp_path / "a", **settings)
    skip_steps(monkeypatch, calls={0, 3, 4})
    method = ToyMethod()
    found, result = fit(tmp_path / "b", method=method, **settings)
    assert torch.equal(weights(found), weights(expected))
    assert (result.skipped_steps, result.num_steps) == (3, straight.num_steps)
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    for hook, steps in (
        ("before", [0, 0, 1, 2, 2, 2, 3, 4, 5]),
        ("after", [0, 1, 2, 3, 4, 5]),
    ):
        assert [step for name, step in method.calls if name == hook] == steps


def test_a_step_that_is_always_skipped_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    skip_steps(monkeypatch, calls=range(2, 1000))
    with pytest.raises(NonFiniteLossError, match="step 2: gradients overflowed 25 times in a row"):
        fit(tmp_path, max_steps=6)
    assert "attempt 25 of 25" in caplog.text
    assert "attempt 26" not in caplog.text


def plain_and_called(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, 12).view(2, 6)
    with torch.no_grad():
        return type(model).forward(model, x), model(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_trained_in_half_precision_computes_in_its_own(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:  # the wrapper without the compiler, which takes a minute
        monkeypatch.setattr(
            torch, "compile", lambda model, **_: torch._dynamo.OptimizedModule(model, lambda f: f)
        )
    model, _ = fit(tmp_path, precision="bf16", compile=compiled)
    plain, called = plain_and_called(model)
    assert torch.equal(plain, called)
    assert not {"forward", "_original_forward"} & set(vars(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_freed_with_its_run(precision: str, tmp_path: Path) -> None:
    model, _ = fit(tmp_path, precision=precision)
    alive = weakref.ref(model)
    del model
    assert alive() is None, "something still refers to it, or it is in a cycle"


def test_attention_plans_nothing_per_shape_and_products_are_as_asked() -> None:
    try:
        Trainer(**{**SETTINGS, "matmul_precision": "tf32"}).prepare_backend()
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        Trainer(**SETTINGS).prepare_backend()
    assert torch.get_float32_matmul_precision() == "highest"


def test_determinism_tells_cublas_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    Trainer(**SETTINGS).prepare_backend()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        Trainer(**{**SETTINGS, "deterministic": True}).prepare_backend()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        Trainer(**SETTINGS).prepare_backend()
    assert not torch.are_deterministic_algorithms_enabled()


def test_step_counters_of_a_resumed_optimiser_stay_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `accelerate` moves to the device when it prepares an optimiser must hold no state."""
    import accelerate.optimizer as engine

    moved: list[Any] = []
    move = engine.move_to_device

    def watched(state: Any, device: Any) -> Any:
        if isinstance(state, dict) and "state" in state:  # it calls itself for what is in there
            moved.append(state["state"])
        return move(state, device)

    monkeypatch.setattr(engine, "move_to_device", watched)
    fit(tmp_path, max_steps=4)
    fit(tmp_path, max_steps=8)
    assert moved == [{}, {}]


# ---------------------------------------------------------------------- from outside


FOREIGN = [
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
    {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"},
    {"ACCELERATE_GRADIENT_CLIPPING": "0.001"},
    {"GRADIENT_ACCUMULATION_STEPS": "4"},
    {"ACCELERATE_DOWNCAST_BF16": "true"},
]


@pytest.mark.parametrize("variables", first(FOREIGN), ids=lambda v: next(iter(v)))
def test_the_environment_of_other_tools_changes_no_gradient(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = fit(tmp_path / "a", max_steps=4)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, _ = fit(tmp_path / "b", max_steps=4)
    assert torch.equal(weights(found), weights(expected))
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")


def test_what_another_loop_left_behind_skips_no_step(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "a", max_steps=4)
    with fresh_state():
        other = Accelerator(cpu=True, gradient_accumulation_steps=4)
        other.gradient_state._set_sync_gradients(False)  # as in the middle of an accumulation
        found, _ = fit(tmp_path / "b", max_steps=4)
        assert PartialState._shared_state, "the other loop keeps its state"
    assert torch.equal(weights(found), weights(expected))


def test_a_fit_leaves_the_process_free_to_choose_its_device(tmp_path: Path) -> None:
    with fresh_state():
        fit(tmp_path, max_steps=2)
        assert not PartialState._shared_state


@pytest.mark.parametrize(
    ("variable", "kind"),
    [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM")],
)
def test_a_launch_that_shards_is_refused(
    variable: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import DistributedType

    kinds = property(lambda _: DistributedType[kind])
    monkeypatch.setattr(Accelerator, "distributed_type", kinds)
    with pytest.raises(ValueError, match=f"accelerate is set up for {kind}.*--multi_gpu"):
        fit(tmp_path)


def test_the_device_that_is_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, max_steps=1)
    assert "training on cpu, 1 process(es), fp32, float32 products in fp32" in caplog.text


def test_a_device_that_torch_cannot_use_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match=r"trainer\.device=cuda, but torch can use no CUDA"):
        Trainer(**{**SETTINGS, "device": "cuda"})
    with pytest.raises(ValueError, match=r"trainer\.matmul_precision='bf16' is not known"):
        Trainer(**{**SETTINGS, "matmul_precision": "bf16"})
    with pytest.raises(ValueError, match=r"trainer\.checkpoint_every_s=0"):
        Trainer(**{**SETTINGS, "checkpoint_every_s": 0})


@contextlib.contextmanager
def fresh_state() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# ---------------------------------------------------------------------- the watched loss


def test_a_loss_is_checked_without_the_one_that_runs() -> None:
    fine = WatchedLoss(3, torch.tensor(1.0), ["a"])
    assert fine.is_finite
    assert "step 3 is not finite; the batch was another process's" in str(fine.error())
    broken = WatchedLoss(4, torch.tensor(float("inf")), ["b", "c"])
    assert not broken.is_finite
    assert "step 4 is inf; its batch was b, c" in str(broken.error())
