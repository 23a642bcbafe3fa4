"""The trainer: the values of a recipe, checked once, and the loop that follows them.

The loop itself is `delta_lora.loop`; the engine is `accelerate` (device, precision, processes).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import nn

from delta_lora import processes
from delta_lora.checks import check_bool, check_choice, check_integer, check_real
from delta_lora.loop import Loop
from delta_lora.optimization import OPTIMIZERS, SCHEDULES, make_optimizer, split_by_decay
from delta_lora.protocols import Method, Task
from delta_lora.result import FitResult

PRECISIONS = ("fp32", "bf16", "fp16")
MATMUL_PRECISIONS = {"fp32": "highest", "tf32": "high"}
CHECKPOINT_RULES = ("last", "best")
DEVICES = ("auto", "cpu", "cuda")
#: what `fit` runs on; models that are sharded over devices need a loop that knows about it.
_ENGINES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


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
        checkpoint_every_s: seconds between checkpoints; each waits for the next log step, and is
            written while training goes on.
        checkpoint_every_steps: a further checkpoint every so many steps; None: by time alone.
        device: ``auto`` (CUDA where torch can use one, else the CPU), ``cpu`` or ``cuda``.
        matmul_precision: of float32 matrix products on CUDA: ``fp32``, or ``tf32``, which rounds
            their inputs to 10 bits behind the point and is several times faster.
        num_threads: CPU threads for torch; None leaves torch's choice. Sums depend on it in the
            last bits, so it is part of a run's identity.
        deterministic: take kernels that give the same bits every time: slower, and needed for
            that on CUDA only.

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
        checkpoint_every_s: float = 600.0,
        checkpoint_every_steps: int | None = None,
        device: str = "auto",
        matmul_precision: str = "fp32",
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
        check_choice("trainer.device", device, DEVICES)
        check_choice("trainer.matmul_precision", matmul_precision, tuple(MATMUL_PRECISIONS))
        check_real("trainer.checkpoint_every_s", checkpoint_every_s, above=0)
        if warmup_steps is not None and warmup_ratio is not None:
            raise ValueError(
                f"both warmup_steps={warmup_steps} and warmup_ratio={warmup_ratio} are given; "
                "set one of them to null"
            )
        if checkpoint_rule == "best" and evaluate_every_epochs is None:
            raise ValueError("checkpoint_rule=best needs evaluations; set evaluate_every_epochs")
        has_cuda = device != "cpu" and torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise ValueError(
                "trainer.device=cuda, but torch can use no CUDA device (torch.cuda.is_available() "
                "is False); use trainer.device=cpu, or a torch and a driver that fit each other"
            )
        if precision == "fp16" and not has_cuda:
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
        self.checkpoint_every_s = checkpoint_every_s
        self.checkpoint_every_steps = checkpoint_every_steps
        self.device = device
        self.matmul_precision = matmul_precision
        self.num_threads = num_threads
        self.deterministic = check_bool("trainer.deterministic", deterministic)

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

    def optimizer(self, model: nn.Module, method: Method) -> torch.optim.Optimizer:
        """Return the optimiser over the method's groups, each split by `no_decay`.

        Raises:
            ValueError: nothing trains.
        """
        groups = split_by_decay(method.param_groups(model), self.weight_decay, self.no_decay)
        if not groups:
            raise ValueError("the method trains no parameter; check its settings")
        return make_optimizer(
            self.optimizer_name,
            groups,
            betas=self.adam_betas,
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
        self.prepare_backend()
        had_state = bool(PartialState._shared_state)
        accelerator = self._accelerator()
        try:
            return Loop(
                self, accelerator, model, method=method, task=task, train=train,
                validation=validation, seed=seed, folder=folder, mirrors=mirrors,
                identity=identity or {}, score=score,
            ).run()  # fmt: skip
        finally:
            accelerator.free_memory()
            # The next fit may be on another device; the processes of a launch stay together.
            AcceleratorState._reset_state(
                reset_partial_state=not had_state and processes.share()[1] == 1
            )

    def _accelerator(self) -> Accelerator:
        """Return the engine. What other tools leave in the environment changes no gradient.

        Raises:
            ValueError: the process is on another device, or the launch shards the model.
        """
        wants_cpu = self.device == "cpu" or not torch.cuda.is_available()
        accelerator = Accelerator(
            cpu=wants_cpu,  # also for several processes without CUDA: they need gloo
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # Every process sets its buffers itself. Handing them round would make a forward pass
            # wait for processes that have none to run.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        accelerator.sync_gradients = True
        if wants_cpu != (accelerator.device.type == "cpu"):
            raise ValueError(
                f"trainer.device={self.device}, but this process computes on {accelerator.device} "
                "already (accelerate keeps one device a process); start a new process, or ask for "
                "that device"
            )
        if accelerator.distributed_type not in _ENGINES:
            raise ValueError(
                f"accelerate is set up for {accelerator.distributed_type.value}, but the trainer "
                "keeps the whole model on every device; use accelerate launch --multi_gpu, or "
                "delta_lora.attach (method.form=closed_form) in a loop that shards"
            )
        return accelerator
