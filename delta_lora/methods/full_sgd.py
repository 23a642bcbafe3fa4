"""Full fine-tuning by plain SGD: the memory baseline, in which an optimiser keeps nothing.

Ours; the paper has no such row. AdamW holds two float32 tensors of the size of the model beside the
gradients; SGD without momentum holds none, so what is left of the memory of full fine-tuning is
what every method that computes all gradients pays.

Update: ``theta <- theta - lr * (dL/dtheta + decay * theta)`` for every parameter; with momentum mu
``m <- mu * m + (dL/dtheta + decay * theta)`` and ``theta <- theta - lr * m`` (torch's SGD).

State kept: none; with momentum one tensor of the size of the model, in its type.

Details:
1. The method brings its own optimiser; schedule, decay groups and clipping stay the trainer's.
2. Weight decay is coupled. Without momentum that equals AdamW's decoupled decay.
3. Everything else as in `delta_lora.methods.full`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from delta_lora.checks import check_real
from delta_lora.projections import head_parameters
from delta_lora.protocols import Method


class FullSgd(Method):
    """Full fine-tuning by SGD.

    Args:
        learning_rate: peak learning rate, above 0.
        momentum: mu, in [0, 1).
    """

    def __init__(self, *, learning_rate: float, momentum: float = 0.0) -> None:
        self.learning_rate = check_real("learning_rate", learning_rate, above=0)
        self.momentum = check_real("momentum", momentum, at_least=0, below=1)

    def inject(
        self,
        model: nn.Module,
        *,
        projections: Sequence[str] | None,
        head: Sequence[str],
        total_steps: int,
        seed: int,
    ) -> None:
        """Check that something trains; the model stays as it is.

        Raises:
            ValueError: no parameter requires a gradient, or there is no such head.
        """
        head_parameters(model, head)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient; "
                "hand in the model as it was loaded"
            )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return all trainable parameters as one group."""
        return [{"params": list(self.updated_tensors(model).items()), "lr": self.learning_rate}]

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return SGD over `groups`."""
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)
