"""DyLoRA: one adapter that works at every rank from 1 to r.

Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free
Low Rank Adaptation", arXiv 2210.07558, Algorithm 1.

As printed: sample b; truncate, ``W_dw = W_dw[:b, :]``, ``W_up = W_up[:, :b]``; forward with
``h = W_0 x + (alpha / b) W_up W_dw x``; update the truncated factors, or ("frozen") only the b-th
row and column.
In our symbols: ``h = W x + (alpha / b) * lora_B[:, :b] @ lora_A[:b] @ dropout(x)``.

The released code (huawei-noah/Efficient-NLP) multiplies both truncated factors by sqrt(r / b) and
the branch by alpha / r, which is the same scale, and always uses the frozen rule.

Deviations:
* The released `MergedLinear` (GPT-2) has no DyLoRA version; ours treats query and value of a fused
  layer as two projections, as LoRA does.
* The released code evaluates during training at whatever rank was drawn last; ours always at
  `eval_rank`.

State kept: none beyond the optimiser's; four buffers of r numbers each and two of r x r, shared by
all branches.

Details:
1. b is uniform on 1..r, drawn for every micro-batch, the same for every projection. It is a hash of
   (seed, step, micro_step), so a resumed run and every process of a parallel one draw the same.
2. "frozen" detaches the rows and columns before the b-th: they take part in the forward pass and
   have a gradient of zero, not none. So with Adam momentum still moves them and weight decay
   shrinks them, as in the released code.
3. Truncation is a product with a mask, so that shapes never change (nothing is recompiled).
4. Training mode uses the drawn b, evaluation mode and `merged` use `eval_rank` (None: the full r).
   A table that compares with LoRA of rank r uses the full r.
5. Under gradient accumulation several b are averaged in one update; the author recommends it
   (kohya-ss/sd-scripts #394).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from delta_lora.checks import OneOf, check_integer, check_values
from delta_lora.low_rank import LowRankBranch, factor_dtype
from delta_lora.method_bases import Alpha, Dropout, LearningRate, LowRankMethod, Rank
from delta_lora.projections import Projection


class ActiveRank(nn.Module):
    """The rank that the branches of a model use now, as masks of r entries.

    Args:
        rank: r.
        eval_rank: the rank in evaluation mode.
        is_frozen: only the last active row and column get a gradient.
        weight: a weight of the model, for device and type.
    """

    def __init__(self, rank: int, eval_rank: int, *, is_frozen: bool, weight: Tensor) -> None:
        super().__init__()
        self.rank = rank
        self.is_frozen = is_frozen
        scale_RR, trains_RR = self._masks()
        scale_RR = scale_RR.to(weight.device, factor_dtype(weight))
        trains_RR = trains_RR.to(weight.device)
        for mode, active in (("train", rank), ("eval", eval_rank)):
            self._keep(f"{mode}_scale", scale_RR[active - 1].clone())
            self._keep(f"{mode}_trains", trains_RR[active - 1].clone())
        # Of every rank, by b - 1, on the device: a draw then copies nothing from the host.
        self._keep("scales", scale_RR)
        self._keep("trains", trains_RR)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _masks(self) -> tuple[Tensor, Tensor]:
        """Return scale and gradient mask for every active rank b, (r, r), row b - 1."""
        index_R = torch.arange(self.rank)
        active_R1 = torch.arange(1, self.rank + 1)[:, None]
        is_active_RR = index_R < active_R1
        scale_RR = is_active_RR.double() * (self.rank / active_R1.double())
        trains_RR = (index_R == active_R1 - 1) if self.is_frozen else is_active_RR
        return scale_RR, trains_RR

    def set(self, active: int) -> None:
        """Use the first `active` rows and columns in training mode."""
        self.get_buffer("train_scale").copy_(self.get_buffer("scales")[active - 1])
        self.get_buffer("train_trains").copy_(self.get_buffer("trains")[active - 1])

    def forward(self, is_training: bool) -> tuple[Tensor, Tensor]:
        """Return the scale r / b (0 where inactive), (r,), and which entries get a gradient."""
        if is_training:
            return self.get_buffer("train_scale"), self.get_buffer("train_trains")
        return self.get_buffer("eval_scale"), self.get_buffer("eval_trains")


class TruncatedBranch(LowRankBranch):
    """A branch of which the first b rows and columns are active, scaled by alpha / b.

    Args:
        active_rank: the masks, shared by all branches of a model.
        projection: as in `LowRankBranch`.
        rank: as in `LowRankBranch`.
        alpha: as in `LowRankBranch`.
        weight: as in `LowRankBranch`.
        generator: as in `LowRankBranch`.
    """

    def __init__(
        self,
        active_rank: ActiveRank,
        projection: Projection,
        *,
        rank: int,
        alpha: float,
        weight: Tensor,
        generator: torch.Generator,
    ) -> None:
        super().__init__(projection, rank=rank, alpha=alpha, weight=weight, generator=generator)
        self.active_rank = active_rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A with inactive rows zero and active ones scaled by r / b, and B."""
        return self._factors(self.training)

    def _factors(self, is_training: bool) -> tuple[Tensor, Tensor]:
        scale_R, trains_R = self.active_rank(is_training)
        A_RI = torch.where(trains_R[:, None], self.lora_A, self.lora_A.detach())
        B_OR = torch.where(trains_R, self.lora_B, self.lora_B.detach())
        return A_RI * scale_R[:, None], B_OR

    def delta_weight(self) -> Tensor:
        """Return the change of W at `eval_rank`, in training mode too."""
        A_RI, B_OR = self._factors(is_training=False)
        with torch.autocast(A_RI.device.type, enabled=False):
            return (B_OR @ A_RI) * self.scaling


class DyLora(LowRankMethod):
    """DyLoRA on W_Q and W_V.

    Args:
        rank: the largest rank r, at least 1 and at most the smaller side of a projection.
        alpha: the branch at rank b is scaled by alpha / b; above 0.
        dropout: probability on the input of the branch, in [0, 1).
        learning_rate: peak learning rate, above 0.
        update: ``frozen`` trains only the b-th row and column, ``all`` the first b.
        eval_rank: rank in evaluation and merging, 1 to r; None is r.
    """

    name = "dylora"

    def __init__(
        self,
        *,
        rank: Rank = 8,
        alpha: Alpha = 16.0,
        dropout: Dropout = 0.0,
        learning_rate: LearningRate = 2e-4,
        update: Annotated[str, OneOf(("frozen", "all"))] = "frozen",
        eval_rank: Rank | None = None,
    ) -> None:
        check_values(DyLora.__init__, locals())
        super().__init__(rank=rank, alpha=alpha, dropout=dropout, learning_rate=learning_rate)
        self.update = update
        self.eval_rank = self.rank
        if eval_rank is not None:
            self.eval_rank = check_integer("eval_rank", eval_rank, at_most=self.rank)
        self._seed = 0
        self._active_rank: ActiveRank | None = None

    def plan(self, total_steps: int, seed: int) -> None:
        """Keep the seed of the draws."""
        self._seed, self._active_rank = seed, None

    def make_branch(
        self, projection: Projection, *, weight: Tensor, generator: torch.Generator
    ) -> LowRankBranch:
        """Return a branch that is cut to the active rank, which all branches share."""
        if self._active_rank is None:
            self._active_rank = ActiveRank(
                self.rank, self.eval_rank, is_frozen=self.update == "frozen", weight=weight
            )
        return TruncatedBranch(
            self._active_rank,
            projection,
            rank=self.rank,
            alpha=self.alpha,
            weight=weight,
            generator=generator,
        )

    def before_micro_batch(self, step: int, micro_step: int) -> None:
        """Draw the rank of this micro-batch.

        Raises:
            RuntimeError: `inject` was not called.
        """
        if self._active_rank is None:
            raise RuntimeError("before_micro_batch before inject; inject the model first")
        self._active_rank.set(draw_rank(self.rank, self._seed, step, micro_step))

    def describe(self) -> dict[str, Any]:
        """Return the rank that scores belong to."""
        return {"eval_rank": self.eval_rank, "update": self.update}


def draw_rank(rank: int, seed: int, step: int, micro_step: int) -> int:
    """Return a rank, uniform on 1..`rank`, as a function of its arguments alone."""
    digest = hashlib.sha256(f"dylora {seed} {step} {micro_step}".encode()).digest()
    return int.from_bytes(digest, "big") % rank + 1
