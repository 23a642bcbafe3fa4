"""Checks 4, 5, 11, 13: what a step costs by method, precision and model, and who waits for it."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from delta_lora.trainer import Trainer
from scripts.checking import children, lengths, models, recipes, steps, synthetic
from scripts.checking.finding import Context, Deadline, Finding
from scripts.checking.steps import EnoughError, StepCost, Workload

#: processes that share the device in check 5, and seconds in which their steps are counted.
PROCESSES, WINDOW_S = 4, 6.0
#: different shapes in the comparison of attention backends; a plan per shape may take a second.
SHAPES = 12
SYNC_STEPS = 5
#: rounds in which methods take turns; the median of their ratios is judged.
ROUNDS = 8
#: a device with less memory takes XSum's batch in smaller pieces.
SMALL_DEVICE_BYTES = 40 * 2**30
#: what GPT2-Medium's step is timed with; its recipe has dropout, so LoRA without is another step.
TIMED = (*models.METHODS, "lora_no_dropout")
#: what torch says of a host that waits for the device.
SYNC_WARNING = "called a synchronizing CUDA operation"


def methods(context: Context) -> Finding:
    """Time GPT2-Medium's step with every method in float32."""
    finding = Finding()
    workload = steps.gpt2(context)
    epochs, profiled = (1, 0) if context.is_small else (3, 3)
    costs: dict[str, StepCost] = {}
    for name in TIMED:
        cost = steps.measure(context, workload, name, epochs=epochs, profiled_steps=profiled)
        steps.clean_up(context.device)
        costs[name] = cost
        finding.values[name] = cost.facts()
        finding.cost(
            "steps",
            **steps.entry(workload, name, cost, precision="fp32", matmul_precision="fp32"),
        )
        context.say(_line(name, cost))
    losses_are_finite = all(math.isfinite(cost.loss) for cost in costs.values())
    finding.equal("finite_losses", losses_are_finite, True)
    rounds = side_by_side(context, workload, ("lora", "lora_no_dropout", "delta_lora"))
    peak = round(costs["delta_lora"].peak_bytes / costs["lora"].peak_bytes, 3)
    times = {
        other: _ratio(rounds["delta_lora"], rounds[other]) for other in ("lora", "lora_no_dropout")
    }
    finding.values["side_by_side"] = {"ms_per_step": rounds, "delta_over": times, "peak": peak}
    context.say(f"Delta-LoRA's step over that of {times} (medians over rounds)")
    if context.is_cuda and not context.is_small:
        finding.at_most("delta/lora_time", times["lora"], 1.15)
        finding.at_most("delta/lora_peak", peak, 1.10)
    return finding


def side_by_side(
    context: Context, workload: Workload, names: Sequence[str]
) -> dict[str, list[float]]:
    """Return milliseconds a step of several methods, which take turns round by round.

    The host is shared with others, so that two measurements one after the other may differ by half;
    what happens within a round of seconds meets all alike.

    Args:
        context: the device.
        workload: model and batches; all methods' models are on the device together.
        names: methods of `scripts.checking.models`.

    Returns:
        One number a round and method; the first round, a warm-up, is left out.
    """
    Trainer(batch_size=1, device=context.device).prepare_backend()
    task = synthetic.task(workload.model)
    batches = [task.collate([group]).to(context.device) for group in workload.groups]
    takers = {name: _step_of(context, workload, name, task) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1 + (1 if context.is_small else ROUNDS)):
        for name, take in takers.items():
            steps.synchronize(context.device)
            began = time.perf_counter()
            for batch in batches:
                take(batch)
            steps.synchronize(context.device)
            if number:
                times[name].append((time.perf_counter() - began) * 1000 / len(batches))
    takers.clear()
    steps.clean_up(context.device)
    return times


def _step_of(
    context: Context, workload: Workload, name: str, task: synthetic.Synthetic
) -> Callable[[Any], None]:
    """Return what takes one optimiser step of a method on a batch."""
    model, method = workload.build(context.device), models.make_method(name, workload.model)
    method.inject(model, projections=None, head=(), total_steps=1_000_000, seed=1)
    model.train()
    optimizer = Trainer(batch_size=1, device=context.device).build_optimizer(model, method)
    step = 0

    def take(batch: Any) -> None:
        nonlocal step
        method.before_micro_batch(step, 0)
        (task.loss(model, batch) / batch.num_targets).backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
        step += 1

    return take


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over rounds of one time over the other."""
    return round(statistics.median(a / b for a, b in zip(times, others, strict=True)), 3)


def precisions(context: Context) -> Finding:
    """Time LoRA's step in float32, TF32 and bfloat16, and with four processes on the device."""
    finding = Finding()
    workload = steps.gpt2(context, steps=SHAPES)
    epochs = 1 if context.is_small else 3
    variants: dict[str, dict[str, Any]] = {
        "fp32": {},
        "tf32": {"matmul_precision": "tf32"},
        "bf16": {"precision": "bf16"},
        "bf16_cudnn_attention": {
            "precision": "bf16",
            "at_start": lambda: torch.backends.cuda.enable_cudnn_sdp(True),
        },
    }
    for name, settings in variants.items():
        cost = steps.measure(context, workload, "lora", epochs=epochs, **settings)
        steps.clean_up(context.device)
        new_shape_ms = cost.first_epoch_ms - cost.ms_per_step
        finding.values[name] = {
            **cost.facts(), "steps_per_s": round(1000 / cost.best_ms, 2),
            "first_seen_shape_ms": round(new_shape_ms, 2),
        }  # fmt: skip
        if name in ("tf32", "bf16"):
            finding.cost("steps", **steps.entry(
                workload, "lora", cost, precision="bf16" if name == "bf16" else "fp32",
                matmul_precision="tf32" if name == "tf32" else "fp32",
            ))  # fmt: skip
        context.say(f"{_line(name, cost)}, {new_shape_ms:.1f} ms more for a new shape")
    for name in TIMED[1:]:  # LoRA's is there already
        cost = steps.measure(context, workload, name, epochs=2, matmul_precision="tf32")
        steps.clean_up(context.device)
        found = steps.entry(workload, name, cost, precision="fp32", matmul_precision="tf32")
        finding.cost("steps", **found)
        context.say(_line(f"{name} tf32", cost))
    alone = 1000 / finding.values["tf32"]["best_ms_per_step"]
    shared = together(context, PROCESSES, {"matmul_precision": "tf32"}, {})
    finding.values["processes"] = {**shared, "alone_steps_per_s": alone}
    context.say(f"{PROCESSES} processes: {shared['steps_per_s']:.1f} steps/s, alone {alone:.1f}")
    # The trainer's own choice of attention must not plan anew for every shape.
    finding.at_most("bf16_first_seen_shape_ms", finding.values["bf16"]["first_seen_shape_ms"], 50)
    finding.equal("processes_done", shared["processes"], PROCESSES)
    return finding


def together(
    context: Context, count: int, settings: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return the steps a second of `count` processes that train at the same time on the device.

    Args:
        context: the device.
        count: number of processes.
        settings: keywords of the trainer.
        environment: variables of the processes.
    """
    folder = context.folder / f"together-{time.monotonic_ns()}"
    arguments = {
        "device": context.device, "is_small": context.is_small, "folder": str(folder),
        "window_s": 1.0 if context.is_small else WINDOW_S, "settings": dict(settings),
    }  # fmt: skip
    started = [
        children.start(
            "count_steps", arguments | {"index": index}, folder, name=f"process{index}",
            environment=environment,
        )
        for index in range(count)
    ]  # fmt: skip
    with children.ended_after(started):
        deadline = Deadline(90, f"the start of {count} processes")
        while len(list(folder.glob("ready-*"))) < count:
            deadline.check()
            for child in started:
                if child.process.poll() is not None:
                    child.result()
                    raise RuntimeError(f"{child.answer.stem} ended before all were ready")
            time.sleep(0.05)
        (folder / "go").touch()
        children.wait(started, 60, f"{count} processes on one device")
    rates = [child.result()["steps_per_s"] for child in started]
    return {"processes": len(rates), "steps_per_s": sum(rates), "each_steps_per_s": rates}


def count_steps(
    *, device: str, is_small: bool, folder: str, window_s: float, settings: dict[str, Any],
    index: int,
) -> dict[str, Any]:  # fmt: skip
    """Train LoRA, wait for the file ``go`` once warm, and count steps for `window_s` seconds."""
    context = Context(device, is_small, Path(folder) / f"scratch{index}")
    workload = steps.gpt2(context)
    method = models.make_method("lora", workload.model)
    model = workload.build(device)
    total = 1_000_000
    method.inject(model, projections=None, head=(), total_steps=total, seed=1)
    began, first = 0.0, workload.steps_per_epoch

    def after(step: int) -> None:
        nonlocal began
        if step == first:
            steps.synchronize(device)
            (Path(folder) / f"ready-{index}").touch()
            deadline = Deadline(90, "the other processes")
            while not (Path(folder) / "go").exists():
                deadline.check()
                time.sleep(0.01)
            began = time.perf_counter()
        elif step > first and time.perf_counter() - began > window_s:
            steps.synchronize(device)
            answer["steps_per_s"] = (step - first) / (time.perf_counter() - began)
            raise EnoughError

    answer: dict[str, Any] = {}
    steps.watch(method, after=after)
    task = synthetic.task(workload.model)
    steps.run(context, model, method, task, workload, total, {"log_every_steps": 10, **settings})
    return answer


def other_models(context: Context) -> Finding:
    """Time BART-large's and RoBERTa-base's steps as XSum and GLUE take them."""
    finding = Finding()
    finite = True
    bart, roberta = _bart(context), _roberta(context)
    cases = [
        (bart, name, matmul)
        for matmul in ("fp32", "tf32")
        for name in models.METHODS
        if name != "delta_lora_closed_form"
    ] + [(roberta, name, "fp32") for name in models.METHODS]
    for workload, name, matmul in cases:
        if matmul == "tf32" and not context.is_cuda:
            continue
        epochs = 1 if context.is_small or workload is bart else 3
        cost = steps.measure(
            context, workload, name, epochs=epochs, matmul_precision=matmul,
            profiled_steps=0 if context.is_small or workload is bart else 3,
            max_grad_norm=1.0 if workload is roberta else None,
        )  # fmt: skip
        steps.clean_up(context.device)
        finite = finite and math.isfinite(cost.loss)
        found = steps.entry(workload, name, cost, precision="fp32", matmul_precision=matmul)
        finding.cost("steps", **found)
        finding.values[f"{workload.model}/{name}/{matmul}"] = cost.facts()
        context.say(_line(f"{workload.model} {name} {matmul}", cost))
    if context.is_cuda and not context.is_small:
        for matmul in ("fp32", "tf32"):
            cost = steps.measure(
                context, _bart_at_the_limit(), "lora", epochs=3, matmul_precision=matmul
            )
            steps.clean_up(context.device)
            finding.values[f"bart_large/lora/{matmul}, 8 x 768"] = cost.facts()
            context.say(_line(f"bart_large lora {matmul}, 8 x 768", cost))
    finding.equal("finite_losses", finite, True)
    return finding


def _bart(context: Context) -> Workload:
    """XSum's step as the recipe takes it: 64 articles, sorted by length, in micro-batches.

    A device of less than `SMALL_DEVICE_BYTES` gets micro-batches of 8, as the recipe advises.
    """
    batch_size, size = (
        (4, 2) if context.is_small else (64, recipes.recipe("xsum")["micro_batch_size"])
    )
    if context.is_cuda and not context.is_small and _memory_bytes() < SMALL_DEVICE_BYTES:
        size = 8
    number = batch_size // size
    sources = [12, 24] if context.is_small else lengths.sorted_articles(number)
    target, vocabulary = (12, 160) if context.is_small else (28, 50_265)
    groups = [
        synthetic.pairs(size, source, target, vocabulary, seed=4 + index)
        for index, source in enumerate(sources)
    ]
    # Two equal steps: one set of articles stands for all.
    return Workload(
        "bart_large", groups * 2, number, batch_size, context.is_small,
        2 if context.is_small else None,
    )  # fmt: skip


def _bart_at_the_limit() -> Workload:
    """Return micro-batches of 8 articles, every one cut at the limit of 768 tokens."""
    group = synthetic.pairs(8, 768, 64, 50_265, seed=4)
    return Workload("bart_large", [group, group], 1, 8, False)


def _memory_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)


def _roberta(context: Context) -> Workload:
    """GLUE's step: 16 texts of 40 tokens."""
    vocabulary, number = (160, 2) if context.is_small else (50_265, 12)
    examples = synthetic.labelled(16 * number, 40, vocabulary, seed=5)
    return Workload(
        "roberta_base", synthetic.groups(examples, 16), 1, 16, context.is_small,
        2 if context.is_small else None,
    )  # fmt: skip


def host_syncs(context: Context) -> Finding:
    """Count how often the host waits for the device in a step that is neither logged nor saved."""
    finding = Finding()
    workload = steps.gpt2(context, steps=4)
    for name in models.METHODS:
        counted, where = _count_syncs(context, workload, name)
        finding.values[name] = {"syncs_per_step": counted, "where": where}
        context.say(f"{name}: {counted:g} syncs a step {json.dumps(where)}")
    for name in ("lora", "delta_lora", "full"):
        finding.at_most(f"{name}_syncs", finding.values[name]["syncs_per_step"], 2)
    return finding


def _count_syncs(
    context: Context, workload: Workload, method_name: str
) -> tuple[float, dict[str, int]]:
    """Return the syncs of a step, and how many came from which line, over all counted steps."""
    first, total = 6, 6 + SYNC_STEPS + 1
    method = models.make_method(method_name, workload.model)
    model = workload.build(context.device)
    method.inject(model, projections=None, head=(), total_steps=total, seed=1)
    counted = contextlib.ExitStack()
    caught: list[warnings.WarningMessage] = []

    def after(step: int) -> None:
        nonlocal caught
        if step + 1 == first:
            steps.synchronize(context.device)
            caught = counted.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            counted.callback(torch.cuda.set_sync_debug_mode, "default")
        if step + 1 == first + SYNC_STEPS:
            counted.close()
            raise EnoughError

    steps.watch(method, after=after)
    task = synthetic.task(workload.model)
    with counted:  # also where a step fails between the two
        steps.run(context, model, method, task, workload, total, {})
    steps.clean_up(context.device)
    return summarise_syncs(caught, SYNC_STEPS)


def summarise_syncs(
    caught: list[warnings.WarningMessage], num_steps: int
) -> tuple[float, dict[str, int]]:
    """Return the syncs of a step, and their number by the line that torch blames."""
    where: dict[str, int] = {}
    for warning in caught:
        if SYNC_WARNING in str(warning.message):
            name = "/".join(Path(warning.filename).parts[-2:])
            place = f"{name}:{warning.lineno}"
            where[place] = where.get(place, 0) + 1
    return sum(where.values()) / num_steps, where


def _line(name: str, cost: StepCost) -> str:
    text = f"{name}: {cost.ms_per_step:.1f} ms a step, peak {cost.peak_bytes / 2**30:.2f} GiB"
    if cost.launches is not None and cost.busy is not None:
        text += f", {cost.launches:.0f} launches, device busy {cost.busy:.0%}"
    return text
