"""The training loop: one fit from its start, or its newest checkpoint, to its end.

Read `Loop.run` first; the settings are those of `delta_lora.trainer.Trainer`. What makes a run
repeatable:

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
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from delta_lora import checkpoint, memory
from delta_lora.draws import seed_everything, step_indices
from delta_lora.optimization import schedule_factor
from delta_lora.protocols import Batch, Method, Task
from delta_lora.result import FitResult, best_entry
from delta_lora.runlog import Progress, RunLog
from delta_lora.session import Session, stop_signals
from delta_lora.watched_loss import NonFiniteLossError, WatchedLoss

if TYPE_CHECKING:
    from delta_lora.trainer import Trainer

logger = logging.getLogger(__name__)

#: consecutive overflowing steps after which fp16 training is given up.
MAX_SKIPPED_STEPS = 25


class Loop:
    """State of one fit.

    Args:
        settings: the trainer's values.
        accelerator: device, precision and processes.
        model: after ``method.inject``; the others as `delta_lora.trainer.Trainer.fit`.
    """

    def __init__(
        self,
        settings: Trainer,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        method: Method,
        task: Task,
        train: Sequence[Any],
        validation: Sequence[Any],
        seed: int,
        folder: Path,
        mirrors: Sequence[Any],
        identity: Mapping[str, Any],
        score: Callable[[nn.Module], dict[str, float]] | None,
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.bare_model, self.method, self.task = model, method, task
        self.train, self.validation = train, validation
        self.seed, self.folder = seed, folder
        self.mirrors, self.identity, self.score = mirrors, dict(identity), score
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        if settings.batch_size < self.world:
            raise ValueError(
                f"batch_size={settings.batch_size} is smaller than the number of processes "
                f"({self.world}), so that one would have nothing to do; use fewer processes"
            )
        self.device = accelerator.device
        self.total = settings.total_steps(len(train))
        self.warmup = settings.total_warmup_steps(self.total)
        self.steps_per_epoch = settings.steps_per_epoch(len(train))
        self.step = 0
        self.result = FitResult(checkpoint_rule=settings.checkpoint_rule)
        self._watched: WatchedLoss | None = None
        self._num_targets_logged = 0
        self._is_due = False

    def run(self) -> FitResult:
        """Train to the end; see `delta_lora.trainer.Trainer.fit` for what is raised."""
        self._say_where()
        self._warn_of_long_warmup()
        stored = checkpoint.latest(self.folder / "checkpoints")
        self._build(stored)
        self._open(stored)
        with (
            stop_signals() as self.stop,
            contextlib.closing(self.progress),
            checkpoint.Writer() as self.writer,
        ):
            self.model.train()
            self._evaluate_if_due()  # an evaluation that was interrupted
            while self.step < self.total:
                self._train_step()
                self._evaluate_if_due()
                self._save_if_due()
        return self._finish()

    # ------------------------------------------------------------------ beginning

    def _say_where(self) -> None:
        if self.accelerator.is_main_process:
            is_cuda = self.device.type == "cuda"
            logger.info(
                "training on %s%s, %d process(es), %s, float32 products in %s",
                self.device, f" ({torch.cuda.get_device_name(self.device)})" if is_cuda else "",
                self.world, self.settings.precision, self.settings.matmul_precision,
            )  # fmt: skip

    def _warn_of_long_warmup(self) -> None:
        if 0 < self.total <= self.warmup:
            logger.warning(
                "warm-up of %d steps is not shorter than the run of %d steps: "
                "the learning rate never reaches its value",
                self.warmup, self.total,
            )  # fmt: skip

    def _build(self, stored: checkpoint.Checkpoint | None) -> None:
        """Put the model on its device, make the optimiser, and restore both from `stored`."""
        model, method = self.bare_model, self.method
        if self.settings.gradient_checkpointing:
            self._use_cache = model.config.use_cache  # type: ignore[union-attr]
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            model.config.use_cache = False  # type: ignore[union-attr]
        model.to(self.device)
        self.optimizer = self.settings.optimizer(model, method)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if stored is not None:
            _check_identity(stored, self.identity, self.folder)
            self.step = stored.step
            self.result = FitResult(**stored.state["result"])
            checkpoint.restore_weights(model, stored.tensors.get("weights", {}))
            method.load_state_dict(stored.tensors.get("method", {}))
            logger.info("continuing at step %d of %d", self.step, self.total)
        #: what evaluation runs: the model without the wrapper that waits for other processes.
        self.network: nn.Module = model
        if self.settings.compile:
            self.network = torch.compile(model, dynamic=True)  # type: ignore[assignment]
        with _forward_unchanged(self.network, model):
            self.model, self.prepared = self.accelerator.prepare(self.network, self.optimizer)
        if stored is not None:
            # Behind `prepare`, which would move the optimiser's step counters to the device.
            checkpoint.restore_optimizer(
                self.optimizer, stored.tensors.get("optimizer", {}), stored.state["optimizer"]
            )
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(stored.state["loss_scaler"])

    def _open(self, stored: checkpoint.Checkpoint | None) -> None:
        """Open log, progress and clock where the stored run left them."""
        is_main = self.accelerator.is_main_process
        self.folder.mkdir(parents=True, exist_ok=True)
        position = 0 if stored is None else stored.state["log_position"]
        if stored is not None and is_main:
            checkpoint.drop_after(self.folder / "best", self.step)
        self.log = (
            RunLog(self.folder / "metrics.jsonl", position=position, mirrors=self.mirrors)
            if is_main
            else None
        )
        self.progress = Progress(
            self.total, initial=self.step, description="train", unit="step", enabled=is_main
        )
        self.session = Session(self.device, self.result.resources)
        self._loss_sum = torch.zeros((), device=self.device)
        if stored is not None:
            sums, self._num_targets_logged = stored.state.get("unlogged", ([], 0))
            self._loss_sum += _own(sums, self.rank, self.world)

    # ------------------------------------------------------------------ one step

    def _train_step(self) -> None:
        """Take one optimiser step, and log it where it is one to be logged."""
        step, settings = self.step, self.settings
        batches = self._batches(step)
        num_targets = self._agree_on(sum(batch.num_targets for batch in batches))
        if num_targets == 0:
            raise ValueError(
                f"step {step} has no target at all (examples {batches[0].example_ids[:8]}); "
                "check truncation and the data"
            )
        factor = schedule_factor(settings.schedule, step, self.warmup, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        is_log_step = self._logs_at(step + 1)
        loss, norm = self._optimizer_step(batches, num_targets, want_norm=is_log_step)
        self.method.after_step(step)
        self.prepared.zero_grad()

        self._watched = WatchedLoss(step, loss, [i for b in batches for i in b.example_ids])
        self._loss_sum += loss
        self._num_targets_logged += num_targets
        self.session.num_tokens += sum(batch.num_tokens for batch in batches) * self.world
        self.step = step + 1
        self.result.num_steps = self.step
        self.result.num_epochs = self.step / self.steps_per_epoch
        self.progress.update(1, self._log_step(norm) if is_log_step else "")

    def _batches(self, step: int) -> list[Batch]:
        """Return this process's part of the global batch, cut into micro-batches."""
        indices = step_indices(len(self.train), self.settings.batch_size, self.seed, step)
        start, stop = (len(indices) * r // self.world for r in (self.rank, self.rank + 1))
        own = indices[start:stop]
        if self.settings.group_by_length:
            own = sorted(own, key=lambda i: self.task.length(self.train[i]))
        size = self.settings.micro_batch_size or len(own)
        return [
            self.task.collate([self.train[i] for i in own[start : start + size]])
            for start in range(0, len(own), size)
        ]

    def _optimizer_step(
        self, batches: list[Batch], num_targets: int, *, want_norm: bool
    ) -> tuple[Tensor, float]:
        """Apply one optimiser step; return this process's summed loss and the gradient norm."""
        for attempt in range(MAX_SKIPPED_STEPS):
            loss = torch.zeros((), device=self.device)
            for micro_step, batch in enumerate(batches):
                is_last = micro_step == len(batches) - 1
                loss += self._backward(batch, micro_step, num_targets, is_last=is_last)
            norm = self._clip(want_norm)
            self.method.before_step(self.step)
            self.prepared.step()
            if not self.prepared.step_was_skipped:
                return loss, norm
            self.prepared.zero_grad()
            self.result.skipped_steps += 1
            logger.warning(
                "step %d: gradients overflowed in fp16; repeating it with a smaller loss scale "
                "(attempt %d of %d)",
                self.step, attempt + 2, MAX_SKIPPED_STEPS,
            )  # fmt: skip
        raise NonFiniteLossError(
            f"step {self.step}: gradients overflowed {MAX_SKIPPED_STEPS} times in a row in fp16; "
            "use trainer.precision=bf16"
        )

    def _backward(
        self, batch: Batch, micro_step: int, num_targets: int, *, is_last: bool
    ) -> Tensor:
        """Add the gradients of one micro-batch; return its summed loss."""
        accelerator = self.accelerator
        seed_everything(self.seed, self.step, micro_step, self.rank)
        self.method.before_micro_batch(self.step, micro_step)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
            with accelerator.autocast():
                summed = self.task.loss(
                    self.model, batch.to(self.device), self.settings.label_smoothing
                )
            # Several processes average their gradients; the sum is wanted.
            loss = summed * (self.world / num_targets)
            if is_last and (extra := self.method.extra_loss()) is not None:
                loss = loss + extra
            # Not `accelerator.backward`, which divides by what other tools' variables say.
            loss = loss if accelerator.scaler is None else accelerator.scaler.scale(loss)
            loss.backward()
        return summed.detach()

    def _clip(self, want_norm: bool) -> float:
        """Clip if asked to; return the norm before clipping, or NaN where nobody asks for it."""
        if self.settings.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
            return float(norm) if want_norm and norm is not None else math.nan
        if not want_norm:
            return math.nan
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    # ------------------------------------------------------------------ log and evaluation

    def _logs_at(self, step: int) -> bool:
        return step % self.settings.log_every_steps == 0 or step == self.total

    def _log_step(self, norm: float) -> str:
        """Write the log line of the steps since the last one; return it for people."""
        self._check_loss()
        total_loss = self._sum(self._loss_sum)
        self.result.final_train_loss = total_loss / self._num_targets_logged
        self._loss_sum.zero_()
        self._num_targets_logged = 0
        values = {
            "epoch": self.result.num_epochs,
            "train/loss": self.result.final_train_loss,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/grad_norm": norm,
        }
        if self.log is not None:
            self.log.log(self.step, values, self.session.measured())
        return (
            f"loss {self.result.final_train_loss:.4f}, {self.session.tokens_per_s():.0f} "
            f"tokens/s, {memory.peak_bytes(self.device) / 2**30:.2f} GiB"
        )

    def _evaluates_at(self, step: int) -> bool:
        every = self.settings.evaluate_every_epochs
        if every is None or step == 0 or not len(self.validation):
            return False
        return step == self.total or step % (self.steps_per_epoch * every) == 0

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
                f"stopped in the evaluation at step {self.step} of {self.total}"
            ) from None
        self.model.train()

    def _evaluate(self) -> None:
        """Record loss and metrics of the validation split, and keep the best step."""
        values = {"loss": self._validation_loss()}
        if self.score is not None:
            self.bare_model.eval()
            values.update(self.score(self.bare_model))
        entry = {"step": self.step, "epoch": self.result.num_epochs, **values}
        if self.log is not None:
            named = {f"validation/{name}": value for name, value in values.items()}
            self.log.log(self.step, {"epoch": self.result.num_epochs, **named})
        self.result.validation = [*self.result.validation, entry]
        is_best = best_entry(self.result.validation, self.task) == entry
        if self.settings.checkpoint_rule == "best" and is_best:
            self.result.chosen_step = self.step
            if self.accelerator.is_main_process:
                self.writer.save(
                    self.folder / "best",
                    self.step,
                    tensors={
                        "weights": self.method.updated_tensors(self.bare_model),
                        "method": self.method.state_dict(),
                    },
                    state=values,
                    keep=2,  # a kill before the next checkpoint needs the one before
                )

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
        self._is_due = self._is_due or (every is not None and self.step % every == 0)
        if not self._logs_at(self.step):
            return
        is_late = self.session.since_mark_s() >= self.settings.checkpoint_every_s
        is_late, is_stopping = self._any(is_late), self._any(self.stop.requested)
        if is_late or self._is_due or is_stopping or self.step == self.total:
            self._save()
        if is_stopping and self.step < self.total:
            raise KeyboardInterrupt(f"stopped at step {self.step} of {self.total}")

    def _save(self, log_position: int | None = None) -> None:
        """Begin to write a checkpoint of this step, with the log up to `log_position`."""
        self._is_due = False
        self.session.mark()
        sums = self.accelerator.gather(self._loss_sum.reshape(1)).tolist()
        self.result.resources = self.session.resources()
        if self.log is None:
            return
        with self.session.apart(wait=False):
            state_tensors, state_plain = checkpoint.optimizer_tensors(self.optimizer)
            scaler = self.accelerator.scaler
            self.writer.save(
                self.folder / "checkpoints",
                self.step,
                tensors={
                    "weights": self.method.updated_tensors(self.bare_model),
                    "optimizer": state_tensors,
                    "method": self.method.state_dict(),
                },
                state={
                    "identity": self.identity,
                    "optimizer": state_plain,
                    "log_position": self.log.position() if log_position is None else log_position,
                    "result": vars(self.result),
                    "unlogged": [sums, self._num_targets_logged],
                    "loss_scaler": scaler and scaler.state_dict(),
                },
            )

    # ------------------------------------------------------------------ end

    def _finish(self) -> FitResult:
        """Put the chosen step's weights and method state into the model."""
        memory.synchronize(self.device)
        self.result.resources = self.session.resources()
        self.method.finish(self.total)
        self.result.chosen_step = self.total
        if self.settings.checkpoint_rule == "best" and self.total > 0:
            self._restore_best()
        if self.log is not None:
            self.log.close()
        self.accelerator.wait_for_everyone()
        if self.settings.gradient_checkpointing:
            self.bare_model.gradient_checkpointing_disable()  # type: ignore[operator]
            self.bare_model.config.use_cache = self._use_cache  # type: ignore[union-attr]
        self.bare_model.eval()
        return self.result

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
        best = checkpoint.latest(folder)
        if best is None or best.step != chosen["step"]:
            found = "nothing" if best is None else f"step {best.step}"
            raise RuntimeError(
                f"{folder} holds {found}, but step {chosen['step']} is the best; remove "
                f"{self.folder} and run again"
            )
        checkpoint.restore_weights(self.bare_model, best.tensors["weights"])
        self.method.load_state_dict(best.tensors["method"])
        self.result.chosen_step = best.step

    # ------------------------------------------------------------------ what processes agree on

    def _agree_on(self, num_targets: int) -> int:
        """Return the number of targets on all processes; stop all where a loss was not finite."""
        if self.world == 1:
            self._check_loss()
            return num_targets
        is_bad = self._watched is not None and not self._watched.is_finite
        values = torch.tensor([num_targets, int(is_bad)], device=self.device)
        total, num_bad = self.accelerator.reduce(values, reduction="sum").tolist()
        if num_bad and self._watched is not None:
            raise self._watched.error()
        return int(total)

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


@contextlib.contextmanager
def _forward_unchanged(*modules: nn.Module) -> Iterator[None]:
    """Undo what `Accelerator.prepare` does to `forward` in half precision.

    The loop enters autocast itself, so that nothing is left behind: a model that was trained in
    half precision decodes in the type of its weights, compiled or not, and is freed with its run.

    Args:
        modules: the model, and its compiled form, which hands attributes on to the model.
    """
    names = ("forward", "_original_forward")
    before = [{name: vars(m)[name] for name in names if name in vars(m)} for m in modules]
    try:
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values)


def _own(sums: Sequence[float], rank: int, world: int) -> float:
    """Return this process's part of the stored sums; process 0 takes those of another number."""
    if len(sums) == world:
        return sums[rank]
    return math.fsum(sums) if rank == 0 else 0.0


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
