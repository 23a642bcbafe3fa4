"""AdaLoRA: an adapter in SVD form whose total rank is cut down during training.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512,
equations 3 to 12 and Algorithm 1; details as in its released code.

As printed: ``W = W_0 + P Lambda Q``; ``R(P, Q) = |P'P - I|_F^2 + |QQ' - I|_F^2`` (equation 4; the
code takes the norm, not its square); sensitivity ``I(w) = |w dL/dw|`` smoothed by beta1,
uncertainty by beta2, score their product; the triplets with the lowest scores lose their lambda.
In our symbols: ``h = W x + scaling * lora_B @ (lora_E * lora_A) @ dropout(x)`` with P = `lora_B`
(out, rank), Lambda = `lora_E` (rank, 1), Q = `lora_A` (rank, in).

Deviations from the released code:
* A budget equal to the initial one masks nothing; there the code would ask for the 0-th smallest
  score and stop.
* `t_init` and `t_final` are given as fractions of the run, so that the schedule fits any length.

Against PEFT: the released code, which counts here, masks to the target budget with the frozen
importance in every step after T - t_final; PEFT fixes the pattern at T - t_final and re-applies
it. Both give the same pattern, but where T - t_final is no multiple of `interval` PEFT masks one
step earlier. PEFT also leaves the divisor of the scale (`ranknum`) trainable.

State kept: smoothed sensitivity and uncertainty of every entry of the three factors, twice their
size in their type (3 MiB for GPT2-Medium at rank 4).

Details:
1. P and Q are N(0, 0.02^2), Lambda zero, so the change is zero at the start.
2. ``scaling = alpha / (init_rank + 1e-5)``, never changed by pruning, as in the released code.
3. The regulariser is the mean over all P and Q, times `orth_reg_weight`; it enters once per
   optimiser step, whatever the accumulation.
4. The importance of an entry uses its value after the optimiser step and its gradient from before.
   Both averages start at zero without bias correction.
5. Budget after step t (from 0): n * init_rank while t <= t_init, then the cubic schedule, truncated
   to an integer and applied where t is a multiple of `interval`, and n * target_rank applied in
   every step where t > T - t_final. Importance is no longer updated from T - t_final on.
6. The threshold is global: scores of all projections are ranked together, so they end with
   different ranks and only the mean is `target_rank`.
7. Nothing is removed: a masked lambda can come back at the next allocation, and P and Q stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from delta_lora.checks import Range, check_values
from delta_lora.low_rank import LowRankBranch
from delta_lora.method_bases import (
    MAX_STEPS,
    Alpha,
    Dropout,
    Fraction,
    LearningRate,
    LowRankMethod,
    Rank,
    check_steps,
)
from delta_lora.projections import Projection

INIT_STD = 0.02
SCALING_EPS = 1e-5


class SvdBranch(LowRankBranch):
    """A branch ``scaling * P diag(lambda) Q``, zero at the start.

    Args:
        projection: as in `LowRankBranch`.
        rank: the initial rank.
        alpha: as in `LowRankBranch`.
        weight: as in `LowRankBranch`.
        generator: as in `LowRankBranch`.
    """

    def __init__(
        self,
        projection: Projection,
        *,
        rank: int,
        alpha: float,
        weight: Tensor,
        generator: torch.Generator,
    ) -> None:
        super().__init__(projection, rank=rank, alpha=alpha, weight=weight, generator=generator)
        self.scaling = alpha / (rank + SCALING_EPS)
        with torch.no_grad():
            for factor in (self.lora_A, self.lora_B):
                draw = torch.empty(factor.shape).normal_(0, INIT_STD, generator=generator)
                factor.copy_(draw)
        self.lora_E = nn.Parameter(torch.zeros_like(self.lora_A[:, :1]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(lambda) Q and P."""
        return self.lora_A * self.lora_E, self.lora_B


class AdaLora(LowRankMethod):
    """AdaLoRA on W_Q and W_V.

    Defaults: ranks, `beta1` and `beta2` are those of PEFT's `AdaLoraConfig` (the paper's first
    budget is 1.5 times the last one too), `orth_reg_weight` that of most of the released scripts;
    fractions and `interval` lie within what those scripts have (t_init 7.5 to 18 % and t_final 31
    to 58 % of the run, an allocation every 1 to 100 steps); rate and `alpha` are ours.

    Args:
        init_rank: rank of every projection at the start.
        target_rank: mean rank at the end, 1 to `init_rank`.
        alpha: numerator of the scaling, above 0.
        dropout: probability on the input of the branch, in [0, 1).
        learning_rate: peak learning rate, above 0.
        orth_reg_weight: gamma, weight of the regulariser, at least 0.
        initial_fraction: t_init as a fraction of the steps, in [0, 1).
        final_fraction: t_final as a fraction of the steps, in [0, 1).
        interval: Delta_T, steps between two allocations, at least 1.
        beta1: smoothing of the sensitivity, in (0, 1).
        beta2: smoothing of the uncertainty, in (0, 1).
    """

    name = "adalora"
    needs_total_steps = True

    def __init__(
        self,
        *,
        init_rank: Rank = 12,
        target_rank: Rank = 8,
        alpha: Alpha = 16.0,
        dropout: Dropout = 0.0,
        learning_rate: LearningRate = 2e-4,
        orth_reg_weight: Annotated[float, Range(at_least=0, at_most=1e6)] = 0.1,
        initial_fraction: Fraction = 0.1,
        final_fraction: Fraction = 0.4,
        interval: Annotated[int, Range(at_least=1, at_most=MAX_STEPS)] = 10,
        beta1: Annotated[float, Range(above=0, below=1)] = 0.85,
        beta2: Annotated[float, Range(above=0, below=1)] = 0.85,
    ) -> None:
        check_values(AdaLora.__init__, locals())
        self.init_rank = init_rank
        self.target_rank = target_rank
        if self.target_rank > self.init_rank:
            raise ValueError(
                f"target_rank={target_rank} is larger than init_rank={init_rank}; AdaLoRA only "
                "cuts ranks, so use target_rank <= init_rank"
            )
        super().__init__(
            rank=self.init_rank, alpha=alpha, dropout=dropout, learning_rate=learning_rate
        )
        self.orth_reg_weight = float(orth_reg_weight)
        self.initial_fraction = float(initial_fraction)
        self.final_fraction = float(final_fraction)
        self.interval = interval
        self.beta1 = float(beta1)
        self.beta2 = float(beta2)
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._total_steps = 0
        self._t_init = 0
        self._t_final = 0
        self._num_steps = 0

    def plan(self, total_steps: int, seed: int) -> None:
        """Fix the schedule.

        Raises:
            ValueError: it leaves no step to cut ranks in.
        """
        self._total_steps = check_steps(self.name, total_steps)
        self._t_init = round(self.initial_fraction * total_steps)
        self._t_final = round(self.final_fraction * total_steps)
        if self._t_init + self._t_final >= total_steps:
            raise ValueError(
                f"initial_fraction={self.initial_fraction:g} and "
                f"final_fraction={self.final_fraction:g} of {total_steps} steps are "
                f"t_init={self._t_init} and t_final={self._t_final}, which leave no step to cut "
                "ranks in; t_init + t_final must be below the number of steps, so lower the "
                "fractions or train longer"
            )

    def make_branch(
        self, projection: Projection, *, weight: Tensor, generator: torch.Generator
    ) -> LowRankBranch:
        """Return the branch of a projection in SVD form."""
        return SvdBranch(
            projection, rank=self.init_rank, alpha=self.alpha, weight=weight, generator=generator
        )

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Start the importances at zero."""
        self._sensitivity = {n: torch.zeros_like(p) for n, p in self._factors().items()}
        self._uncertainty = {n: torch.zeros_like(p) for n, p in self._factors().items()}

    def _factors(self) -> dict[str, nn.Parameter]:
        """Return every lora_A, lora_B and lora_E by name."""
        return {
            f"{name}.{leaf}": getattr(branch, leaf)
            for name, branch in self.branches.items()
            for leaf in ("lora_A", "lora_B", "lora_E")
        }

    def extra_loss(self) -> Tensor | None:
        """Return gamma times the mean of ``|P'P - I|_F`` and ``|QQ' - I|_F`` over all P and Q."""
        if self.orth_reg_weight == 0:
            return None
        norms = []
        for branch in self.branches.values():
            eye = torch.eye(branch.rank, device=branch.lora_A.device, dtype=branch.lora_A.dtype)
            with torch.autocast(branch.lora_A.device.type, enabled=False):
                norms.append(torch.linalg.norm(branch.lora_A @ branch.lora_A.T - eye))
                norms.append(torch.linalg.norm(branch.lora_B.T @ branch.lora_B - eye))
        return self.orth_reg_weight * torch.stack(norms).mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the importances and cut to the budget of this step.

        Raises:
            RuntimeError: the step is out of order.
        """
        if step != self._num_steps:
            raise RuntimeError(
                f"after_step({step}) but {self._num_steps} steps were applied so far; call it once "
                "per applied optimiser step, counted from 0"
            )
        self._follow_device()
        if step < self._total_steps - self._t_final:
            self._update_importance()
        budget = self.budget(step)
        if budget is not None:
            self._mask_to(budget)
        self._num_steps += 1

    def budget(self, step: int) -> int | None:
        """Return the total rank to cut to after `step`, or None where nothing is cut.

        Args:
            step: optimiser step, from 0.

        Returns:
            A rank summed over all projections.
        """
        start = len(self.branches) * self.init_rank
        target = len(self.branches) * self.target_rank
        end_of_cut = self._total_steps - self._t_final
        if step <= self._t_init:
            return None
        if step > end_of_cut:
            return target
        if step % self.interval != 0:
            return None
        remaining = 1 - (step - self._t_init) / (end_of_cut - self._t_init)
        return int(target + (start - target) * remaining**3)

    def _follow_device(self) -> None:
        """Keep the averages where the factors are: a model may move after `inject`."""
        factors = self._factors()
        for average in (self._sensitivity, self._uncertainty):
            average.update({n: average[n].to(p.device) for n, p in factors.items()})

    def _update_importance(self) -> None:
        factors = self._factors()
        values: list[Tensor] = list(factors.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in values]
        sensitivity = [self._sensitivity[name] for name in factors]
        uncertainty = [self._uncertainty[name] for name in factors]
        now = [p * gradient for p, gradient in zip(values, gradients, strict=True)]
        torch._foreach_abs_(now)
        torch._foreach_mul_(sensitivity, self.beta1)
        torch._foreach_add_(sensitivity, now, alpha=1 - self.beta1)
        torch._foreach_sub_(now, sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_mul_(uncertainty, self.beta2)
        torch._foreach_add_(uncertainty, now, alpha=1 - self.beta2)

    def _mask_to(self, budget: int) -> None:
        """Set the lambdas of all but the `budget` highest triplets to zero (ties go too)."""
        num_masked = len(self.branches) * self.init_rank - budget
        if num_masked == 0:
            return
        scores = {name: self._triplet_scores(name) for name in self.branches}
        # Not `kthvalue`, which CUDA has in no deterministic form.
        threshold = torch.cat(list(scores.values())).sort().values[num_masked - 1]
        for name, branch in self.branches.items():
            branch.get_parameter("lora_E").masked_fill_((scores[name] <= threshold)[:, None], 0.0)

    def _triplet_scores(self, name: str) -> Tensor:
        """Return the score of every triplet of one projection, (rank,)."""
        A_RI, B_OR, E_R1 = (
            self._sensitivity[f"{name}.{leaf}"] * self._uncertainty[f"{name}.{leaf}"]
            for leaf in ("lora_A", "lora_B", "lora_E")
        )
        return E_R1[:, 0] + (A_RI.mean(dim=1) + B_OR.mean(dim=0))

    def finish(self, num_steps: int) -> None:
        """Check that `after_step` ran once for each of `num_steps` steps.

        Raises:
            RuntimeError: it did not, so ranks were not cut as scheduled.
        """
        if self._num_steps != num_steps:
            raise RuntimeError(
                f"after_step ran {self._num_steps} times in {num_steps} steps; AdaLoRA needs it "
                "after every optimiser step, before gradients are cleared, so this run is void"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the importances, by factor name, and the number of applied steps."""
        state = {f"sensitivity.{name}": tensor for name, tensor in self._sensitivity.items()}
        state |= {f"uncertainty.{name}": tensor for name, tensor in self._uncertainty.items()}
        return state | {"num_steps": torch.tensor(self._num_steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the importances after `inject`.

        Raises:
            ValueError: the state belongs to another method or other projections.
        """
        own = self.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if shapes != expected:
            differing = sorted(dict(shapes.items() ^ expected.items()))
            raise ValueError(
                f"the state does not fit this AdaLoRA: {differing[:6]} differ in name or shape; "
                "resume from a checkpoint of the same method, model and rank"
            )
        for name, tensor in own.items():
            if name == "num_steps":
                self._num_steps = int(state[name])
            else:
                tensor.copy_(state[name])

    def describe(self) -> dict[str, Any]:
        """Return the rank of every projection, which is its number of non-zero lambdas."""
        ranks = {
            n: int(torch.count_nonzero(b.get_parameter("lora_E"))) for n, b in self.branches.items()
        }
        return {
            "rank_pattern": ranks,
            "mean_rank": sum(ranks.values()) / len(ranks) if ranks else 0.0,
            "t_init": self._t_init,
            "t_final": self._t_final,
        }
