"""LoRA: a trained low-rank change beside the frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

As printed (equation 3): ``h = W_0 x + Delta W x = W_0 x + B A x``, scaled by alpha / r.
In our symbols: ``h = W x + scaling * lora_B @ lora_A @ dropout(x)``, ``scaling = alpha / rank``.

Deviations: none from microsoft/LoRA's layers; GPT-2's query and value have an A and a B each
(`MergedLinear`), where PEFT gives the fused layer one A and adapts the key too.

State kept: none beyond the optimiser's.

Details:
1. A is Kaiming uniform with a = sqrt 5, B zero (`low_rank.LowRankBranch`).
2. Dropout acts on the input of the branch only, one mask for query and value of a fused layer.
3. The controls `lora_no_dropout`, `lora_scaled` (alpha times 1 + lambda) and `lora_high_lr` are
   this class with other values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from delta_lora.checks import check_integer, check_real
from delta_lora.low_rank import LowRankBranch, inject_branches, merged_layers
from delta_lora.projections import Projection
from delta_lora.protocols import Method


class Lora(Method):
    """LoRA on W_Q and W_V.

    Args:
        rank: r, at least 1 and at most the smaller side of a projection.
        alpha: numerator of the scaling alpha / rank, above 0.
        dropout: probability on the input of the branch, in [0, 1).
        learning_rate: peak learning rate, above 0.
    """

    def __init__(self, *, rank: int, alpha: float, dropout: float, learning_rate: float) -> None:
        self.rank = check_integer("rank", rank, at_least=1)
        self.alpha = check_real("alpha", alpha, above=0)
        self.dropout = check_real("dropout", dropout, at_least=0, below=1)
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
        """Freeze the model, add the branches, let branches and head train.

        Raises:
            RuntimeError: the model was injected before.
            ValueError: nothing matches, or the rank is larger than a projection.
        """

        def make_branch(p: Projection, weight: Tensor, generator: torch.Generator) -> LowRankBranch:
            return LowRankBranch(
                p, rank=self.rank, alpha=self.alpha, weight=weight, generator=generator
            )

        inject_branches(
            model,
            projections=projections,
            head=head,
            rank=self.rank,
            dropout=self.dropout,
            seed=seed,
            make_branch=make_branch,
        )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return A, B and the head as one group."""
        return [{"params": list(self.updated_tensors(model).items()), "lr": self.learning_rate}]

    def merged(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Run on ``W + scaling * B @ A`` within the context."""
        return merged_layers(model)
