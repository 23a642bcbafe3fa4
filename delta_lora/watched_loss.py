"""The loss of a step, checked when the device has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from delta_lora.finite import NonFiniteLossError


class WatchedLoss:
    """The loss of one step, read later, so that the device is not made to wait for it.

    Args:
        step: number of the step.
        loss: scalar; on CUDA its copy to the host is queued behind the kernels of the step.
        example_ids: what was in the step, for the message.
    """

    def __init__(self, step: int, loss: Tensor, example_ids: list[str]) -> None:
        self.step, self.example_ids = step, example_ids
        self._value = loss.detach()
        self._copied: torch.cuda.Event | None = None
        if loss.is_cuda:
            host = torch.empty((), dtype=loss.dtype, pin_memory=True)
            self._value = host.copy_(self._value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_finite(self) -> bool:
        """Whether it is a number; waits for this step and for nothing queued behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        return math.isfinite(float(self._value))

    def error(self) -> NonFiniteLossError:
        """Return what to raise where it is none."""
        where = f"its batch was {', '.join(self.example_ids)}"
        if self.is_finite:
            where = "the batch was another process's"
        value = "not finite" if self.is_finite else float(self._value)
        if self.step == 0:
            return NonFiniteLossError(
                f"the loss of step 0 is {value}, before any update; {where}. Look at these "
                "examples and at the model: in half precision a checkpoint that was trained in "
                "another type overflows (trainer.precision=fp32, model.dtype=float32)"
            )
        return NonFiniteLossError(
            f"the loss of step {self.step} is {value}; {where}. "
            "Lower the learning rate, clip gradients (trainer.max_grad_norm=1.0) or use "
            "trainer.precision=fp32; checkpoints of earlier steps are kept"
        )
