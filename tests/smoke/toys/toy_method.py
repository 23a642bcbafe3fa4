"""Train the biases and nothing else."""

from collections.abc import Sequence

from torch import nn

from delta_lora.method_bases import WeightsMethod
from delta_lora.projections import head_parameters


class ToyMethod(WeightsMethod):
    """The biases train, and what is new."""

    name = "toy"

    def choose(
        self, model: nn.Module, projections: Sequence[str] | None, head: Sequence[str]
    ) -> None:
        new = head_parameters(model, head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".bias") or name in new)
