"""The loop: one fit from its start, or its newest checkpoint, to its end.

Read `Loop.run`, then the helpers in the order in which it calls them. What can be set is declared
in `delta_lora.trainer.Trainer`. What makes a run repeatable:

* Everything random is a function of (seed, epoch) or (seed, step, micro-batch, process), never of
  history. A run that was killed therefore continues to the bit-identical result from weights,
  optimiser state and method state alone.
* The loss of an optimiser step is the sum over all its targets, on all processes and
  micro-batches, divided by their number. So 1 x 8, 8 x 1 (accumulation) and 2 processes x 4 are
  the same step.
* A step that the fp16 loss scaler skips is repeated with the smaller scale, so the number of
  applied steps, the data position and the schedule always agree.

What the processes of a distributed run do together happens on all of them in the same order, also
where one has no batch, fewer batches than another, or a loss that is not finite: the sum of the
targets before a step, the gradients of its last micro-batch, and the sums of evaluation and log.
A forward pass alone waits for nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from delta_lora import checkpoint, engine, memory, writing
from delta_lora.draws import seed_everything, step_indices
from delta_lora.finite import NonFiniteLossError, Trained, check_values, check_weights
from delta_lora.optimization import schedule_factor
from delta_lora.protocols import Batch, Method, Task
from delta_lora.result import FitResult, PrunedError, best_entry
from delta_lora.runlog import MetricLogger, Progress, RunLog
from delta_lora.session import Session, stop_signals
from delta_lora.watched_loss import WatchedLoss

if TYPE_CHECKING:
    from delta_lora.trainer import Trainer

logger = logging.getLogger(__name__)

#: consecutive overflowing steps after which fp16 training is given up.
MAX_SKIPPED_STEPS = 25


@dataclass(kw_only=True, eq=False, repr=False)
class Loop:
    """State of one fit.

    Attributes:
        settings: the trainer's values.
        accelerator: from `delta_lora.engine.start`.
        model: after ``method.inject``; it and the others are the arguments of
            `delta_lora.trainer.Trainer.fit`.
    """

    settings: Trainer
    accelerator: Accelerator
    model: nn.Module
    method: Method
    task: Task
    train: Sequence[Any]
    validation: Sequence[Any]
    seed: int
    folder: Path
    mirrors: Sequence[MetricLogger]
    identity: dict[str, Any]
    score: Callable[[nn.Module], dict[str, float]] | None
    prune: Callable[[Sequence[dict[str, float]]], str | None] | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        self.world = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.device = self.accelerator.device
        if settings.batch_size < self.world:
            raise ValueError(
                f"batch_size={settings.batch_size} is smaller than the number of processes "
                f"({self.world}), so that one would have nothing to do; use fewer processes"
            )
        self.total_steps = settings.total_steps(len(self.train))
        self.warmup_steps = settings.total_warmup_steps(self.total_steps)
        self.steps_per_epoch = settings.steps_per_epoch(len(self.train))
        self.step = 0  # optimiser steps that were applied
        self.result = FitResult(checkpoint_rule=settings.checkpoint_rule)
        self._watched: WatchedLoss | None = None
        self._loss_sum = torch.zeros((), device=self.device)
        self._num_targets_logged = 0
        self._checkpoint_is_due = False

    def run(self) -> FitResult:
        """Train to the end; see `delta_lora.trainer.Trainer.fit` for what is raised."""
        self._say_what_runs()
        self._start()  # at the newest checkpoint, if there is one
        with (
            stop_signals() as self.stop,
            contextlib.closing(self.progress),
            checkpoint.Writer() as self.writer,
        ):
            self.wrapped.train()
            self._evaluate_if_due()  # an evaluation that was interrupted
            self._prune_if_asked()
            while self.step < self.total_steps:
                batches = self._draw_batches()
                num_targets = self._count_targets(batches)
                self._set_learning_rate()

                for attempt in itertools.count(1):
                    loss = self._forward_backward(batches, num_targets)
                    norm = self._clip_gradients()
                    self.method.before_step(self.step)
                    self.optimizer.step()
                    if not self.optimizer.step_was_skipped:
                        break
                    self._repeat_with_smaller_scale(attempt)

                self.method.after_step(self.step)
                self.optimizer.zero_grad()
                self.step += 1

                self._count_step(batches, num_targets, loss)
                self._log_if_due(norm)
                self._evaluate_if_due()
                self._prune_if_asked()
                self._save_if_due()
        return self._finish()

    # ------------------------------------------------------------------ beginning

    def _say_what_runs(self) -> None:
        if self.accelerator.is_main_process:
            is_cuda = self.device.type == "cuda"
            logger.info(
                "training on %s%s, %d process(es), %s, float32 products in %s",
                self.device, f" ({torch.cuda.get_device_name(self.device)})" if is_cuda else "",
                self.world, self.settings.precision, self.settings.matmul_precision,
            )  # fmt: skip
        if 0 < self.total_steps <= self.warmup_steps:
            logger.warning(
                "warm-up of %d steps is not shorter than the run of %d steps: "
                "the learning rate never reaches its value",
                self.warmup_steps, self.total_steps,
            )  # fmt: skip

    def _start(self) -> None:
        """Put the model on its device and build what a step needs, as the newest checkpoint says.

        `optimizer` is accelerate's, around torch's. Training calls `wrapped`, which averages
        gradients over processes; evaluation calls `network`, which waits for nobody.
        """
        stored = checkpoint.latest(self.folder / "checkpoints", self.identity)
        self._trained = Trained(self.model)
        if self.settings.gradient_checkpointing:
            self._enable_gradient_checkpointing()
        self.model.to(self.device)
        check_weights(
            ((n.replace(".base_layer", ""), p) for n, p in self.model.named_parameters()),
            "the model that the run starts from",
            "copy its weights again, or take others",
        )
        optimizer = self.settings.build_optimizer(self.model, self.method)
        if stored is not None:
            self._restore_model(stored)
        self.network, self.wrapped, self.optimizer = engine.prepare(
            self.accelerator, self.model, optimizer, compiles=self.settings.compile
        )
        if stored is not None:
            self._restore_optimizer(stored)
        self._open_log({"log_position": 0, "log": ""} if stored is None else stored.state)
        self.session = Session(self.device, self.result.resources, self.step)
        if self.log is not None:
            self.method.log_values()  # from now on it keeps what they need

    def _enable_gradient_checkpointing(self) -> None:
        model: Any = self.model
        self._use_cache = model.config.use_cache
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False

    def _restore_model(self, stored: checkpoint.Checkpoint) -> None:
        """Take step, result, weights and method state from a checkpoint of this very run."""
        self.step = stored.step
        self.result = FitResult(**stored.state["result"])
        checkpoint.restore_weights(self.model, stored.tensors.get("weights", {}))
        self.method.load_state_dict(stored.tensors.get("method", {}))
        logger.info("continuing at step %d of %d", self.step, self.total_steps)

    def _restore_optimizer(self, stored: checkpoint.Checkpoint) -> None:
        """Take the rest; behind `prepare`, which would move step counters to the device."""
        checkpoint.restore_optimizer(
            self.optimizer.optimizer,
            stored.tensors.get("optimizer", {}),
            stored.state["optimizer"],
        )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(stored.state["loss_scaler"])
        sums, self._num_targets_logged = stored.state.get("unlogged", ([], 0))
        self._loss_sum += _own(sums, self.rank, self.world)
        if self.accelerator.is_main_process:
            for name in ("checkpoints", "best"):
                checkpoint.drop_after(self.folder / name, self.step)

    def _open_log(self, state: Mapping[str, Any]) -> None:
        """Open log and progress where `state` says; only the main process has a log."""
        is_main = self.accelerator.is_main_process
        writing.make_folder(self.folder)
        path = self.folder / "metrics.jsonl"
        at = {"position": state["log_position"], "known": state["log"]}
        self.log = RunLog(path, **at, mirrors=self.mirrors) if is_main else None
        self.progress = Progress(
            self.total_steps, initial=self.step, description="train", unit="step", enabled=is_main
        )

    # ------------------------------------------------------------------ one step

    def _draw_batches(self) -> list[Batch]:
        """Return this process's part of the step's examples, cut into micro-batches."""
        indices = step_indices(len(self.train), self.settings.batch_size, self.seed, self.step)
        start, stop = (len(indices) * r // self.world for r in (self.rank, self.rank + 1))
        own = indices[start:stop]
        if self.settings.group_by_length:
            own = sorted(own, key=lambda i: self.task.length(self.train[i]))
        size = self.settings.micro_batch_size or len(own)
        return [
            self.task.collate([self.train[i] for i in own[start : start + size]])
            for start in range(0, len(own), size)
        ]

    def _count_targets(self, batches: list[Batch]) -> int:
        """Return the number of targets of the step, on all processes.

        Raises:
            NonFiniteLossError: the loss of the step before was not finite, on any process.
            ValueError: there is no target.
        """
        num_targets = sum(batch.num_targets for batch in batches)
        if self.world == 1:
            self._check_loss()
        else:  # one exchange for both
            is_bad = self._watched is not None and not self._watched.is_finite
            both = torch.tensor([num_targets, int(is_bad)], device=self.device)
            num_targets, num_bad = self.accelerator.reduce(both, reduction="sum").tolist()
            if num_bad and self._watched is not None:
                raise self._watched.error()
        if num_targets == 0:
            raise ValueError(
                f"step {self.step} has no target at all (examples {batches[0].example_ids[:8]}); "
                "check truncation and the data"
            )
        return num_targets

    def _set_learning_rate(self) -> None:
        factor = schedule_factor(
            self.settings.schedule, self.step, self.warmup_steps, self.total_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _forward_backward(self, batches: list[Batch], num_targets: int) -> Tensor:
        """Add up the gradients of the step; return this process's summed loss."""
        loss = torch.zeros((), device=self.device)
        for micro_step, batch in enumerate(batches):
            seed_everything(self.seed, self.step, micro_step, self.rank)
            self.method.before_micro_batch(self.step, micro_step)
            is_last = micro_step == len(batches) - 1
            loss += self._add_gradients(batch, num_targets, is_last=is_last)
        return loss

    def _add_gradients(self, batch: Batch, num_targets: int, *, is_last: bool) -> Tensor:
        """Add the gradients of one micro-batch; return its summed loss, without its graph."""
        accelerator = self.accelerator
        with contextlib.nullcontext() if is_last else accelerator.no_sync(self.wrapped):
            with accelerator.autocast():
                summed = self.task.loss(
                    self.wrapped, batch.to(self.device), self.settings.label_smoothing
                )
            # Several processes average their gradients; the sum is wanted.
            loss = summed * (self.world / num_targets)
            if is_last and (extra := self.method.extra_loss()) is not None:
                loss = loss + extra
            # Not `accelerator.backward`, which divides by what other tools' variables say.
            loss = loss if accelerator.scaler is None else accelerator.scaler.scale(loss)
            loss.backward()
        return summed.detach()

    def _clip_gradients(self) -> float:
        """Clip if asked to; return the norm before clipping, or NaN where no log line needs it."""
        is_wanted = self._logs_at(self.step + 1)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.settings.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(trained, self.settings.max_grad_norm)
            return float(norm) if is_wanted and norm is not None else math.nan
        if not is_wanted:
            return math.nan
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in trained if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _repeat_with_smaller_scale(self, attempt: int) -> None:
        """Prepare to repeat a step whose gradients overflowed in fp16.

        Raises:
            NonFiniteLossError: it was the last attempt.
        """
        self.optimizer.zero_grad()
        self.result.skipped_steps += 1
        if attempt == MAX_SKIPPED_STEPS:
            raise NonFiniteLossError(
                f"step {self.step}: gradients overflowed {MAX_SKIPPED_STEPS} times in a row in "
                "fp16; use trainer.precision=bf16"
            )
        logger.warning(
            "step %d: gradients overflowed in fp16; repeating it with a smaller loss scale "
            "(attempt %d of %d)",
            self.step, attempt + 1, MAX_SKIPPED_STEPS,
        )  # fmt: skip

    # ------------------------------------------------------------------ log

    def _count_step(self, batches: list[Batch], num_targets: int, loss: Tensor) -> None:
        """Add an applied step to what the next log line and the result tell."""
        example_ids = [i for batch in batches for i in batch.example_ids]
        self._watched = WatchedLoss(self.step - 1, loss, example_ids)
        self._loss_sum += loss
        self._num_targets_logged += num_targets
        self.session.num_tokens += sum(batch.num_tokens for batch in batches) * self.world
        self.result.num_steps = self.step
        self.result.num_epochs = self.step / self.steps_per_epoch

    def _logs_at(self, step: int) -> bool:
        return step % self.settings.log_every_steps == 0 or step == self.total_steps

    def _log_if_due(self, norm: float) -> None:
        """Show the step; where a line is due, log the mean loss since the last one."""
        if not self._logs_at(self.step):
            self.progress.update()
            return
        self._check_loss()
        check_values({"the norm of the gradients": norm}, f"step {self.step - 1}")
        loss = self._sum(self._loss_sum) / self._num_targets_logged
        self._loss_sum.zero_()
        self._num_targets_logged = 0
        self.result.final_train_loss = loss
        if self.log is not None:
            values = {
                "epoch": self.result.num_epochs,
                "train/loss": loss,
                "train/learning_rate": self.optimizer.param_groups[0]["lr"],
                "train/grad_norm": norm,
            }
            measured = {**self.session.measured(self.step), **self.method.log_values()}
            self.log.log(self.step, values, measured)
        gib = memory.peak_bytes(self.device) / 2**30
        note = f"loss {loss:.4f}, {self.session.tokens_per_s():.0f} tokens/s, {gib:.2f} GiB"
        self.progress.update(note=note)

    # ------------------------------------------------------------------ evaluation

    def _evaluates_at(self, step: int) -> bool:
        every = self.settings.evaluate_every_epochs
        if every is None or step == 0 or not len(self.validation):
            return False
        return step == self.total_steps or step % (self.steps_per_epoch * every) == 0

    def _evaluate_if_due(self) -> None:
        """Evaluate at ends of epochs; a signal stops it at once, with a checkpoint before it."""
        is_done = any(entry["step"] == self.step for entry in self.result.validation)
        if is_done or not self._evaluates_at(self.step):
            return
        self._check_loss()
        before = self.result.validation
        position = None if self.log is None else self.log.position()
        try:
            with self.session.apart(wait=True), self.stop.at_once(enabled=self.world == 1):
                self._evaluate()
        except KeyboardInterrupt:
            self.result.validation = before
            self._save(log_position=position)
            raise KeyboardInterrupt(
                f"stopped in the evaluation at step {self.step} of {self.total_steps}"
            ) from None
        self.wrapped.train()

    def _evaluate(self) -> None:
        """Record loss and metrics of the validation split, and keep the step if it is the best."""
        values = {"loss": self._validation_loss()}
        if self.score is not None:
            self.model.eval()
            values.update(self.score(self.model))
        check_values(values, f"the evaluation at step {self.step}")
        entry = {"step": self.step, "epoch": self.result.num_epochs, **values}
        if self.log is not None:
            named = {f"validation/{name}": value for name, value in values.items()}
            self.log.log(self.step, {"epoch": self.result.num_epochs, **named})
        self.result.validation = [*self.result.validation, entry]
        is_best = best_entry(self.result.validation, self.task) == entry
        if self.settings.checkpoint_rule == "best" and is_best:
            self._save_best(values)

    def _prune_if_asked(self) -> None:
        """Give the run up behind an evaluation where the caller says so, with a checkpoint.

        Raises:
            PrunedError: it is given up.
        """
        entries = self.result.validation
        is_evaluated = bool(entries) and entries[-1]["step"] == self.step
        if self.prune is None or not is_evaluated or self.step == self.total_steps:
            return
        reason = self.prune(entries)
        if self._any(reason is not None):
            self._save()
            why = reason or "another process gives it up"
            raise PrunedError(self.step, self.total_steps, why, self.result)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Return the mean loss per target, without label smoothing, each process its batches."""
        self.network.eval()
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        num_targets = 0
        size = self.settings.eval_batch_size
        for start in range(self.rank * size, len(self.validation), self.world * size):
            stop = min(start + size, len(self.validation))
            batch = self.task.collate([self.validation[i] for i in range(start, stop)])
            with self.accelerator.autocast():
                loss_sum += self.task.loss(self.network, batch.to(self.device)).double()
            num_targets += batch.num_targets
        targets = self._sum(num_targets)
        return self._sum(loss_sum) / max(1, targets)

    # ------------------------------------------------------------------ checkpoints

    def _save_if_due(self) -> None:
        """Write a checkpoint where it is time, at log steps; stop where a signal asked for it."""
        every = self.settings.checkpoint_every_steps
        if every is not None and self.step % every == 0:
            self._checkpoint_is_due = True
        if not self._logs_at(self.step):
            return
        is_late = self.session.since_mark_s() >= self.settings.checkpoint_every_s
        is_late, is_stopping = self._any(is_late), self._any(self.stop.requested)
        is_end = self.step == self.total_steps
        if is_late or self._checkpoint_is_due or is_stopping or is_end:
            self._save()
        if is_stopping and not is_end:
            raise KeyboardInterrupt(f"stopped at step {self.step} of {self.total_steps}")

    def _save(self, log_position: int | None = None) -> None:
        """Begin to write a checkpoint of this step, with the log up to `log_position`."""
        self._checkpoint_is_due = False
        self.session.mark()
        sums = self.accelerator.gather(self._loss_sum.reshape(1)).tolist()
        self.result.resources = self.session.resources()
        if self.log is None:
            return
        written = self.log.position()
        position = written if log_position is None else log_position
        with self.session.apart(wait=False):
            optimizer_tensors, optimizer_state = checkpoint.optimizer_tensors(
                self.optimizer.optimizer
            )
            scaler = self.accelerator.scaler
            self.writer.save(
                self.folder / "checkpoints",
                self.step,
                tensors={**self._changed_tensors(), "optimizer": optimizer_tensors},
                state={
                    "identity": self.identity,
                    "optimizer": optimizer_state,
                    "log_position": position,
                    "log": self.log.text(position),
                    "result": vars(self.result),
                    "unlogged": [sums, self._num_targets_logged],
                    "loss_scaler": scaler and scaler.state_dict(),
                },
            )

    def _changed_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what training changed of the model."""
        return {
            "weights": self.method.updated_tensors(self.model),
            "method": self.method.state_dict(),
        }

    def _save_best(self, values: dict[str, float]) -> None:
        self.result.chosen_step = self.step
        if self.accelerator.is_main_process:
            self.writer.save(
                self.folder / "best",
                self.step,
                tensors=self._changed_tensors(),
                state={**values, "identity": self.identity},
            )

    def _restore_best(self) -> None:
        chosen = best_entry(self.result.validation, self.task)
        if chosen is None:
            raise RuntimeError(
                f"no evaluation gave a value of {self.task.selection_metric or 'a finite loss'}, "
                "so there is no best step; use trainer.checkpoint_rule=last, or a smaller "
                "learning rate"
            )
        folder = self.folder / "best"
        self.accelerator.wait_for_everyone()  # the main process has written it
        best = checkpoint.latest(folder, self.identity)
        if best is None or best.step != chosen["step"]:
            found = "nothing" if best is None else f"step {best.step}"
            raise RuntimeError(
                f"{folder} holds {found}, but step {chosen['step']} is the best; remove "
                f"{self.folder} and run again"
            )
        checkpoint.restore_weights(self.model, best.tensors["weights"])
        self.method.load_state_dict(best.tensors["method"])
        self.result.chosen_step = best.step

    # ------------------------------------------------------------------ end

    def _finish(self) -> FitResult:
        """Put the chosen step's weights and method state into the model."""
        memory.synchronize(self.device)
        self.result.resources = self.session.resources()
        self.method.finish(self.total_steps)
        self.result.chosen_step = self.total_steps
        if self.total_steps > 0:
            self._check_end()
        if self.settings.checkpoint_rule == "best" and self.total_steps > 0:
            self._restore_best()
        if self.log is not None:
            self.log.close()
        self.accelerator.wait_for_everyone()
        if self.settings.gradient_checkpointing:
            model: Any = self.model
            model.gradient_checkpointing_disable()
            model.config.use_cache = self._use_cache
        self.model.eval()
        return self.result

    def _check_end(self) -> None:
        """Check what the last step left: nobody has looked at the weights behind it.

        Raises:
            NonFiniteError: a weight is infinite or NaN.
        """
        check_weights(
            self.method.updated_tensors(self.model).items(),
            f"what {self.total_steps} steps have trained",
            "lower the learning rate or alpha, or clip gradients (trainer.max_grad_norm=1.0)",
        )
        self.result.is_unchanged = self._trained.is_unchanged(self.model)
        if self.result.is_unchanged and self.accelerator.is_main_process:
            logger.warning(
                "nothing was learnt: %d steps have changed nothing of what the model computes; "
                "look at the learning rate, at warm-up and at what trains",
                self.total_steps,
            )

    # ------------------------------------------------------------------ what processes agree on

    def _check_loss(self) -> None:
        """Raise where the loss of the last step, on any process, was not finite."""
        watched, self._watched = self._watched, None
        if watched is not None and self._any(not watched.is_finite):
            raise watched.error()

    def _any(self, flag: bool) -> bool:
        """Return whether it holds on any process."""
        return bool(self._sum(int(flag)))

    def _sum(self, value: Any) -> Any:
        """Return the sum over processes of an int or a scalar tensor, as a Python number."""
        if self.world > 1:
            tensor = torch.as_tensor(value, device=self.device)
            value = self.accelerator.reduce(tensor, reduction="sum")
        return value.item() if isinstance(value, Tensor) else value


def _own(sums: Sequence[float], rank: int, world: int) -> float:
    """Return this process's part of the stored sums; process 0 takes those of another number."""
    if len(sums) == world:
        return sums[rank]
    return math.fsum(sums) if rank == 0 else 0.0
