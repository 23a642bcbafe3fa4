"""Checks 6, 7 and 8: half precision that overflows, runs that are killed, checkpoints."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from delta_lora import checkpoint
from delta_lora.models import fingerprint
from delta_lora.protocols import Method
from delta_lora.trainer import FitResult, Trainer
from scripts.checking import children, models, steps, synthetic
from scripts.checking.finding import Context, Deadline, Finding
from scripts.checking.steps import Workload

#: check 6: steps of the run, where it is stopped, where and how often it overflows.
FP16_STEPS, FP16_STOP, FP16_OVERFLOW, FP16_REPEATS = 60, 30, 10, 3
#: steps in which the calls of the device are counted.
COUNTED_STEPS = 4
#: check 7: steps of the run, where it is killed, steps between two checkpoints.
KILLED_STEPS, KILLED_AT, CHECKPOINT_EVERY = 50, 25, 10
CHILD_TIMEOUT_S = 120.0


class Overflowing(synthetic.Synthetic):
    """A causal task whose loss is too large for float16 at chosen attempts of one step."""

    def __init__(self) -> None:
        inner = synthetic.task("gpt2_medium")
        super().__init__(inner._collate, inner._loss)
        self.step = 0
        self.repeats = FP16_REPEATS

    def loss(self, model: Any, batch: Any, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the loss, times 2^40 where it shall overflow."""
        loss = super().loss(model, batch, label_smoothing)
        if self.step == FP16_OVERFLOW and self.repeats:
            self.repeats -= 1
            return loss * 2.0**40
        return loss


def fp16(context: Context) -> Finding:
    """Let float16 overflow, stop, resume, and compare what a step asks of the device."""
    finding = Finding()
    workload = steps.gpt2(context, steps=10)
    folder = context.folder / "fp16-straight"
    straight, straight_ms, straight_calls = _fp16_run(context, workload, folder, None)
    folder = context.folder / "fp16-stopped"
    stopped, _, _ = _fp16_run(context, workload, folder, FP16_STOP)
    resumed, resumed_ms, resumed_calls = _fp16_run(context, workload, folder, None)
    assert straight is not None
    assert resumed is not None
    finding.values = {
        "skipped_steps": {"straight": straight.skipped_steps, "resumed": resumed.skipped_steps},
        "steps": {"straight": straight.num_steps, "resumed": resumed.num_steps},
        "loss": {"straight": straight.final_train_loss, "resumed": resumed.final_train_loss},
        "ms_per_step": {"straight": straight_ms, "resumed": resumed_ms},
    }
    finding.equal("was_stopped", stopped is None, True)
    finding.equal("skipped_steps", straight.skipped_steps, FP16_REPEATS)
    finding.equal("skipped_steps_resumed", resumed.skipped_steps, FP16_REPEATS)
    finding.equal("steps_resumed", resumed.num_steps, straight.num_steps)
    losses = [run.final_train_loss or math.nan for run in (straight, resumed)]
    finding.equal("finite_losses", all(map(math.isfinite, losses)), True)
    finding.values["ms_after_resume"] = round(resumed_ms / straight_ms, 3)
    # A clock on a shared host says little; what the host asks of the device can be counted.
    finding.values["calls_per_step"] = {"straight": straight_calls, "resumed": resumed_calls}
    finding.equal("calls_after_resume", resumed_calls, straight_calls)
    return finding


def _fp16_run(
    context: Context, workload: Workload, folder: Path, stop_at: int | None
) -> tuple[FitResult | None, float, dict[str, float]]:
    """Run LoRA in float16.

    Returns:
        Its result (None if it stopped), the milliseconds a step of its fastest window, and how
        often a step of the last window calls the device, by the kind of the call.
    """
    task = Overflowing()
    method = models.make_method("lora", workload.model)
    model = workload.build(context.device)
    method.inject(model, projections=None, head=(), total_steps=FP16_STEPS, seed=1)
    window, marks = workload.steps_per_epoch, []
    profiler = steps.make_profiler(context)

    def before(step: int) -> None:
        task.step = step

    def after(step: int) -> None:
        # Whole epochs behind the stop, where the resumed run has warmed up.
        if step + 1 > FP16_STOP and (step + 1) % window == 0:
            steps.synchronize(context.device)
            marks.append(time.perf_counter())
        if step + 1 == FP16_STEPS - COUNTED_STEPS - 1:
            profiler.start()
        if step + 1 == FP16_STEPS - 1:
            steps.synchronize(context.device)
            profiler.stop()
        if step + 1 == stop_at:  # as a scheduler does: a checkpoint is written, then the run ends
            os.kill(os.getpid(), signal.SIGTERM)

    steps.watch(method, before=before, after=after)
    trainer = Trainer(
        batch_size=1, max_steps=FP16_STEPS, precision="fp16", evaluate_every_epochs=None,
        log_every_steps=window, device=context.device,
    )  # fmt: skip
    trainer.prepare_backend()
    try:
        result = trainer.fit(
            model, method=method, task=task, train=workload.groups, validation=(), seed=1,
            folder=folder,
        )  # fmt: skip
    except KeyboardInterrupt:
        result = None
    # The last window was profiled in part.
    windows = [(b - a) * 1000 / window for a, b in pairwise(marks[:-1])]
    calls = steps.device_calls(profiler, COUNTED_STEPS) if result is not None else {}
    del model, trainer
    steps.clean_up(context.device)
    return result, min(windows, default=math.nan), calls


def killed(context: Context) -> Finding:
    """Kill a run, resume it, and compare its bits with those of a run that nobody killed."""
    finding = Finding()
    arguments = {
        "device": context.device, "layers": 2 if context.is_small else 4,
        "folder": str(context.folder / "killed"),
    }  # fmt: skip
    where = context.folder / "children"
    straight = children.start(
        "straight_runs", {**arguments, "folder": str(context.folder / "straight")}, where
    )
    first = children.start("run_to_kill", {**arguments, "kill_at": KILLED_AT}, where, name="killed")
    with children.ended_after([straight, first]):
        children.wait([first], CHILD_TIMEOUT_S, "the run that is killed")
        second = children.start("run_to_kill", arguments, where, name="resumed")
        with children.ended_after([second]):
            children.wait([second, straight], CHILD_TIMEOUT_S, "the resumed and the straight run")
    runs, resumed = straight.result(), second.result()
    finding.values = {"killed": resumed, **runs, "signal": first.process.returncode}
    finding.equal("killed_by", first.process.returncode, -signal.SIGKILL)
    finding.at_least("resumed_from", resumed["first_step"], CHECKPOINT_EVERY)
    finding.equal("bits_resumed", _bits(resumed) == _bits(runs["deterministic"]), True)
    finding.equal("bits_repeated", _bits(runs["again"]) == _bits(runs["deterministic"]), True)
    finding.values["bits_repeated_without_deterministic"] = _bits(runs["default"]) == _bits(
        runs["default_again"]
    )
    return finding


def _bits(run: dict[str, Any]) -> tuple[str, str]:
    return run["weights"], run["metrics"]


def straight_runs(*, device: str, layers: int, folder: str) -> dict[str, Any]:
    """Run to the end twice with deterministic kernels, and twice as torch chooses."""
    return {
        name: run_to_kill(
            device=device, layers=layers, folder=f"{folder}-{name}", deterministic=deterministic
        )
        for name, deterministic in (
            ("deterministic", True), ("again", True), ("default", False), ("default_again", False),
        )
    }  # fmt: skip


def run_to_kill(
    *, device: str, layers: int, folder: str, kill_at: int | None = None, deterministic: bool = True
) -> dict[str, Any]:
    """Train Delta-LoRA on a small GPT-2; at step `kill_at` the process kills itself."""
    run = Path(folder)
    groups = synthetic.groups(synthetic.sequences(80, 160, seed=6), 8)
    trainer = Trainer(
        batch_size=1, max_steps=KILLED_STEPS, evaluate_every_epochs=None, log_every_steps=5,
        checkpoint_every_steps=CHECKPOINT_EVERY, device=device, deterministic=deterministic,
    )  # fmt: skip
    trainer.prepare_backend()
    model = models.build("gpt2_medium", device, layers=layers, small=True)
    method = models.make_method("delta_lora", "gpt2_medium", start_step=3)
    method.inject(model, projections=None, head=(), total_steps=KILLED_STEPS, seed=1)
    seen: list[int] = []

    def after(step: int) -> None:
        seen.append(step)
        if step + 1 == kill_at:
            _wait_for_checkpoint(run)
            os.kill(os.getpid(), signal.SIGKILL)

    steps.watch(method, after=after)
    result = trainer.fit(
        model, method=method, task=synthetic.task("gpt2_medium"), train=groups, validation=(),
        seed=1, folder=run,
    )  # fmt: skip
    return {
        "weights": fingerprint(model),
        "metrics": checkpoint.sha256_file(run / "metrics.jsonl"),
        "first_step": seen[0],
        "steps": result.num_steps,
        "loss": result.final_train_loss,
    }


def _wait_for_checkpoint(run: Path) -> None:
    """A checkpoint is written in the background; without one there would be nothing to resume."""
    deadline = Deadline(30, "the first checkpoint")
    while not list((run / "checkpoints").glob("step-*")):
        deadline.check()
        time.sleep(0.01)


def checkpoints(context: Context) -> Finding:
    """Write and read the checkpoints of full fine-tuning and of Delta-LoRA on GPT2-Medium."""
    finding = Finding()
    workload = steps.gpt2(context, steps=2)
    for name in ("full", "delta_lora"):
        method, tensors = _state_after_a_step(context, workload, name)
        folder = context.folder / f"checkpoint-{name}"
        began = time.perf_counter()
        path = checkpoint.save(folder, 1, tensors=tensors, state={"state": {}})
        saved_s = time.perf_counter() - began
        size = sum(file.stat().st_size for file in path.iterdir())
        began = time.perf_counter()
        stored = checkpoint.latest(folder)
        loaded_s = time.perf_counter() - began
        assert stored is not None
        equal = all(
            torch.equal(stored.tensors[part][key], tensor.detach().cpu())
            for part, content in tensors.items()
            for key, tensor in content.items()
        )
        finding.equal(f"{name}_read_as_written", equal, True)
        facts = {
            "bytes": size, "save_s": round(saved_s, 3), "load_s": round(loaded_s, 3),
            "write_bytes_per_s": round(size / saved_s), "read_bytes_per_s": round(size / loaded_s),
        }  # fmt: skip
        finding.values[name] = facts
        finding.cost("checkpoint", model=workload.model, method=name, **facts)
        context.say(
            f"{name}: {size / 1e6:.0f} MB, saved in {saved_s:.2f} s, read in {loaded_s:.2f} s"
        )
        shutil.rmtree(folder)
        del method, tensors, stored
        steps.clean_up(context.device)
    return finding


def _state_after_a_step(
    context: Context, workload: Workload, name: str
) -> tuple[Method, dict[str, dict[str, torch.Tensor]]]:
    """Return what a checkpoint of the first step holds."""
    method = models.make_method(name, workload.model)
    model = workload.build(context.device)
    method.inject(model, projections=None, head=(), total_steps=2, seed=1)
    trainer = Trainer(batch_size=1, device=context.device)
    trainer.prepare_backend()
    optimizer = trainer.build_optimizer(model, method)
    task = synthetic.task(workload.model)
    batch = task.collate([workload.groups[0]]).to(context.device)
    method.before_micro_batch(0, 0)
    (task.loss(model, batch) / batch.num_targets).backward()
    method.before_step(0)
    optimizer.step()
    method.after_step(0)
    state, _ = checkpoint.optimizer_tensors(optimizer)
    return method, {
        "weights": method.updated_tensors(model),
        "optimizer": state,
        "method": method.state_dict(),
    }
