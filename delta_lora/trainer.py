"""The trainer: what can be set about a training, declared once, and `fit`.

What `fit` does with it is the loop, `delta_lora.loop`; what it runs on is `delta_lora.engine`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from delta_lora import engine, processes
from delta_lora.checks import OneOf, Range, check_values, documented
from delta_lora.loop import Loop
from delta_lora.optimization import OPTIMIZERS, SCHEDULES, make_optimizer, split_by_decay
from delta_lora.protocols import Method, Task
from delta_lora.result import FitResult

PRECISIONS = ("fp32", "bf16", "fp16")
MATMUL_PRECISIONS = {"fp32": "highest", "tf32": "high"}
CHECKPOINT_RULES = ("last", "best")
DEVICES = ("auto", "cpu", "cuda")
#: optimiser steps, and what is counted in them.
MAX_STEPS = 10**9
#: examples of one forward pass: far more than any device holds.
MAX_EXAMPLES = 4096
_PASS = Range(at_least=1, at_most=MAX_EXAMPLES, why="all are in memory at once")


@documented
@dataclass(frozen=True, kw_only=True)
class Trainer:
    """AdamW or another optimiser with a warm-up schedule; the recipe's values are the keywords.

    A value is used as it is given, and none changes afterwards.

    Raises:
        TypeError: a value of another type.
        ValueError: a value outside its range, or two that do not fit each other.
    """

    #: raised when the same values give another result.
    version: ClassVar[int] = 1
    #: keywords that change no result, so that no run is named by them.
    not_signed: ClassVar[tuple[str, ...]] = ("checkpoint_every_s", "checkpoint_every_steps")

    batch_size: Annotated[int, Range(at_least=1, at_most=2**20)]
    """Examples of one optimiser step, over all processes and micro-batches."""

    micro_batch_size: Annotated[int | None, _PASS] = None
    """Examples of one forward pass on one process; None: no accumulation."""

    group_by_length: bool = False
    """Sort a process's examples of a step by length before they are cut into micro-batches: less
    padding, and the same examples in the step."""

    eval_batch_size: Annotated[int, _PASS] = 8
    """Examples of one forward pass in evaluation; small, because attention over a batch without
    padding is quadratic in its tokens."""

    num_epochs: Annotated[float, Range(above=0, at_most=100_000)] = 1.0
    """Passes over the training data; ignored where `max_steps` is given."""

    max_steps: Annotated[int | None, Range(at_least=0, at_most=MAX_STEPS)] = None
    """Number of optimiser steps, or None; 0 trains nothing."""

    warmup_steps: Annotated[int | None, Range(at_least=0, at_most=MAX_STEPS)] = None
    """Steps of linear warm-up; exclusive with `warmup_ratio`."""

    warmup_ratio: Annotated[float | None, Range(at_least=0, at_most=1)] = None
    """The same as a fraction of all steps."""

    schedule: Annotated[str, OneOf(SCHEDULES)] = "linear"
    """What the learning rate does behind the warm-up."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """One of torch's."""

    momentum: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Of ``sgd`` and ``rmsprop``."""

    weight_decay: Annotated[float, Range(at_least=0, at_most=1000)] = 0.0
    """Decoupled decay (torch's AdamW: before the update, by the learning rate); ``sgd`` and
    ``rmsprop`` add it to the gradient instead."""

    no_decay: Sequence[str] = ()
    """Name parts of parameters without decay, for example ``bias``."""

    adam_beta1: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """Decay of AdamW's first moment."""

    adam_beta2: Annotated[float, Range(at_least=0, below=1)] = 0.999
    """Decay of AdamW's second moment."""

    adam_epsilon: Annotated[float, Range(above=0, at_most=1)] = 1e-8
    """AdamW's epsilon; the other optimisers keep torch's."""

    max_grad_norm: Annotated[float | None, Range(above=0, at_most=1e30)] = None
    """Clip the global gradient norm to this; None: no clipping."""

    label_smoothing: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Passed to the task's training loss (validation loss is plain)."""

    precision: Annotated[str, OneOf(PRECISIONS)] = "fp32"
    """Of the forward pass: float32, or autocast in half precision (weights stay in float32)."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    compile: bool = False
    """Run the model through `torch.compile`."""

    checkpoint_rule: Annotated[str, OneOf(CHECKPOINT_RULES)] = "last"
    """Which step's weights the model holds at the end: the last, or the best by the task's
    `selection_metric` on the validation split (without one: by validation loss); of equal ones
    the first."""

    evaluate_every_epochs: Annotated[int | None, Range(at_least=1, at_most=MAX_STEPS)] = 1
    """Evaluations happen at these ends of epochs and at the last step; None: never."""

    log_every_steps: Annotated[int, Range(at_least=1, at_most=MAX_STEPS)] = 10
    """Distance of log lines."""

    checkpoint_every_s: Annotated[float, Range(above=0, at_most=1e9)] = 600.0
    """Seconds between checkpoints; each waits for the next log step, and is written while training
    goes on."""

    checkpoint_every_steps: Annotated[int | None, Range(at_least=1, at_most=MAX_STEPS)] = None
    """A further checkpoint every so many steps; None: by time alone."""

    device: Annotated[str, OneOf(DEVICES)] = "auto"
    """``auto``: CUDA where torch can use one, else the CPU."""

    matmul_precision: Annotated[str, OneOf(tuple(MATMUL_PRECISIONS))] = "fp32"
    """Of float32 matrix products on CUDA; ``tf32`` rounds their inputs to 10 bits behind the point
    and is several times faster."""

    num_threads: Annotated[int | None, Range(at_least=1, at_most=1024)] = None
    """CPU threads for torch; None leaves torch's choice. Sums depend on it in the last bits, so it
    is part of a run's identity."""

    deterministic: bool = False
    """Take kernels that give the same bits every time: slower, and needed for that on CUDA only."""

    def __post_init__(self) -> None:
        check_values(Trainer, vars(self), prefix="trainer.")
        most = MAX_EXAMPLES * processes.share()[1]
        if self.micro_batch_size is None and self.batch_size > most:
            raise ValueError(
                f"trainer.batch_size={self.batch_size} without trainer.micro_batch_size: all "
                "examples of a step would be in memory at once; set micro_batch_size, at most "
                f"{MAX_EXAMPLES}, or a batch_size of at most {most}"
            )
        if self.momentum > 0 and self.optimizer not in ("sgd", "rmsprop"):
            raise ValueError(
                f"trainer.momentum={self.momentum} has no meaning for "
                f"trainer.optimizer={self.optimizer}; use 0, or optimizer=sgd or rmsprop"
            )
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                f"both warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} are "
                "given; set one of them to null"
            )
        if self.checkpoint_rule == "best" and self.evaluate_every_epochs is None:
            raise ValueError("checkpoint_rule=best needs evaluations; set evaluate_every_epochs")
        has_cuda = self.device != "cpu" and torch.cuda.is_available()
        if self.device == "cuda" and not has_cuda:
            raise ValueError(
                "trainer.device=cuda, but torch can use no CUDA device (torch.cuda.is_available() "
                "is False); use trainer.device=cpu, or a torch and a driver that fit each other"
            )
        if self.precision == "fp16" and not has_cuda:
            raise ValueError(
                "precision=fp16 needs a CUDA device; on a CPU use precision=bf16 or fp32"
            )

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
        """Set threads, precision and determinism of torch, before a model is built."""
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        torch.set_float32_matmul_precision(MATMUL_PRECISIONS[self.matmul_precision])
        # cuDNN's attention plans anew for every shape, and batches without padding have a new one
        # nearly every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.deterministic:  # cuBLAS reads it when it is first used
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic)

    def build_optimizer(self, model: nn.Module, method: Method) -> torch.optim.Optimizer:
        """Return the optimiser over the method's groups, each split by `no_decay`.

        Raises:
            ValueError: nothing trains.
        """
        groups = split_by_decay(method.param_groups(model), self.weight_decay, self.no_decay)
        if not groups:
            raise ValueError("the method trains no parameter; check its settings")
        return make_optimizer(
            self.optimizer,
            groups,
            betas=(self.adam_beta1, self.adam_beta2),
            epsilon=self.adam_epsilon,
            momentum=self.momentum,
            has_loss_scaler=self.precision == "fp16",
        )

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
        prune: Callable[[Sequence[dict[str, float]]], str | None] | None = None,
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
            prune: called behind every evaluation but that of the last step with all evaluations so
                far (`FitResult.validation`); returns why the run is given up there, or None to go
                on. The same on every process. It changes nothing of a run that goes on, and the
                same call without it continues one that was given up.

        Returns:
            What happened; `model` holds the weights that the checkpoint rule names.

        Raises:
            NonFiniteLossError: the loss is infinite or NaN (step and examples named).
            NonFiniteError: a weight of the model, the norm of the gradients, a value of an
                evaluation, or a weight behind the last step is.
            ValueError: no training data, or the global batch cannot be split over the processes.
            RuntimeError: a checkpoint does not fit the run.
            KeyboardInterrupt: stopped by a signal, after writing a checkpoint.
            PrunedError: `prune` gave it up, after writing a checkpoint.
        """
        if not len(train):
            raise ValueError("the training split has no examples")
        self.prepare_backend()
        with engine.start(device=self.device, precision=self.precision) as accelerator:
            return Loop(
                settings=self, accelerator=accelerator, model=model, method=method, task=task,
                train=train, validation=validation, seed=seed, folder=folder, mirrors=mirrors,
                identity=identity or {}, score=score, prune=prune,
            ).run()  # fmt: skip
