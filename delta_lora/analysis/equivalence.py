"""Is Delta-LoRA the LoRA of alpha * (1 + lambda)? Two trainings side by side, in any type.

The updates of W telescope (`delta_lora.methods.delta_lora`, detail 6), so with K = -1 (W follows
from the first step on) and f = 1 + lambda the layer is ``W_0 + f s B A``: the forward pass of a
LoRA of alpha * f. Only the gradients differ: A and B of Delta-LoRA get those of ``s B A``, of the
scaled LoRA those of ``f s B A``, f times as large. An optimiser whose step does not change when all
gradients of a parameter are multiplied by one constant therefore makes the same steps:

* Adam, RMSprop, Adafactor divide by the root of a mean of squares: f cancels as far as their
  epsilon is small against the gradients;
* Lion takes a sign: f cancels exactly;
* SGD moves f times as far. Divided by f, its learning rate gives the same weights again
  (`learning_rate_factor`);
* clipping by the global norm mixes: it acts at other steps, and where other parameters train (a
  head, whose gradients are not multiplied) it turns the common direction.

For K >= 0 let k = K + 1 be the first step that W follows. Until then Delta-LoRA is LoRA of alpha;
from then on ``W_0 - lambda s B_k A_k + f s B A``: the LoRA of alpha * f, continued from (A_k, B_k),
on a base that is shifted by the fixed ``-lambda s B_k A_k``. The twin below is just that; the loss
of its first k steps is multiplied by f, so that the optimiser's state is in one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delta_lora.analysis.similarity import Original, projection_weight, snapshot
from delta_lora.checks import check_choice, check_integer, check_real
from delta_lora.low_rank import LowRankLinear, weight_slice
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.methods.lora import Lora
from delta_lora.protocols import Method

#: loss of a model at a step.
StepLoss = Callable[[nn.Module, int], Tensor]


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., arXiv 2302.06675, program 1): the sign of an interpolated momentum.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: beta1 of the step and beta2 of the momentum.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = momentum.lerp(p.grad, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                momentum.lerp_(p.grad, 1 - beta2)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
    "lion": Lion,
}


@dataclass(frozen=True)
class Divergence:
    """How far two trainings are apart after the same number of steps.

    Attributes:
        max_abs: largest difference of an entry of the merged weights.
        relative: norm of the difference over all projections, divided by that of how far
            Delta-LoRA moved them from W_0.
        moved: that norm.
        num_clipped: steps at which clipping acted on Delta-LoRA.
    """

    max_abs: float
    relative: float
    moved: float
    num_clipped: int


def compare(
    build: Callable[[], nn.Module],
    loss: StepLoss,
    *,
    steps: int,
    rank: int,
    alpha: float,
    update_ratio: float,
    start_step: int,
    optimizer: str,
    learning_rate: float,
    options: dict[str, Any] | None = None,
    learning_rate_factor: float = 1.0,
    max_grad_norm: float | None = None,
    projections: list[str] | None = None,
    head: tuple[str, ...] = (),
    seed: int = 0,
) -> Divergence:
    """Train Delta-LoRA and the LoRA that it should equal; return how far they are apart.

    Args:
        build: returns the same pre-trained model anew, best in float64.
        loss: the training loss of a model at a step, the same for the same step.
        steps: optimiser steps, at least 1.
        rank: r of both.
        alpha: of Delta-LoRA; the twin has alpha * (1 + lambda).
        update_ratio: lambda, at least 0.
        start_step: K, at least -1; W follows at steps above it.
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: of Delta-LoRA, constant.
        options: keywords of the optimiser (``{"eps": 1e-16}``).
        learning_rate_factor: the twin's learning rate divided by Delta-LoRA's.
        max_grad_norm: clips the global norm of all trained gradients; None does not clip.
        projections: as for `Method.inject`.
        head: names of modules that train besides the branches.
        seed: of the factors.

    Returns:
        The divergence of the merged weights of the projections.

    Raises:
        ValueError: a setting is not allowed.
    """
    check_integer("steps", steps, at_least=1)
    check_integer("start_step", start_step, at_least=-1)
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    check_real("learning_rate_factor", learning_rate_factor, above=0)
    make, keywords = OPTIMIZERS[optimizer], options or {}
    where = {"projections": projections, "head": head, "total_steps": steps, "seed": seed}

    model = build()
    originals = snapshot(model, projections, exclude=head)
    delta = DeltaLora(
        rank=rank, alpha=alpha, learning_rate=learning_rate, update_ratio=update_ratio,
        start_step=start_step, form="in_place",
    )  # fmt: skip
    delta.inject(model, **where)  # type: ignore[arg-type]
    optim = make(_trained(model), lr=learning_rate, **keywords)
    num_clipped = _train(model, delta, optim, loss, steps, max_grad_norm)
    with delta.merged(model) as merged:
        ours = _weights(originals, merged)

    model = build()
    lora = Lora(rank=rank, alpha=alpha, learning_rate=learning_rate, dropout=0.0)
    lora.inject(model, **where)  # type: ignore[arg-type]
    optim = make(_trained(model), lr=learning_rate * learning_rate_factor, **keywords)
    _train(model, lora, optim, _of_twin(loss, update_ratio, start_step), steps, max_grad_norm)
    with lora.merged(model) as merged:
        theirs = _weights(originals, merged)

    moved = _norm([a - o.weight for a, o in zip(ours, originals, strict=True)])
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    apart = _norm(differences)
    return Divergence(
        max_abs=max(float(d.abs().max()) for d in differences),
        relative=apart / moved if moved > 0 else apart,
        moved=moved,
        num_clipped=num_clipped,
    )


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _train(
    model: nn.Module,
    method: Method,
    optim: torch.optim.Optimizer,
    loss: StepLoss,
    steps: int,
    max_grad_norm: float | None,
) -> int:
    """Train, with the hooks of the method; return at how many steps clipping acted."""
    trained = _trained(model)
    num_clipped = 0
    for step in range(steps):
        total = loss(model, step)
        optim.zero_grad()
        total.backward()
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
            num_clipped += bool(norm > max_grad_norm)
        method.before_step(step)
        optim.step()
        method.after_step(step)
    return num_clipped


def _of_twin(loss: StepLoss, update_ratio: float, start_step: int) -> StepLoss:
    """Return the loss of the twin, whose layers change before the first step that W follows."""

    def changed(model: nn.Module, step: int) -> Tensor:
        if step == start_step + 1:
            _shift_and_scale(model, update_ratio)
        factor = 1 + update_ratio if step <= start_step else 1.0
        return loss(model, step) * factor

    return changed


@torch.no_grad()
def _shift_and_scale(model: nn.Module, update_ratio: float) -> None:
    """Take ``lambda s B A`` off W and multiply the scaling by 1 + lambda: the layer is the same."""
    for layer in (m for m in model.modules() if isinstance(m, LowRankLinear)):
        for branch in layer.branches:
            shift = update_ratio * branch.delta_weight()
            W_slice = weight_slice(layer.weight, branch.projection)
            W_slice.sub_(shift.T if branch.projection.is_transposed else shift)
            branch.scaling *= 1 + update_ratio


def _weights(originals: list[Original], model: nn.Module) -> list[Tensor]:
    return [projection_weight(model, o.projection).to("cpu", copy=True) for o in originals]


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
