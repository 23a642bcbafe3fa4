"""The engine: what `accelerate` does for the loop, and what of it must not reach the run.

It gives device, mixed precision and processes. Nothing that another tool left in the environment
or in the process changes a gradient, and nothing of it stays in the model or the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import nn

from delta_lora import processes

#: what the loop runs on; models that are sharded over devices need a loop that knows about it.
_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@contextlib.contextmanager
def start(*, device: str, precision: str) -> Iterator[Accelerator]:
    """Give an `Accelerator` for one fit.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ValueError: the process is on another device, or the launch shards the model.
    """
    had_state = bool(PartialState._shared_state)
    accelerator = _accelerator(device, precision)
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        # The next fit may be on another device; the processes of a launch stay together.
        AcceleratorState._reset_state(
            reset_partial_state=not had_state and processes.share()[1] == 1
        )


def _accelerator(device: str, precision: str) -> Accelerator:
    wants_cpu = device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=wants_cpu,  # also for several processes without CUDA: they need gloo
        mixed_precision="no" if precision == "fp32" else precision,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Every process sets its buffers itself. Handing them round would make a forward pass
        # wait for processes that have none to run.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    accelerator.sync_gradients = True
    if wants_cpu != (accelerator.device.type == "cpu"):
        raise ValueError(
            f"trainer.device={device}, but this process computes on {accelerator.device} "
            "already (accelerate keeps one device a process); start a new process, or ask for "
            "that device"
        )
    if accelerator.distributed_type not in _LAUNCHES:
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}, but the trainer "
            "keeps the whole model on every device; use accelerate launch --multi_gpu, or "
            "delta_lora.attach (method.form=closed_form) in a loop that shards"
        )
    return accelerator


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, *, compiles: bool
) -> tuple[nn.Module, nn.Module, AcceleratedOptimizer]:
    """Return what evaluation calls, what training calls, and the optimiser that training steps.

    Training calls a wrapper that averages gradients over processes; evaluation calls the model
    without it, so that it waits for nobody. Both are compiled where `compiles` says so.
    """
    network: nn.Module = model
    if compiles:
        network = torch.compile(model, dynamic=True)  # type: ignore[assignment]
    with _forward_unchanged(network, model):
        wrapped, prepared = accelerator.prepare(network, optimizer)
    return network, wrapped, prepared


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
