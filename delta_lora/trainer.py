"""The training loop: one for every method and every task, on `accelerate`.

Read `Trainer.fit` top to bottom. What makes it repeatable:

* Everything random is a function of (seed, epoch) or (seed, step, micro-batch, process), never of
  history. A run that was killed therefore continues to the bit-identical result from weights,
  optimiser state and method state alone.
* The loss of an optimiser step is the sum over all its targets, on all processes and
  micro-batches, divided by their number. So 1 x 8, 8 x 1 (accumulation) and 2 processes x 4 are
  the same step.
* A step that the fp16 loss scaler skips is repeated with the smaller scale, so the number of
  applied steps, the data position and the schedule always agree.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from delta_lora import checkpoint, memory
from delta_lora.checks import check_bool, check_choice, check_integer, check_real
from delta_lora.draws import seed_everything, step_indices
from delta_lora.optimization import (
    OPTIMIZERS,
    SCHEDULES,
    make_optimizer,
    schedule_factor,
    split_by_decay,
)
from delta_lora.protocols import Batch, Method, Task
from delta_lora.runlog import Progress, RunLog
from delta_lora.session import Session, stop_signals

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")
CHECKPOINT_RULES = ("last", "best")
#: consecutive overflowing steps after which fp16 training is given up.
MAX_SKIPPED_STEPS = 25


class NonFiniteLossError(RuntimeError):
    """The training loss became infinite or NaN."""


@dataclass
class FitResult:
    """What a run did; only what a repetition gives again to the bit, but for `resources`.

    Attributes:
        num_steps: applied optimiser steps.
        num_epochs: passes over the data.
        final_train_loss: mean loss per target since the last log line.
        validation: one entry per evaluation (step, epoch, loss, the task's metrics).
        checkpoint_rule: ``last`` or ``best``.
        chosen_step: the step whose weights the model holds now.
        skipped_steps: fp16 steps that overflowed and were repeated.
        resources: seconds, peak memory in bytes, tokens per second, number of sessions.
    """

    num_steps: int = 0
    num_epochs: float = 0.0
    final_train_loss: float = float("nan")
    validation: list[dict[str, float]] = field(default_factory=list)
    checkpoint_rule: str = "last"
    chosen_step: int = 0
    skipped_steps: int = 0
    resources: dict[str, float] = field(default_factory=dict)


class Trainer:
    """AdamW or another optimiser with a warm-up schedule; the recipe's values are the keywords.

    Args:
        batch_size: examples of one optimiser step, over all processes and micro-batches.
        micro_batch_size: examples of one forward pass on one process; None: no accumulation.
        group_by_length: sort a process's examples of a step by length before they are cut into
            micro-batches: less padding, and the same examples in the step.
        eval_batch_size: examples of one forward pass in evaluation.
        num_epochs: passes over the training data; ignored where `max_steps` is given.
        max_steps: number of optimiser steps, or None; 0 trains nothing.
        warmup_steps: steps of linear warm-up; exclusive with `warmup_ratio`.
        warmup_ratio: the same as a fraction of all steps.
        schedule: ``linear``, ``cosine`` or ``constant`` behind the warm-up.
        optimizer: ``adamw``, or torch's ``sgd``, ``rmsprop`` or ``adafactor``; a method may bring
            its own.
        momentum: of ``sgd`` and ``rmsprop``, in [0, 1).
        weight_decay: decoupled decay (torch's AdamW: before the update, by the learning rate);
            ``sgd`` and ``rmsprop`` add it to the gradient instead.
        no_decay: name parts of parameters without decay, for example ``bias``.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: AdamW's epsilon; the other optimisers keep torch's.
        max_grad_norm: clip the global gradient norm to this; None: no clipping.
        label_smoothing: passed to the task's training loss (validation loss is plain).
        precision: ``fp32``, or autocast in ``bf16`` or ``fp16`` (weights stay in float32).
        gradient_checkpointing: recompute activations in the backward pass.
        compile: run the model through `torch.compile`.
        checkpoint_rule: ``last``, or ``best`` by the task's `selection_metric` on the validation
            split (without one: by validation loss); of equal ones the first.
        evaluate_every_epochs: evaluations happen at these ends of epochs and at the last step;
            None: never.
        log_every_steps: distance of log lines.
        checkpoint_every_steps: distance of checkpoints; each waits for the next log step.
        device: ``auto`` (CUDA where there is one) or ``cpu``.
        num_threads: CPU threads for torch; None leaves torch's choice. Sums depend on it in the
            last bits, so it is part of a run's identity.
        deterministic: ask torch for deterministic kernels (slower on CUDA).

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        group_by_length: bool = False,
        eval_batch_size: int = 8,
        num_epochs: float = 1.0,
        max_steps: int | None = None,
        warmup_steps: int | None = None,
        warmup_ratio: float | None = None,
        schedule: str = "linear",
        optimizer: str = "adamw",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        no_decay: Sequence[str] = (),
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        adam_epsilon: float = 1e-8,
        max_grad_norm: float | None = None,
        label_smoothing: float = 0.0,
        precision: str = "fp32",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        checkpoint_rule: str = "last",
        evaluate_every_epochs: int | None = 1,
        log_every_steps: int = 10,
        checkpoint_every_steps: int = 500,
        device: str = "auto",
        num_threads: int | None = None,
        deterministic: bool = False,
    ) -> None:
        for name, least, integer in (
            ("batch_size", 1, batch_size),
            ("eval_batch_size", 1, eval_batch_size),
            ("log_every_steps", 1, log_every_steps),
            ("checkpoint_every_steps", 1, checkpoint_every_steps),
            ("micro_batch_size", 1, micro_batch_size),
            ("evaluate_every_epochs", 1, evaluate_every_epochs),
            ("num_threads", 1, num_threads),
            ("max_steps", 0, max_steps),
            ("warmup_steps", 0, warmup_steps),
        ):
            if integer is not None:
                check_integer(f"trainer.{name}", integer, at_least=least)
        check_real("trainer.num_epochs", num_epochs, above=0)
        check_real("trainer.weight_decay", weight_decay, at_least=0)
        check_real("trainer.adam_beta1", adam_beta1, at_least=0, below=1)
        check_real("trainer.adam_beta2", adam_beta2, at_least=0, below=1)
        check_real("trainer.adam_epsilon", adam_epsilon, above=0)
        check_real("trainer.label_smoothing", label_smoothing, at_least=0, below=1)
        if warmup_ratio is not None:
            check_real("trainer.warmup_ratio", warmup_ratio, at_least=0, at_most=1)
        if max_grad_norm is not None:
            check_real("trainer.max_grad_norm", max_grad_norm, above=0)
        check_real("trainer.momentum", momentum, at_least=0, below=1)
        check_choice("trainer.optimizer", optimizer, OPTIMIZERS)
        if momentum > 0 and optimizer not in ("sgd", "rmsprop"):
            raise ValueError(
                f"trainer.momentum={momentum} has no meaning for trainer.optimizer={optimizer}; "
                "use 0, or optimizer=sgd or rmsprop"
            )
        check_choice("trainer.schedule", schedule, SCHEDULES)
        check_choice("trainer.precision", precision, PRECISIONS)
        check_choice("trainer.checkpoint_rule", checkpoint_rule, CHECKPOINT_RULES)
        check_choice("trainer.device", device, ("auto", "cpu"))
        if warmup_steps is not None and warmup_ratio is not None:
            raise ValueError(
                f"both warmup_steps={warmup_steps} and warmup_ratio={warmup_ratio} are given; "
                "set one of them to null"
            )
        if checkpoint_rule == "best" and evaluate_every_epochs is None:
            raise ValueError("checkpoint_rule=best needs evaluations; set evaluate_every_epochs")
        if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
            raise ValueError(
                "precision=fp16 needs a CUDA device; on a CPU use precision=bf16 or fp32"
            )
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.group_by_length = check_bool("trainer.group_by_length", group_by_length)
        self.eval_batch_size = eval_batch_size
        self.num_epochs = num_epochs
        self.max_steps = max_steps
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio
        self.schedule = schedule
        self.optimizer_name = optimizer
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.no_decay = tuple(no_decay)
        self.adam_betas = (adam_beta1, adam_beta2)
        self.adam_epsilon = adam_epsilon
        self.max_grad_norm = max_grad_norm
        self.label_smoothing = label_smoothing
        self.precision = precision
        self.gradient_checkpointing = gradient_checkpointing
        self.compile = compile
        self.checkpoint_rule = checkpoint_rule
        self.evaluate_every_epochs = evaluate_every_epochs
        self.log_every_steps = log_every_steps
        self.checkpoint_every_steps = checkpoint_every_steps
        self.device = device
        self.num_threads = num_threads
        self.deterministic = deterministic

    # ------------------------------------------------------------------ plan

    def steps_per_epoch(self, num_examples: int) -> int:
        """Return the number of optimiser steps of one pass over the data."""
        return math.ceil(num_examples / self.batch_size)

    def total_steps(self, num_examples: int) -> int:
        """Return the number of optimiser steps of the run."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(self.num_epochs * self.steps_per_epoch(num_examples))

    def total_warmup_steps(self, total_steps: int) -> int:
        """Return the number of warm-up steps of a run of `total_steps`."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * total_steps)
        return self.warmup_steps or 0

    def prepare_backend(self) -> None:
        """Set threads and determinism of torch, before a model is built."""
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        torch.use_deterministic_algorithms(self.deterministic)

    def optimizer(self, model: nn.Module, method: Method) -> torch.optim.Optimizer:
        """Return the optimiser over the method's groups, each split by `no_decay`.

        Raises:
            ValueError: nothing trains, or two optimisers are asked for.
        """
        groups = split_by_decay(method.param_groups(model), self.weight_decay, self.no_decay)
        if not groups:
            raise ValueError("the method trains no parameter; check its settings")
        own = method.make_optimizer(groups)
        if own is None:
            return make_optimizer(
                self.optimizer_name,
                groups,
                betas=self.adam_betas,
                epsilon=self.adam_epsilon,
                momentum=self.momentum,
                has_loss_scaler=self.precision == "fp16",
            )
        if self.optimizer_name != "adamw":
            raise ValueError(
                f"trainer.optimizer={self.optimizer_name}, but this method brings its own "
                f"({type(own).__name__}); leave trainer.optimizer as it is, or take another "
                "method"
            )
        return own

    # ------------------------------------------------------------------ the loop

    def fit(
        self,
        model: nn.Module,
        *,
        method: Method,
        task: Task,
        train: Sequence[Any],
        validation: Sequence[Any],
        seed: int,
        folder: Path,
        mirrors: Sequence[Any] = (),
        identity: dict[str, Any] | None = None,
        score: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> FitResult:
        """Train `model`, continuing from the newest checkpoint in `folder` if there is one.

        Args:
            model: the model after `method.inject`, in float32 unless the method allows less.
            method: what is adapted.
            task: collates batches and computes the summed loss.
            train: encoded training examples.
            validation: encoded validation examples; may be empty if nothing evaluates.
            seed: seed of data order and dropout.
            folder: run folder; ``metrics.jsonl`` and ``checkpoints/`` are written here.
            mirrors: further loggers (`delta_lora.runlog.MetricLogger`).
            identity: JSON values that a checkpoint must agree on to be continued (for example
                the checksum of the base weights).
            score: returns the task's metrics of the validation split; called at every evaluation
                and recorded beside the loss. Needed where `task.selection_metric` is not None.

        Returns:
            What happened; `model` holds the weights that the checkpoint rule names.

        Raises:
            NonFiniteLossError: the loss is infinite or NaN (step and examples named).
            ValueError: no training data, or the global batch cannot be split over the processes.
            RuntimeError: a checkpoint does not fit the run.
            KeyboardInterrupt: stopped by a signal, after writing a checkpoint.
        """
        if not len(train):
            raise ValueError("the training split has no examples")
        # Several processes without CUDA: accelerate takes gloo only if told to use the CPU.
        is_cpu_launch = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
        accelerator = Accelerator(
            cpu=self.device == "cpu" or is_cpu_launch,
            mixed_precision="no" if self.precision == "fp32" else self.precision,
        )
        try:
            return self._fit(
                accelerator, model, method, task, train, validation, seed, folder, mirrors,
                identity or {}, score,
            )  # fmt: skip
        finally:
            accelerator.free_memory()
            AcceleratorState._reset_state()

    def _fit(
        self,
        accelerator: Accelerator,
        bare_model: nn.Module,
        method: Method,
        task: Task,
        train: Sequence[Any],
        validation: Sequence[Any],
        seed: int,
        folder: Path,
        mirrors: Sequence[Any],
        identity: dict[str, Any],
        score: Callable[[nn.Module], dict[str, float]] | None,
    ) -> FitResult:
        world, rank = accelerator.num_processes, accelerator.process_index
        is_main = accelerator.is_main_process
        if self.batch_size % world:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be split over {world} processes; "
                "use a multiple of the number of processes"
            )
        total = self.total_steps(len(train))
        warmup = self.total_warmup_steps(total)
        steps_per_epoch = self.steps_per_epoch(len(train))
        if 0 < total <= warmup:
            logger.warning(
                "warm-up of %d steps is not shorter than the run of %d steps: "
                "the learning rate never reaches its value",
                warmup, total,
            )  # fmt: skip

        if self.gradient_checkpointing:
            bare_model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            bare_model.config.use_cache = False  # type: ignore[union-attr]
        bare_model.to(accelerator.device)
        optimizer = self.optimizer(bare_model, method)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        result, step, log_position = FitResult(checkpoint_rule=self.checkpoint_rule), 0, 0
        best_folder = folder / "best"

        stored = checkpoint.latest(folder / "checkpoints")
        if stored is not None:
            _check_identity(stored, identity, folder)
            step, log_position = stored.step, stored.state["log_position"]
            result = FitResult(**stored.state["result"])
            checkpoint.restore_weights(bare_model, stored.tensors.get("weights", {}))
            checkpoint.restore_optimizer(
                optimizer, stored.tensors.get("optimizer", {}), stored.state["optimizer"]
            )
            method.load_state_dict(stored.tensors.get("method", {}))
            if is_main:
                checkpoint.drop_after(best_folder, step)
            logger.info("continuing at step %d of %d", step, total)

        wrapped = torch.compile(bare_model, dynamic=True) if self.compile else bare_model
        model, prepared = accelerator.prepare(wrapped, optimizer)
        if stored is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(stored.state["loss_scaler"])
        folder.mkdir(parents=True, exist_ok=True)
        log = (
            RunLog(folder / "metrics.jsonl", position=log_position, mirrors=mirrors)
            if is_main
            else None
        )
        progress = Progress(total, initial=step, description="train", unit="step", enabled=is_main)
        session = Session(accelerator.device, result.resources)
        loss_sum = torch.zeros((), device=accelerator.device)
        num_targets_logged = 0
        is_due = False
        pending: tuple[int, Tensor, list[str]] | None = None
        model.train()

        def save() -> None:
            result.resources = session.resources()
            if not is_main:
                return
            assert log is not None
            state_tensors, state_plain = checkpoint.optimizer_tensors(optimizer)
            checkpoint.save(
                folder / "checkpoints",
                step,
                tensors={
                    "weights": method.updated_tensors(bare_model),
                    "optimizer": state_tensors,
                    "method": method.state_dict(),
                },
                state={
                    "identity": identity,
                    "optimizer": state_plain,
                    "log_position": log.position(),
                    "result": vars(result),
                    "loss_scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                },
            )

        with stop_signals() as stop, contextlib.closing(progress):
            while step < total:
                indices = step_indices(len(train), self.batch_size, seed, step)
                share = len(indices) // world
                own = indices[rank * share : (rank + 1) * share]
                if self.group_by_length:
                    own = sorted(own, key=lambda i: task.length(train[i]))
                batches = [task.collate([train[i] for i in part]) for part in self._split(own)]
                num_targets = _sum_over_processes(
                    accelerator, sum(batch.num_targets for batch in batches)
                )
                if num_targets == 0:
                    raise ValueError(
                        f"step {step} has no target at all (examples "
                        f"{batches[0].example_ids[:8]}); check truncation and the data"
                    )
                factor = schedule_factor(self.schedule, step, warmup, total)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                is_log_step = (step + 1) % self.log_every_steps == 0 or step + 1 == total

                step_loss, norm = self._optimizer_step(
                    accelerator, model, prepared, trained, method, task, batches,
                    num_targets=num_targets, key=(seed, step), result=result, want_norm=is_log_step,
                )  # fmt: skip
                method.after_step(step)
                prepared.zero_grad()

                _raise_if_not_finite(pending)
                pending = (step, step_loss, [i for b in batches for i in b.example_ids])
                loss_sum += step_loss
                num_targets_logged += num_targets
                session.num_tokens += sum(batch.num_tokens for batch in batches) * world
                step += 1
                result.num_steps, result.num_epochs = step, step / steps_per_epoch
                note = ""
                if is_log_step:
                    _raise_if_not_finite(pending)
                    total_loss = _sum_over_processes(accelerator, loss_sum)
                    result.final_train_loss = total_loss / num_targets_logged
                    loss_sum.zero_()
                    num_targets_logged = 0
                    values = {
                        "epoch": result.num_epochs,
                        "train/loss": result.final_train_loss,
                        "train/learning_rate": optimizer.param_groups[0]["lr"],
                        "train/grad_norm": norm,
                    }
                    if log is not None:
                        log.log(step, values, session.measured())
                    note = (
                        f"loss {result.final_train_loss:.4f}, {session.tokens_per_s():.0f} "
                        f"tokens/s, {memory.peak_bytes(accelerator.device) / 2**30:.2f} GiB"
                    )
                progress.update(1, note)

                if self._evaluates_at(step, steps_per_epoch, total) and len(validation):
                    _raise_if_not_finite(pending)
                    values = {"loss": self._evaluate(accelerator, model, task, validation)}
                    if score is not None:
                        bare_model.eval()
                        values.update(score(bare_model))
                    result.validation.append({"step": step, "epoch": result.num_epochs, **values})
                    if log is not None:
                        named = {f"validation/{name}": value for name, value in values.items()}
                        log.log(step, {"epoch": result.num_epochs, **named})
                    if (
                        self.checkpoint_rule == "best"
                        and best_entry(result.validation, task) == (result.validation[-1])
                    ):
                        result.chosen_step = step
                        if is_main:
                            checkpoint.save(
                                best_folder,
                                step,
                                tensors={"weights": method.updated_tensors(bare_model)},
                                state=values,
                                keep=2,  # a kill before the next checkpoint needs the one before
                            )
                    model.train()
                # Only at log steps, so that no half-filled mean has to be stored.
                is_due = is_due or step % self.checkpoint_every_steps == 0
                if is_log_step:
                    is_stopping = _sum_over_processes(accelerator, int(stop.requested)) > 0
                    if is_due or is_stopping or step == total:
                        save()
                        is_due = False
                    if is_stopping and step < total:
                        raise KeyboardInterrupt(f"stopped at step {step} of {total}")

        method.finish(total)
        if self.checkpoint_rule == "best" and total > 0:
            accelerator.wait_for_everyone()
            best = checkpoint.latest(best_folder)
            if best is None:
                raise RuntimeError(
                    f"no evaluation gave a value of {task.selection_metric or 'a finite loss'}, so "
                    "there is no best step; use trainer.checkpoint_rule=last, or a smaller "
                    "learning rate"
                )
            if best.step != result.chosen_step:
                raise RuntimeError(
                    f"{best_folder} holds step {best.step}, but step {result.chosen_step} is the "
                    f"best; remove {folder} and run again"
                )
            checkpoint.restore_weights(bare_model, best.tensors["weights"])
        else:
            result.chosen_step = total
        result.resources = session.resources()
        if log is not None:
            log.close()
        accelerator.wait_for_everyone()
        bare_model.eval()
        return result

    # ------------------------------------------------------------------ parts of the loop

    def _optimizer_step(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        trained: list[Tensor],
        method: Method,
        task: Task,
        batches: list[Batch],
        *,
        num_targets: int,
        key: tuple[int, int],
        result: FitResult,
        want_norm: bool,
    ) -> tuple[Tensor, float]:
        """Apply one optimiser step; return this process's summed loss and the gradient norm."""
        (_, step), world = key, accelerator.num_processes
        for attempt in range(MAX_SKIPPED_STEPS):
            step_loss = torch.zeros((), device=accelerator.device)
            for micro_step, batch in enumerate(batches):
                is_last = micro_step == len(batches) - 1
                seed_everything(*key, micro_step, accelerator.process_index)
                method.before_micro_batch(step, micro_step)
                with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                    with accelerator.autocast():
                        loss = task.loss(model, batch.to(accelerator.device), self.label_smoothing)
                    step_loss += loss.detach()
                    # DDP averages gradients over processes; the sum is wanted.
                    loss = loss * (world / num_targets)
                    if is_last and (extra := method.extra_loss()) is not None:
                        loss = loss + extra
                    accelerator.backward(loss)
            norm = self._clip(accelerator, trained, want_norm)
            method.before_step(step)
            optimizer.step()
            if not optimizer.step_was_skipped:
                return step_loss, norm
            optimizer.zero_grad()
            result.skipped_steps += 1
            logger.warning(
                "step %d: gradients overflowed in fp16; repeating it with a smaller loss scale "
                "(attempt %d of %d)",
                step, attempt + 2, MAX_SKIPPED_STEPS,
            )  # fmt: skip
        raise NonFiniteLossError(
            f"step {step}: gradients overflowed {MAX_SKIPPED_STEPS} times in a row in fp16; "
            "use trainer.precision=bf16"
        )

    def _split(self, indices: list[int]) -> Iterator[list[int]]:
        size = self.micro_batch_size or len(indices)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]

    def _evaluates_at(self, step: int, steps_per_epoch: int, total: int) -> bool:
        if self.evaluate_every_epochs is None:
            return False
        return step == total or step % (steps_per_epoch * self.evaluate_every_epochs) == 0

    def _clip(self, accelerator: Accelerator, trained: list[Tensor], is_log_step: bool) -> float:
        """Clip if asked to; return the norm before clipping, or NaN where nobody asks for it."""
        if self.max_grad_norm is not None:
            norm = accelerator.clip_grad_norm_(trained, self.max_grad_norm)
            return float(norm) if is_log_step and norm is not None else math.nan
        if not is_log_step:
            return math.nan
        accelerator.unscale_gradients()
        return float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))

    @torch.no_grad()
    def _evaluate(
        self, accelerator: Accelerator, model: nn.Module, task: Task, examples: Sequence[Any]
    ) -> float:
        """Return the mean loss per target over `examples`, without label smoothing."""
        model.eval()
        world, rank = accelerator.num_processes, accelerator.process_index
        loss_sum = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        num_targets = 0
        starts = range(0, len(examples), self.eval_batch_size)
        for number, start in enumerate(starts):
            if number % world != rank:
                continue
            stop = min(start + self.eval_batch_size, len(examples))
            batch: Batch = task.collate([examples[i] for i in range(start, stop)])
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                loss_sum += task.loss(model, batch).double()
            num_targets += batch.num_targets
        targets = _sum_over_processes(accelerator, num_targets)
        return _sum_over_processes(accelerator, loss_sum) / max(1, targets)


def best_entry(validation: Sequence[dict[str, float]], task: Task) -> dict[str, float] | None:
    """Return the best evaluation by the task's `selection_metric`, or by loss where it has none.

    Args:
        validation: entries of `FitResult.validation`.
        task: names the metric; its `MetricSpec` says which direction is better.

    Returns:
        The first of the best; None if no entry has a finite value.
    """
    name = task.selection_metric or "loss"
    higher = any(spec.name == name and spec.higher_is_better for spec in task.metrics)
    known = [entry for entry in validation if math.isfinite(entry.get(name, math.nan))]
    sign = -1.0 if higher else 1.0
    return min(known, key=lambda entry: sign * entry[name], default=None)


def _check_identity(stored: checkpoint.Checkpoint, identity: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of other data or another base; say what differs."""
    theirs = stored.state["identity"]
    differing = [key for key in {**theirs, **identity} if theirs.get(key) != identity.get(key)]
    if differing:
        changes = "; ".join(f"{k}: {theirs.get(k)} then, {identity.get(k)} now" for k in differing)
        raise RuntimeError(
            f"the checkpoint in {folder} belongs to another run ({changes}); delete that folder "
            "to start again"
        )


def _raise_if_not_finite(pending: tuple[int, Tensor, list[str]] | None) -> None:
    """Check the loss of an earlier step (so that a GPU is not made to wait for the running one)."""
    if pending is not None and not torch.isfinite(pending[1]):
        step, loss, example_ids = pending
        raise NonFiniteLossError(
            f"the loss of step {step} is {loss.item()}; its batch was {', '.join(example_ids)}. "
            "Lower the learning rate, clip gradients (trainer.max_grad_norm=1.0) or use "
            "trainer.precision=fp32; checkpoints of earlier steps are kept"
        )


def _sum_over_processes(accelerator: Accelerator, value: Any) -> Any:
    """Return the sum over processes of an int or a scalar tensor, as a Python number."""
    if accelerator.num_processes > 1:
        tensor = torch.as_tensor(value, device=accelerator.device)
        value = accelerator.reduce(tensor, reduction="sum")
    return value.item() if isinstance(value, Tensor) else value
