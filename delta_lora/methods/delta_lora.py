"""Delta-LoRA: LoRA whose weight W moves along with the product of the factors.

Zi et al., "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices",
arXiv 2309.02411, Algorithm 1 and equations 3 to 6.

As printed (A is (out, r) and B is (r, in) there), for t = 0 .. T-1: AdamW on A and B; then, if
t > K, ``W(t+1) = W(t) + lambda * (alpha / r) * (A(t+1) B(t+1) - A(t) B(t))``; and
``h = W x + (alpha / r) A B x``.
In our symbols: ``if step > start_step: W += update_ratio * scaling * (B' @ A' - B @ A)`` with
``lora_A``, ``lora_B`` before and after the optimiser step of the same `step`.

Deviations: none. Equation 5 as printed has the sign of its expansion reversed; the products above
are what is computed.

Two forms of the same method:

* ``in_place`` writes W as printed; the suite's tables use it.
* ``closed_form``, the default, never writes it. The updates telescope (detail 6), so with A_k and
  B_k the factors before the first update, W(t) x is
  ``W_0 x + update_ratio * scaling * (B A - B_k A_k) x``. The branch becomes one of rank 2 rank,
  ``(1 + update_ratio) B A - update_ratio B_k A_k``, in which A and B get the gradients that they
  have in ``scaling * B A`` alone, while x gets the whole one. Values and gradients are those of
  ``in_place``; only a forward pass of the base layer is needed, so its weight may be narrow,
  quantised or sharded.

State kept, ``in_place``: per projection an (out, 2 rank) and a (2 rank, in) buffer in the type of
W, together twice the factors (3 MiB for GPT2-Medium at rank 4), on CUDA a copy of the factors too.
They are rewritten in every step, so a checkpoint needs none of them. ``closed_form``: `kept_A` and
`kept_B`, once the factors, which belong to what a run has learned. Both: two counters of 8 bytes.
Once `log_values` was called, ``in_place`` keeps the factors before the first update too; no result
depends on them.

Details:
1. `step` counts applied optimiser steps from 0 and the inequality is strict: the first update of W
   is at step K + 1. K = -1 updates from the first step on, K = 0 leaves one step out.
2. The delta is one product of rank 2 rank, ``[B' B] @ [A'; -A]``, added by one `addmm_` into the
   slice of W: nothing of W's size is allocated.
3. W has no gradient, no optimiser state and no weight decay.
4. Written in place, W must be float32 (or float64). bfloat16 rounds the update away: with lambda 2
   the audit measured a relative error of .92 at learning rate 2e-5 and .37 at 2e-4; the size
   depends on how large W is against the update. Autocast over a float32 W is fine.
5. No dropout in the branch: W may follow the product only because dL/dW = dL/d(BA), which dropout
   breaks. `allow_dropout` is for the ablation `delta_lora_dropout` (Table 5).
6. The updates telescope: with A_k and B_k as they stood before the first update,
   ``W_T - W_0 = update_ratio * scaling * (B_T @ A_T - B_k @ A_k)``.
7. A step that the loss scaler skipped changes neither A, B nor W, and does not count.
8. `update_ratio` 0 leaves W alone, so the run is LoRA without dropout to the bit.
9. In ``closed_form`` the branch is plain LoRA until the first update.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from delta_lora import delta
from delta_lora.checks import OneOf, Range, check_values
from delta_lora.low_rank import LowRankBranch, LowRankLinear, weight_slice
from delta_lora.method_bases import (
    MAX_STEPS,
    Alpha,
    Dropout,
    LearningRate,
    LowRankMethod,
    Rank,
    check_steps,
)
from delta_lora.projections import Projection

logger = logging.getLogger(__name__)

#: lambda and K.
UpdateRatio = Annotated[float, Range(at_least=0, at_most=1e6)]
StartStep = Annotated[int, Range(at_least=-1, at_most=MAX_STEPS)]


class DeltaLora(LowRankMethod):
    """Delta-LoRA on W_Q and W_V.

    Args:
        rank: r, at least 1 and at most the smaller side of a projection.
        alpha: numerator of the scaling alpha / rank, above 0.
        learning_rate: peak learning rate, above 0.
        update_ratio: lambda, at least 0.
        start_step: K, at least -1; W is updated at the steps above it.
        dropout: probability on the input of the branch, in [0, 1); above 0 only for the ablation.
        allow_dropout: says that a dropout above 0 is meant.
        form: ``closed_form``, which leaves W alone, or ``in_place``, the update of W as
            Algorithm 1 prints it, for a W in float32 or float64.
    """

    name = "delta_lora"
    version = 2  # since form has another default

    def __init__(
        self,
        *,
        rank: Rank = 8,
        alpha: Alpha = 16.0,
        learning_rate: LearningRate = 2e-4,
        update_ratio: UpdateRatio = delta.UPDATE_RATIO,
        start_step: StartStep = delta.START_STEP,
        dropout: Dropout = 0.0,
        allow_dropout: bool = False,
        form: Annotated[str, OneOf(delta.FORMS)] = delta.FORM,
    ) -> None:
        check_values(DeltaLora.__init__, locals())
        super().__init__(rank=rank, alpha=alpha, dropout=dropout, learning_rate=learning_rate)
        self.update_ratio = float(update_ratio)
        self.start_step = start_step
        self.form = form
        if not allow_dropout and self.dropout > 0:
            raise ValueError(
                f"dropout={self.dropout:g} is not allowed in Delta-LoRA: with dropout in the "
                "branch the gradient of W is not that of B @ A, which the method rests on; "
                "use dropout=0, or allow_dropout=true with form=in_place for the ablation "
                "(method=delta_lora_dropout)"
            )
        if self.form == "closed_form" and self.dropout > 0:
            raise ValueError(
                f"form=closed_form with dropout={self.dropout:g}: in the closed form the branch "
                "carries the update of W, which no dropout may touch; use form=in_place for the "
                "ablation"
            )
        if self.form == "in_place":
            self.weight_dtypes = delta.WRITABLE
        self._targets: list[_Target] = []
        self._differences = delta.Differences()
        self._closed: list[ClosedFormBranch] = []
        self._num_steps = 0
        self._num_updates = 0
        self._snapshot_step: int | None = None
        self._first: list[delta.Factors] | None = None
        self._is_logged = False

    def plan(self, total_steps: int, seed: int) -> None:
        """Check that there is a step at all."""
        check_steps(self.name, total_steps)

    def make_branch(
        self, projection: Projection, *, weight: Tensor, generator: torch.Generator
    ) -> LowRankBranch:
        """Return the branch of a projection; in closed form one that carries the update of W."""
        if self.form == "in_place" or self.update_ratio == 0:
            return super().make_branch(projection, weight=weight, generator=generator)
        return ClosedFormBranch(
            projection,
            rank=self.rank,
            alpha=self.alpha,
            weight=weight,
            generator=generator,
            update_ratio=self.update_ratio,
        )

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Find what is updated, and say so where no step of the training does it."""
        self._closed = [b for b in self.branches.values() if isinstance(b, ClosedFormBranch)]
        self._targets = [
            _Target(layer, branch)
            for layer in model.modules()
            if isinstance(layer, LowRankLinear) and self.form == "in_place"
            for branch in layer.branches
        ]
        if self.update_ratio > 0:
            # One count for both forms: the entries of W that move, wherever their change is kept.
            moving = [*self._closed, *(target.branch for target in self._targets)]
            self.num_updatable_parameters = sum(b.projection.num_entries for b in moving)
        if delta.never_updates(total_steps, self.update_ratio, self.start_step):
            logger.warning(delta.NEVER_UPDATES, self.start_step, total_steps, total_steps - 2)

    def before_step(self, step: int) -> None:
        """Keep A and B as they are before the optimiser step.

        Raises:
            RuntimeError: W is sharded and would be written in place.
        """
        if self._updates_at(step):
            if self._targets:
                weights = [target.whole_weight() for target in self._targets]
                self._differences.keep([t.branch.factors() for t in self._targets], like=weights)
            if self._num_updates == 0:
                if self._is_logged:
                    self._first = [_copies(target.branch) for target in self._targets]
                for branch in self._closed:
                    branch.keep_factors()
            self._snapshot_step = step

    def after_step(self, step: int) -> None:
        """Add the delta of this step to W if `step` is above `start_step`.

        Raises:
            RuntimeError: the step is out of order, or `before_step` was not called for it.
        """
        if step != self._num_steps:
            raise RuntimeError(
                f"after_step({step}) but {self._num_steps} steps were applied so far; call it once "
                "per applied optimiser step, counted from 0"
            )
        if self._updates_at(step):
            if self._snapshot_step != step:
                raise RuntimeError(
                    f"after_step({step}) without before_step({step}); Delta-LoRA needs A and B "
                    "from before the optimiser step"
                )
            targets = self._targets
            self._differences.add_to(
                [target.slice() for target in targets],
                [target.branch.factors() for target in targets],
                factors=[self.update_ratio * target.branch.scaling for target in targets],
                are_transposed=[target.branch.projection.is_transposed for target in targets],
            )
            self._set_num_updates(self._num_updates + 1)
        self._num_steps += 1

    def _set_num_updates(self, number: int) -> None:
        self._num_updates = number
        for branch in self._closed:
            branch.is_active = number > 0

    def _updates_at(self, step: int) -> bool:
        return delta.updates_at(step, self.update_ratio, self.start_step)

    def finish(self, num_steps: int) -> None:
        """Check that `after_step` ran once for each of `num_steps` steps.

        Raises:
            RuntimeError: it did not, so W is not what Algorithm 1 gives.
        """
        if self._num_steps != num_steps:
            raise RuntimeError(
                f"after_step ran {self._num_steps} times in {num_steps} steps; Delta-LoRA needs it "
                "after every optimiser step (and before_step before it), so this run is void"
            )

    def merged(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Run on W and the branch in one weight within the context.

        A closed form over a W that is neither float32 nor float64 runs as it is: rounded into such
        a W, the change would not be the one that was learned.
        """
        if self._closed and not all(
            layer.weight.dtype in delta.WRITABLE
            for layer in model.modules()
            if isinstance(layer, LowRankLinear)
        ):
            return nullcontext(model)
        return super().merged(model)

    def updated_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return A, B, the head, and what carries the update of W.

        In place: every whole weight of which a slice is updated. Closed form: the kept factors.
        """
        tensors = super().updated_tensors(model)
        if self.update_ratio > 0:
            for name, module in model.named_modules():
                if isinstance(module, LowRankLinear) and self.form == "in_place":
                    tensors[f"{name}.base_layer.weight"] = module.weight
                if isinstance(module, ClosedFormBranch):
                    tensors[f"{name}.kept_A"] = module.kept_A
                    tensors[f"{name}.kept_B"] = module.kept_B
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counters, as int64 scalars, and in place what `log_values` needs."""
        state = {
            "num_steps": torch.tensor(self._num_steps),
            "num_updates": torch.tensor(self._num_updates),
        }
        for index, factors in enumerate(self._first or ()):
            state |= {f"first.{index}.{name}": f for name, f in zip("AB", factors, strict=True)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the counters, and the factors of `log_values` where they were kept.

        Raises:
            ValueError: the state is not one of this method.
        """
        first = [f"first.{i}.{name}" for i in range(len(self._targets)) for name in "AB"]
        if set(state) - set(first) != {"num_steps", "num_updates"}:
            raise ValueError(
                f"the state of Delta-LoRA has num_steps and num_updates, got {sorted(state)}; "
                "resume from a checkpoint of the same method"
            )
        self._num_steps = int(state["num_steps"])
        self._set_num_updates(int(state["num_updates"]))
        self._first = None
        if first and all(name in state for name in first):
            like = [target.branch.lora_A for target in self._targets]
            found = [state[name] for name in first]
            pairs = zip(like, found[::2], found[1::2], strict=True)
            self._first = [(A.to(own), B.to(own)) for own, A, B in pairs]

    @torch.no_grad()
    def log_values(self) -> dict[str, float]:
        """Return the number of updates, and norms over all projections (Frobenius, together).

        ``delta/ba_norm`` is that of ``scaling * B @ A``; ``delta/w_change_norm`` that of what the
        updates added to W, ``update_ratio * scaling * (B @ A - B_k @ A_k)``. Of products only
        matrices of rank x rank are made. From the first call on the factors before the first update
        are kept. Sharded factors have no norms.
        """
        self._is_logged = True
        values = {"delta/num_updates": float(self._num_updates)}
        written = [target.branch for target in self._targets]
        branches = written or self._closed or list(self.branches.values())
        if any(hasattr(branch.lora_A, "device_mesh") for branch in branches):
            return values
        first: Sequence[delta.Factors] = self._first or [(b.kept_A, b.kept_B) for b in self._closed]
        now = [(branch.lora_A, branch.lora_B) for branch in branches]
        scalings = [branch.scaling for branch in branches]
        values["delta/ba_norm"] = delta.norm(now, scalings)
        if self._num_updates == 0 or self.update_ratio == 0:
            values["delta/w_change_norm"] = 0.0
        elif len(first) == len(branches):
            changes = [delta.difference(new, old) for new, old in zip(now, first, strict=True)]
            values["delta/w_change_norm"] = self.update_ratio * delta.norm(changes, scalings)
        return values

    def describe(self) -> dict[str, Any]:
        """Return how often W was updated and at which step first (None if it never was)."""
        first = self.start_step + 1 if self._num_updates else None
        return {"num_weight_updates": self._num_updates, "first_weight_update_step": first}

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set the number of updates, which says whether a closed form has begun."""
        self._set_num_updates(int(facts["num_weight_updates"]))


def _copies(branch: LowRankBranch) -> delta.Factors:
    return branch.lora_A.detach().clone(), branch.lora_B.detach().clone()


class ClosedFormBranch(LowRankBranch):
    """A branch that carries the update of W: ``(1 + lambda) B A - lambda B_k A_k``, scaled.

    Until it is active it is ``scaling * B A``, plain LoRA.

    Args:
        projection: as in `LowRankBranch`.
        rank: as in `LowRankBranch`.
        alpha: as in `LowRankBranch`.
        weight: as in `LowRankBranch`.
        generator: as in `LowRankBranch`.
        update_ratio: lambda, above 0.

    Attributes:
        kept_A: A_k, (rank, in), no gradient.
        kept_B: B_k, (out, rank), no gradient.
        is_active: whether the first update of W has taken place.
    """

    def __init__(
        self,
        projection: Projection,
        *,
        rank: int,
        alpha: float,
        weight: Tensor,
        generator: torch.Generator,
        update_ratio: float,
    ) -> None:
        super().__init__(projection, rank=rank, alpha=alpha, weight=weight, generator=generator)
        self.update_ratio = update_ratio
        # Parameters and not buffers: whoever shards A and B shards these in the same way.
        self.kept_A = nn.Parameter(torch.zeros_like(self.lora_A), requires_grad=False)
        self.kept_B = nn.Parameter(torch.zeros_like(self.lora_B), requires_grad=False)
        self.is_active = False

    @torch.no_grad()
    def keep_factors(self) -> None:
        """Write the factors of the moment to `kept_A` and `kept_B`."""
        self.kept_A.copy_(self.lora_A)
        self.kept_B.copy_(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, or once active ``[A; A_k]`` and ``[(1 + lambda) B, -lambda B_k]``."""
        if not self.is_active:
            return self.lora_A, self.lora_B
        share = 1 / (1 + self.update_ratio)
        now = (
            _ScaledGradient.apply(self.lora_A, share),
            _ScaledGradient.apply(self.lora_B, share),
        )
        return delta.stack(now, (self.kept_A, self.kept_B), update_ratio=self.update_ratio)


class _ScaledGradient(torch.autograd.Function):
    """The identity, with its gradient times a number.

    In ``(1 + lambda) B A x`` the gradients of A and B are 1 + lambda times those in ``B A x``; in
    Delta-LoRA the lambda part belongs to W, which has no gradient, so they are divided by it.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class _Target:
    """One projection that is written in place: its branch and its slice of W."""

    def __init__(self, layer: LowRankLinear, branch: LowRankBranch) -> None:
        self.layer = layer
        self.branch = branch

    def whole_weight(self) -> Tensor:
        """Return W of the layer.

        Raises:
            RuntimeError: it is no longer a whole matrix.
        """
        W = self.layer.weight
        if W.dim() != 2 or hasattr(W, "device_mesh"):
            raise RuntimeError(
                f"the weight of {self.branch.projection.layer} is sharded and cannot be written in "
                "place; use form=closed_form, which never writes it"
            )
        return W

    def slice(self) -> Tensor:
        """Return the slice of W that is written."""
        return weight_slice(self.layer.weight, self.branch.projection)
