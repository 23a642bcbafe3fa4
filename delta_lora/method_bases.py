"""What methods have in common: those that add low-rank branches, and those that train weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Annotated

import torch
from torch import Tensor, nn

from delta_lora.checks import Range, check_integer, check_values
from delta_lora.low_rank import LowRankBranch, inject_branches, merged_layers
from delta_lora.projections import Projection, head_parameters
from delta_lora.protocols import Method

#: what methods share; a value beyond these bounds is a slip of the pen, not a setting.
Rank = Annotated[int, Range(at_least=1, at_most=65536)]
Alpha = Annotated[float, Range(above=0, at_most=1e6)]
Dropout = Annotated[float, Range(at_least=0, below=1)]
LearningRate = Annotated[float, Range(above=0, at_most=1000)]
Fraction = Annotated[float, Range(at_least=0, below=1)]
#: optimiser steps.
MAX_STEPS = 10**9


def check_steps(method: str, total_steps: int) -> int:
    """Return the number of steps of a training, of which a method needs one at least.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    if check_integer("total_steps", total_steps, at_least=0) == 0:
        raise ValueError(
            f"total_steps=0 (trainer.max_steps=0): method={method} needs at least one step; raise "
            "max_steps, or use method=full for a model that is not trained"
        )
    return total_steps


class LowRankMethod(Method):
    """A method that trains a low-rank branch on every projection, beside the frozen weight.

    A subclass says what a branch is (`make_branch`) and, in `plan` and `begin`, what it needs
    before and after the branches are in the model.

    Args:
        rank: r, at least 1 and at most the smaller side of a projection.
        alpha: numerator of the scaling alpha / rank, above 0.
        dropout: probability on the input of the branch, in [0, 1).
        learning_rate: peak learning rate, above 0.
    """

    #: types of W in which the method can write it; None takes any.
    weight_dtypes: tuple[torch.dtype, ...] | None = None

    def __init__(
        self,
        *,
        rank: Rank = 8,
        alpha: Alpha = 16.0,
        dropout: Dropout = 0.0,
        learning_rate: LearningRate = 2e-4,
    ) -> None:
        check_values(LowRankMethod.__init__, locals())
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = float(dropout)
        self.learning_rate = float(learning_rate)
        self.branches: dict[str, LowRankBranch] = {}

    def inject(
        self,
        model: nn.Module,
        *,
        projections: Sequence[str] | None,
        head: Sequence[str],
        total_steps: int,
        seed: int,
    ) -> None:
        """Freeze the model, add the branches, let branches and head train.

        Raises:
            RuntimeError: the model was injected before.
            ValueError: nothing matches, the rank is larger than a projection, or the method cannot
                work with the weights or the number of steps.
        """
        self.plan(total_steps, seed)
        self.branches = inject_branches(
            model,
            projections=projections,
            head=head,
            rank=self.rank,
            dropout=self.dropout,
            seed=seed,
            make_branch=self.make_branch,
            weight_dtypes=self.weight_dtypes,
        )
        self.begin(model, total_steps)

    def plan(self, total_steps: int, seed: int) -> None:
        """Run before the branches are made; raise ValueError where the length does not fit."""

    def make_branch(
        self, projection: Projection, *, weight: Tensor, generator: torch.Generator
    ) -> LowRankBranch:
        """Return the branch of a projection; see `LowRankBranch`."""
        return LowRankBranch(
            projection, rank=self.rank, alpha=self.alpha, weight=weight, generator=generator
        )

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Run when the branches are in the model."""

    def merged(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Run on W and the branch in one weight within the context."""
        return merged_layers(model)


class WeightsMethod(Method):
    """A method that trains weights of the model as they are; a subclass says which (`choose`).

    Args:
        learning_rate: peak learning rate, above 0.
    """

    def __init__(self, *, learning_rate: LearningRate = 2e-4) -> None:
        check_values(WeightsMethod.__init__, locals())
        self.learning_rate = float(learning_rate)

    def inject(
        self,
        model: nn.Module,
        *,
        projections: Sequence[str] | None,
        head: Sequence[str],
        total_steps: int,
        seed: int,
    ) -> None:
        """Set what trains and check that it is something; steps and seed are not used.

        Raises:
            RuntimeError: the model was injected before.
            ValueError: there is no such head, nothing to choose, or nothing that would train.
        """
        head_parameters(model, head)
        self.choose(model, projections, head)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} would train with method={self.name}; "
                "hand in the model as it was loaded, or take another method"
            )

    def choose(
        self, model: nn.Module, projections: Sequence[str] | None, head: Sequence[str]
    ) -> None:
        """Set `requires_grad` of what trains; default: every weight stays as it is."""
