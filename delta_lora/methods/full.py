"""Full fine-tuning: every weight trains.

The first row of the paper's tables (Zi et al., arXiv 2309.02411, Tables 1 to 4).

Update: ``theta <- AdamW(theta, dL/dtheta)`` for every parameter.

State kept: none beyond the optimiser's (two float32 tensors of the size of the model).

Details:
1. A parameter that the model itself holds fixed (sinusoidal positions) stays fixed.
2. `projections` and `head` change nothing: both train anyway. A head that the model lacks is still
   an error, because it means the wrong model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from delta_lora.checks import check_real
from delta_lora.projections import head_parameters
from delta_lora.protocols import Method


class Full(Method):
    """Full fine-tuning.

    Args:
        learning_rate: peak learning rate, above 0.
    """

    def __init__(self, *, learning_rate: float) -> None:
        self.learning_rate = check_real("learning_rate", learning_rate, above=0)

    def inject(
        self,
        model: nn.Module,
        *,
        projections: Sequence[str] | None,
        head: Sequence[str],
        total_steps: int,
        seed: int,
    ) -> None:
        """Check that something trains; the model stays as it is."""
        head_parameters(model, head)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient; "
                "hand in the model as it was loaded"
            )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return all trainable parameters as one group."""
        return [{"params": list(self.updated_tensors(model).items()), "lr": self.learning_rate}]
