"""What one optimiser step of the suite's own loop costs.

`delta_lora.trainer.Trainer` runs as in a table; `watch` looks at it between two steps, through the
method's hook that the loop calls once per applied step. Times are wall-clock between two points at
which the device has finished everything.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from delta_lora import memory
from delta_lora.protocols import Method
from delta_lora.trainer import Trainer
from scripts.checking import models, synthetic
from scripts.checking.finding import Context

#: host calls that start a kernel, or a graph of them.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch")
#: what the host asks of the device in a step, and how the profiler calls it.
CALLS = {"launch": LAUNCHES, "copy": ("cudaMemcpy",), "wait": ("cudaStreamSynchronize",)}


class EnoughError(Exception):
    """Ends a fit from a hook: everything was measured. No checkpoint is written."""


@dataclass(frozen=True)
class Workload:
    """A model and the batches it is timed on.

    Attributes:
        model: name in `scripts.checking.models`.
        groups: the micro-batches of one epoch; every one is seen once per epoch.
        groups_per_step: micro-batches of one optimiser step.
        batch_size: examples of one optimiser step.
        is_small: whether the model is a small one.
        layers: number of layers of a small model.
    """

    model: str
    groups: list[list[Any]]
    groups_per_step: int
    batch_size: int
    is_small: bool
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 2 or len(self.groups) % self.groups_per_step:
            raise ValueError(
                f"{len(self.groups)} groups of {self.groups_per_step} a step; an epoch needs at "
                "least two whole steps"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every group is seen once."""
        return len(self.groups) // self.groups_per_step

    @property
    def batch_tokens(self) -> float:
        """Mean number of input tokens of an optimiser step."""
        task = synthetic.task(self.model)
        return sum(task.collate([group]).num_tokens for group in self.groups) / self.steps_per_epoch

    def build(self, device: str) -> Any:
        """Return the model."""
        return models.build(self.model, device, small=self.is_small, layers=self.layers)


@dataclass
class StepCost:
    """What a step costs.

    Attributes:
        ms: milliseconds a step in every timed epoch.
        first_epoch_ms: the same in the epoch before, which saw every shape for the first time.
        peak_bytes: device memory at its highest since the fit began (CPU: of the process).
        loss: of the last micro-batch, summed over its targets.
        launches: kernel launches a step; None where no profiler ran or it saw no kernel.
        busy: share of the step in which the device ran a kernel; None likewise.
    """

    ms: list[float] = field(default_factory=list)
    first_epoch_ms: float = float("nan")
    peak_bytes: int = 0
    loss: float = float("nan")
    launches: float | None = None
    busy: float | None = None

    @property
    def ms_per_step(self) -> float:
        """Mean over the timed epochs."""
        return sum(self.ms) / len(self.ms)

    @property
    def best_ms(self) -> float:
        """The fastest epoch: what a comparison rests on, for noise only ever adds time."""
        return min(self.ms)

    def facts(self) -> dict[str, Any]:
        """Return plain values for the report."""
        facts: dict[str, Any] = {
            "ms_per_step": round(self.ms_per_step, 3),
            "best_ms_per_step": round(self.best_ms, 3),
            "first_epoch_ms_per_step": round(self.first_epoch_ms, 3),
            "peak_bytes": self.peak_bytes,
            "last_loss": self.loss,
        }
        if self.launches is not None:
            facts |= {"launches_per_step": round(self.launches, 1), "busy": self.busy}
        return facts


def gpt2(context: Context, *, batch_size: int = 8, steps: int = 12) -> Workload:
    """Return GPT2-Medium on `steps` different batches with E2E's lengths."""
    vocabulary = 160 if context.is_small else 50_257
    count = batch_size * (2 if context.is_small else steps)
    groups = synthetic.groups(synthetic.sequences(count, vocabulary, seed=1), batch_size)
    return Workload(
        "gpt2_medium", groups, 1, batch_size, context.is_small, 2 if context.is_small else None
    )


def watch(
    method: Method,
    *,
    before: Callable[[int], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Call `before(step)` in front of every forward pass and `after(step)` behind every step."""
    before_micro_batch, after_step = method.before_micro_batch, method.after_step

    def watched_before(step: int, micro_step: int) -> None:
        if before is not None:
            before(step)
        before_micro_batch(step, micro_step)

    def watched_after(step: int) -> None:
        after_step(step)
        if after is not None:
            after(step)

    method.before_micro_batch = watched_before  # type: ignore[method-assign]
    method.after_step = watched_after  # type: ignore[method-assign]


def synchronize(device: str) -> None:
    """Wait until the device has finished what is queued."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    context: Context,
    workload: Workload,
    method_name: str,
    *,
    epochs: int = 5,
    profiled_steps: int = 0,
    at_start: Callable[[], None] | None = None,
    **settings: Any,
) -> StepCost:
    """Run the loop for one untimed and `epochs` timed passes over the workload.

    Args:
        context: the device.
        workload: model and batches.
        method_name: one of `scripts.checking.models.METHODS`.
        epochs: timed passes.
        profiled_steps: further steps under the profiler, untimed; 0: none.
        at_start: called behind the first step, for a backend setting that the trainer sets itself.
        **settings: keywords of `delta_lora.trainer.Trainer`.
    """
    per_epoch = workload.steps_per_epoch
    timed = per_epoch * (1 + epochs)
    total = timed + profiled_steps + 1
    method = models.make_method(method_name, workload.model)
    model = workload.build(context.device)
    method.inject(
        model, projections=None, head=models.head(workload.model), total_steps=total, seed=1
    )
    task, cost = synthetic.task(workload.model), StepCost()
    marks: list[float] = []
    profiler = make_profiler(context) if profiled_steps else None

    def after(step: int) -> None:
        number = step + 1
        if number == 1 and at_start is not None:
            at_start()
        if number == 1 or number % per_epoch == 0:
            synchronize(context.device)
            marks.append(time.perf_counter())
        if number == timed and profiler is not None:
            profiler.start()
        if number == timed + profiled_steps:
            synchronize(context.device)
            if profiler is not None:
                profiler.stop()
            raise EnoughError

    watch(method, after=after)
    run(context, model, method, task, workload, total, settings)
    # The first mark stands behind the first step, the others behind an epoch each.
    times = [(b - a) * 1000 for a, b in pairwise(marks)]
    cost.first_epoch_ms = times[0] / (per_epoch - 1)
    cost.ms = [each / per_epoch for each in times[1 : 1 + epochs]]
    cost.peak_bytes = memory.peak_bytes(torch.device(context.device))
    assert task.last_loss is not None
    cost.loss = float(task.last_loss)
    if profiler is not None:
        cost.launches, cost.busy = _read(profiler, profiled_steps, cost.best_ms)
    return cost


def run(
    context: Context,
    model: Any,
    method: Method,
    task: synthetic.Synthetic,
    workload: Workload,
    total: int,
    settings: dict[str, Any],
) -> None:
    """Fit until a hook raises `EnoughError` or `total` steps are done."""
    settings = {"log_every_steps": total, "evaluate_every_epochs": None, **settings}
    trainer = Trainer(
        batch_size=workload.groups_per_step,
        micro_batch_size=1 if workload.groups_per_step > 1 else None,
        max_steps=total,
        device=context.device,
        **settings,
    )
    trainer.prepare_backend()
    folder = context.folder / f"fit-{time.monotonic_ns()}"
    try:
        trainer.fit(
            model, method=method, task=task, train=workload.groups, validation=(), seed=1,
            folder=folder,
        )  # fmt: skip
    except EnoughError:
        return


def entry(
    workload: Workload, method: str, cost: StepCost, *, precision: str, matmul_precision: str
) -> dict[str, Any]:
    """Return the planner's entry for a measured step: all numbers are of one forward pass."""
    parts = workload.groups_per_step
    facts = cost.facts()
    facts |= {name: round(ms / parts, 3) for name, ms in facts.items() if "ms_per_step" in name}
    return {
        "model": workload.model,
        "method": method,
        "precision": precision,
        "matmul_precision": matmul_precision,
        "batch_size": workload.batch_size // parts,
        "batch_tokens": round(workload.batch_tokens / parts, 1),
        "micro_batches": parts,
        "steps_timed": len(cost.ms) * workload.steps_per_epoch,
        **facts,
    }


def clean_up(device: str) -> None:
    """Free what a check left and give torch its default settings again."""
    gc.collect()
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_profiler(context: Context) -> profile:
    """Return a profiler of host and device, not started."""
    activities = [ProfilerActivity.CPU]
    if context.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def _read(profiler: profile, steps: int, ms_per_step: float) -> tuple[float | None, float | None]:
    """Return launches a step and the share of the step in which a kernel ran."""
    averages = profiler.key_averages()
    launches = sum(e.count for e in averages if e.key.startswith(LAUNCHES))
    if not launches:  # a CPU, or a machine that does not let the profiler see the device
        return None, None
    return launches / steps, device_us(averages) / steps / (ms_per_step * 1000)


def device_calls(profiler: profile, steps: int) -> dict[str, float]:
    """Return how often a step called the device, by the kind of the call: launch, copy, wait.

    Empty where the profiler sees no device.
    """
    counts = dict.fromkeys(CALLS, 0)
    for event in profiler.key_averages():
        for kind, names in CALLS.items():
            if event.key.startswith(names):
                counts[kind] += event.count
    return {kind: count / steps for kind, count in counts.items()} if any(counts.values()) else {}


def device_us(averages: Sequence[Any]) -> float:
    """Return the microseconds of all kernels and copies of a profile."""
    return sum(
        e.self_device_time_total
        for e in averages
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    )
